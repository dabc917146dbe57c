"""T5's encoder as the exporter prepares it, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from latentrt.export.networks.t5 import hidden_states, prepare  # noqa: E402

from .tiny_flux import t5  # noqa: E402

HALF_LIMIT = 65504


@torch.no_grad()
def both(dtype: Any, scale: float = 1.0) -> tuple[Any, Any, float]:
    """Return what transformers gives in float32, what is exported in a type, and the largest sum over layers."""
    torch.manual_seed(0)
    encoder, ids = t5(90), torch.randint(0, 90, (2, 300))
    for block in encoder.encoder.block:
        block.layer[-1].DenseReluDense.wi_1.weight.mul_(scale)
        block.layer[-1].DenseReluDense.wo.weight.mul_(scale)
    largest = []
    hook = encoder.encoder.final_layer_norm.register_forward_hook(lambda _, given, __: largest.append(given[0]))
    wanted = encoder(ids)[0]
    hook.remove()
    return wanted, hidden_states(prepare(encoder).to(dtype), ids), float(largest[0].abs().max())


def test_hidden_states_are_those_of_transformers() -> None:
    wanted, found, _ = both(torch.float32)
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "bound"), [("float16", 1e-2), ("bfloat16", 1e-1)])
def test_sums_beyond_half_precision_keep_their_numbers(name: str, bound: float) -> None:
    dtype = getattr(torch, name)
    wanted, found, largest = both(dtype, scale=1e3)
    assert largest > 2 * HALF_LIMIT and found.dtype == dtype
    assert (found.float() - wanted).norm() / wanted.norm() < bound
