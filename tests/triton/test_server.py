"""A real tritonserver over the embedded model, with Triton's own client.

It is found by the variable LATENTRT_TRITONSERVER, or in the package nvidia-pytriton, whose server needs the system's
own Python (its stub is linked to libpython) and numpy 1. In a virtual environment of that Python:

    pip install nvidia-pytriton 'numpy<2' 'latentrt[cpu]' pytest
    python -m pytest -m slow tests/triton/test_server.py -s  # says figures
"""

from __future__ import annotations

import base64
import importlib.util
import io
import itertools
import json
import os
import queue
import shutil
import signal
import site
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.triton.fields import DTYPES, INPUTS
from latentrt.runtime.triton.repository import write_repository
from latentrt.runtime.triton.settings import TritonSettings
from PIL import Image

pytestmark = pytest.mark.slow
say = print
client_module = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")

SETTINGS = TritonSettings(backend="onnxruntime-cpu", options={"threads": 1}, slots=4, sizes=[(64, 64), (128, 128)])
KINDS = {"STRING": "BYTES"}
UNLIKE: list[dict[str, Any]] = [
    {"prompt": "a red circle", "num_inference_steps": 4, "sampler": "euler", "guidance_scale": 1.0},
    {"prompt": "a blue star", "num_inference_steps": 6, "sampler": "euler_a", "guidance_scale": 4.5},
    {"prompt": "a green cross", "num_inference_steps": 8, "sampler": "dpmpp_2m", "negative_prompt": "red"},
    {"prompt": "two rings", "num_inference_steps": 10, "sampler": "unipc", "guidance_scale": 7.0},
    {"prompt": "a yellow square", "num_inference_steps": 12, "sampler": "ddim", "guidance_scale": 1.0},
    {"prompt": "a white line", "num_inference_steps": 7, "sampler": "heun", "guidance_scale": 2.0},
    {"prompt": "an orange triangle", "num_inference_steps": 16, "sampler": "lms"},
    {"prompt": "a black dot", "num_inference_steps": 20, "sampler": "pndm", "guidance_scale": 3.5},
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(repository: Path, place: Path, ports: dict[str, int]) -> tuple[list[str], dict[str, str]]:
    """Return the command line of a server and its environment; skips where there is none."""
    environment, options = dict(os.environ), []
    binary = os.environ.get("LATENTRT_TRITONSERVER")
    if binary is None:
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            pytest.skip("LATENTRT_TRITONSERVER names no server, and nvidia-pytriton is not installed")
        package = Path(spec.origin).parent / "tritonserver"
        backend, version = place / "backends" / "python", "{}.{}".format(*sys.version_info)
        shutil.copytree(package / "backends" / "python", backend)
        shutil.copy(package / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
        libraries = package.parent.parent / "nvidia_pytriton.libs"  # the stub's own way to them is relative
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries), os.getenv("LD_LIBRARY_PATH")]))
        binary, options = str(package / "bin" / "tritonserver"), ["--backend-directory", str(backend.parent)]
    for name, port in ports.items():
        options += [f"--{name}-port", str(port), f"--{name}-address", "127.0.0.1"]
    return [binary, "--model-repository", str(repository), *options], environment


