"""Plans built in a child process: whatever becomes of it, the program gets a plan or one clear error, and no orphan."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import psutil
import pytest
from latentrt.engines import errors
from latentrt.engines.errors import EngineError, LatentRTError, MissingExtraError
from latentrt.engines.tensorrt import child, worker
from latentrt.engines.tensorrt.child import build_in_child
from latentrt.engines.tensorrt.library import load_library
from latentrt.engines.tensorrt.plan import PlanOptions, Profile
from onnx import TensorProto, helper

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")

LIBRARY: Any = SimpleNamespace(backend="tensorrt-rtx", version="0.0")
PROFILE = Profile({"x": ((1, 8), (2, 8), (4, 8))})
STUB = """
import sys; sys.path[:] = sys.argv[1:]
import json, logging, os, signal, time
from pathlib import Path
from latentrt.engines.tensorrt import worker
def build(request, answer):
    {body}
    return {{"pid": os.getpid(), **request}}
worker._build = build
worker.main()
"""
"""A child whose library does what a test says."""


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Give every test children of its own, and end them."""
    child.end_all()
    yield
    child.end_all()


def stub(patch: pytest.MonkeyPatch, body: str) -> None:
    patch.setattr(child, "PROGRAM", STUB.format(body=body.replace("\n", "\n    ")))


def build(folder: Path, library: Any = LIBRARY, **how: Any) -> dict[str, Any]:
    return build_in_child(library, folder / "denoiser.onnx", folder / "plan", PROFILE, PlanOptions(tf32=True), **how)


def is_gone(pid: int) -> bool:
    """Tell whether a process ends within some seconds; one that nobody has asked about yet has ended."""
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_request_arrives_whole_and_progress_and_what_is_logged_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = """
print("a library that prints")
os.write(1, b"and one that is not Python")
answer({"progress": ["tactics", 3, 7]})
logging.getLogger("latentrt.engines.tensorrt.library").info("a note: %s", Path.cwd())
logging.getLogger("latentrt.engines.tensorrt.library").debug("a detail")"""
    stub(monkeypatch, body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THE_PARENT", "yes")
    (tmp_path / "json.py").write_text("raise RuntimeError('the user has a module of this name')")
    steps: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO, "latentrt"):
        facts = build(
            Path(), compute_capability="8.9", timing_cache=Path("t"), progress=lambda *step: steps.append(step), gpu=3
        )
    assert steps == [("tactics", 3, 7)]
    notes = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    assert notes == [("latentrt.engines.tensorrt.library", "INFO", f"a note: {tmp_path}")]
    assert facts["graph"] == str(tmp_path / "denoiser.onnx") and facts["output"] == str(tmp_path / "plan")
    assert worker.profile_from_json(facts["profile"]) == PROFILE and PlanOptions(**facts["options"]).tf32
    assert (facts["compute_capability"], facts["timing_cache"], facts["gpu"]) == ("8.9", str(tmp_path / "t"), 3)


