"""Files that go bad while a server runs: a full disk, damaged engines and bundles; each is mended without a restart."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.batcher import Batcher
from PIL import Image

from .conftest import FEW, Served, error_of, generate, png, until

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.name == "nt", reason="limits and mounts are POSIX's")]

SHARE = 20_000
"""Bytes that a file may have where a user's share of a disk is full."""


class Disk:
    """A folder for engines that can be full, and be written or not."""

    def __init__(self, home: Path, *, mounted: bool) -> None:
        self.home, self._mounted = home, mounted

    @contextmanager
    def full(self) -> Iterator[None]:
        """Let nothing more be written inside the block: on a file system that is full, or over a user's share."""
        if not self._mounted:
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (SHARE, hard))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            return
        ballast = self.home / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        try:
            yield
        finally:
            ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        if not self._mounted:
            pytest.skip("nothing can be mounted here, and root may write everywhere")
        assert mount("-o", "remount,bind,ro", str(self.home))  # where files are removed and open, too
        try:
            yield
        finally:
            assert mount("-o", "remount,bind,rw", str(self.home))

    @property
    def engines(self) -> list[Path]:
        """The files of all engines."""
        return sorted(file for file in (self.home / "engines").glob("*-*/*") if file.suffix in (".onnx", ".data"))

    def drop(self) -> None:
        """Remove the cache."""
        shutil.rmtree(self.home / "engines")


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", params=["file system", "share"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    home, mounted = tmp_path_factory.mktemp("disk"), request.param == "file system"
    if mounted and not mount("-t", "tmpfs", "-o", "size=128m", "tmpfs", str(home)):
        pytest.skip("nothing can be mounted here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTRT_HOME", str(home))
        patch.setattr(Batcher, "warm_up", lambda *_: None)
        yield Disk(home, mounted=mounted)
    if mounted:
        subprocess.run(["umount", "-l", str(home)], check=True)


@pytest.fixture(scope="module")
def pair(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, httpx2.Client, Path]]:
    """A server of two bundles, of which the second one lies in a folder of its own."""
    folder = tmp_path_factory.mktemp("bundles") / "two"
    shutil.copytree(ensure_bundle(), folder)
    bundles = {"one": Bundle.open(ensure_bundle()), "two": Bundle.open(folder)}
    with Served(bundles) as served, served.http() as http:
        yield served, http, folder


def reopened(served: Served, http: httpx2.Client) -> httpx2.Response:
    """Close the second bundle, as if there had been no room for it, and ask it for a picture."""
    model = served.service.models.find("two")
    model.close(model.taken())
    return generate(http, model="two")


def drawn(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["b64_json"])


def well(served: Served, http: httpx2.Client) -> str:
    """Return the picture of both bundles, which are open and have nothing left to do."""
    one, two = (drawn(generate(http, model=name)) for name in ("one", "two"))
    assert one == two
    until(lambda: not served.service.unfinished)
    for model in served.service.models:
        assert model.batcher is not None
        assert (model.unfinished, model.batcher.waiting, model.batcher.running) == (0, 0, 0)
        assert model.batcher.failures_in_a_row == 0
    return one


def edited(http: httpx2.Client) -> httpx2.Response:
    """Have a picture redrawn that is larger than the share."""
    noise = Image.effect_noise((256, 256), 60).convert("RGB")
    form = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": "2"}
    return http.post("/v1/images/edits", data=form, files={"image": ("a.png", png(noise), "image/png")})


def refused(answer: httpx2.Response, status: int, code: str, *places: Path) -> None:
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    assert not any(str(place) in answer.text for place in places)  # which is not for clients


def test_a_full_disk_stops_what_must_be_written_and_nothing_else(
    pair: tuple[Served, httpx2.Client, Path], disk: Disk
) -> None:
    served, http, _ = pair
    before = well(served, http)
    assert edited(http).status_code == 200  # as warming up does, it opens what encodes pictures
    with disk.full():
        assert drawn(reopened(served, http)) == before  # its engines are there
        assert edited(http).status_code == 200
        body = {"prompt": "a red circle", "size": "64x64", **FEW}
        ids = {http.post("/v1/jobs", json=body, headers={"idempotency-key": "a"}).json()["id"] for _ in range(2)}
        job = f"/v1/jobs/{ids.pop()}"
        assert not ids and until(lambda: http.get(job).json()["state"] == "succeeded")
        assert Image.open(io.BytesIO(http.get(f"{job}/images/0").content)).size == (64, 64)
    disk.drop()
    with disk.full():
        for _ in range(4):  # more than failures that end a process
            answer = reopened(served, http)
            refused(answer, 503, "storage", disk.home)
            assert int(answer.headers["retry-after"]) > 1
            assert drawn(generate(http, model="one")) == before  # its engines are gone, and it runs
        assert list((disk.home / "engines").glob("*-*")) == []
        assert list((disk.home / "engines" / ".building").glob("*")) == []
        with http.stream("POST", "/v1/images/generations", json={**body, "model": "two", "stream": True}) as stream:
            assert '"code": "storage"' in stream.read().decode().replace('":"', '": "')
    assert drawn(reopened(served, http)) == before and well(served, http) == before


