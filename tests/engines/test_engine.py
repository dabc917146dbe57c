from __future__ import annotations

import pytest
from latentrt.engines.bundle import GraphInfo, TensorInfo
from latentrt.engines.engine import check_binding, shape_of, solve_sizes
from latentrt.engines.errors import ShapeError
from latentrt.engines.host import HostDevice

LATENTS = TensorInfo(name="latents", dtype="float32", shape=("B", 4, "8*h", "w"))
TABLE = TensorInfo(name="table", dtype="float32", shape=("B", "S+1"))
IMAGE = TensorInfo(name="image", dtype="uint8", shape=("B", "64*h", "8*w", 3))
GRAPH = GraphInfo(name="g", stage="end", files=("g.onnx",), inputs=(LATENTS, TABLE), outputs=(IMAGE,), opset=20)


def test_symbols_are_solved_and_applied() -> None:
    sizes = solve_sizes({"latents": LATENTS, "table": TABLE}, {"latents": (2, 4, 16, 5), "table": (2, 8)})
    assert sizes == {"B": 2, "h": 2, "w": 5, "S": 7}
    assert shape_of(IMAGE, sizes) == (2, 128, 40, 3)


@pytest.mark.parametrize(
    "shapes",
    [
        {"latents": (2, 4, 16)},
        {"latents": (2, 3, 16, 5)},
        {"latents": (2, 4, 15, 5)},
        {"latents": (2, 4, 16, 5), "table": (3, 8)},
    ],
    ids=["rank", "fixed size", "multiple", "contradiction"],
)
def test_a_shape_that_does_not_fit_is_named(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError, match="has shape"):
        solve_sizes({"latents": LATENTS, "table": TABLE}, shapes)


def test_binding_checks_names_and_types() -> None:
    device = HostDevice()
    latents, table = device.empty((1, 4, 8, 8), "float32"), device.empty((1, 3), "float32")
    assert check_binding(GRAPH, {"latents": latents, "table": table})["h"] == 1
    with pytest.raises(ShapeError, match="no tensor for its input 'table'"):
        check_binding(GRAPH, {"latents": latents})
    with pytest.raises(ShapeError, match="no input or output 'other'"):
        check_binding(GRAPH, {"latents": latents, "table": table, "other": table})
    with pytest.raises(ShapeError, match="is float32, the tensor is float16"):
        check_binding(GRAPH, {"latents": latents, "table": device.empty((1, 3), "float16")})
