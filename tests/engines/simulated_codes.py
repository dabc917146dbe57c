"""The enumerations of `cuda.bindings.driver` that the simulated driver knows, and what it keeps of a stream's work."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

Op = Callable[[], None]


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class Failure(Exception):
    def __init__(self, code: CUresult) -> None:
        self.code = code


class Capture:
    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.valid = True


class Mark:
    """What one recording of an event stands for."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.time: float | None = None
