"""Model Optimizer on an ONNX graph: run as a program by the Python of its own environment, which has no latentrt.

    python calibrate.py REQUEST

REQUEST is a JSON file with `graph`, `calls` (an .npz file with arrays `<call>/<input>`), `nodes` (names), `precision`
("int8" or "fp8") and `output`. The versions of what took part are printed last, as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


class Calls:
    """What ONNX Runtime's calibration reads."""

    def __init__(self, file: str) -> None:
        self._calls: dict[str, dict[str, Any]] = {}
        with np.load(file) as arrays:
            for name in arrays.files:
                call, _, tensor = name.partition("/")
                self._calls.setdefault(call, {})[tensor] = arrays[name]
        self.rewind()

    def get_first(self) -> dict[str, Any]:
        """Return the first call."""
        return next(iter(self._calls.values()))

    def get_next(self) -> dict[str, Any] | None:
        """Return the next call, or None behind the last."""
        return next(self._rest, None)

    def rewind(self) -> None:
        """Begin again."""
        self._rest = iter(self._calls.values())


def main() -> None:
    """Do what a request says."""
    from modelopt.onnx.quantization import quantize

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    quantize(
        request["graph"],
        quantize_mode=request["precision"],
        calibration_data_reader=Calls(request["calls"]),
        # "entropy" leaves out what is rare, and what is rare in one step is common in another. fp8 needs "max".
        calibration_method="max",
        calibration_eps=["cpu"],
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        nodes_to_quantize=request["nodes"],
        high_precision_dtype="fp32",  # nothing is cast: what is not quantized stays in the graph's own precision
        disable_mha_qdq=True,
        enable_gemv_detection_for_trt=False,
        output_path=request["output"],
        use_external_data_format=True,  # many variants of the graph then share one file of weights
        log_level="WARNING",
    )
    used = {name: metadata.version(name) for name in ("nvidia-modelopt", "onnx", "onnxruntime")}
    sys.stdout.write(json.dumps(used) + "\n")


if __name__ == "__main__":
    main()
