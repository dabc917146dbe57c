"""Engines that give other numbers than they should are refused before they are used, and right ones checked once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from latentrt.engines import selfcheck
from latentrt.engines.bundle import Bundle, Parity, ReferenceInfo, TensorInfo, write_manifest
from latentrt.engines.bundle.references import read_reference, write_reference
from latentrt.engines.bundle.runs import random_inputs, runs
from latentrt.engines.cache import SIDECAR, EngineCache
from latentrt.engines.device import Array
from latentrt.engines.engine import shape_of, solve_sizes
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.files import sha256_of
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.selfcheck import PASSED, relative_error
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.engines.tensorrt.plan import profile_for
from latentrt.export.step_rows import step_rows
from onnx import helper

from . import simulated_backends
from .simulated_backends import onnxruntime_backend, tensorrt_backend
from .simulated_cuda import SimulatedDriver
from .small_bundles import graph_info, manifest_of, proto, random, write_bundle

KERNEL = random(4, 4, 3, 3, seed=1) / 6
NATIVE = 10

Spoil = Callable[[Array], Array]


def convolved(x: Array) -> Array:
    """Return the convolution of [R, 4, h, w] with `KERNEL`, by its definition."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))).astype(np.float64)
    height, width = x.shape[2:]
    shifted = [
        np.einsum("oc,rchw->rohw", KERNEL[:, :, i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    ]
    return np.asarray(sum(shifted)).astype(np.float32)


def convolution_bundle(folder: Path, *, recorded: bool = True, seed: int = 0, **changes: Any) -> Bundle:
    """Write a bundle of one network, a convolution, with rows at 10x10 cells."""
    folder.mkdir(parents=True)
    x, y = (TensorInfo(name=name, dtype="float32", shape=("R", 4, "h", "w")) for name in "xy")
    rows = random(2, 4, NATIVE, NATIVE, seed=seed)
    reference = write_reference(folder, "net-native", [x, y], {"x": rows, "y": convolved(rows)})
    info = graph_info("net", [x], [y]).model_copy(
        update={
            "parity": Parity(max_abs_error=0, relative_error=0),
            "references": (reference,) if recorded else (),
            **changes,
        }
    )
    node = helper.make_node("Conv", ["x", "kernel"], ["y"], pads=[1, 1, 1, 1])
    return write_bundle(folder, (info, proto(info, [node], {"kernel": KERNEL})))


@pytest.fixture
def net(tmp_path: Path) -> Bundle:
    return convolution_bundle(tmp_path / "net")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


class Spoiled:
    """A session of ONNX Runtime whose outputs are changed on their way."""

    def __init__(self, session: Any, spoil: Spoil) -> None:
        self._session, self._spoil = session, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        outputs: list[Array] = self._session.run(names, feeds)
        return [self._spoil(output.copy()) if output.dtype.kind == "f" else output for output in outputs]


def spoil_simulated(patch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    real = simulated_backends.InferenceSession
    patch.setattr(simulated_backends, "InferenceSession", lambda *a, **k: Spoiled(real(*a, **k), spoil))


def row(number: int, factor: float, batch: int | None = None) -> Spoil:
    """Return what makes one row wrong, at every batch or at one."""

    def spoil(values: Array) -> Array:
        if batch is None or len(values) == batch:
            values[number] *= factor
        return values

    return spoil


def forbid_checks(patch: pytest.MonkeyPatch) -> None:
    def check(*_: Any) -> float:
        raise AssertionError("it was checked again")

    patch.setattr(selfcheck, "_check", check)


def dynamic_plan(backend: tensorrt.TensorRt, bundle: Bundle, side: int = NATIVE) -> dict[str, tuple[int, ...]]:
    graph = bundle.graph("net")
    low, high = ({"x": (rows, 4, side, side)} for rows in (1, 4))
    backend.planner.build(bundle, graph, profile_for(graph, low, high))
    return {"x": (2, 4, side, side)}


@pytest.mark.parametrize("side", [NATIVE, 20])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (row(0, 1.1, batch=1), r"0\.(0[5-9]|1)\d*"),
        (row(3, 1.1, batch=4), r"0\.(0[2-9]|1)\d*"),
        (row(0, np.nan), "nan"),
        (row(0, np.inf, batch=4), "nan"),
    ],
    ids=["batch 1", "the last row of the largest batch", "nan", "infinite at the largest batch"],
)
def test_a_plan_that_is_wrong_at_one_batch_is_refused(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, spoil: Spoil, error: str, side: int
) -> None:
    driver = SimulatedDriver()
    backend = tensorrt_backend(monkeypatch, cache, driver)
    shapes, before = dynamic_plan(backend, net, side), len(driver._memory)
    spoil_simulated(monkeypatch, spoil)
    for _ in range(2):  # it is not trusted the next time either
        with pytest.raises(EngineError) as refused:
            backend.open(net, net.graph("net"), shapes)
        assert "\n" not in str(refused.value)
        assert refused.match(
            rf"engine net of backend tensorrt is wrong and was not used: y .* R=\d h={side} w={side}, "
            rf"relative error {error} where 0\.001 is allowed; use another backend, version .* and report it"
        )
    assert len(driver._memory) == before and not backend._loaded


@pytest.mark.parametrize("side", [NATIVE, 20])
def test_a_right_plan_is_checked_once_for_each_gpu(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    options = {"hardware": "same_compute_capability"}
    first = tensorrt_backend(monkeypatch, cache, **options)
    shapes = dynamic_plan(first, net, side)
    first.open(net, net.graph("net"), shapes).close()
    (noted,) = json.loads(next(cache.root.glob(f"net-*/{PASSED}")).read_text()).values()
    assert noted["graph"] == "net" and noted["relative_error"] < 1e-6 and noted["bound"] == 1e-3
    with monkeypatch.context() as patch:
        forbid_checks(patch)
        again = tensorrt_backend(patch, cache, **options)
        engine = again.open(net, net.graph("net"), shapes)
        again.open(net, net.graph("net"), shapes).close()
        engine.close()
    other = tensorrt_backend(monkeypatch, cache, **options)
    monkeypatch.setattr(other.device, "name", "Another GPU")
    forbid_checks(monkeypatch)
    with pytest.raises(AssertionError, match="checked again"):
        other.open(net, net.graph("net"), shapes)


def other_rows(folder: Path, patch: pytest.MonkeyPatch) -> Bundle:
    return convolution_bundle(folder, seed=5)


def stricter_bound(folder: Path, patch: pytest.MonkeyPatch) -> Bundle:
    patch.setitem(selfcheck.BOUND, "fp32", 1e-4)  # type: ignore[arg-type]
    return convolution_bundle(folder)


def later_check(folder: Path, patch: pytest.MonkeyPatch) -> Bundle:
    patch.setattr(selfcheck, "CHECK", selfcheck.CHECK + 1)
    return convolution_bundle(folder)


@pytest.mark.parametrize("change", [other_rows, stricter_bound, later_check])
def test_an_engine_that_passed_another_check_is_checked_again(
    net: Bundle,
    cache: EngineCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], Bundle],
) -> None:
    backend = OnnxRuntimeCpu(cache=cache, threads=1)
    backend.open(net, net.graph("net")).close()
    changed, checked, check = change(tmp_path / "changed", monkeypatch), list[str](), selfcheck._check

    def noted(engine: Any, bundle: Bundle, graph: Any, place: Any) -> float:
        checked.append(graph.name)
        return check(engine, bundle, graph, place)

    monkeypatch.setattr(selfcheck, "_check", noted)
    for _ in range(2):
        backend.open(changed, changed.graph("net")).close()
    assert checked == ["net"] and len(cache.entries()) == 1


