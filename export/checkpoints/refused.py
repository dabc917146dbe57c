"""Weights that cannot be exported, recognized by the names of their tensors, and refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection
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

LEAVE_OUT = "a bundle has none; give the checkpoint without it"
ADAPTERS = (
    (
        re.compile(r"[._]lora[._](A|B|up|down)\.|\.base_layer\.|\.(hada|lokr)_w[12]|\.dora_scale$"),
        "a LoRA that is not merged",
        "merge it into its checkpoint first, and give that",
    ),
    (re.compile(r"^control_model\.|^controlnet_"), "a ControlNet", LEAVE_OUT),
    (re.compile(r"^ip_adapter\.|\.to_[kv]_ip\."), "an IP-Adapter", LEAVE_OUT),
)
"""How the names of an adapter's tensors are recognized, alone or beside a checkpoint's, what it is, and what to do."""


def refuse_weights(file: Path, names: Collection[str]) -> None:
    """Raise `UnsupportedModelError` when the names of a file's tensors are those of quantized weights or of an adapter.

    Weights that were only cast to fp8, without scales, are plain: they pass.
    """
    for sign, method in SIGNS:
        for name in names:
            if sign in name and (sign.endswith(".") or name.endswith(sign) or sign == ".absmax"):
                raise UnsupportedModelError(f"{file} is quantized ({method}: it has a tensor {name!r}): {REMEDY}")
    for pattern, adapter, remedy in ADAPTERS:
        for name in names:
            if pattern.search(name):
                raise UnsupportedModelError(f"{file} holds {adapter} (it has a tensor {name!r}): {remedy}")
