"""Which files weights are read from, and which numbers: variants, shards, `.bin`, fp8, quantized, damaged."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import CheckpointError, LatentRTError, RequestError, UnsupportedModelError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402

from .loaded import loaded  # noqa: E402

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_sd15_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd15_checkpoint, tmp_path / "checkpoint"))


def plain(folder: Path, part: str) -> Path:
    return folder / part / f"{STEMS[part]}.safetensors"


def add_variant(folder: Path, part: str, variant: str, *, only: bool = False) -> None:
    """Write a variant whose numbers are not those of the plain file."""
    tensors = {name: (tensor * 2).half() for name, tensor in safetensors.load_file(plain(folder, part)).items()}
    safetensors.save_file(tensors, folder / part / f"{STEMS[part]}.{variant}.safetensors", {"format": "pt"})
    if only:
        plain(folder, part).unlink()


def shard(folder: Path, part: str, variant: str = "", factor: float = 3) -> None:
    """Write two shards with an index, with numbers of their own, beside what there is."""
    tensors = {name: tensor * factor for name, tensor in safetensors.load_file(plain(folder, part)).items()}
    names, table = sorted(tensors), {}
    for n in range(2):
        file = f"{STEMS[part]}{variant}-0000{n + 1}-of-00002.safetensors"
        safetensors.save_file({key: tensors[key] for key in names[n::2]}, folder / part / file, {"format": "pt"})
        table |= dict.fromkeys(names[n::2], file)
    index = folder / part / f"{STEMS[part]}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))


def pickled(folder: Path, part: str, *, only: bool = True, old: bool = False) -> None:
    stem = "pytorch_model" if part == "text_encoder" else STEMS[part]
    tensors = {name: tensor * 5 for name, tensor in safetensors.load_file(plain(folder, part)).items()}
    torch.save(tensors, folder / part / f"{stem}.bin", _use_new_zipfile_serialization=not old)
    if only:
        plain(folder, part).unlink()


def every(change: Callable[..., None], **options: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for part in STEMS:
            change(folder, part, **options)

    return apply


def steps(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


LAYOUTS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "variant nobody asked for": (every(add_variant, variant="fp16"), None),
    "every component": (every(add_variant, variant="fp16", only=True), "fp16"),
    "some components": (lambda f: add_variant(f, "unet", "fp16"), "fp16"),
    "mixed with variants only": (
        steps(lambda f: add_variant(f, "vae", "bf16", only=True), lambda f: add_variant(f, "unet", "fp16")),
        "bf16",
    ),
    "non_ema beside ema": (
        steps(lambda f: add_variant(f, "unet", "non_ema"), lambda f: add_variant(f, "unet", "ema")),
        "non_ema",
    ),
    "shards before a whole file": (every(shard), None),
    "shards of a variant": (every(shard, variant=".fp16"), "fp16"),
    "pickles": (every(pickled), None),
    "pickles of an old format": (lambda f: pickled(f, "vae", old=True), None),
    "pickles beside safetensors": (every(pickled, only=False), None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_that_diffusers_takes(folder: Path, layout: str) -> None:
    arrange, variant = LAYOUTS[layout]
    arrange(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, variant=variant, safety_checker=None, torch_dtype=torch.float32
    )
    opened = open_checkpoint(folder, variant=variant)
    for name in STEMS:
        expected, found = getattr(theirs, name).state_dict(), loaded(opened, name).state_dict()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def index_of(table: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return apply


def unsafe(folder: Path) -> None:
    plain(folder, "unet").unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Code()}))


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


REFUSALS: dict[str, tuple[Callable[[Path], None], str | None, str]] = {
    "only a variant": (
        lambda f: add_variant(f, "unet", "fp16", only=True),
        None,
        r"unet has no weights \(diffusion_pytorch_model\.safetensors\), but those of the variant fp16: give --variant",
    ),
    "another variant": (lambda f: add_variant(f, "unet", "bf16"), "fp16", "variant 'fp16': there are bf16"),
    "no variant": (lambda f: None, "fp16", "variant 'fp16': there are none, leave --variant out"),
    "code in a pickle": (unsafe, None, "asks for more than tensors, which would run code: it is not opened"),
    "damaged pickle": (
        lambda f: (plain(f, "unet").unlink(), (f / "unet/diffusion_pytorch_model.bin").write_bytes(b"PK\3\4x"))[0],
        None,
        r"diffusion_pytorch_model\.bin (is damaged|asks for)",
    ),
    "index without a map": (index_of(None), None, "weight_map is None; give the file"),
    "index that leaves the folder": (index_of({"a": "../../x.safetensors"}), None, "which is no file beside it"),
    "index of numbers": (index_of({"a": 7}), None, "weight_map names 7"),
    "missing shard": (
        index_of({"a": "x.safetensors"}),
        None,
        r"x\.safetensors is missing, which diffusion_pytorch",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_weights_that_are_refused(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrange, variant, message = REFUSALS[case]
    monkeypatch.chdir(folder)
    arrange(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(folder, variant=variant)
    assert "\n" not in str(raised.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("variant", ["", "../x", "a.b", "x" * 40])
def test_what_is_no_variant(folder: Path, variant: str) -> None:
    with pytest.raises(RequestError, match="variant is "):
        open_checkpoint(folder, variant=variant)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float64"])
def test_plain_casts_are_read_as_diffusers_reads_them(folder: Path, dtype: str) -> None:
    file = plain(folder, "vae")
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in safetensors.load_file(file).items()}
    safetensors.save_file(cast, file, {"format": "pt"})
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).state_dict()
    ours = loaded(open_checkpoint(folder), "vae").state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8 with scales": ({"conv_in.scale_weight": torch.ones(())}, r"fp8 with scales: it has a tensor 'conv_in\.scale"),
    "fp8 with other scales": ({"conv_in.weight_scale": torch.ones(1)}, "fp8 with scales"),
    "fp8 in blocks": ({"conv_in.weight_scale_inv": torch.ones(1)}, "scale for each block"),
    "nvfp4": ({"conv_in.weight_scale": torch.ones(1), "conv_in.weight_scale_2": torch.ones(1)}, "NVFP4"),
    "bitsandbytes 4": (
        {"conv_in.weight.absmax": torch.ones(1), "conv_in.weight.quant_state.bitsandbytes__nf4": torch.ones(1)},
        "bitsandbytes 4-bit",
    ),
    "bitsandbytes 8": ({"conv_in.SCB": torch.ones(1)}, "bitsandbytes 8-bit"),
    "gptq": ({"conv_in.qweight": torch.ones(1)}, "GPTQ or AWQ"),
    "integers": (
        {"conv_out.bias": torch.ones(4, dtype=torch.int8)},
        r"'conv_out\.bias' is torch\.int8, which is",
    ),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_refused_by_name(folder: Path, kind: str) -> None:
    beside, message = QUANTIZED[kind]
    safetensors.save_file(safetensors.load_file(folder / UNET) | beside, folder / UNET)
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        loaded(open_checkpoint(folder), "unet")
    assert "give the fp16, bf16 or fp32 checkpoint" in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "mid_block.resnets.0.conv1.weight"), ("text_encoder", "embeddings.token_embedding.weight")],
)
def test_damaged_numbers_are_blamed_on_the_weights(folder: Path, part: str, name: str, value: float) -> None:
    file = plain(folder, part)
    tensors = safetensors.load_file(file)
    (name,) = [each for each in tensors if each.endswith(name)]
    tensors[name].view(-1)[11] = value
    safetensors.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LatentRTError, match=rf"{file.name}: tensor '{name}' holds NaN or infinity in 1 of \d+ numbers"):
        loaded(open_checkpoint(folder), part)


ADAPTERS = {
    "mid_block.attentions.0.proj_in.lora_A.default.weight": "a LoRA that is not merged",
    "conv_in.base_layer.weight": "a LoRA that is not merged",
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": "a LoRA that is not merged",
    "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": "a LoRA that is not merged",
    "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": "a LoRA that is not merged",
    "control_model.input_hint_block.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0.weight": "an IP-Adapter",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_refused_by_name(folder: Path, name: str) -> None:
    tensors = safetensors.load_file(folder / UNET)
    safetensors.save_file(tensors | {name: torch.zeros(1)}, folder / UNET)
    safetensors.save_file({name: torch.zeros(1)}, folder / "alone.safetensors")
    for source in (folder, folder / "alone.safetensors"):
        with pytest.raises(UnsupportedModelError, match=rf"holds {ADAPTERS[name]} \(it has a tensor '{name}'"):
            open_checkpoint(source)
