"""Bad input at the command line: one line on standard error, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrt.runtime.cli import run
from PIL import Image

PROMPT = "a red circle on a blue background"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a few files that are no pictures, prompts or checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "short.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *words: str) -> None:
    """Run a command line and check its exit code and its one line of error; --quiet leaves lines of progress out."""
    assert run(["--quiet", *arguments]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("latentrt: error: ") and "Traceback" not in captured.err
    for word in words:
        assert word in lines[0], lines[0]
    assert captured.out == ""


USAGE: list[tuple[list[str], tuple[str, ...]]] = [
    (["--steps", "0"], ("--steps is 0", "greater than or equal to 1")),
    (["--steps", "-5"], ("--steps is -5",)),
    (["--steps", "many"], ("'many'", "--steps", "see `latentrt generate --help`")),
    (["--steps", "1001"], ("--steps 1001", "1000")),
    (["--seed", "-1"], ("--seed is -1",)),
    (["--seed", str(2**64)], ("--seed is 18446744073709551616",)),
    (["--seed", "x"], ("'x'", "--seed")),
    (["--seed", "1,2"], ("--seed is a list of 2",)),
    (["--sampler", "euler", "--timesteps", "100,999"], ("--timesteps must decrease",)),
    (["--sigmas", "a"], ("--sigmas is 'a': give numbers",)),
    (["--mask-padding", "3"], ("--mask-padding was given without --init-image",)),
    (["--size", "512"], ("--size is '512'", "WIDTHxHEIGHT")),
    (["--size", "0x64"], ("the width of --size is 0",)),
    (["--size", "0x0"], ("of --size is 0",)),
    (["--size", "64x63"], ("the height of --size is 63", "multiple of", "64")),
    (["--size", "99999x64"], ("the width of --size is 99999", "8192")),
    (["--size=-64x64"], ("--size is '-64x64'",)),
    (["--count", "0"], ("--count is 0",)),
    (["--guidance", "-1"], ("--guidance is -1",)),
    (["--guidance", "nan"], ("--guidance is nan",)),
    (["--guidance", "inf"], ("--guidance is inf",)),
    (["--eta", "2"], ("--eta is 2",)),
    (["--sampler", "magic"], ("--sampler 'magic'", "ddim")),
    (["--strength", "0.5"], ("--strength was given without --init-image",)),
    (["--mask", "picture.png"], ("--mask was given without --init-image",)),
    (["--init-image", "absent.png"], ("--init-image absent.png does not exist",)),
    (["--init-image", "notes.png"], ("--init-image notes.png cannot be read as a picture",)),
    (["--init-image", "picture.png", "--strength", "0"], ("--strength is 0",)),
    (["--init-image", "picture.png", "--strength", "1.5"], ("--strength is 1.5",)),
    (["--init-image", "picture.png", "--strength", "0.01", "--steps", "4"], ("--strength 0.01 of 4 steps",)),
    (["--init-image", "picture.png", "--mask", "notes.png"], ("--mask notes.png",)),
    (["--output", "picture.jpg"], ("--output picture.jpg", ".png")),
    (["--output", "one.png", "--count", "2"], ("--output one.png", "2 pictures")),
    (["--output", "-", "--count", "2"], ("--output -", "one picture of 2")),
    (["--output", "-", "--json"], ("--output -", "--json")),
    (["--backend", "quantum"], ("--backend 'quantum'", "onnxruntime-cpu")),
    (["--bundle", "nowhere"], ("bundle nowhere does not exist",)),
    (["--grid", "grid.jpg"], ("--grid grid.jpg", ".png")),
    (["--threads", "0"], ("--threads",)),
    (["--unknown"], ("--unknown", "see `latentrt generate --help`")),
    (["--quiet"], ("latentrt --quiet generate",)),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE, ids=[" ".join(a)[:40] for a, _ in USAGE])
def test_bad_flags(
    folder: Path,
    tiny_sd15_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    before = sorted(p.name for p in folder.iterdir())
    fails(capsys, ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle), *arguments], 2, *words)
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("prompts",)),
        ([PROMPT, "--prompts", "empty.txt"], ("either",)),
        (["--prompts", "absent.txt"], ("--prompts absent.txt does not exist",)),
        (["--prompts", "empty.txt"], ("empty.txt", "no prompts")),
        (["--prompts", "latin.txt"], ("latin.txt", "UTF-8")),
    ],
)
def test_bad_prompts(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]
) -> None:
    fails(capsys, ["generate", *arguments], 2, *words)


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "no manifest.json"),
    "manifest is no JSON": (lambda b: (b / "manifest.json").write_text("{"), "cannot be read as JSON"),
    "other version": (lambda b: edit_manifest(b, lambda m: m.update(format_version=7)), "format version 7"),
    "path escape": (
        lambda b: edit_manifest(b, lambda m: m["files"].update({"../x": {"size": 1, "sha256": "0" * 64}})),
        "leaves the bundle",
    ),
    "missing graph": (lambda b: (b / "denoiser.onnx").unlink(), "denoiser.onnx is missing"),
    "truncated graph": (lambda b: os.truncate(b / "denoiser.onnx", 100), "100 bytes"),
    "changed graph": (lambda b: flip(b / "denoiser.onnx"), "SHA-256"),
    "changed tokenizer": (lambda b: flip(b / "tokenizer.json"), "SHA-256"),
    "unknown scheduler": (
        lambda b: edit_manifest(b, lambda m: m["scheduler"].update(_class_name="MagicScheduler")),
        "MagicScheduler",
    ),
    "no denoiser": (
        lambda b: edit_manifest(b, lambda m: m.update(graphs=[g for g in m["graphs"] if g["name"] != "denoiser"])),
        "no graph 'denoiser'",
    ),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bundles(
    folder: Path,
    tiny_sd15_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(folder / "home"))  # no engine from before hides the damage
    bundle = folder / "bundle"
    shutil.copytree(tiny_sd15_bundle, bundle)
    change, message = DAMAGE[damage]
    change(bundle)
    fails(capsys, ["generate", PROMPT, "--bundle", str(bundle), "--steps", "2"], 1, message)
    assert not list(folder.glob("latentrt-*.png"))


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("absent-folder/", 2, ("absent-folder/ does not exist",)),
        ("model.ckpt", 1, ("pickle", "safetensors")),
        ("short.safetensors", 1, ("short.safetensors",)),
        (".", 1, ("model_index.json",)),
    ],
)
def test_bad_checkpoints(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    code: int,
    words: tuple[str, ...],
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(p.name for p in folder.iterdir())
    fails(capsys, ["export", source, "-o", "out"], code, *words)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_export_keeps_an_existing_bundle(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_sd15_bundle, folder / "bundle")
    fails(capsys, ["export", "model.ckpt", "-o", "bundle"], 1)
    assert run(["inspect", "bundle"]) == 0


def test_inspect_names_damage_and_fails(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_sd15_bundle, folder / "bundle")
    flip(folder / "bundle" / "decoder.onnx")
    assert run(["inspect", "bundle"]) == 1
    out = capsys.readouterr().out
    assert "decoder.onnx does not match its SHA-256" in out and "Traceback" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nowhere"], ("nowhere does not exist",)),
        (["build", "nowhere"], ("nowhere does not exist",)),
        (["build", "nowhere", "--backend", "quantum"], ("--backend 'quantum'",)),
        (["verify", "nowhere", "--against", "x"], ("nowhere does not exist",)),
        (["export", ".", "-o", "out", "--revision", "main"], ("--revision is for hub ids", "local path")),
        (["cache", "prune"], ("--older-than DAYS or --all",)),
        (["cache", "prune", "--older-than", "-1"], ("--older-than", "see `latentrt cache prune --help`")),
        (["genrate"], ("No such command 'genrate'", "see `latentrt --help`")),
        (["generate", "--bundel", "x"], ("--bundel", "--bundle")),
        (["--verbose", "env"], ("--verbose and --quiet",)),
    ],
)
def test_what_was_typed_wrong_is_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]
) -> None:
    fails(capsys, arguments, 2, *words)


def test_a_backend_that_cannot_run_here_is_1(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.engines.onnxruntime.cuda.no_driver", lambda: "no NVIDIA driver is installed")
    arguments = ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle), "--backend", "onnxruntime-cuda"]
    fails(capsys, arguments, 1, "no NVIDIA driver is installed")


def test_an_error_that_nobody_meant_is_one_line(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr("latentrt.runtime.pipeline.Pipeline.__call__", broken)
    arguments = ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle)]
    fails(capsys, arguments, 1, "ZeroDivisionError: division by zero (a bug: run with -vv for the traceback)")


def test_a_full_disk_leaves_no_picture(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle), "--steps", "1", "-o", "out"]
    fails(capsys, arguments, 1, "No space left")
    assert list((folder / "out").iterdir()) == []


def test_a_missing_extra_names_the_pip_command(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle), "--backend", "onnxruntime-cpu"]
    fails(capsys, arguments, 1, "pip install 'latentrt[cpu]'")


def test_an_interrupt_is_130(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentrt.runtime.pipeline.Pipeline.__call__", interrupted)
    fails(capsys, ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle)], 130, "interrupted")


@pytest.mark.parametrize("module", ["latentrt.runtime", "latentrt.runtime.cli"])
def test_the_modules_run_as_the_command_does(folder: Path, module: str) -> None:
    arguments = [sys.executable, "-m", module, "generate", PROMPT, "--bundle", "nowhere"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere does not exist" in done.stderr


def test_a_traceback_is_shown_to_who_asks(folder: Path) -> None:
    arguments = [sys.executable, "-m", "latentrt.runtime", "-vv", "generate", PROMPT, "--bundle", "nowhere"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("latentrt: error: bundle nowhere does not exist")