@pytest.mark.parametrize(("axes", "name"), [(2, "y"), (0, "total")])
def test_every_output_of_a_graph_is_checked(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, axes: int, name: str
) -> None:
    def spoil(values: Array) -> Array:
        return values * np.float32(1.1) if values.ndim == axes else values

    spoil_simulated(monkeypatch, spoil)
    with pytest.raises(EngineError, match=f"is wrong and was not used: {name} differs"):
        tensorrt_backend(monkeypatch, cache).open(bundle, bundle.graph("first"), {"x": (2, 8)})


def test_a_static_plan_takes_the_recorded_rows_repeated(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"x": (3, 4, NATIVE, NATIVE)}
    (run,) = runs(net, net.graph("net"), (shapes, shapes))
    recorded = read_reference(net, net.graph("net"), net.graph("net").references[0])
    np.testing.assert_array_equal(run.inputs["x"], recorded["x"][[0, 1, 0]])
    np.testing.assert_array_equal(run.expected["y"], recorded["y"][[0, 1, 0]])
    backend = tensorrt_backend(monkeypatch, cache)
    spoil_simulated(monkeypatch, lambda values: values * np.float32(1.1))  # all rows alike: only a reference tells
    with pytest.raises(EngineError, match=r"differs from the reference at R=3 h=10 w=10, relative error 0\.1 "):
        backend.open(net, net.graph("net"), shapes)


