"""A contender that answers at once with times that it makes up, in a real worker process; a tiny CLIP."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from latentrt.benchmarks.contenders import process
from latentrt.benchmarks.measure import method

FAKE = (
    f"""
import os, sys, types
package = types.ModuleType("latentrt.benchmarks.contenders")  # without the backends that it imports: they take long
package.__path__ = [{str(Path(process.__file__).parent)!r}]
sys.modules[package.__name__] = package
"""
    + """
from latentrt.benchmarks.contenders import worker

class Contender:
    def __init__(self, variant, options):
        print("noise on standard output")
        if variant == "broken":
            raise RuntimeError("no such luck")
        self.variant, self.runs = variant, 0
        self.facts = {"import": 0.1, "open": 0.2, "build": None, "versions": {}, "options": options}

    def run(self, request):
        self.runs += 1
        if self.variant == "dying" and self.runs == 3:
            sys.stderr.write("out of luck\\n")
            os._exit(9)
        with open(os.environ["FAKE_ORDER"], "a") as file:
            file.write(self.variant + "\\n")
        seconds = {"slow": 2.0}.get(self.variant, 1.0) * request["steps"]
        stages = dict.fromkeys(("tokenize", "encode", "prepare", "denoise", "decode", "png"), seconds / 6)
        return {"stages": stages, "steps": [], "evaluations": request["steps"], "total": seconds}

    def save(self, file, *, latents):
        file.write_bytes(b"answer")

module = type(sys)("fake")
module.Contender = Contender
worker.MODULES["fake"] = "fake"
worker.importlib.import_module = lambda name, package: module
worker.main(sys.argv[1:])
"""
)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make workers start contenders of this module; return the file in which they note their turns."""
    monkeypatch.setattr(process, "worker_command", lambda contender: [sys.executable, "-c", FAKE, contender])
    monkeypatch.setattr(method, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("FAKE_ORDER", str(tmp_path / "order"))
    return tmp_path / "order"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP of transformers' own classes, with its tokenizer and image processor."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from latentrt.benchmarks.random_checkpoint import write_tokenizer

    folder = tmp_path_factory.mktemp("random") / "clip"
    size = write_tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": size, "eos_token_id": size - 1, "bos_token_id": size - 2, "pad_token_id": size - 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder
