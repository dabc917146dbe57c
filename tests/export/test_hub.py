"""Hub ids, against a cache laid out here and no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

UNET = "unet/diffusion_pytorch_model.safetensors"

HUB_SCRIPT = """
import json, sys
from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoints.sources import open_checkpoint, tokenizer_folder
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        checkpoint = open_checkpoint(name, revision)
        answers.append([checkpoint.name, checkpoint.revision, sorted(checkpoint.files)])
    except CheckpointError as error:
        answers.append(str(error))
try:
    answers.append(tokenizer_folder("org/model").name)
    tokenizer_folder("org/nothing")
except CheckpointError as error:
    answers.append(str(error))
print(json.dumps(answers))
"""


def test_hub_cache_without_a_network(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    """HF_HOME names the cache and HF_HUB_OFFLINE forbids the network; both are read when the library is imported."""
    first, second, third = ("a" * 40, "b" * 40, "c" * 40)
    repository = tmp_path / "hub" / "models--org--model"
    for commit in (first, second, third):
        shutil.copytree(tiny_sd15_checkpoint, repository / "snapshots" / commit)
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    (repository / "snapshots" / second / UNET).rename(repository / "snapshots" / second / half)
    (repository / "snapshots" / third / UNET).rename(repository / "snapshots" / third / "unet/pytorch_model.bin")
    (repository / "refs").mkdir()
    for name, commit in {"main": first, "half": second, "pickled": third}.items():
        (repository / "refs" / name).write_text(commit)
    asked = [
        ("org/model", None),
        ("org/model", "half"),
        ("org/model", "pickled"),
        ("org/model", "v9"),
        ("org/no", None),
    ]
    result = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, json.dumps(asked)],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=True,
    )
    main, variant, pickled, revision, absent, tokenizer, no_tokenizer = json.loads(result.stdout.splitlines()[-1])
    assert main[:2] == ["org/model", first]
    assert UNET in main[2]
    assert variant[1] == second
    assert half in variant[2]
    assert "no .safetensors weights for unet" in pickled
    assert "org/model at revision v9 is no local path and not in the local cache" in revision
    assert "org/no is no local path and not in the local cache" in absent
    assert tokenizer == "tokenizer"
    assert "pass --tokenizer" in no_tokenizer
