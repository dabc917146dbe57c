"""The model: requests of Triton's Python backend become jobs of a service, and what happens to a job its responses."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from ...engines.bundle import Bundle
from ...engines.device import Array
from ...engines.errors import LatentRTError, is_out_of_memory
from ..service import Ended, Event, Job, Models, Pictured, Previewed, Service, Stepped
from ..service.counts import fault_of
from ..service.errors import UnavailableError, told
from ..service.pictures import Picture
from .errors import code_of, reason_of
from .fields import DTYPES, INPUTS, OUTPUTS, Wanted, pixels_of, wanted_of
from .metrics import TritonMetrics
from .settings import settings_of

POLL_SECONDS = 0.1
"""How often requests are asked whether their clients are gone: the Python backend tells nobody by itself."""
READ_POLLS = 10
"""Polls between two readings of the metrics."""
ANSWER_SECONDS, END_SECONDS = 1.0, 10.0
"""Time for answers to reach clients, and for the server to end, before it is killed."""
HUNG = 70
"""The exit code of a process whose device hangs; the system's own for a software error."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Exchange:
    """A request of Triton's, and its job."""

    sender: Any
    outputs: frozenset[str]
    """Names of the outputs that were asked for."""
    wanted: Wanted
    job: Job
    steps: dict[int, Stepped] = field(default_factory=dict)
    """The last step of each image that was not sent yet: for a slow client, those before it are left out."""
    sent: set[int] = field(default_factory=set)
    """Images that were sent."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of the steps."""


