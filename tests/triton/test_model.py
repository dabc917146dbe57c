"""The written model.py in place of Triton's process: requests in, responses out, over the embedded model."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import (
    BundleError,
    DeadlineError,
    EngineError,
    QueueFullError,
    RequestError,
    StorageError,
)
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.service.errors import BusyError, NotFoundError, RefusedError, UnavailableError
from latentrt.runtime.triton.errors import code_of, reason_of
from latentrt.runtime.triton.fields import DTYPES, INPUTS, OUTPUTS
from latentrt.runtime.triton.repository import write_repository
from latentrt.runtime.triton.settings import TritonSettings
from PIL import Image

from . import backend
from .config import parsed

pytest.importorskip("onnxruntime")

SETTINGS = TritonSettings(
    backend="onnxruntime-cpu", options={"threads": 1}, slots=2, sizes=[(64, 64)], max_steps=60, max_waiting=12
)
NAMES = [spec.name for spec in OUTPUTS]
KINDS = {spec.name: spec for spec in INPUTS}
FEW: dict[str, Any] = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 3, "seed": 7}


@dataclass
class Loaded:
    """A model as Triton has it."""

    model: Any
    utils: Any

    def ask(
        self,
        *,
        outputs: list[str] | None = None,
        microseconds: int = 0,
        sender: backend.Sender | None = None,
        **values: Any,
    ) -> backend.Sender:
        """Queue one request with inputs of the configuration's types."""
        arrays = {name: array_of(name, value) for name, value in values.items()}
        request = backend.Request(NAMES if outputs is None else outputs, microseconds, **arrays)
        request.sender = sender or request.sender
        assert self.model.execute([request]) is None
        return request.sender

    def responses(self, **values: Any) -> list[dict[str, Any]]:
        """Return the values of all responses to a request."""
        sender = self.ask(**values)
        assert sender.answered.wait(120)
        assert [response.error and response.error.message for response in sender.responses] == [None] * len(
            sender.responses
        )
        return [{name: value_of(array) for name, array in each.tensors.items()} for each in sender.responses]

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        return {labels: metric.value for labels, metric in self.utils.MetricFamily.made[name].items()}


def array_of(name: str, value: Any) -> np.ndarray[Any, Any]:
    values = value if isinstance(value, list) else [value]
    spec = KINDS[name]
    return np.array([each.encode() if isinstance(each, str) else each for each in values], DTYPES[spec.kind])


def value_of(array: np.ndarray[Any, Any]) -> Any:
    return array if array.ndim == 3 else array.tolist()[0]


