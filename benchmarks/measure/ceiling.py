"""The machine's ceiling, measured: the fastest matrix product and the fastest copy of a few that libraries offer.

`python -m latentrt.benchmarks.measure.ceiling DEVICE THREADS PRECISION` prints it as JSON; the benchmark runs that with
the threads and cores that contenders get.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ...engines.machine import has_bf16

REPEATS = 7


def ceiling(device: str, threads: int, precision: str) -> dict[str, Any]:
    """Return `flops` (a second, multiply and add counted as two) and `bytes` (a second, read plus written).

    Of a processor that has bf16 units also `flops_bf16`.
    """
    import torch

    torch.set_num_threads(threads)
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    rates = _products(device, threads, torch.float16 if precision == "fp16" else torch.float32, wait)
    in_bf16 = _products(device, threads, torch.bfloat16, wait) if device == "cpu" and has_bf16() else {}
    source = torch.ones(2**28 if device == "cpu" else 2**31, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copied = 2 * source.numel() / _best(partial(target.copy_, source), wait)
    measured = {**rates, **{f"{name}, bf16": rate for name, rate in in_bf16.items()}, "copy, torch": copied}
    found = {"flops": max(rates.values()), "bytes": copied, "measured": measured}
    return found | ({"flops_bf16": max(in_bf16.values())} if in_bf16 else {})


def _products(device: str, threads: int, dtype: Any, wait: Callable[[], object]) -> dict[str, float]:
    """Return operations a second of products of square matrices, by size and library."""
    import torch

    rates = {}
    for size in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products: dict[str, Callable[[], object]] = {"torch": partial(torch.mm, a, b, out=torch.empty_like(a))}
        if device == "cpu" and dtype == torch.float32:
            x, y = a.numpy(), b.numpy()
            products["numpy"] = partial(np.matmul, x, y, out=np.empty_like(x))
            products["onnxruntime"] = partial(_product_session(threads).run, None, {"a": x, "b": y})
        for library, product in products.items():
            rates[f"matrix product {size}, {library}"] = 2 * size**3 / _best(product, wait)
    return rates


def _product_session(threads: int) -> Any:
    """Return an ONNX Runtime session that multiplies two matrices: its kernels differ from those of a BLAS."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", ends[:2], ends[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _best(act: Callable[[], object], wait: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        act()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    device, threads, precision = sys.argv[1:]
    sys.stdout.write(json.dumps(ceiling(device, int(threads), precision)) + "\n")