class Serving:
    """One instance of the model: a process of its own, with a service of one bundle."""

    def __init__(self, args: Mapping[str, str], backend: Any) -> None:
        """Open the bundle and warm up; `args` and the module `backend` are those of Triton's Python backend.

        Raises what opening a bundle does.
        """
        self._backend, self._server = backend, os.getppid()
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self.settings = settings = settings_of({name: said["string_value"] for name, said in parameters.items()})
        if args.get("model_instance_kind") == "GPU":
            _see_only(int(args["model_instance_device_id"]))
        place = Path(args["model_repository"]) / args["model_version"] / settings.bundle
        self.metrics = TritonMetrics(backend, args["model_name"], args.get("model_instance_name", ""))
        models = Models({args["model_name"]: Bundle.open(place)}, settings.model, observer=self.metrics)
        self.service = Service(models, settings.limits)
        self._exchanges: set[Exchange] = set()
        self._lock = threading.Lock()
        self._events: SimpleQueue[tuple[Exchange, Event] | None] = SimpleQueue()
        self._closing = threading.Event()
        self.service.open()
        self._threads = [
            threading.Thread(target=target, name=f"latentrt triton {target.__name__}", daemon=True)
            for target in (self._send, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Queue requests; what is wrong with one is its only response."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._begin(request, sender)
            except Exception as error:
                if (reason := reason_of(error)) is not None:
                    self.metrics.rejected(reason)
                self._fail(sender, error)

    def _begin(self, request: Any, sender: Any) -> None:
        inputs: dict[str, Array] = {}
        for spec in INPUTS:
            tensor = self._backend.get_input_tensor_by_name(request, spec.name)
            if tensor is not None:
                inputs[spec.name] = tensor.as_numpy()
        if "probe" in inputs and inputs["probe"].any():
            self._probed(sender)
            return
        wanted = wanted_of(inputs, request_id=request.request_id(), timeout=request.timeout() / 1e6 or None)
        names = frozenset(request.requested_output_names())
        steps = wanted.progress or wanted.work.previews > 0
        exchange = Exchange(sender, names, wanted, self.service.submit(wanted.work, steps=steps))
        with self._lock:
            self._exchanges.add(exchange)
        exchange.job.listen(lambda event: self._heard(exchange, event))

    def _probed(self, sender: Any) -> None:
        """Answer at once whether requests are taken: that this process is dead, Triton tells nobody but who asks it."""
        try:
            self.service.check_ready()
        except UnavailableError as error:
            self._fail(sender, error)
            return
        (model,) = self.service.models
        assert model.batcher is not None
        said = {"state": self.service.state, "waiting": model.batcher.waiting, "running": model.batcher.running}
        facts = self._backend.Tensor("facts", np.asarray([json.dumps(said)], np.object_))
        final = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        sender.send(self._backend.InferenceResponse([facts]), flags=final)

    def _heard(self, exchange: Exchange, event: Event) -> None:
        """Note an event for the sender's thread; on whatever thread it happens."""
        if isinstance(event, Stepped):
            if not exchange.wanted.progress:
                return
            with exchange.lock:
                before = exchange.steps.get(event.index)
                exchange.steps[event.index] = event
            if before is not None:
                return
        self._events.put((exchange, event))

    def _send(self) -> None:
        while (item := self._events.get()) is not None:
            exchange, event = item
            try:
                self._say(exchange, event)
            except Exception:  # such as shared memory that is full
                log.exception("a response could not be sent")
                if isinstance(event, Ended):
                    self._fail(
                        exchange.sender, LatentRTError("the result could not be sent: the server's log says why")
                    )
                else:
                    exchange.job.cancel()

    def _say(self, exchange: Exchange, event: Event) -> None:
        if isinstance(event, Stepped):
            with exchange.lock:
                last = exchange.steps.pop(event.index)
            self._respond(exchange, index=last.index, step=last.done, steps=last.total)
        elif isinstance(event, Previewed):
            self._respond(exchange, index=event.index, preview=_file(event.picture, exchange.wanted))
        elif isinstance(event, Pictured):
            if len(exchange.sent) + 1 < exchange.job.work.images:  # the last one waits for what is known at the end
                self._picture(exchange, event.index, event.picture)
        elif isinstance(event, Ended):
            with self._lock:
                self._exchanges.discard(exchange)
            if event.error is not None:
                self._fail(exchange.sender, event.error)
                return
            job = exchange.job
            left = sorted(set(job.pictures) - exchange.sent)
            for index in left:
                final = index == left[-1]
                facts = json.dumps(job.facts) if final else None
                self._picture(exchange, index, job.pictures[index], final=final, facts=facts)

    def _picture(self, exchange: Exchange, index: int, picture: Picture, **more: Any) -> None:
        wanted = exchange.wanted
        shown: Any = {"pixels": pixels_of(picture.data)} if wanted.raw else {"image": _file(picture, wanted)}
        self._respond(exchange, index=index, seed=picture.seed, **shown, **more)
        exchange.sent.add(index)

    def _respond(self, exchange: Exchange, *, final: bool = False, **values: Any) -> None:
        backend = self._backend
        tensors = [
            backend.Tensor(spec.name, np.asarray(value if spec.name == "pixels" else [value], DTYPES[spec.kind]))
            for spec in OUTPUTS
            if (value := values.get(spec.name)) is not None and spec.name in exchange.outputs
        ]
        flags = backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        if tensors:
            exchange.sender.send(backend.InferenceResponse(tensors), flags=flags)
        elif final:
            exchange.sender.send(flags=flags)

    def _fail(self, sender: Any, error: BaseException) -> None:
        """Send an error as the last response; the text of a bug stays in the log."""
        backend, known = self._backend, isinstance(error, LatentRTError | CancelledError)
        if not known:
            log.error("a request failed", exc_info=error)
        message = "the request was cancelled" if isinstance(error, CancelledError) else told(error) or str(error)
        if is_out_of_memory(error):
            message = "out of memory: ask for a smaller size or fewer pictures"
        elif not known:
            message = "the model failed, which is a bug: the server's log has the traceback"
        code = getattr(backend.TritonError, code_of(error), backend.TritonError.UNKNOWN)
        try:
            response = backend.InferenceResponse(output_tensors=[], error=backend.TritonError(message, code))
            sender.send(response, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as second:
            log.warning("an error could not be sent: %s", second)

    def _watch(self) -> None:
        """Cancel jobs whose clients are gone, read metrics, end the server when the device hangs or keeps failing."""
        for poll in itertools.count():
            if self._closing.wait(POLL_SECONDS):
                return
            for look in (self._check, self._drop, *([self._read] if poll % READ_POLLS == 0 else [])):
                try:
                    look()
                except Exception:  # all others are looked at, and again
                    log.exception("a look at requests or their batcher failed")

    def _check(self) -> None:
        for model in self.service.models:
            if (fault := fault_of(model.name, model.batcher, self.settings.step_timeout)) is not None:
                self._end(fault)

    def _drop(self) -> None:
        with self._lock:
            exchanges = list(self._exchanges)
        for exchange in exchanges:
            with self._lock:  # not once its last response is sent: the server would look at what it has freed
                try:
                    gone = exchange in self._exchanges and exchange.sender.is_cancelled()
                except Exception:
                    log.exception("a request cannot be asked whether its client is gone, and is not asked again")
                    self._exchanges.discard(exchange)
                    continue
            if gone:
                exchange.job.cancel()

    def _read(self) -> None:
        for model in self.service.models:
            if (batcher := model.batcher) is not None:
                self.metrics.read(batcher)

    def _end(self, what: str) -> None:
        """End the server, after clients have got their answers: whoever runs it is to start another.

        Triton neither starts this process again nor says that it is not ready when it is gone. Asked to end, it waits
        for this process, and for ever when a client holds a stream open.
        """
        log.critical("%s: ending the server", what)
        self.service.fail(UnavailableError("the device fails: try again", "failed", 10.0))
        time.sleep(ANSWER_SECONDS)
        os.kill(self._server, signal.SIGTERM)
        time.sleep(END_SECONDS)  # for other models' requests
        if os.getppid() == self._server:
            os.kill(self._server, signal.SIGKILL)
        os._exit(HUNG)

    def close(self) -> None:
        """Let requests finish in the time that they have, then close everything."""
        self.service.drain(self.settings.drain_timeout)
        self._closing.set()
        self.service.close()
        self._events.put(None)
        for thread in self._threads:
            thread.join()


def _file(picture: Picture, wanted: Wanted) -> bytes:
    return picture.text.encode() if wanted.base64 else picture.data


def _see_only(gpu: int) -> None:
    """Let this process, which has not used a GPU yet, see one alone."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