def test_tf32_and_fp16_are_allowed_what_they_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"x": (2, 4, NATIVE, NATIVE)}
    spoil_simulated(monkeypatch, lambda values: values * np.float32(1.01))
    for number, (options, changes, right) in enumerate(
        [({}, {}, False), ({"tf32": True}, {}, True), ({}, {"precision": "fp16"}, True)]
    ):
        bundle = convolution_bundle(tmp_path / f"net{number}", **changes)
        backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / f"engines{number}"), **options)
        if right:
            backend.open(bundle, bundle.graph("net"), shapes)
        else:
            with pytest.raises(EngineError, match=r"relative error 0\.01 where 0\.001 is allowed"):
                backend.open(bundle, bundle.graph("net"), shapes)


def test_memory_that_runs_out_is_no_wrong_result(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimulatedDriver()
    backend = tensorrt_backend(monkeypatch, cache, driver)
    shapes, before = dynamic_plan(backend, net), (len(driver._memory), len(driver._pinned))
    ordinary = simulated_backends.Context.execute_async_v3

    def failing(self: Any, stream: int) -> bool:
        if self.shapes["x"][0] == 4:
            backend.device.empty((1 << 45,), np.uint8)
        return ordinary(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(simulated_backends.Context, "execute_async_v3", failing)
        with pytest.raises(EngineError) as caught:
            backend.open(net, net.graph("net"), shapes)
    assert caught.match("out of memory on tensorrt while engine net was checked: use --low-memory, .* weights_on_gpu")
    assert (len(driver._memory), len(driver._pinned)) == before and not backend._loaded
    assert not list(cache.root.glob(f"net-*/{PASSED}")) and len(cache.entries()) == 1
    backend.open(net, net.graph("net"), shapes)


def test_a_graph_of_no_module_is_computed_from_its_own_definition(
    tmp_path: Path, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = pytest.importorskip("latentrt.export.exporter", exc_type=ImportError)
    folder = tmp_path / "bundle"
    folder.mkdir()
    info = exporter.write_step_graph(folder, "fp32", 4)
    write_manifest(folder, manifest_of(folder, info))
    bundle = Bundle.open(folder)
    graph, rows = bundle.graph("step"), step_rows("fp32", 4)
    sizes = solve_sizes({spec.name: spec for spec in graph.inputs}, {name: rows[name].shape for name in rows})
    shapes = {spec.name: shape_of(spec, {**sizes, "h": 7}) for spec in graph.inputs}  # not those that are recorded
    OnnxRuntimeCpu(cache=cache, threads=1).open(bundle, graph)
    backend = tensorrt_backend(monkeypatch, cache)
    backend.open(bundle, graph, shapes).close()
    shutil.rmtree(cache.root)
    spoil_simulated(monkeypatch, lambda values: values * np.float32(1.1))
    with pytest.raises(EngineError, match=r"engine step .* differs from ONNX's reference implementation"):
        backend.open(bundle, graph, shapes)
    assert cache.entries()
    with pytest.raises(EngineError, match=r"engine step of backend onnxruntime-cuda .* differs from the reference"):
        onnxruntime_backend(monkeypatch, cache=cache).open(bundle, graph)


def test_an_error_that_is_no_number_is_past_every_bound(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite outputs against a definition that itself gives infinities."""
    monkeypatch.setattr(selfcheck, "relative_error", lambda values, reference: float("nan"))
    with pytest.raises(EngineError, match=r"is wrong and was not used: y differs .* relative error nan where"):
        OnnxRuntimeCpu(cache=cache, threads=1).open(net, net.graph("net"))


def plant(folder: Path, change: Callable[[Path], object]) -> None:
    """Change an engine of the cache, and its description with it."""
    change(folder)
    sidecar = json.loads((folder / SIDECAR).read_text())
    for name in sidecar["files"]:
        sidecar["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    (folder / SIDECAR).write_text(json.dumps(sidecar))


def other_weights(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    (kernel,) = model.graph.initializer
    kernel.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(kernel) * 1.01, kernel.name))
    onnx.save(model, folder / "model.onnx")


def test_an_optimized_graph_with_other_weights_is_refused(net: Bundle, cache: EngineCache) -> None:
    backend = OnnxRuntimeCpu(cache=cache, threads=1)
    backend.open(net, net.graph("net")).close()
    (folder,) = cache.root.glob("net-*")
    assert (folder / PASSED).is_file()
    plant(folder, other_weights)
    with pytest.raises(EngineError, match=r"net of backend onnxruntime-cpu .* relative error 0\.0\d* where 0\.001"):
        backend.open(net, net.graph("net"))
    shutil.rmtree(folder)
    backend.open(net, net.graph("net"))


def test_a_right_engine_on_the_processor_is_checked_once_at_small_sizes(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, seen = OnnxRuntimeCpu(cache=cache, threads=1), []
    ordinary = selfcheck._outputs
    monkeypatch.setattr(selfcheck, "_outputs", lambda *a: (seen.append(a[3].sizes), ordinary(*a))[1])
    for _ in range(2):
        backend.open(net, net.graph("net")).close()
    assert [sizes["R"] for sizes in seen] == [1, 4]
    large = net.graph("net").references[0].model_copy(update={"sizes": {"R": 2, "h": 64, "w": 64}})
    graph = net.graph("net").model_copy(update={"references": (large,)})
    assert {run.sizes["h"] for run in runs(net, graph, None)} == {8}  # and no reference, for it is too large


def test_a_gpu_with_onnxruntime_is_checked_once(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = net.graph("net")
    with monkeypatch.context() as patch:
        spoil_simulated(patch, row(0, 1.1, batch=1))
        with pytest.raises(EngineError, match=r"engine net of backend onnxruntime-cuda .* differs from the reference"):
            onnxruntime_backend(patch, cache=cache).open(net, graph)
    onnxruntime_backend(monkeypatch, cache=cache).open(net, graph).close()
    forbid_checks(monkeypatch)
    onnxruntime_backend(monkeypatch, cache=cache).open(net, graph).close()


@pytest.mark.parametrize("note", ["", "[]", "{", '{"0": 1}'])
def test_a_damaged_note_is_no_passed_check(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    backend = OnnxRuntimeCpu(cache=cache, threads=1)
    backend.open(net, net.graph("net")).close()
    (file,) = cache.root.glob(f"net-*/{PASSED}")
    file.write_text(note)
    with monkeypatch.context() as patch:
        forbid_checks(patch)
        with pytest.raises(AssertionError, match="checked again"):
            backend.open(net, net.graph("net"))
    backend.open(net, net.graph("net")).close()
    forbid_checks(monkeypatch)
    backend.open(net, net.graph("net")).close()


def test_an_engine_that_is_removed_while_it_is_checked_stays_removed(
    net: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, ordinary = OnnxRuntimeCpu(cache=cache, threads=1), selfcheck._check

    def removed(*given: Any) -> float:
        error = ordinary(*given)
        assert all(cache.remove(entry) for entry in cache.entries())
        return error

    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "_check", removed)
        backend.open(net, net.graph("net")).close()
    assert list(cache.root.glob("net-*")) == [] and cache.verify() == {}
    backend.open(net, net.graph("net")).close()
    assert len(cache.entries()) == 1


def test_a_bundle_without_rows_still_opens_and_its_rows_must_agree(
    tmp_path: Path, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = convolution_bundle(tmp_path / "early", recorded=False)
    OnnxRuntimeCpu(cache=cache, threads=1).open(bundle, bundle.graph("net"))
    spoil_simulated(monkeypatch, row(0, 1.1, batch=1))
    with pytest.raises(EngineError, match=r"onnxruntime-cuda .* y differs from a row of the same inputs at R=4"):
        onnxruntime_backend(monkeypatch, cache=cache).open(bundle, bundle.graph("net"))


def test_damaged_rows_are_one_line(net: Bundle, cache: EngineCache) -> None:
    file, graph = net.path / "net-native.rows", net.graph("net")
    data = file.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(BundleError, match=message) as caught:
            OnnxRuntimeCpu(cache=cache, threads=1).open(Bundle.open(net.path), graph)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)

    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    refused("does not match its SHA-256")
    file.unlink()
    refused("is missing")
    manifest = json.loads((net.path / "manifest.json").read_text())

    def listed(contents: bytes) -> None:
        file.write_bytes(contents)
        manifest["files"][file.name] = {"size": len(contents), "sha256": sha256_of(file)}
        (net.path / "manifest.json").write_text(json.dumps(manifest))

    listed(data[:-4])
    refused(rf"has {len(data) - 4} bytes and its tensors take {len(data)}: export the checkpoint again")
    listed(np.float32(np.nan).tobytes() + data[4:])
    refused("numbers in x that are not finite")
    listed(data)
    OnnxRuntimeCpu(cache=cache, threads=1).open(Bundle.open(net.path), graph)


@pytest.mark.parametrize(
    "change",
    [
        {"references": [{"file": "net-native.rows", "sizes": {"R": 2}}]},
        {"references": [{"file": "net-native.rows", "sizes": {"R": 2, "h": 10, "w": 0}}]},
        {"references": [{"file": "other.rows", "sizes": {"R": 2, "h": 10, "w": 10}}]},
        {"limits": {"y": 1}},
        {"limits": {"x": "T"}},
        {"limits": {"x": 0}},
    ],
    ids=str,
)
def test_a_manifest_whose_rows_do_not_fit_its_graph_is_refused(net: Bundle, change: dict[str, Any]) -> None:
    manifest = json.loads((net.path / "manifest.json").read_text())
    manifest["graphs"][0] |= change
    (net.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="is not valid at") as caught:
        Bundle.open(net.path)
    assert "\n" not in str(caught.value)


def test_every_type_comes_back_as_it_was_written(tmp_path: Path) -> None:
    kinds = ("float16", "float32", "int64", "int32", "uint8", "bool")
    specs = [TensorInfo(name=f"t{n}", dtype=kind, shape=("B", 3)) for n, kind in enumerate(kinds)]  # type: ignore[arg-type]
    arrays = {spec.name: (np.arange(6).reshape(2, 3) % 3).astype(spec.dtype) for spec in specs}
    reference = write_reference(tmp_path, "all", specs, arrays)
    assert reference == ReferenceInfo(file="all.rows", sizes={"B": 2})
    info = graph_info("all", specs, []).model_copy(update={"references": (reference,)})
    (tmp_path / "all.onnx").touch()
    bundle = Bundle(tmp_path, manifest_of(tmp_path, info))
    for name, array in read_reference(bundle, info, reference).items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])
    drawn = random_inputs(info.model_copy(update={"limits": {"t2": "B", "t3": 7.0}}), {"B": 50})
    assert set(np.unique(drawn["t2"])) <= set(range(50)) and set(np.unique(drawn["t3"])) == set(range(7))
    assert drawn["t4"].max() > 128 and set(np.unique(drawn["t5"])) == {False, True}


def test_the_error_by_hand() -> None:
    assert relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(1 / 5)
    assert relative_error(np.array([10, 21], np.uint8), np.array([11, 20], np.uint8)) == 0
    assert relative_error(np.array([12, 20], np.uint8), np.array([10, 0], np.uint8)) == pytest.approx(
        np.sqrt(1 + 19**2) / 10
    )
    assert np.isnan(relative_error(np.array([np.nan]), np.array([1.0])))
