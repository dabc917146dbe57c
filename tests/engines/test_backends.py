"""What backends say about themselves without being opened."""

from __future__ import annotations

import importlib
import inspect
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
from latentrt.engines import backends
from latentrt.engines.backends import factory, names, open_backend, option_help, resolve
from latentrt.engines.errors import BackendUnavailableError, RequestError
from latentrt.engines.onnxruntime import cuda as onnxruntime_cuda
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.engines.tensorrt import library


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
        "tf32": "yes or no",
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


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A driver that works, and no package for GPUs except what a test adds."""
    monkeypatch.setattr(tensorrt, "no_driver", lambda: None)
    monkeypatch.setattr(onnxruntime_cuda, "no_driver", lambda: "another GPU is needed")
    monkeypatch.setattr(backends, "has_driver", lambda: True)
    for module in (tensorrt, backends):
        monkeypatch.setattr(module, "module_exists", lambda name: name in ("tensorrt", "onnxruntime"))
    library.load_library.cache_clear()
    return monkeypatch


def install(patch: pytest.MonkeyPatch, version: object) -> None:
    """Let `import tensorrt` give a module of this version, or raise what is given."""
    real = importlib.import_module

    def load(name: str, package: str | None = None) -> object:
        if name != "tensorrt":
            return real(name, package)
        if isinstance(version, BaseException):
            raise version
        return SimpleNamespace(__version__=version, __name__="tensorrt", ILogger=object)

    patch.setattr(library.importlib, "import_module", load)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (
            "10.2.0",
            r"tensorrt 10\.2\.0 is installed, 10\.3 or later is needed: run `pip install 'latentrt\[tensorrt\]'`",
        ),
        ("8.6.1.post1", r"tensorrt 8\.6\.1\.post1 is installed"),
        (None, r"tensorrt None is installed"),
        (OSError("libnvinfer.so.10: cannot open\nmore"), r"cannot be imported \(libnvinfer\.so\.10: cannot open\)"),
        (ValueError("numpy.dtype size changed"), r"cannot be imported \(numpy\.dtype size changed\)"),
    ],
)
def test_auto_goes_on_where_tensorrt_is_installed_and_does_not_work_and_says_why(
    gpu_machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: object, said: str
) -> None:
    install(gpu_machine, version)
    with caplog.at_level(logging.WARNING):
        assert resolve("auto") == "onnxruntime-cpu"
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(" is passed over")[0] for text in told] == ["backend tensorrt", "backend onnxruntime-cuda"]
    with pytest.raises(BackendUnavailableError, match=f"^backend tensorrt: .*{said}") as error:
        open_backend("tensorrt")
    assert str(error.value).count("backend tensorrt") == 1
    assert str(error.value).removeprefix("backend tensorrt: ") in told[0]
    library.load_library.cache_clear()


@pytest.mark.parametrize("version", ["10.3.0", "10.14.1.48", "11.0a1"])
def test_auto_takes_a_tensorrt_that_is_new_enough_in_silence(
    gpu_machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    install(gpu_machine, version)
    assert resolve("auto") == "tensorrt"
    assert not caplog.records
    library.load_library.cache_clear()


def test_auto_says_nothing_of_gpus_where_there_is_no_driver(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (tensorrt, onnxruntime_cuda):
        monkeypatch.setattr(module, "no_driver", lambda: "no NVIDIA driver is installed")
    monkeypatch.setattr(backends, "has_driver", lambda: False)
    assert resolve("auto") == "onnxruntime-cpu"
    assert not caplog.records
