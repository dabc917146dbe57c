"""Quantized weights, recognized by the tensors that lie beside them, and refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...engines.errors import UnsupportedModelError

SIGNS = (
    (".weight_scale_2", "NVFP4"),
    (".comfy_quant", "a layout of ComfyUI"),
    (".quant_state.", "bitsandbytes 4-bit"),
    (".absmax", "bitsandbytes 4-bit"),
    (".SCB", "bitsandbytes 8-bit"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_scale_inv", "fp8 with a scale for each block"),
    (".scale_weight", "fp8 with scales"),
    (".weight_scale", "fp8 with scales"),
    ("scaled_fp8", "fp8 with scales"),
    ("._scale", "quanto"),
    (".W_q", "HQQ"),
)
"""Parts of tensor names, the more telling first, and the format that writes them."""
REMEDY = "the weights are not in it as plain floating-point numbers; give the fp16, bf16 or fp32 checkpoint"


def refuse_quantized(file: Path, names: Iterable[str]) -> None:
    """Raise `UnsupportedModelError` when the names of a file's tensors are those of quantized weights.

    Weights that were only cast to fp8, without scales, are plain: they pass.
    """
    names = list(names)
    for sign, method in SIGNS:
        for name in names:
            if sign in name and (sign.endswith(".") or name.endswith(sign) or sign == ".absmax"):
                raise UnsupportedModelError(f"{file} is quantized ({method}: it has a tensor {name!r}): {REMEDY}")