class Here:
    """A child that is this process."""

    def ask(self, request: dict[str, Any], progress: Any) -> dict[str, Any]:
        return worker.serve(json.loads(json.dumps(request)), lambda answer: progress(*answer["progress"]))

    def close(self) -> int:
        return 0


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Build in this process, and return what `build_plan` is called with; GPUs are noted as they are made current."""
    called: list[dict[str, Any]] = []

    def build_plan(library: Any, graph: Path, output: Path, profile: Profile, options: PlanOptions, **how: Any) -> Any:
        progress, activate = how.pop("progress"), how.pop("activate")
        if progress is not None:
            progress("tactics", 3, 7)
        gpu = None if activate is None else activate()
        called.append({"graph": graph, "output": output, "profile": profile, "options": options, "gpu": gpu, **how})
        return {"plan_bytes": 5}

    monkeypatch.setattr(child, "_take", lambda backend, gpu: Here())
    monkeypatch.setattr(child, "_keep", lambda child: None)
    monkeypatch.setattr(worker, "load_library", lambda name: SimpleNamespace(backend=name, version=LIBRARY.version))
    monkeypatch.setattr(worker, "build_plan", build_plan)
    monkeypatch.setattr(worker, "CudaContext", lambda gpu: SimpleNamespace(activate=lambda: gpu))
    worker._context.cache_clear()
    yield called
    worker._context.cache_clear()


@pytest.mark.parametrize("gpu", [None, 0, 3])
def test_a_child_builds_what_it_was_asked_for(tmp_path: Path, here: list[dict[str, Any]], gpu: int | None) -> None:
    steps: list[tuple[str, int, int]] = []
    files = {"timing_cache": tmp_path / "timings"} if gpu else {}
    facts = build(tmp_path, compute_capability="8.9", progress=lambda *step: steps.append(step), gpu=gpu, **files)
    wanted = {"graph": tmp_path / "denoiser.onnx", "output": tmp_path / "plan", "timing_cache": None, **files}
    wanted |= {"profile": PROFILE, "options": PlanOptions(tf32=True), "gpu": gpu, "compute_capability": "8.9"}
    assert here == [wanted] and facts == {"plan_bytes": 5} and steps == [("tactics", 3, 7)]
    build(tmp_path)
    assert len(here) == 2 and steps == [("tactics", 3, 7)]  # nobody asks for progress


def test_another_version_than_the_program_s_builds_nothing(tmp_path: Path, here: list[dict[str, Any]]) -> None:
    with pytest.raises(EngineError, match=r"tensorrt-rtx 1\.5 was replaced by 0\.0 while this program ran: start"):
        build(tmp_path, SimpleNamespace(backend="tensorrt-rtx", version="1.5"))
    assert not here


def test_a_child_serves_builds_that_follow_each_other_and_then_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "pass")
    monkeypatch.setattr(child, "IDLE", 600.0)  # longer than a busy machine takes to start another
    first, second = build(tmp_path)["pid"], build(tmp_path)["pid"]
    assert first == second != os.getpid()
    assert os.getsid(first) == first  # Ctrl-C in a terminal reaches its parent alone
    assert build(tmp_path, gpu=1)["pid"] != first  # it would hold memory of both
    os.kill(first, signal.SIGKILL)
    next(each for each in child._idle if each.pid == first)._process.wait()
    monkeypatch.setattr(child, "IDLE", 0.1)
    assert (third := build(tmp_path)["pid"]) != first
    assert is_gone(third)
    child.end_all()
    assert not child._idle


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_those_of_a_build_in_this_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(errors, name)
    if not isinstance(kind, type):
        return
    raised = MissingExtraError("rtx", "reading") if kind is MissingExtraError else kind("what was given: do this")

    def fail(request: Any, answer: Any) -> None:
        raise raised

    monkeypatch.setattr(worker, "_build", fail)
    error = child._error(worker.serve({"log_level": logging.NOTSET}, lambda message: None))
    assert type(error) is kind and str(error) == str(raised) and isinstance(error, LatentRTError)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_a_fork_has_no_child_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "pass")
    monkeypatch.setattr(child, "IDLE", 600.0)
    build(tmp_path)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that the fork does not have: it only counts
        process = os.fork()
    if process == 0:
        os.write(write, bytes([len(child._idle)]))
        os._exit(0)
    os.waitpid(process, 0)
    assert os.read(read, 1) == b"\0" and len(child._idle) == 1
    os.close(read)
    os.close(write)


def test_errors_of_the_system_and_of_unknown_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "raise OSError(28, 'No space left on device')")
    with pytest.raises(OSError, match="No space left") as full:
        build(tmp_path)
    assert full.value.errno == errno.ENOSPC
    stub(monkeypatch, "raise MemoryError")
    with pytest.raises(MemoryError):
        build(tmp_path)
    stub(monkeypatch, "request.no_such_method()")
    with pytest.raises(EngineError, match=r"tensorrt-rtx 0\.0 failed to build denoiser\.onnx \(AttributeError: "):
        build(tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.abort()", r"tensorrt-rtx 0\.0 crashed \(SIGABRT\) while it built denoiser\.onnx: use another backend"),
        ("os._exit(3)", r"tensorrt-rtx 0\.0 ended with exit code 3 while it built denoiser\.onnx"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed while it built .*memory runs out: use a smaller size"),
    ],
)
def test_a_crash_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    stub(monkeypatch, f"Path('core_limit').write_text(str(__import__('resource').getrlimit(4)[0]))\n{body}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match=message) as error:
        build(tmp_path)
    assert "\n" not in str(error.value)
    assert not child._idle and [file.name for file in tmp_path.iterdir()] == ["core_limit"]
    assert (tmp_path / "core_limit").read_text() == "0"


def test_a_python_that_does_not_start_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in (str(tmp_path / "python"), None):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(EngineError, match="cannot be started to build plans"):
            build(tmp_path)


def test_progress_that_raises_ends_the_child_and_what_it_was_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
from latentrt.engines.files import temporary_beside
with temporary_beside(Path(request["timing_cache"])) as half:
    half.write_bytes(b"half")
    answer({"progress": ["writing", os.getpid(), 1]})
    time.sleep(600)"""
    stub(monkeypatch, body)
    pids = []

    def stop(stage: str, done: int, total: int) -> None:
        pids.append(done)
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, timing_cache=tmp_path / "timings", progress=stop)
    assert is_gone(pids[0]) and not child._idle and not list(tmp_path.iterdir())