def load(folder: Path, settings: TritonSettings) -> Loaded:
    """Write a repository, and do with its model.py what Triton does."""
    written = write_repository(Bundle.open(ensure_bundle()), folder, settings, name="m")
    spec = importlib.util.spec_from_file_location("model", written / "1" / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = parsed((written / "config.pbtxt").read_text(encoding="utf-8"))
    parameters = {each.key: {"string_value": each.value.string_value} for each in said.parameters}
    args = {
        "model_config": json.dumps({"parameters": parameters}),
        "model_repository": str(written),
        "model_version": "1",
        "model_name": "m",
        "model_instance_name": "m_0_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }
    utils, model = backend.module(), module.TritonPythonModel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", utils)
        model.initialize(args)
    return Loaded(model, utils)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    found = load(tmp_path_factory.mktemp("models"), SETTINGS)
    yield found
    found.model.finalize()
    assert not [thread for thread in threading.enumerate() if "latentrt triton" in thread.name]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as opened:
        yield opened


def drawn(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def expected(pipe: Pipeline, **arguments: Any) -> np.ndarray[Any, Any]:
    arguments = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7, **arguments}
    return np.asarray(pipe(**arguments).images[0]).astype(int)


def test_a_picture_is_the_pipelines_own(loaded: Loaded, pipe: Pipeline) -> None:
    (response,) = loaded.responses(**FEW)
    assert set(response) == {"index", "seed", "image", "facts"} and (response["index"], response["seed"]) == (0, 7)
    assert abs(drawn(response["image"]) - expected(pipe)).max() <= 1
    facts = json.loads(response["facts"])
    assert facts["timings"]["steps"] == 3 and facts["parameters"]["num_inference_steps"] == 3


def test_each_input_means_what_the_pipelines_argument_does(loaded: Loaded, pipe: Pipeline) -> None:
    given = {"negative_prompt": "blue", "guidance_scale": 4.7, "sampler": "euler_a", "num_inference_steps": 4}
    (response,) = loaded.responses(**{**FEW, **given})
    assert abs(drawn(response["image"]) - expected(pipe, **given)).max() <= 1
    sigmas = [14.6, 3.0, 1.0, 0.0]
    values = {name: value for name, value in FEW.items() if name != "num_inference_steps"}
    (response,) = loaded.responses(**values, sampler="euler", sigmas=sigmas)
    reference = expected(pipe, sampler="euler", sigmas=sigmas, num_inference_steps=None)
    assert abs(drawn(response["image"]) - reference).max() <= 1


@pytest.mark.parametrize("sent", ["bytes", "base64"])
def test_a_picture_to_start_from_comes_as_a_file_or_in_base64(loaded: Loaded, pipe: Pipeline, sent: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    mask = Image.fromarray(np.repeat([[0, 255]], 64, 0).astype(np.uint8).repeat(32, 1))
    files = {}
    for name, image in (("image", picture), ("mask", mask)):
        image.save(buffer := io.BytesIO(), "PNG")
        files[name] = buffer.getvalue() if sent == "bytes" else base64.b64encode(buffer.getvalue())
    (response,) = loaded.responses(**FEW, **files, strength=0.7)
    reference = expected(pipe, image=picture, mask_image=mask, strength=0.7)
    assert abs(drawn(response["image"]) - reference).max() <= 1


def test_pictures_come_one_by_one_with_seeds_of_their_own(loaded: Loaded) -> None:
    responses = loaded.responses(**{**FEW, "seed": [5, 2**64 - 1, 3]}, n=3, output_format="raw")
    assert sorted((each["index"], each["seed"]) for each in responses) == [(0, 5), (1, 2**64 - 1), (2, 3)]
    assert all(each["pixels"].shape == (64, 64, 3) and "image" not in each for each in responses)
    assert [("facts" in each) for each in responses] == [False, False, True]
    (alone,) = loaded.responses(**{**FEW, "seed": 3})
    (third,) = (each for each in responses if each["seed"] == 3)
    assert abs(third["pixels"].astype(int) - drawn(alone["image"])).max() <= 1


def test_progress_and_previews_come_before_the_picture(loaded: Loaded) -> None:
    responses = loaded.responses(**{**FEW, "num_inference_steps": 6}, progress=True, partial_images=1)
    steps = [each["step"] for each in responses if "step" in each]
    assert steps == sorted(set(steps)) and set(steps) <= set(range(1, 7)) and steps
    assert all(each["steps"] == 6 for each in responses if "step" in each)
    (preview,) = (each["preview"] for each in responses if "preview" in each)
    assert drawn(preview).shape == (64, 64, 3)
    assert "image" in responses[-1] and sum("image" in each for each in responses) == 1


def test_a_slow_client_misses_steps_and_nothing_else(loaded: Loaded) -> None:
    free = threading.Event()
    sender = backend.Sender()
    sender.on_send = lambda response: free.wait(60)
    loaded.ask(**{**FEW, "num_inference_steps": 20}, progress=True, sender=sender)
    job = next(iter(loaded.model._serving.service.unfinished))
    assert job.wait(60)
    free.set()
    assert sender.answered.wait(60)
    steps = [each.tensors["step"][0] for each in sender.responses if "step" in each.tensors]
    assert len(steps) <= 3 and steps[-1] == 20 and "image" in sender.responses[-1].tensors


def full_once(sender: backend.Sender, free: threading.Event) -> None:
    """Let no response be sent before it is free, and then the first picture be the one too many."""
    left = [RuntimeError("no room in shared memory")]

    def on_send(response: backend.InferenceResponse | None) -> None:
        assert free.wait(60)
        if response is not None and "image" in response.tensors and left:
            raise left.pop()

    sender.on_send = on_send


def test_a_last_response_that_cannot_be_sent_is_an_error(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    free = threading.Event()
    free.set()
    full_once(sender := backend.Sender(), free)
    assert loaded.ask(**FEW, sender=sender).answered.wait(60)
    (response,) = sender.responses
    assert response.error is not None and response.error.code == backend.TritonError.INTERNAL
    assert response.error.message == "the result could not be sent: the server's log says why"
    assert "no room in shared memory" in caplog.text


def test_a_picture_that_could_not_be_sent_comes_with_the_last_one(loaded: Loaded) -> None:
    full_once(sender := backend.Sender(), free := threading.Event())
    loaded.ask(**FEW, n=2, progress=True, sender=sender)
    job = next(iter(loaded.model._serving.service.unfinished))
    assert job.wait(60)
    free.set()
    assert sender.answered.wait(60)
    assert sorted(each.tensors["index"][0] for each in sender.responses if "image" in each.tensors) == [0, 1]


def test_formats(loaded: Loaded) -> None:
    (as_text,) = loaded.responses(**FEW, response_format="b64_json", output_format="jpeg", output_compression=90)
    assert Image.open(io.BytesIO(base64.b64decode(as_text["image"]))).format == "JPEG"
    (webp,) = loaded.responses(**FEW, output_format="webp")
    assert Image.open(io.BytesIO(webp["image"])).format == "WEBP"


def test_only_outputs_that_were_asked_for_are_sent(loaded: Loaded) -> None:
    sender = loaded.ask(**FEW, outputs=["seed"], progress=True)
    assert sender.answered.wait(60)
    assert [set(each.tensors) for each in sender.responses] == [{"seed"}]
    sender = loaded.ask(**FEW, outputs=["step"])
    assert sender.answered.wait(60) and sender.responses == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": "63x64"}, "width is 63: this bundle needs a multiple of 8; try 56 or 64"),
        ({"size": "64"}, "size is '64': give WIDTHxHEIGHT in pixels, such as 512x512"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0: input should be greater than or equal to 1"),
        ({"num_inference_steps": 61}, "61 steps: at most 60 are run"),
        ({"n": 11}, "n is 11: at most 10 pictures of a request are drawn"),
        ({"n": -1}, "num_images_per_prompt is -1: input should be greater than or equal to 1"),
        ({"sampler": "nonsense"}, "sampler 'nonsense' is not known: "),
        ({"sampler": ["euler", "ddim"]}, "sampler has 2 values: give one"),
        ({"prompt": b"\xff"}, "prompt is no UTF-8 at byte 0: give a text"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: "),
        ({"timeout": -1.0}, "timeout is -1: give seconds, more than 0"),
        ({"output_format": "bmp"}, "output_format is 'bmp': choose png, jpeg, webp, raw"),
        ({"output_compression": 101}, "output_compression is 101: give 0 to 100"),
        ({"partial_images": -1}, "partial_images is -1: give 0 or more"),
        ({"image": b"nothing"}, "image is no base64: "),
        ({"image": b"\x89PNG\r\n"}, "image cannot be read as a picture: "),
    ],
)
def test_what_is_wrong_is_one_response_of_one_line(loaded: Loaded, values: dict[str, Any], said: str) -> None:
    before = loaded.counted("latentrt_rejections_total")
    sender = loaded.ask(**{**FEW, **values})
    assert sender.answered.is_set() and len(sender.responses) == 1
    error = sender.responses[0].error
    assert error is not None and error.message.startswith(said) and error.code == backend.TritonError.INVALID_ARG
    counted = loaded.counted("latentrt_rejections_total")
    reasons = [(*labels, count - before.get(labels, 0)) for labels, count in counted.items()]
    code = "unsupported_size" if values.get("size") == "63x64" else "invalid_request"
    assert [each for each in reasons if each[-1]] == [(code, 1)]


def test_a_bad_request_harms_none_of_those_that_come_with_it(loaded: Loaded) -> None:
    requests = [
        backend.Request(NAMES, **{name: array_of(name, value) for name, value in {**FEW, **other}.items()})
        for other in ({}, {"size": "63x64"}, {})
    ]
    del requests[0].inputs["prompt"]
    loaded.model.execute(requests)
    assert all(request.sender.answered.wait(60) for request in requests)
    errors = [request.sender.responses[0].error for request in requests]
    assert errors[0] and errors[0].message == "prompt is missing: give a text"
    assert errors[1] and errors[1].message.startswith("width is 63") and errors[2] is None


def test_every_kind_of_error_has_a_code() -> None:
    kinds = {
        "INVALID_ARG": RequestError("x"),
        "UNAVAILABLE": QueueFullError("x"),
        "CANCELLED": CancelledError(),
        "INTERNAL": EngineError("x"),
    }
    assert {code: code_of(error) for code, error in kinds.items()} == {code: code for code in kinds}
    assert code_of(DeadlineError("x")) == code_of(UnavailableError("x", "y")) == "UNAVAILABLE"
    assert code_of(ZeroDivisionError()) == "INTERNAL"


@pytest.mark.parametrize(
    "error",
    [
        RequestError("x"),
        RefusedError("x", "size", "unsupported_size"),
        NotFoundError("x", "model", "model_not_found"),
        QueueFullError("x", 1.0),
        BusyError("x", "key_busy"),
        BusyError("x", "model_not_loaded"),
        DeadlineError("x", 3.0),
        DeadlineError("x"),
        UnavailableError("x", "draining"),
        StorageError("x"),
        BundleError("x"),
        EngineError("x"),
        ZeroDivisionError(),
    ],
    ids=repr,
)
def test_rejections_have_the_servers_reasons(error: Exception) -> None:
    metrics = pytest.importorskip("latentrt.runtime.server.metrics", reason="needs the serve extra").Metrics()
    answer = importlib.import_module("latentrt.runtime.server.errors").api_error(error)
    metrics.answered("POST", "/v1/images/generations", answer.status, 0.0, answer.code)
    (family,) = (each for each in metrics.registry.collect() if each.name == "latentrt_rejections")
    counted = [sample.labels["reason"] for sample in family.samples if sample.name.endswith("_total")]
    assert [reason for reason in [reason_of(error)] if reason] == counted


def test_folders_of_the_server_are_not_for_clients(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code in (
        (StorageError("cannot write /srv/a"), "UNAVAILABLE"),
        (BundleError("/srv/b is missing"), "INTERNAL"),
    ):
        failing = Mock(side_effect=error)
        monkeypatch.setattr(loaded.model._serving.service, "submit", failing)
        (response,) = loaded.ask(**FEW).responses
        assert response.error is not None and response.error.code == getattr(backend.TritonError, code)
        assert "/srv" not in response.error.message and "its log says which" in response.error.message


def test_a_client_that_is_gone_frees_its_place(loaded: Loaded, held: threading.Event) -> None:
    before = loaded.counted("latentrt_requests_total").get(("cancelled",), 0.0)
    gone, stays = loaded.ask(**FEW), loaded.ask(**FEW)
    gone.cancelled = True
    assert gone.answered.wait(60)
    assert [(each.error.message, each.error.code) for each in gone.responses if each.error] == [
        ("the request was cancelled", backend.TritonError.CANCELLED)
    ]
    held.set()
    assert stays.answered.wait(60) and stays.responses[0].error is None
    assert loaded.counted("latentrt_requests_total")[("cancelled",)] == before + 1


def test_no_request_is_asked_once_its_last_response_is_sent(loaded: Loaded, held: threading.Event) -> None:
    """Triton's server crashes then."""
    sender, asked, found = backend.Sender(), threading.Event(), list[bool]()

    def is_cancelled() -> bool:
        if not asked.is_set():
            (job,) = loaded.model._serving.service.unfinished
            asked.set()
            assert job.wait(60)
            found.append(sender.answered.wait(0.3))
        return False

    sender.is_cancelled = is_cancelled  # type: ignore[method-assign]
    loaded.ask(**FEW, sender=sender)
    assert asked.wait(60)
    held.set()
    assert sender.answered.wait(60) and found == [False]


def test_a_look_at_requests_that_fails_is_not_the_last_one(
    loaded: Loaded, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read, serving = threading.Event(), threading.Event(), loaded.model._serving

    def fails(event: threading.Event) -> Any:
        event.set()
        raise RuntimeError("the pipe is broken")

    monkeypatch.setattr("latentrt.runtime.triton.serving.READ_POLLS", 1)
    monkeypatch.setattr(serving.metrics, "read", lambda batcher: fails(read))
    broken, gone = backend.Sender(), backend.Sender()
    monkeypatch.setattr(broken, "is_cancelled", lambda: fails(asked))
    for sender in (broken, gone):
        loaded.ask(**FEW, sender=sender)
    assert asked.wait(60) and read.wait(60)
    gone.cancelled = True
    assert gone.answered.wait(60) and not broken.answered.is_set()
    held.set()
    assert broken.answered.wait(60) and "image" in broken.responses[-1].tensors


def test_a_full_queue_and_a_deadline_are_said(loaded: Loaded, held: threading.Event) -> None:
    before = loaded.counted("latentrt_rejections_total").get(("queue_full",), 0.0)
    taken = [loaded.ask(**FEW, n=6), loaded.ask(**FEW, n=6)]
    full, late = loaded.ask(**FEW), taken[0]
    assert full.answered.is_set() and full.responses[0].error
    assert full.responses[0].error.code == backend.TritonError.UNAVAILABLE
    assert "at most 12 may; try later" in full.responses[0].error.message
    assert loaded.counted("latentrt_rejections_total")[("queue_full",)] == before + 1
    held.set()
    assert all(sender.answered.wait(120) for sender in taken) and late.responses[0].error is None
    late = loaded.ask(**{**FEW, "num_inference_steps": 60}, microseconds=1)  # by Triton's own parameter
    assert late.answered.wait(60) and late.responses[0].error
    assert late.responses[0].error.code == backend.TritonError.UNAVAILABLE


def test_a_bug_is_said_without_its_text(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(loaded.model._serving.service, "submit", broken)
    sender = loaded.ask(**FEW)
    assert sender.responses[0].error
    assert sender.responses[0].error.message == "the model failed, which is a bug: the server's log has the traceback"
    assert sender.responses[0].error.code == backend.TritonError.INTERNAL and "a secret" in caplog.text


def test_a_probe_is_answered_without_drawing(loaded: Loaded, held: threading.Event) -> None:
    waits = loaded.ask(**FEW)
    sender = loaded.ask(prompt="", probe=True)
    assert sender.answered.is_set()
    facts = json.loads(sender.responses[0].tensors["facts"][0])
    assert facts == {"state": "ready", "waiting": 1, "running": 0}
    held.set()
    assert waits.answered.wait(60)


def test_a_model_that_is_unloaded_finishes_what_it_has(tmp_path: Path) -> None:
    found = load(tmp_path, SETTINGS)
    sender = found.ask(**{**FEW, "num_inference_steps": 20})
    found.model.finalize()
    assert sender.answered.is_set() and "image" in sender.responses[-1].tensors
    for late in (found.ask(**FEW), found.ask(prompt="", probe=True)):
        assert late.responses[0].error and late.responses[0].error.code == backend.TritonError.UNAVAILABLE
    assert found.counted("latentrt_rejections_total") == {("draining",): 1.0}, "a probe is no request"


def test_a_device_that_keeps_failing_ends_the_server(
    held: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients get an answer, Triton's process a SIGTERM, and ours is gone."""
    found, ended = load(tmp_path, SETTINGS), []
    serving = found.model._serving

    def gone(code: int) -> None:
        ended.append(("exit", code))
        serving._closing.set()

    monkeypatch.setattr("latentrt.runtime.triton.serving.time.sleep", lambda _: None)
    monkeypatch.setattr("latentrt.runtime.triton.serving.os.kill", lambda *what: ended.append(("kill", what)))
    monkeypatch.setattr("latentrt.runtime.triton.serving.os._exit", gone)
    sender = found.ask(**FEW)
    (model,) = serving.service.models
    model.batcher._tally.failures_in_a_row = 3
    assert serving._closing.wait(60) and sender.answered.wait(60)
    assert sender.responses[0].error and sender.responses[0].error.message == "the device fails: try again"
    late = found.ask(**FEW)
    assert late.responses[0].error and late.responses[0].error.code == backend.TritonError.UNAVAILABLE
    held.set()
    found.model.finalize()
    server = os.getppid()
    assert ended == [("kill", (server, signal.SIGTERM)), ("kill", (server, signal.SIGKILL)), ("exit", 70)]
