"""The model repository: what Triton reads of it, and that it is written whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import BundleError, RequestError, StorageError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.cli import run
from latentrt.runtime.triton import fields, model
from latentrt.runtime.triton.repository import config_of, write_repository
from latentrt.runtime.triton.settings import TritonSettings, parameters_of, settings_of

from .config import KINDS, TYPES, parsed

CHANGED = TritonSettings(
    bundle="here",
    backend="onnxruntime-cpu",
    options={"threads": 1, "name": 'a "quoted" \\ text\nof ünïcode'},
    slots=3,
    rows=5,
    fixed_rows=True,
    max_waiting=7,
    sizes=[(64, 64), (128, 64)],
    sizes_only=True,
    max_images=2,
    max_steps=30,
    max_work=1.5,
    timeout=9.5,
    step_timeout=3.25,
    drain_timeout=4.0,
)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(ensure_bundle())


@pytest.mark.parametrize("kind", [kind.lower() for kind in KINDS])
def test_the_configuration_says_what_the_model_is(kind: str) -> None:
    config = parsed(config_of("a-model.1", CHANGED, kind))
    assert (config.name, config.backend, config.max_batch_size) == ("a-model.1", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [(group.kind, group.count) for group in config.instance_group] == [(KINDS[kind.upper()], 1)]
    for said, specs in ((config.input, fields.INPUTS), (config.output, fields.OUTPUTS)):
        assert [(each.name, each.data_type, tuple(each.dims)) for each in said] == [
            (spec.name, TYPES[spec.kind], spec.dims) for spec in specs
        ]
    assert [each.name for each in config.input if not each.optional] == ["prompt"]


def test_parameters_survive_the_configuration() -> None:
    values = {each.key: each.value.string_value for each in parsed(config_of("m", CHANGED)).parameters}
    assert set(values) == {field.name for field in fields_of(TritonSettings)}, "a setting was not changed by this test"
    assert settings_of(values) == CHANGED
    assert settings_of(parameters_of(TritonSettings())) == TritonSettings() and not parameters_of(TritonSettings())
    assert settings_of({"EXECUTION_ENV_PATH": "/env.tar.gz"}) == TritonSettings(), "the Python backend's own"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"slot": "3"}, "parameter slot is not known: choose bundle, backend,"),
        ({"slots": "three"}, "parameter slots is 'three', which is no JSON"),
        ({"slots": "[3]"}, r"parameter slots is \[3\]: input should be a valid integer"),
        ({"sizes": "[[64]]"}, "parameter sizes is "),
        ({"step_timeout": "0"}, "parameter step_timeout is 0: input should be greater than 0"),
        ({"step_timeout": "Infinity"}, "parameter step_timeout is inf: input should be less than"),
        ({"step_timeout": "NaN"}, "parameter step_timeout is nan: "),
        ({"drain_timeout": "-1"}, "parameter drain_timeout is -1: input should be greater than or equal to 0"),
        ({"drain_timeout": "Infinity"}, "parameter drain_timeout is inf: "),
    ],
)
def test_parameters_that_are_wrong_are_named(parameters: dict[str, str], said: str) -> None:
    with pytest.raises(RequestError, match=f"^{said}"):
        settings_of(parameters)


def test_a_repository_links_to_its_bundle(bundle: Bundle, tmp_path: Path) -> None:
    folder = write_repository(bundle, tmp_path / "new" / "models", TritonSettings(), name="m")
    assert folder == tmp_path / "new" / "models" / "m"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    assert files == ["1/model.py", "config.pbtxt"]
    assert (folder / "1" / "bundle").resolve() == bundle.path.resolve()
    assert (folder / "1" / "model.py").read_bytes() == Path(model.__file__).read_bytes()
    assert Bundle.open(folder / "1" / "bundle").manifest == bundle.manifest


def test_a_repository_with_a_copy_stands_alone(bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "bundle"
    shutil.copytree(bundle.path, source)
    (source / "notes.txt").write_text("not of the bundle")
    folder = write_repository(Bundle.open(source), tmp_path / "models", TritonSettings(), name="m", copy=True)
    shutil.rmtree(source)
    copied = Bundle.open(folder / "1" / "bundle")
    assert copied.problems() == {} and not (copied.path / "notes.txt").exists()
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_python_finds_what_the_repository_names(bundle: Bundle, tmp_path: Path) -> None:
    folder = write_repository(bundle, tmp_path, TritonSettings(), name="m", python_path=[tmp_path])
    assert (folder / "1" / "python_path.txt").read_text(encoding="utf-8").splitlines() == [str(tmp_path)]
    with pytest.raises(RequestError, match="missing, which is no folder: give one that holds packages"):
        write_repository(bundle, tmp_path, TritonSettings(), name="n", python_path=[tmp_path / "missing"])


def test_what_is_there_stays_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "models", TritonSettings(slots=1), name="one")
    write_repository(bundle, tmp_path / "models", TritonSettings(), name="two")
    before = (tmp_path / "models" / "one" / "config.pbtxt").read_bytes()
    with pytest.raises(StorageError, match="one already exists: remove it, or choose another --name or output"):
        write_repository(bundle, tmp_path / "models", TritonSettings(slots=2), name="one")
    assert (tmp_path / "models" / "one" / "config.pbtxt").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["one", "two"]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file is no folder: choose another output"):
        write_repository(bundle, tmp_path / "file", TritonSettings(), name="m")


@pytest.mark.parametrize("fault", ["a damaged file", "a full disk"])
def test_nothing_is_left_of_what_failed(
    fault: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "bundle"
    shutil.copytree(bundle.path, source)
    if fault == "a damaged file":
        (source / "tokenizer.json").write_bytes(b"{}")
        error, said = BundleError, "is damaged: tokenizer.json"
    else:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("latentrt.runtime.triton.repository.shutil.copyfile", full)
        error, said = StorageError, "No space left on device; free space or choose another place"
    with pytest.raises(error, match=said):
        write_repository(Bundle.open(source), tmp_path / "models", TritonSettings(), name="m", copy=True)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_command_writes_what_its_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--name", "m", "--size", "64x64", "--sizes-only", "--slots", "3", "--rows", "5", "--fixed-rows"]
    given += ["--max-waiting", "7", "--backend", "onnxruntime-cpu", "--threads", "1", "--instances", "cpu"]
    assert run(["triton-repository", str(ensure_bundle()), str(tmp_path / "models"), *given]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/models/m: tritonserver --model-repository {tmp_path}/models\n"
    config = parsed((tmp_path / "models" / "m" / "config.pbtxt").read_text(encoding="utf-8"))
    of_command = replace(
        TritonSettings(), backend="onnxruntime-cpu", options={"threads": 1}, slots=3, rows=5, fixed_rows=True
    )
    expected = replace(of_command, max_waiting=7, sizes=[(64, 64)], sizes_only=True)
    assert settings_of({each.key: each.value.string_value for each in config.parameters}) == expected
    assert config.instance_group[0].kind == KINDS["CPU"]


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--slots", "8", "--rows", "4"], "rows is 4: give a whole number from 8", 2),
        (["--size", "63x64"], "the width of --size is 63: this bundle needs a multiple of 8; try 56 or 64", 2),
        (["--name", "a/b"], "--name is 'a/b': give letters, digits, dots, dashes and underlines", 2),
        (["--backend", "nonsense"], "--backend 'nonsense' is not known", 2),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], said: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["triton-repository", str(ensure_bundle()), str(tmp_path / "models"), *arguments]) == code
    assert said in capsys.readouterr().err and not (tmp_path / "models").exists()