def test_a_cache_that_cannot_be_written(pair: tuple[Served, httpx2.Client, Path], disk: Disk) -> None:
    served, http, _ = pair
    before = well(served, http)
    with disk.read_only():
        assert drawn(reopened(served, http)) == before
    disk.drop()
    with disk.read_only():
        refused(reopened(served, http), 503, "storage", disk.home)
        assert drawn(generate(http, model="one")) == before
    assert drawn(reopened(served, http)) == before and well(served, http) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "a folder"])
def test_engines_that_are_damaged_are_built_again(
    pair: tuple[Served, httpx2.Client, Path], disk: Disk, damage: str
) -> None:
    served, http, _ = pair
    before = well(served, http)
    model = served.service.models.find("two")
    model.close(model.taken())
    for file in disk.engines:
        data = bytearray(file.read_bytes())
        file.unlink()  # another file in its place: what the first bundle has mapped is as it was
        if damage == "flipped":
            data[len(data) // 2] ^= 0x40
        if damage == "a folder":
            file.mkdir()
        elif damage != "gone":
            file.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    assert drawn(generate(http, model="one")) == before
    assert drawn(generate(http, model="two")) == before
    assert drawn(reopened(served, http)) == before and well(served, http) == before


@pytest.mark.parametrize("name", ["denoiser.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_bundle_that_is_damaged_draws_nothing_until_it_is_mended(
    pair: tuple[Served, httpx2.Client, Path], disk: Disk, name: str, damage: str
) -> None:
    """Also where the file was right when the bundle was opened first: no wrong picture."""
    served, http, folder = pair
    before = well(served, http)
    file = folder / name
    data = file.read_bytes()
    wrong = bytearray(data)
    wrong[len(data) // 2] ^= 0x40
    file.unlink()
    if damage != "gone":
        file.write_bytes(wrong if damage == "flipped" else data[: len(data) // 2])
    assert drawn(generate(http, model="two")) == before  # it is open, and goes on
    disk.drop()
    for _ in range(2):
        answer = reopened(served, http)
        refused(answer, 500, "bundle_damaged", folder, disk.home)
        assert answer.headers["x-should-retry"] == "false"
        assert drawn(generate(http, model="one")) == before
    assert served.service.models.find("two").state == "failed" and http.get("/health").status_code == 200
    file.write_bytes(data)
    assert drawn(generate(http, model="two")) == before and well(served, http) == before


def test_a_size_that_must_be_compiled_on_a_full_disk_harms_no_other(tmp_path_factory: pytest.TempPathFactory) -> None:
    """OpenVINO compiles for a size when it is first drawn, in a turn of the loop."""
    pytest.importorskip("openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batcher, "warm_up", lambda *_: None)
        patch.setenv("LATENTRT_HOME", str(tmp_path_factory.mktemp("openvino")))
        disk = Disk(Path(os.environ["LATENTRT_HOME"]), mounted=False)
        with Served(backend="openvino") as served, served.http() as http:
            (model,) = served.service.models
            before = drawn(generate(http))
            with disk.full():
                for _ in range(2):
                    refused(generate(http, size="96x64"), 503, "storage", disk.home)
                    assert model.batcher is not None and model.batcher.failures_in_a_row == 0
                assert drawn(generate(http)) == before
            assert generate(http, size="96x64").status_code == 200 and drawn(generate(http)) == before


def test_a_log_on_a_full_disk_is_cut_and_requests_are_served(tmp_path: Path) -> None:
    """What stands behind a share's end is lost; the process ends as one whose log was written."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("limits of another process are Linux's")
    options = ["--port", "0", "--size", "64x64", "--backend", "onnxruntime-cpu", "--threads", "1", "--slots", "1"]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        child = subprocess.Popen([sys.executable, "-m", "latentrt.runtime", "serve", *options], stderr=stream)
    try:
        url = until(lambda: re.search(r"http://[\d.:]+", log.read_text()))[0]
        with httpx2.Client(base_url=url, timeout=60, verify=False) as http:
            until(lambda: http.get("/health").status_code == 200)
            until(lambda: generate(http).status_code == 200 and log.stat().st_size > 1000)
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1000, 1000))
            size = log.stat().st_size
            for _ in range(20):
                assert drawn(generate(http))
                assert generate(http, n=0).status_code == 400
        assert log.stat().st_size == size
        child.terminate()
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
