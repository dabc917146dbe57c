"""Convolutions in half the products, against PyTorch's in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import RequestError
from latentrt.export import export_checkpoint
from latentrt.runtime.cli import run
from onnx import ModelProto, TensorProto, helper, numpy_helper

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from latentrt.export.passes import winograd  # noqa: E402
from latentrt.export.passes.winograd import fewer_products, output_pixels  # noqa: E402

RANDOM = np.random.default_rng(0)
CHANNELS, OUT, WIDTH = 16, 24, 7
LARGE = {"weight": 10**6}


@pytest.fixture(autouse=True)
def every_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take convolutions that are small enough for a test."""
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)


def model_of(*, weight: Any = None, bias: bool = True, group: int = 1, **attributes: Any) -> ModelProto:
    """Return a model of one convolution, which is over 3×3 unless said otherwise."""
    shape = (OUT, CHANNELS // group, 3, 3) if weight is None else weight
    weights = [numpy_helper.from_array(RANDOM.standard_normal(shape).astype(np.float32), "weight")]
    if bias:
        weights.append(numpy_helper.from_array(RANDOM.standard_normal(OUT).astype(np.float32), "bias"))
    attributes = {"pads": [1, 1, 1, 1], "group": group, **attributes}
    node = helper.make_node("Conv", ["x", *(each.name for each in weights)], ["y"], **attributes)
    border = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", CHANNELS, "h", "w"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUT, "h_out", "w_out"])]
    graph = helper.make_graph([node], "one", border, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def rewritten(model: ModelProto, pixels: dict[str, int] = LARGE) -> tuple[int, Any]:
    read = ir.from_proto(model)
    return fewer_products(read, pixels), read


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_same_convolution_for_every_height(bias: bool) -> None:
    model = model_of(bias=bias)
    weight, *more = (torch.from_numpy(numpy_helper.to_array(each).copy()).double() for each in model.graph.initializer)
    count, found = rewritten(model)
    assert count == 1
    session = ort.InferenceSession(ir.to_proto(found).SerializeToString(), providers=["CPUExecutionProvider"])
    for height in range(1, 14):
        picture = RANDOM.standard_normal((2, CHANNELS, height, WIDTH)).astype(np.float32)
        wanted = torch.nn.functional.conv2d(torch.from_numpy(picture).double(), weight, *more, padding=1).numpy()
        (rows,) = session.run(None, {"x": picture})
        assert rows.shape == wanted.shape
        np.testing.assert_allclose(rows, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_products_are_half_as_many_and_weights_twice() -> None:
    _, found = rewritten(model_of())
    kernels = [node.inputs[1].const_value for node in found.graph if node.op_type == "Conv"]
    assert [tuple(kernel.shape.numpy()) for kernel in kernels] == [(OUT, CHANNELS, 1, 3)] * 6
    assert "weight" not in found.graph.initializers and "bias" in found.graph.initializers
    per_pixel = sum(kernel.size for kernel in kernels) / winograd.ROWS  # each runs on every fourth row
    assert per_pixel == OUT * CHANNELS * 9 / 2


@pytest.mark.parametrize(
    "other",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2]},
        {"pads": [0, 0, 1, 1]},
        {"group": 2},
        {"weight": (OUT, CHANNELS, 1, 1), "pads": [0, 0, 0, 0]},
        {"weight": (OUT, CHANNELS, 5, 5)},
    ],
)
def test_other_convolutions_stay_as_they_are(other: dict[str, Any]) -> None:
    model = model_of(**other)
    count, found = rewritten(model)
    assert count == 0 and [node.op_type for node in found.graph] == ["Conv"]


def test_weights_in_half_precision_or_from_elsewhere_stay_as_they_are() -> None:
    half = model_of(bias=False)
    tensor = half.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), "weight"))
    half.graph.input[0].type.tensor_type.elem_type = half.graph.output[0].type.tensor_type.elem_type = 10
    given = model_of(bias=False)
    shape = list(given.graph.initializer[0].dims)
    del given.graph.initializer[:]
    given.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, shape))
    for model in (half, given):
        assert rewritten(model)[0] == 0


def test_few_pixels_or_few_channels_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    least = winograd.LEAST_PIXELS
    assert [rewritten(model_of(), {"weight": count})[0] for count in (least, least - 1)] == [1, 0]
    assert rewritten(model_of(), {})[0] == 0
    for channels, wanted in ((CHANNELS, 1), (CHANNELS + 1, 0), (OUT + 1, 0)):
        monkeypatch.setattr(winograd, "LEAST_CHANNELS", channels)
        assert rewritten(model_of())[0] == wanted


