"""The step graph on ONNX Runtime against the table applied in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from latentrt.export.step_graph import step_graph
from latentrt.runtime.loop.pack import pack
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sampling.noise import Generator
from latentrt.runtime.sampling.step_table import StepTable

CHANNELS, HEIGHT, WIDTH = 4, 6, 5
IMAGE = (CHANNELS, HEIGHT, WIDTH)
CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": False,
    "steps_offset": 1,
}
STATE = ("latents", "history", "model_input", "timestep", "row")


def session(precision: str, options: Any = ()) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    graph = step_graph(precision, CHANNELS, options).SerializeToString()  # type: ignore[arg-type]
    return onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def fp32() -> onnxruntime.InferenceSession:
    return session("fp32")


@pytest.fixture(scope="module")
def fp16() -> onnxruntime.InferenceSession:
    return session("fp16")


def denoiser(model_input: Any, timestep: Any, branch: Any) -> Any:
    return np.tanh(0.8 * model_input + np.sin(timestep / 200) + 0.3 * branch)


def branch_weights(guidance: Any, branches: int) -> list[float]:
    """Return the weights of classifier-free guidance, and with three branches of (text, image) guidance.

    The second is Brooks et al. 2023, equation 3.
    """
    if branches == 1:
        return [1.0]
    text, image = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    return [1 - text, text] if branches == 2 else [1 - image, image - text, text]


class Batch:
    """Images that differ in sampler, number of steps, guidance and noise, run by the graph and one by one in numpy."""

    options: tuple[Any, ...] = ()
    network = staticmethod(denoiser)

    def __init__(self, tables: list[StepTable], scales: list[Any], branches: int, mask: bool) -> None:
        self.tables, self.scales, self.branches = tables, scales, branches
        count = len(tables)
        self.start = np.stack([Generator(seed).randn(IMAGE) * t.init_noise_sigma for seed, t in enumerate(tables)])
        self.original = Generator(77).randn((count, 2, *IMAGE))
        self.mask = np.ones((count, 1, HEIGHT, WIDTH), bool)
        if mask:
            self.mask = Generator(78).randn(self.mask.shape) > 0
        self.noise = Generator(79).randn((count, max(1, *(t.draw_count for t in tables)), *IMAGE))
        self.packed = pack(tables, [branch_weights(scale, branches) for scale in scales], self.options)

    def mixed(self, outputs: list[Any], mix: list[float]) -> Any:
        return sum(weight * output for weight, output in zip(mix, outputs, strict=True))

    def run_graph(self, step: onnxruntime.InferenceSession, steps: int, dtype: Any = np.float32) -> Any:
        rows, image_of_row = self.packed["row"], self.packed["image_of_row"]
        branch = np.repeat(np.arange(self.branches), len(self.tables))[:, None, None, None]
        slots = self.packed["weights"].shape[1] - 1
        state: dict[str, Any] = {
            "latents": self.start,
            "history": np.zeros((len(self.tables), slots, *IMAGE), np.float32),
            "model_input": (self.packed["input_scales"][rows] * self.start).astype(dtype)[image_of_row],
            "timestep": self.packed["timesteps"][rows][image_of_row],
            "row": rows,
        }
        constants = {name: value for name, value in self.packed.items() if name != "row"}
        constants |= {"noise": self.noise, "original": self.original, "mask": self.mask}
        for _ in range(steps):
            network = state["model_input"].astype(np.float32), state["timestep"][:, None, None, None], branch
            feeds = {**constants, "prediction": self.network(*network).astype(dtype)}
            feeds |= {name: state[name] for name in ("latents", "history", "row")}
            state = dict(zip(STATE, step.run([f"next_{name}" for name in STATE], feeds), strict=True))
        assert state["model_input"].dtype == dtype
        return state["latents"]

    def run_numpy(self) -> Any:
        results = []
        for b, (table, scale) in enumerate(zip(self.tables, self.scales, strict=True)):
            x, history, drawn = self.start[b].astype(np.float64), [np.zeros(IMAGE)] * table.history, 0
            mix = branch_weights(scale, self.branches)
            for i in range(len(table)):
                scaled = table.input_scales[i] * x
                outputs = [self.network(scaled, table.timesteps[i], g) for g in range(len(mix))]
                prediction = self.mixed(outputs, mix)
                x, history = table.apply(i, x, prediction, history, self.noise[b, drawn])
                drawn = min(drawn + int(table.draws[i]), self.noise.shape[1] - 1)
                given = table.original[i + 1, 0] * self.original[b, 0] + table.original[i + 1, 1] * self.original[b, 1]
                x = np.where(self.mask[b], x, given)
            results.append(x)
        return np.stack(results)


def table(sampler: str, steps: int, **arguments: Any) -> StepTable:
    return step_table(CONFIG, steps, sampler=sampler, **arguments)


def relative_error(latents: Any, reference: Any) -> float:
    return float(max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(latents, reference, strict=True)))


KINDS = (
    "ddim",
    "DDIMScheduler",
    "ddpm",
    "pndm",
    "lcm",
    "euler_a",
    "heun",
    "lms",
    "dpm_2_a",
    "dpmpp_2m",
    "dpmpp_3m_sde",
)
KINDS = (*KINDS, "dpmpp_3s", "unipc", "deis_karras")


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("sampler", KINDS)
def test_one_image(fp32: onnxruntime.InferenceSession, sampler: str, branches: int) -> None:
    batch = Batch([table(sampler, 12)], [(7.5, 1.4) if branches == 3 else 7.5], branches, mask=False)
    assert relative_error(batch.run_graph(fp32, len(batch.tables[0])), batch.run_numpy()) < 2e-5


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_ragged_batch(fp32: onnxruntime.InferenceSession, branches: int, mask: bool) -> None:
    tables = [
        table("ddim", 7),
        table("pndm", 11),
        table("euler_a", 1),
        table("dpm_2_a", 6, strength=0.5),
        table("DDIMScheduler", 9, eta=0.7),
        table("unipc_karras", 10, strength=0.8),
    ]
    batch = Batch(tables, [1.0, 7.5, 3.0, 12.0, 2.5, 0.0], branches, mask)
    longest = max(len(t) for t in tables)
    latents = batch.run_graph(fp32, longest)
    assert relative_error(latents, batch.run_numpy()) < 5e-5
    assert np.array_equal(batch.run_graph(fp32, longest + 3), latents)  # finished images hold their latents


def test_a_picture_does_not_depend_on_its_neighbours(fp32: onnxruntime.InferenceSession) -> None:
    tables, scales = [table("dpmpp_2m", 8), table("heun", 8)], [7.5, 2.0]
    together, alone = Batch(tables, scales, 2, mask=False), Batch(tables[:1], scales[:1], 2, mask=False)
    assert np.array_equal(together.run_graph(fp32, 15)[0], alone.run_graph(fp32, 15)[0])


def test_repainting_returns_the_known_latents_outside(fp32: onnxruntime.InferenceSession) -> None:
    batch = Batch([table("dpmpp_2m", 5)], [7.5], 2, mask=True)
    latents = batch.run_graph(fp32, 5)
    outside = np.broadcast_to(~batch.mask, latents.shape)
    assert np.array_equal(latents[outside], batch.original[:, 0][outside])


def test_unused_known_latents_may_hold_anything(fp32: onnxruntime.InferenceSession) -> None:
    batch = Batch([table("euler", 4)], [7.5], 2, mask=False)
    expected = batch.run_graph(fp32, 4)
    batch.original[:] = np.nan
    assert np.array_equal(batch.run_graph(fp32, 4), expected)


def test_half_precision_touches_only_the_network(fp16: onnxruntime.InferenceSession) -> None:
    batch = Batch([table("dpmpp_2m", 12), table("unipc", 9)], [7.5, 3.0], 2, mask=False)
    error = relative_error(batch.run_graph(fp16, 12, np.float16), batch.run_numpy())
    assert 1e-5 < error < 2e-2  # the network's own rounding, amplified by guidance


def test_the_graph_is_small_and_carries_no_paths() -> None:
    model = step_graph("fp16", CHANNELS)
    assert len(model.graph.node) <= 30
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert "MatMul" not in {node.op_type for node in model.graph.node}  # TF32 would make latents coarse
