"""A model repository for Triton: its configuration, the model's file, and the bundle, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from ...engines.bundle import Bundle, atomic_folder
from ...engines.bundle.manifest import MANIFEST
from ...engines.errors import BundleError, RequestError, StorageError
from . import fields
from .settings import TritonSettings, parameters_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
VERSION = "1"
KINDS = ("auto", "cpu", "gpu")


def write_repository(
    bundle: Bundle,
    repository: Path,
    settings: TritonSettings,
    *,
    name: str,
    copy: bool = False,
    kind: str = "auto",
    python_path: Sequence[Path] = (),
) -> Path:
    """Write `repository`/`name` for a bundle, and return its folder; other models in the repository stay as they are.

    The bundle is linked to, or with `copy` its files are copied, checked against their hashes. `kind` says where
    Triton starts instances: one on each GPU, one on the processor, or what there is; `python_path` are folders of
    packages that its Python does not find by itself. Raises `RequestError` for a name
    that is none, `StorageError` when the folder exists or cannot be written, and `BundleError` for damaged files.
    """
    if not NAME.fullmatch(name):
        raise RequestError(f"--name is {name!r}: give letters, digits, dots, dashes and underlines")
    if kind not in KINDS:
        raise RequestError(f"--instances is {kind!r}: choose {', '.join(KINDS)}")
    for path in python_path:
        if not path.is_dir():
            raise RequestError(f"--python-path is {path}, which is no folder: give one that holds packages")
    if os.path.lexists(repository) and not repository.is_dir():
        raise StorageError(f"{repository} is no folder: choose another output")
    target = repository / name
    if os.path.lexists(target):
        raise StorageError(f"{target} already exists: remove it, or choose another --name or output")
    with atomic_folder(target) as folder:
        version = folder / VERSION
        version.mkdir()
        shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
        place = version / settings.bundle
        if copy:
            _copy(bundle, place)
        else:
            place.symlink_to(bundle.path.resolve(), target_is_directory=True)
        if python_path:
            (version / "python_path.txt").write_text("".join(f"{path}\n" for path in python_path), encoding="utf-8")
        (folder / "config.pbtxt").write_text(config_of(name, settings, kind), encoding="utf-8")
    return target


def _copy(bundle: Bundle, place: Path) -> None:
    problems = bundle.problems()
    if problems:
        file, problem = next(iter(problems.items()))
        raise BundleError(f"bundle {bundle.path} is damaged: {file} {problem}; export it again")
    for file in (MANIFEST, *bundle.manifest.files):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / file, place / file)


def config_of(name: str, settings: TritonSettings, kind: str = "auto") -> str:
    """Return `config.pbtxt`, in protobuf's text format."""
    lines = [
        f"# Written by latentrt {metadata.version('latentrt')}. Parameters may be edited; latentrt's page on Triton",
        "# lists them. Triton's own batcher stays off: latentrt lets images of all requests share its steps.",
        f"name: {_text(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ kind: KIND_{kind.upper()} count: 1 }} ]",
    ]
    for number, spec in enumerate(fields.INPUTS):
        lines.append(f"input [ {_tensor(spec, optional=number > 0)} ]")
    lines += [f"output [ {_tensor(spec)} ]" for spec in fields.OUTPUTS]
    lines += list(_parameters(parameters_of(settings)))
    return "\n".join(lines) + "\n"


def _tensor(spec: fields.Tensor, *, optional: bool = False) -> str:
    dims = ", ".join(map(str, spec.dims))
    said = f"{{ name: {_text(spec.name)} data_type: TYPE_{spec.kind} dims: [ {dims} ]"
    return f"{said}{' optional: true' if optional else ''} }}"


def _parameters(parameters: Mapping[str, str]) -> Iterable[str]:
    for name, value in parameters.items():
        yield f"parameters {{ key: {_text(name)} value: {{ string_value: {_text(value)} }} }}"


def _text(value: str) -> str:
    """Return a string of protobuf's text format, which for what JSON escapes is JSON's."""
    return json.dumps(value, ensure_ascii=False)
