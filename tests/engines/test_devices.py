"""What every device must do: memory, events, captured work. On a GPU the same tests run with `-m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.driver import Driver, unavailable_reason
from latentrt.engines.device import Array, Device
from latentrt.engines.errors import EngineError, ShapeError
from latentrt.engines.host import HostDevice

from .simulated_cuda import SimulatedDriver
from .small_bundles import random


@pytest.fixture(params=["host", "simulated cuda", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "host":
        yield HostDevice()
        return
    if request.param == "cuda" and (reason := unavailable_reason()):
        pytest.skip(reason)
    gpu = CudaDevice(0, Driver(SimulatedDriver()) if request.param == "simulated cuda" else None)
    yield gpu
    gpu.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 1, 7)], ids=str)
def test_what_is_written_is_read(device: Device, dtype: str, shape: tuple[int, ...]) -> None:
    array = (random(*shape) * 100).astype(dtype)
    stream, tensor = device.stream(), device.empty(shape, dtype)
    tensor.write(array, stream)
    read = tensor.read(stream)
    assert read.dtype == array.dtype and read.shape == shape
    np.testing.assert_array_equal(read, array)
    tensor.close()


def test_an_array_may_change_after_it_was_written_and_a_tensor_after_it_was_read(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((4,), np.float32)
    first, second = random(4), random(4, seed=1)
    array = first.copy()
    tensor.write(array, stream)
    array[:] = 0
    read = tensor.read(stream)
    tensor.write(second, stream)
    tensor.write(first, stream)
    tensor.write(second, stream)
    np.testing.assert_array_equal(tensor.read(stream), second)
    np.testing.assert_array_equal(read, first)
    tensor.close()


def test_a_strided_array_is_written_in_order(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((3, 4), np.float32)
    array = random(4, 3).T
    tensor.write(array, stream)
    np.testing.assert_array_equal(tensor.read(stream), array)
    tensor.close()


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.float32), np.zeros((2,), np.float64)], ids=["shape", "dtype"])
def test_an_array_that_does_not_fit_is_refused(device: Device, array: Array) -> None:
    tensor = device.empty((2,), np.float32)
    with pytest.raises(ShapeError, match=r"cannot write float(32|64)\[2.*\] to float32\[2\]"):
        tensor.write(array, device.stream())
    tensor.close()


def test_rows_are_a_part_of_their_tensor(device: Device) -> None:
    stream, whole, array = device.stream(), device.empty((4, 3), np.float32), random(4, 3)
    whole.write(array, stream)
    before = device.tensor_bytes()
    part = whole.rows(1, 2)
    assert part.shape == (2, 3) and part.pointer == whole.pointer + 12 and part.nbytes == 24
    np.testing.assert_array_equal(part.read(stream), array[1:3])
    part.write(random(2, 3, seed=1), stream)
    part.close()
    assert device.tensor_bytes() == before
    np.testing.assert_array_equal(whole.read(stream), [array[0], *random(2, 3, seed=1), array[3]])
    whole.close()


def test_memory_has_another_shape(device: Device) -> None:
    stream, whole, array = device.stream(), device.empty((4, 3), np.float32), random(4, 3)
    whole.write(array, stream)
    part = whole.rows(2, 2).shaped((3, 1, 2))
    assert part.shape == (3, 1, 2) and part.pointer == whole.pointer + 24 and part.nbytes == 24
    np.testing.assert_array_equal(part.read(stream), array[2:].reshape(3, 1, 2))
    with pytest.raises(ShapeError, match=r"a tensor \[4, 3\] was asked for in the shape \[5\]"):
        whole.shaped((5,))
    part.close()
    whole.close()


def test_a_tensor_is_copied_in_the_order_of_its_stream(device: Device) -> None:
    stream, one, other = device.stream(), device.empty((4, 3), np.float32), device.empty((2, 3), np.float32)
    first, second = random(4, 3), random(4, 3, seed=1)
    one.write(first, stream)
    other.copy(one.rows(2, 2), stream)
    one.write(second, stream)
    one.rows(0, 1).copy(one.rows(3, 1), stream)
    np.testing.assert_array_equal(other.read(stream), first[2:])
    np.testing.assert_array_equal(one.read(stream), [second[3], *second[1:]])
    one.close()
    other.close()


def test_rows_and_copies_that_do_not_fit_are_refused(device: Device) -> None:
    tensor, single = device.empty((2, 3), np.float32), device.empty((), np.float32)
    for first, count in ((-1, 1), (0, 0), (1, 2), (2, 1)):
        with pytest.raises(ShapeError, match=rf"rows {first} to {first + count} of a tensor \[2, 3\]"):
            tensor.rows(first, count)
    with pytest.raises(ShapeError, match=r"rows 0 to 1 of a tensor \[\]"):
        single.rows(0, 1)
    with pytest.raises(ShapeError, match=r"cannot copy float32\[2, 3\] to float32\[1, 3\]"):
        tensor.rows(0, 1).copy(tensor, device.stream())
    tensor.close()
    single.close()


def test_memory_is_counted_and_given_back_once(device: Device) -> None:
    before = device.tensor_bytes()
    tensors = [device.empty((16, 16), dtype) for dtype in ("float32", "float16")]
    assert device.tensor_bytes() - before == 16 * 16 * 6
    assert all(tensor.pointer % 64 == 0 for tensor in tensors)
    for tensor in (*tensors, *tensors):
        tensor.close()
    assert device.tensor_bytes() == before


def test_events_measure_time_in_stream_order(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((256, 1024), np.float32)
    before = stream.record()
    tensor.write(random(256, 1024), stream)
    after = stream.record()
    after.synchronize()
    assert 0 <= after.milliseconds_since(before) < 10_000
    assert after.milliseconds_since(before) == pytest.approx(-before.milliseconds_since(after))
    tensor.close()


def test_a_capture_runs_nothing_until_it_is_replayed(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((4,), np.float32)
    first, captured = random(4), random(4, seed=1)
    tensor.write(first, stream)
    array = captured.copy()
    with stream.capture() as capture:
        tensor.write(array, stream)
    graph = capture.finish()
    array[:] = 0  # what was captured stays what it was
    np.testing.assert_array_equal(tensor.read(stream), first)
    for _ in range(2):
        tensor.write(first, stream)
        graph.replay(stream)
        np.testing.assert_array_equal(tensor.read(stream), captured)
    graph.close()
    graph.close()
    with pytest.raises(EngineError, match="closed graph"):
        graph.replay(stream)
    tensor.close()


def test_what_waits_is_refused_inside_a_capture_and_the_stream_survives(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((4,), np.float32)
    for wait in (stream.synchronize, lambda: tensor.read(stream)):
        with pytest.raises(EngineError, match="while its work is being captured"), stream.capture():
            tensor.write(random(4), stream)
            wait()
    with pytest.raises(EngineError, match="already capturing"), stream.capture(), stream.capture():
        pass
    with pytest.raises(EngineError, match="inside its own block"), stream.capture() as capture:
        capture.finish()
    with pytest.raises(KeyError), stream.capture():
        raise KeyError("from the block")
    tensor.write(random(4, seed=3), stream)
    np.testing.assert_array_equal(tensor.read(stream), random(4, seed=3))
    tensor.close()
    stream.close()
    stream.close()