class Served:
    """A server over a repository of one model, and what is asked of it."""

    def __init__(self, place: Path, settings: TritonSettings = SETTINGS) -> None:
        packages = [Path(path) for path in site.getsitepackages() if Path(path).is_dir()]
        write_repository(
            Bundle.open(ensure_bundle()), place / "models", settings, name="m", kind="cpu", python_path=packages
        )
        self.ports = {name: free_port() for name in ("http", "grpc", "metrics")}
        self.url = f"http://127.0.0.1:{self.ports['http']}/v2"
        arguments, environment = command(place / "models", place, self.ports)
        self.log = place / "log"
        began = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while self.health("ready") != 200:
            assert self.process.poll() is None and time.perf_counter() - began < 60, self.log.read_text()[-3000:]
            time.sleep(0.05)
        self.ready_seconds = time.perf_counter() - began
        self.client = client_module.InferenceServerClient(f"127.0.0.1:{self.ports['grpc']}")
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.listen()

    def listen(self) -> None:
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def health(self, what: str) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/health/{what}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def ask(self, id: str, **values: Any) -> None:
        inputs = []
        for spec in INPUTS:
            if spec.name in values:
                value = values[spec.name]
                value = value.encode() if isinstance(value, str) else value
                array = np.array([value], DTYPES[spec.kind])
                tensor = client_module.InferInput(spec.name, list(array.shape), KINDS.get(spec.kind, spec.kind))
                tensor.set_data_from_numpy(array)
                inputs.append(tensor)
        self.client.async_stream_infer("m", inputs, request_id=id, enable_empty_final_response=True)

    def next(self, seconds: float = 60) -> tuple[str, dict[str, Any], bool]:
        """Return the id of the next response, its values, and whether it is the last one."""
        result, error = self.answers.get(timeout=seconds)
        if error is not None:
            return "", {"error": str(error)}, True
        said = result.get_response()
        values = {output.name: result.as_numpy(output.name) for output in said.outputs}
        return said.id, values, said.parameters["triton_final_response"].bool_param

    def whole(self, **values: Any) -> list[dict[str, Any]]:
        """Return all responses to a request."""
        self.ask("one", **values)
        found, last = [], False
        while not last:
            _, said, last = self.next()
            found.append(said)
        return found

    def generate(self, path: str = "generate", **fields: Any) -> tuple[int, str]:
        request = urllib.request.Request(f"{self.url}/models/m/{path}", json.dumps(fields).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, line: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics']}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(each.rsplit(" ", 1)[1]) for each in lines if each.startswith("latentrt_") and line in each)

    @property
    def children(self) -> list[int]:
        """The processes of models."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def memory(self) -> dict[str, float]:
        """Return MiB of resident memory of the server and of the model's process."""
        found = {}
        for name, pid in {"server": self.process.pid, **{f"model {n}": p for n, p in enumerate(self.children)}}.items():
            status = Path(f"/proc/{pid}/status").read_text()
            found[name] = int(status.split("VmRSS:")[1].split()[0]) / 1024
        return found

    def stop(self) -> int:
        self.client.stop_stream(cancel_requests=True)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def server(place: Path, settings: TritonSettings = SETTINGS) -> Iterator[Served]:
    running = Served(place, settings)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with server(tmp_path_factory.mktemp("triton")) as running:
        say(f"\nready after {running.ready_seconds:.1f} s, MiB {running.memory()}")
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as opened:
        yield opened


def drawn(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_eight_unlike_requests_at_a_time(served: Served, pipe: Pipeline) -> None:
    began = time.perf_counter()
    for number, each in enumerate(UNLIKE):
        served.ask(str(number), **each, seed=number, progress=True)
    order: list[str] = []
    images: dict[str, np.ndarray[Any, Any]] = {}
    while len(images) < len(UNLIKE):
        id, said, _ = served.next()
        assert "error" not in said, said
        order.append(id)
        if "image" in said:
            images[id] = drawn(said["image"][0])
    say(f"eight unlike requests: {time.perf_counter() - began:.2f} s, {len(order)} responses, MiB {served.memory()}")
    assert sum(before != after for before, after in itertools.pairwise(order)) > 20, "one after the other"
    for number, each in enumerate(UNLIKE):
        reference = np.asarray(pipe(**each, seed=number).images[0]).astype(int)
        assert abs(images[str(number)] - reference).max() <= 1
        assert order.count(str(number)) >= 4


def test_what_is_wrong_is_said(served: Served) -> None:
    said = "width is 63: this bundle needs a multiple of 8; try 56 or 64"
    assert served.whole(prompt="x", size="63x64") == [{"error": said}]
    assert served.generate(prompt="x", size="63x64") == (400, json.dumps({"error": said}, separators=(",", ":")))
    assert served.whole(prompt="x", num_inference_steps=0)[0]["error"].startswith("num_inference_steps is 0: ")


def test_arrays_and_several_pictures(served: Served, pipe: Pipeline) -> None:
    found = served.whole(prompt="a red circle", n=3, seed=5, size="64x64", num_inference_steps=4, output_format="raw")
    assert sorted(int(each["seed"][0]) for each in found) == [5, 6, 7]
    images = pipe("a red circle", num_images_per_prompt=3, seed=5, height=64, width=64, num_inference_steps=4).images
    for each in found:
        reference = np.asarray(images[int(each["index"][0])]).astype(int)
        assert abs(each["pixels"].astype(int) - reference).max() <= 1


def test_json_over_http_in_one_answer_and_as_a_stream(served: Served) -> None:
    fields = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 4, "seed": 1}
    status, text = served.generate(**fields, response_format="b64_json")
    assert status == 200 and drawn(base64.b64decode(json.loads(text)["image"])).shape == (64, 64, 3)
    status, text = served.generate("generate_stream", **fields, response_format="b64_json", progress=True)
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and [each["step"] for each in events[:-1]][-1] == 4
    assert drawn(base64.b64decode(events[-1]["image"])).shape == (64, 64, 3)
    status, text = served.generate("generate_stream", prompt="x", size="63x64")
    assert "width is 63" in text
    assert served.generate(prompt="", probe=True)[0] == 200


def test_a_picture_to_start_from(served: Served, pipe: Pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    picture.save(buffer := io.BytesIO(), "PNG")
    given: dict[str, Any] = {"prompt": "a star", "num_inference_steps": 6, "seed": 2, "strength": 0.6}
    (said,) = served.whole(**given, image=buffer.getvalue())
    reference = np.asarray(pipe(**given, image=picture).images[0]).astype(int)
    assert abs(drawn(said["image"][0]) - reference).max() <= 1


def test_a_cancelled_request_frees_its_slots(served: Served) -> None:
    before = served.metric('outcome="cancelled"')
    served.ask("long", prompt="long", num_inference_steps=150, n=8, progress=True)
    for _ in range(3):
        served.next()
    served.client.stop_stream(cancel_requests=True)
    began = time.perf_counter()
    while served.metric('outcome="cancelled"') == before:
        assert time.perf_counter() - began < 30
        time.sleep(0.02)
    say(f"cancelled after {time.perf_counter() - began:.2f} s")
    served.answers = queue.Queue()
    served.listen()
    assert "image" in served.whole(prompt="short", size="64x64", num_inference_steps=2)[-1]
    while served.metric("latentrt_running_images") + served.metric("latentrt_queue_images"):
        assert time.perf_counter() - began < 30, "a place was not freed"
        time.sleep(0.1)


def test_latency_beside_the_pipeline(served: Served, pipe: Pipeline) -> None:
    """Says what Triton adds; another process on the machine adds to it."""
    given: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1}
    times: dict[str, list[float]] = {"pipe": [], "gRPC": [], "HTTP": []}
    for _ in range(30):
        for name, call in {
            "pipe": lambda: pipe(**given, height=64, width=64),
            "gRPC": lambda: served.whole(**given, size="64x64"),
            "HTTP": lambda: served.generate(**given, size="64x64", response_format="b64_json"),
        }.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    say({name: f"{statistics.median(each):.1f} ms p50" for name, each in times.items()})


def test_sigterm_lets_requests_finish(tmp_path: Path) -> None:
    with server(tmp_path) as running:
        for number in range(3):
            running.ask(str(number), prompt="a red circle", num_inference_steps=60, progress=True)
        while "step" not in running.next()[1]:
            pass
        running.process.send_signal(signal.SIGTERM)
        outcomes: list[str] = []
        while len(outcomes) < 3:
            _, said, _ = running.next(30)
            if "image" in said or "error" in said:
                outcomes.append(said.get("error", "a picture"))
        say(outcomes)
        running.client.stop_stream()
        assert running.process.wait(60) == 0
        assert outcomes == ["a picture"] * 3


def test_a_hanging_step_ends_the_server(tmp_path: Path) -> None:
    with server(tmp_path, TritonSettings(**{**vars(SETTINGS), "step_timeout": 1e-6})) as running:
        for number in range(4):
            running.ask(str(number), prompt="a red circle", num_inference_steps=150)
        errors = [running.next(30)[1].get("error", "a picture") for _ in range(4)]
        assert errors.count("a picture") == 0, errors
        began = time.perf_counter()
        assert running.process.wait(60) != 0
        say(f"{set(errors)}; the server was gone {time.perf_counter() - began:.1f} s later")


def test_what_triton_makes_of_a_killed_model(tmp_path: Path) -> None:
    """It stays ready and starts nothing again, so that a probe has to ask the model itself."""
    with server(tmp_path) as running:
        assert running.generate(prompt="", probe=True)[0] == 200
        for child in running.children:
            os.kill(child, signal.SIGKILL)
        status, text = running.generate(prompt="", probe=True)
        say(f"ready {running.health('ready')}, the probe {status} {text}")
        assert status != 200 and "not healthy" in text