@pytest.mark.parametrize(("stride", "taken"), [(2, 1), (1, 2)])
def test_a_weight_may_be_read_twice(stride: int, taken: int) -> None:
    model = model_of(bias=False)
    twice = helper.make_node("Conv", ["y_2", "weight"], ["y"], pads=[1, 1, 1, 1], strides=[stride, stride])
    model.graph.node[0].output[0] = "y_1"
    first = helper.make_node("Slice", ["y_1", "zero", "channels", "one"], ["y_2"])
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in (("zero", 0), ("channels", CHANNELS), ("one", 1))
    )
    model.graph.node.extend([first, twice])
    before = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    count, found = rewritten(model)
    assert count == taken and ("weight" in found.graph.initializers) == (taken == 1)
    after = ort.InferenceSession(ir.to_proto(found).SerializeToString(), providers=["CPUExecutionProvider"])
    picture = RANDOM.standard_normal((1, CHANNELS, 9, 9)).astype(np.float32)
    (wanted,), (rows,) = (session.run(None, {"x": picture}) for session in (before, after))
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())


def test_pixels_are_those_of_the_last_run() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Conv2d(1, 1, 3, stride=2, padding=1))
    with output_pixels(module) as pixels:
        for side in (4, 8):
            module(torch.zeros(1, 1, side, 2 * side))
    assert pixels == {"0.weight": 128, "1.weight": 32}
    module(torch.zeros(1, 1, 2, 2))
    assert pixels == {"0.weight": 128, "1.weight": 32}


def test_points_round_less_than_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16: rows, taps and products are rounded, as OpenVINO stores them."""
    assert 0.55 < _error_in_bf16(5 / 8, 3 / 2, monkeypatch) / _error_in_bf16(1.0, 2.0, monkeypatch) < 0.75


def _error_in_bf16(near: float, far: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the relative error of the four rows, with points 0, ±near, ±far and infinity."""
    monkeypatch.setattr(winograd, "NEAR", near)
    monkeypatch.setattr(winograd, "FAR", far)
    monkeypatch.setattr(winograd, "POINTS", (0.0, near, -near, far, -far))
    random = np.random.default_rng(1)
    six = random.standard_normal((6, 64, 256)).astype(np.float32)
    weight = random.standard_normal((32, 256, 3, 1)).astype(np.float32)
    wanted = [sum(six[row + tap] @ weight[:, :, tap, 0].T for tap in range(3)) for row in range(4)]

    class Numbers:
        """Computes what nodes would."""

        def op(self, kind: str, inputs: Any) -> Any:
            return {"Add": np.add, "Sub": np.subtract}[kind](*inputs)

        def times(self, value: Any, factor: float) -> Any:
            return value * np.float32(factor)

    write: Any = Numbers()
    sums = [_rounded(each) for each in winograd._sums_of_rows(_rounded(six), write)]  # type: ignore[arg-type]
    taps = [_rounded(each.numpy()) for each in winograd._sums_of_taps(ir.tensor(weight))]
    products: Any = [_rounded(s @ t[:, :, 0, 0].T) for s, t in zip(sums, taps, strict=True)]
    rows = [_rounded(each) for each in winograd._four_rows(products, write)]
    return float(np.linalg.norm(np.subtract(rows, wanted)) / np.linalg.norm(wanted))


def _rounded(numbers: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).bfloat16().float().numpy()


def test_an_export_is_in_half_the_products_or_says_that_nothing_is(
    tiny_sd15_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RequestError, match=r"winograd is for processors, and precision is 'fp16': export in fp32"):
        export_checkpoint(tiny_sd15_checkpoint, tmp_path / "half", precision="fp16", winograd=True)
    assert not (tmp_path / "half").exists()
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 10**9)
    export_checkpoint(tiny_sd15_checkpoint, tmp_path / "as_it_is", winograd=True)
    assert "winograd changed nothing" in caplog.text
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 1)
    path = export_checkpoint(tiny_sd15_checkpoint, tmp_path / "bundle", winograd=True)
    counts = {graph.name: graph.winograd for graph in Bundle.open(path).manifest.graphs}
    assert counts["text_encoder"] == counts["step"] == 0 and min(counts["denoiser"], counts["decoder"]) > 3
    assert run(["inspect", str(path)]) == 0
    assert f"    {counts['denoiser']} convolutions in half the products" in capsys.readouterr().out
