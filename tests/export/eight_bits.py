"""In place of Model Optimizer: ONNX Runtime's own static quantization, behind the same request.

python eight_bits.py calibrate.py REQUEST
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)


class Calls(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, file: str) -> None:
        arrays = np.load(file)
        calls: dict[str, dict[str, Any]] = {}
        for name in arrays.files:
            call, _, tensor = name.partition("/")
            calls.setdefault(call, {})[tensor] = arrays[name]
        self._calls = iter(calls.values())

    def get_next(self) -> dict[str, Any] | None:
        return next(self._calls, None)


def main() -> None:
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    kind = {"int8": QuantType.QInt8, "fp8": QuantType.QFLOAT8E4M3FN}[request["precision"]]
    quantize_static(
        request["graph"],
        request["output"],
        Calls(request["calls"]),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True,
        activation_type=kind,
        weight_type=kind,
        nodes_to_quantize=request["nodes"],
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul", "Gemm"],
        },
    )
    sys.stdout.write(json.dumps({"nvidia-modelopt": "0.0", "onnx": "0.0", "onnxruntime": "0.0"}) + "\n")


if __name__ == "__main__":
    main()
