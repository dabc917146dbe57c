"""An NVIDIA GPU as a device: memory, streams, events and captured graphs over `cuda.bindings`.

What waits for the GPU: `read`, `synchronize`, `milliseconds_since` and every `close`; `write` waits for the copy of the
same tensor that is still on its way. A `close` waits for the streams of its own device, and while any stream of the GPU
captures it waits for nothing: the memory is given back when the capture ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from .context import CudaContext
from .driver import Driver, cuda_version
from .memory import CudaTensor
from .stream import CudaStream


class CudaDevice(CudaContext):
    """One GPU, used through its primary context."""

    def __init__(self, number: int = 0, driver: Driver | None = None) -> None:
        """Open GPU `number`; raises `BackendUnavailableError` without a driver, `EngineError` without that GPU."""
        super().__init__(number, driver)
        try:
            self._free_at_open = self.memory_free()[0]
            self.name = self._driver.cuDeviceGetName(128, self._gpu).split(b"\0")[0].decode()
        except BaseException:
            self.close()
            raise

    @property
    def compute_capability(self) -> str:
        """The GPU's architecture, such as `8.9`."""
        kind = self._driver.CUdevice_attribute
        names = ("MAJOR", "MINOR")
        parts = [getattr(kind, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}") for name in names]
        return ".".join(str(self._driver.cuDeviceGetAttribute(part, self._gpu)) for part in parts)

    @property
    def driver_version(self) -> str:
        """The newest CUDA that the driver supports, such as `13.0`."""
        return cuda_version(self._driver.cuDriverGetVersion())

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> CudaTensor:
        """Allocate a tensor with undefined contents."""
        return CudaTensor(self, shape, dtype)

    def stream(self) -> CudaStream:
        """Create a stream that does not wait for the default stream."""
        return CudaStream(self)

    def bytes_taken(self) -> int:
        """Return how many bytes less are free on the GPU than when it was opened, all programs counted."""
        return self._free_at_open - self.memory_free()[0]

    def memory_free(self) -> tuple[int, int]:
        """Return the GPU's free and total bytes, all programs counted."""
        free, total = self.activate().cuMemGetInfo()
        return int(free), int(total)
