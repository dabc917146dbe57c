"""What backends say about themselves without being opened."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from latentrt.engines.backends import factory, names, open_backend, option_help
from latentrt.engines.errors import BackendUnavailableError, RequestError


@pytest.mark.parametrize("name", names())
def test_every_option_of_a_backend_is_described(name: str) -> None:
    parameters = inspect.signature(factory(name)).parameters
    described = option_help(name)
    assert set(described) == set(parameters) - {"name", "cache", "progress"}
    for option, (kind, default, meaning) in described.items():
        assert kind and meaning and "\n" not in meaning, option
        assert default == parameters[option].default, option


def test_types_of_options_are_words() -> None:
    kinds = {option: kind for option, (kind, _, _) in option_help("tensorrt").items()}
    assert kinds == {
        "gpu": "number",
        "build": "yes or no",
        "weights_on_gpu": "bytes, such as 2GiB",
        "optimization_level": "number",
        "scratch": "bytes, such as 2GiB",
        "hardware": "ampere_plus or same_compute_capability",
    }
    assert option_help("onnxruntime-cuda")["graphs"][:2] == ("none or onnxruntime", "none")
    with pytest.raises(BackendUnavailableError, match="unknown backend 'cuda': choose auto, tensorrt"):
        option_help("cuda")


def test_describing_options_imports_no_library_of_a_backend() -> None:
    code = """
import sys
from latentrt.engines import backends
for name in backends.names():
    backends.option_help(name)
assert not {"onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.bindings"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_option_that_a_backend_does_not_have_is_named() -> None:
    with pytest.raises(RequestError, match="backend tensorrt has no option 'threads': it has cache, gpu, build"):
        open_backend("tensorrt", threads=2)
