"""Hub ids, against a cache laid out here and no network."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from latentrt.engines.errors import StorageError

torch = pytest.importorskip("torch")

from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

UNET = "unet/diffusion_pytorch_model.safetensors"

HUB_SCRIPT = """
import json, sys
from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoints.sources import open_checkpoint, tokenizer_folder
answers = []
for name, revision, variant, vae in json.loads(sys.argv[1]):
    try:
        checkpoint = open_checkpoint(name, revision, variant=variant, vae=vae)
        origins = {part: [origin.name, origin.revision] for part, origin in checkpoint.replaced.items()}
        answers.append([checkpoint.name, checkpoint.revision, sorted(checkpoint.files), origins])
    except CheckpointError as error:
        answers.append(str(error))
try:
    answers.append(tokenizer_folder("org/model").name)
    tokenizer_folder("org/nothing")
except CheckpointError as error:
    answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.mark.long
def test_hub_cache_without_a_network(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    """HF_HOME names the cache and HF_HUB_OFFLINE forbids the network; both are read when the library is imported."""
    first, second, third, fourth = (letter * 40 for letter in "abcd")
    repository, autoencoder = (tmp_path / "hub" / f"models--org--{name}" for name in ("model", "vae"))
    for commit in (first, second, third):
        shutil.copytree(tiny_sd15_checkpoint, repository / "snapshots" / commit)
    shutil.copytree(tiny_sd15_checkpoint / "vae", autoencoder / "snapshots" / fourth)
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    (repository / "snapshots" / second / UNET).rename(repository / "snapshots" / second / half)
    pickled = repository / "snapshots" / third / "unet/diffusion_pytorch_model.bin"
    torch.save(load_file(repository / "snapshots" / third / UNET), pickled)
    (repository / "snapshots" / third / UNET).unlink()
    for root, refs in (
        (repository, {"main": first, "half": second, "pickled": third}),
        (autoencoder, {"main": fourth}),
    ):
        (root / "refs").mkdir()
        for name, commit in refs.items():
            (root / "refs" / name).write_text(commit)
    asked = [
        ("org/model", None, None, None),
        ("org/model", "half", None, None),
        ("org/model", "half", "fp16", None),
        ("org/model", "half", "bf16", None),
        ("org/model", "pickled", None, None),
        ("org/model", None, None, "org/vae"),
        ("org/model", "v9", None, None),
        ("org/no", None, None, None),
    ]
    result = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, json.dumps(asked)],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(result.stdout.splitlines()[-1])
    main, unasked, variant, no_variant, pickled_one, other_vae, revision, absent, tokenizer, no_tokenizer = answers
    assert main[:2] == ["org/model", first]
    assert UNET in main[2]
    assert (
        "org/model has no weights for unet, on the hub or in the local cache; it has the variant fp16: give" in unasked
    )
    assert variant[1] == second
    assert half in variant[2] and "vae/diffusion_pytorch_model.safetensors" in variant[2]
    assert "has no weights of the variant 'bf16': there are fp16" in no_variant
    assert "unet/diffusion_pytorch_model.bin" in pickled_one[2]
    assert other_vae[3] == {"vae": ["org/vae", fourth]}
    assert "org/model at revision v9 is no local path and not in the local cache" in revision
    assert "org/no is no local path and not in the local cache" in absent
    assert tokenizer == "tokenizer"
    assert "pass --tokenizer" in no_tokenizer


def test_a_hub_cache_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(StorageError, match=r"org/model cannot be put into .*: free space, or set HF_HOME"):
        open_checkpoint("org/model")