PARENT = """
import signal, sys
from pathlib import Path
from types import SimpleNamespace
signal.signal(signal.SIGINT, signal.default_int_handler)
from latentrt.engines.tensorrt import child
from latentrt.engines.tensorrt.plan import PlanOptions, Profile
child.PROGRAM = sys.argv[1]
library = SimpleNamespace(backend="tensorrt-rtx", version="0.0")
show = lambda stage, done, total: print(done, flush=True)
child.build_in_child(library, Path("g"), Path("p"), Profile({}), PlanOptions(), progress=show)
"""
"""A user's script, without a guard against being imported."""


@pytest.mark.parametrize(("number", "code"), [("SIGINT", -2), ("SIGTERM", -15), ("SIGKILL", -9)])
def test_a_child_ends_with_its_parent(tmp_path: Path, number: str, code: int) -> None:
    sleeping = STUB.format(body="answer({'progress': ['s', os.getpid(), 1]}); time.sleep(600)")
    (tmp_path / "script.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "script.py"), sleeping]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.Process(pid).ppid() == parent.pid
        parent.send_signal(getattr(signal, number))
        _, err = parent.communicate(timeout=60)
    assert parent.returncode == code and ("KeyboardInterrupt" in err) == (number == "SIGINT")
    assert is_gone(pid) and [file.name for file in tmp_path.iterdir()] == ["script.py"]


def attention_graph(folder: Path, count: int) -> Path:
    """Write attentions of one query; TensorRT-RTX 1.7.1 does not survive two."""
    sizes = [1, 2, 16, 8]
    names = ["x", "v", *(f"k{number}" for number in range(count))]
    nodes = [
        helper.make_node("Attention", ["x", f"k{number}", "v"], [f"a{number}"], scale=0.5) for number in range(count)
    ]
    nodes.append(helper.make_node("Sum", [f"a{number}" for number in range(count)], ["y"]))
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in each] for each in (names, ["y"])
    )
    model = helper.make_model(
        helper.make_graph(nodes, "attention", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.save(model, folder / f"{count}.onnx")
    return folder / f"{count}.onnx"


def test_the_library_may_crash_and_the_next_build_works(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    library = load_library("tensorrt-rtx")

    def built(count: int) -> int:
        graph = attention_graph(tmp_path, count)
        names = ["x", "v", *(f"k{number}" for number in range(count))]
        profile = Profile.of(dict.fromkeys(names, (1, 2, 16, 8)))
        facts = build_in_child(library, graph, tmp_path / "plan", profile, PlanOptions(), compute_capability="8.9")
        assert [t["name"] for t in facts["tensors"]] == [*names, "y"]
        return int(facts["plan_bytes"])

    assert built(1) == (tmp_path / "plan").stat().st_size > 0
    (tmp_path / "plan").unlink()
    try:
        built(2)
    except EngineError as error:
        assert f"tensorrt-rtx {library.version} crashed (SIGSEGV) while it built 2.onnx" in str(error)
        assert not (tmp_path / "plan").exists()
    else:
        assert not library.version.startswith("1.7.1"), "it did not crash"
    assert built(1) > 0


def test_a_library_that_was_replaced_meanwhile_builds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    with pytest.raises(EngineError, match=r"tensorrt-rtx 0\.0 was replaced by 1\..*: start it again"):
        build(tmp_path)
