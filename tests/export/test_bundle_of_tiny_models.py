"""What is in an exported bundle: names, types, symbolic sizes, parity, provenance; nothing of this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

NAMES = ["text_encoder", "denoiser", "decoder", "image_encoder", "step"]
CONTRACT = {  # tensor: (type, shape); F stands for the network's type, H and W for the sides of a picture
    "text_encoder": ({"token_ids": ("int64", ("R", 77))}, {"context": ("F", ("R", 77, 64))}),
    "denoiser": (
        {
            "model_input": ("F", ("R", 4, "h", "w")),
            "timestep": ("float32", ("R",)),
            "context": ("F", ("R", "L", 64)),
        },
        {"prediction": ("F", ("R", 4, "h", "w"))},
    ),
    "decoder": (
        {"latents": ("float32", ("B", 4, "h", "w"))},
        {"image": ("uint8", ("B", "H", "W", 3)), "pixels": ("float32", ("B", "H", "W", 3))},
    ),
    "image_encoder": (
        {"image": ("uint8", ("B", "H", "W", 3))},
        {"latents_mean": ("float32", ("B", 4, "h", "w")), "latents_std": ("float32", ("B", 4, "h", "w"))},
    ),
}


@pytest.fixture(
    params=[
        "tiny_sd15_bundle",
        pytest.param("tiny_sd21_bundle", marks=pytest.mark.long),
        pytest.param("tiny_sd15_fp16_bundle", marks=pytest.mark.long),
    ]
)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.getfixturevalue(request.param))


def test_manifest_follows_the_contract(bundle: Bundle) -> None:
    manifest = bundle.manifest
    network = {"fp32": "float32", "fp16": "float16"}[manifest.precision]
    factor = 8 if manifest.source["name"] == "tiny-sd21" else 4
    pixels = {"H": f"{factor}*h", "W": f"{factor}*w"}
    assert [graph.name for graph in manifest.graphs] == NAMES
    assert [graph.stage for graph in manifest.graphs] == ["prompt", "step", "end", "image", "step"]
    for name, sides in CONTRACT.items():
        graph = bundle.graph(name)
        for tensors, wanted in zip((graph.inputs, graph.outputs), sides, strict=True):
            found = {t.name: (t.dtype, t.shape) for t in tensors}
            assert found == {
                name: (network if dtype == "F" else dtype, tuple(pixels.get(size, size) for size in shape))
                for name, (dtype, shape) in wanted.items()
            }
    latent = manifest.latent
    assert (latent.channels, latent.downscale, latent.size_multiple) == (4, factor, factor)
    assert (latent.default_height, latent.default_width) == (8 * factor, 8 * factor)
    assert manifest.default_guidance_scale == 7.5
    assert not bundle.problems()


def test_graphs_say_what_the_manifest_says(bundle: Bundle) -> None:
    for graph in bundle.manifest.graphs:
        model = onnx.load(bundle.file(graph.files[0]))
        onnx.checker.check_model(model)
        assert {entry.domain for entry in model.opset_import} == {""}
        assert model.opset_import[0].version == graph.opset
        for values, tensors in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
            for value, tensor in zip(values, tensors, strict=True):
                kind = value.type.tensor_type
                dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
                dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
                assert (value.name, dims, dtype) == (tensor.name, tensor.shape, np.dtype(tensor.dtype))


def test_each_graph_records_its_parity(bundle: Bundle) -> None:
    bound = {"fp32": 1e-4, "fp16": 2e-2}[bundle.manifest.precision]
    for name in CONTRACT:
        parity = bundle.graph(name).parity
        assert parity is not None
        assert 0 < parity.relative_error < bound
        assert parity.max_abs_error > 0


def test_attention_is_one_node_on_rows_of_tokens(bundle: Bundle) -> None:
    model = onnx.load(bundle.file("denoiser.onnx"))
    operators = [node.op_type for node in model.graph.node]
    # a level on the way down has one residual block, on the way up two; all levels but the deepest attend
    levels = 4 if bundle.manifest.source["name"] == "tiny-sd21" else 2
    residual, transformers = 3 * levels + 2, 3 * (levels - 1) + 1
    assert operators.count("Attention") == 2 * transformers  # to the picture itself and to the text
    assert "Softmax" not in operators
    assert operators.count("InstanceNormalization") == 2 * residual + transformers + 1  # the output's
    for node in model.graph.node:
        if node.op_type == "Attention":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes.pop("scale") > 0  # which libraries would take from sizes that they may not know
            assert attributes == {"q_num_heads": attributes["q_num_heads"], "kv_num_heads": attributes["q_num_heads"]}
            assert len(node.output) == 1


def test_nothing_in_a_graph_names_this_machine(bundle: Bundle, tiny_sd15_checkpoint: Path) -> None:
    here = [str(Path.cwd()), str(tiny_sd15_checkpoint.parent), str(Path(torch.__file__).parent), "site-packages", ".py"]
    for file in bundle.path.iterdir():
        data = file.read_bytes()
        assert not [text for text in here if text.encode() in data], file.name


def test_provenance(bundle: Bundle) -> None:
    assert bundle.manifest.source["name"] in ("tiny-sd15", "tiny-sd21")
    assert sorted(bundle.manifest.source["files"]) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert bundle.manifest.tools["torch"] == torch.__version__


@pytest.mark.long
def test_scheduler_config_is_the_checkpoints_own(tiny_sd21_bundle: Path) -> None:
    scheduler = Bundle.open(tiny_sd21_bundle).manifest.scheduler
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert scheduler["prediction_type"] == "v_prediction"


def test_decoded_picture_equals_diffusers(tiny_sd15_checkpoint: Path, tiny_sd15_bundle: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(tiny_sd15_checkpoint / "vae"))
    processor = VaeImageProcessor()
    session = ort.InferenceSession(str(tiny_sd15_bundle / "decoder.onnx"))
    latents = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    image, pixels = session.run(None, {"latents": latents.numpy()})
    np.testing.assert_allclose(pixels, processor.postprocess(decoded, output_type="np"), atol=2e-6)
    pictures = np.stack([np.asarray(p) for p in processor.postprocess(decoded, output_type="pil")])
    assert np.abs(image.astype(int) - pictures).max() <= 1
    assert (image == np.round(pixels * 255)).all()


def test_encoded_picture_equals_diffusers(tiny_sd15_checkpoint: Path, tiny_sd15_bundle: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from PIL import Image

    vae = AutoencoderKL.from_pretrained(str(tiny_sd15_checkpoint / "vae"))
    pixels = np.random.default_rng(4).integers(0, 256, (1, 24, 16, 3), np.uint8)
    session = ort.InferenceSession(str(tiny_sd15_bundle / "image_encoder.onnx"))
    mean, std = session.run(None, {"image": pixels})
    with torch.no_grad():
        moments = vae.encode(VaeImageProcessor(vae_scale_factor=4).preprocess(Image.fromarray(pixels[0]))).latent_dist
    np.testing.assert_allclose(mean, moments.mean * vae.config.scaling_factor, atol=1e-5)
    np.testing.assert_allclose(std, moments.std * vae.config.scaling_factor, atol=1e-5)


@pytest.mark.long
def test_timestep_embedding_is_computed_in_float32(tiny_sd15_fp16_bundle: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(tiny_sd15_fp16_bundle / "denoiser.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    waves = [node.output[0] for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    assert len(waves) == 2
    assert {types[name] for name in waves} == {onnx.TensorProto.FLOAT}
