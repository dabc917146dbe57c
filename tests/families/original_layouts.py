"""Single files of original layouts, made of tiny diffusers folders or of random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from latentrt.export.single_files.layout import PLACES, STACKED, Layout
from latentrt.export.single_files.names import original_unet_name, original_vae_name
from safetensors.torch import load_file, save_file

from ..export.original_files import open_clip

HEAD, LAYERS, WIDTH = 16, 2, 32


def sdxl_file(folder: Path, file: Path, **marks: torch.Tensor) -> Path:
    """Write the weights of a tiny Stable Diffusion XL or its refiner under their original names, and marks."""
    stored = {
        part: load_file(folder / part / f"{stem}.safetensors")
        for part, stem in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
            ("text_encoder_2", "model"),
        )
        if (folder / part).is_dir()
    }
    tensors: dict[str, Any] = dict(marks)
    for name, tensor in stored["unet"].items():
        original = original_unet_name(name, layers=1)
        if name.startswith("up_blocks.") and ".upsamplers." in name and not _attends(stored["unet"], name):
            original = original.replace(".2.conv.", ".1.conv.")
        tensors[f"model.diffusion_model.{original}"] = tensor
    for name, tensor in stored["vae"].items():
        is_linear = ".attentions.0.to_" in name and name.endswith("weight")
        tensors[f"first_stage_model.{original_vae_name(name, levels=2)}"] = (
            tensor[:, :, None, None] if is_linear else tensor
        )
    texts = {part: _bare(stored[part]) for part in ("text_encoder", "text_encoder_2") if part in stored}
    if "text_encoder" in texts:
        prefix = "conditioner.embedders.0.transformer.text_model."
        tensors |= {prefix + name: tensor for name, tensor in texts["text_encoder"].items()}
    second = f"conditioner.embedders.{len(texts) - 1}."
    projection = texts["text_encoder_2"].pop("text_projection.weight")
    tensors |= {second + name: tensor for name, tensor in open_clip(texts["text_encoder_2"], 0).items()}
    tensors[f"{second}model.text_projection"] = projection.T
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def _attends(unet: dict[str, Any], name: str) -> bool:
    return any(other.startswith(name.split(".upsamplers.")[0] + ".attentions.") for other in unet)


def _bare(text: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("text_model."): tensor for name, tensor in text.items()}


def flux_tensors(prefix: str, *, guided: bool = True, channels: int = 64) -> dict[str, torch.Tensor]:
    """Return random tensors under the names of Black Forest Labs' code, of the shapes that it gives them."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, given: int, wanted: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(wanted, given) / given**0.5
        tensors[f"{name}.bias"] = torch.randn(wanted) / 10

    for name, given in (("time_in", 256), ("vector_in", 32), *([("guidance_in", 256)] if guided else [])):
        linear(f"{name}.in_layer", given, WIDTH)
        linear(f"{name}.out_layer", WIDTH, WIDTH)
    linear("img_in", channels, WIDTH)
    linear("txt_in", 32, WIDTH)
    for layer in range(LAYERS):
        for stream in ("img", "txt"):
            block = f"double_blocks.{layer}.{stream}_"
            linear(f"{block}mod.lin", WIDTH, 6 * WIDTH)
            linear(f"{block}attn.qkv", WIDTH, 3 * WIDTH)
            linear(f"{block}attn.proj", WIDTH, WIDTH)
            linear(f"{block}mlp.0", WIDTH, 4 * WIDTH)
            linear(f"{block}mlp.2", 4 * WIDTH, WIDTH)
            for kind in ("query", "key"):
                tensors[f"{block}attn.norm.{kind}_norm.scale"] = torch.rand(HEAD) + 0.5
        block = f"single_blocks.{layer}."
        linear(f"{block}modulation.lin", WIDTH, 3 * WIDTH)
        linear(f"{block}linear1", WIDTH, 7 * WIDTH)
        linear(f"{block}linear2", 5 * WIDTH, WIDTH)
        for kind in ("query", "key"):
            tensors[f"{block}norm.{kind}_norm.scale"] = torch.rand(HEAD) + 0.5
    linear("final_layer.linear", WIDTH, 64)
    linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def original_tensors(layout: Layout, state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a transformer of diffusers under the names, and in the order, of an original layout."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in sorted(state.items(), key=lambda each: _place(each[0])):
        stack, block, own, names = "", "", name, layout.names
        for new, (old, inside) in layout.blocks.items():
            if name.startswith(f"{new}."):
                block, own = name.removeprefix(f"{new}.").split(".", 1)
                stack, names = f"{old}.{block}.", inside
        begin = next((each for each in names if own.startswith(each)), "")
        original = stack + names.get(begin, "") + own.removeprefix(begin)
        if layout.swapped(own, int(block) if block else None, config):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        known = [tensors[original]] if original in tensors else []
        tensors[original] = torch.cat([*known, tensor])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _place(name: str) -> int:
    """Return where a parameter stands in a tensor of several: query, key and value, in this order."""
    found = STACKED.search(name)
    return PLACES[found[1]] if found else -1
