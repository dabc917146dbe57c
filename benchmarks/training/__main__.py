"""Train the embedded model and write it as a diffusers checkpoint.

    python -m latentrt.benchmarks.training --work FOLDER

Deterministic for one version of PyTorch on one kind of processor; a killed run continues where its last save was.
Processor seconds on one thread of an AMD EPYC (Zen 5, AVX-512 with bfloat16, 2.6 GHz), PyTorch 2.13:

| part | steps | parameters | seconds |
| --- | --- | --- | --- |
| text encoder | 1,200 of 64 prompts | 0.6 M | 178 |
| autoencoder | 2,800 of 8 crops or 2 pictures | 1.7 M | 447 |
| its decoder once more | 10,000 of 4 pictures | | 1,895 |
| latents of 12,000 scenes | | | about 100 |
| denoiser | 4,600 of 32 scenes | 2.8 M | 1,973 |

The shipped weights were trained in these steps, but the last two learning-rate schedules were lengthened under way (the
decoder's after 3,000 and 5,000 steps, the denoiser's after 1,600), and the decoder's first 3,000 steps had the plain
loss of the autoencoder: a new run gives a model of its own, not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..quality.oracle import Score, score
from .denoiser import new_scheduler, new_unet, train_denoiser
from .text import new_text_encoder, train_text_encoder, write_tokenizer
from .vae import new_vae, polish_decoder, shrink_activations, train_vae

log = logging.getLogger(__name__)

CHECKPOINT = Path(__file__).parents[2] / "export" / "embedded" / "checkpoint"
GUIDANCE, STEPS = 3.0, 20  # what the scores were best with


def save_checkpoint(
    out: Path, vae: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: torch.nn.Module
) -> None:
    """Replace the folder `out` with a diffusers checkpoint in half precision."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict())
    pipeline = StableDiffusionPipeline(
        vae,
        encoder,
        tokenizer,
        copy,
        new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(fresh)
    for part, module in (("vae", vae), ("text_encoder", encoder), ("unet", copy)):
        half = type(module).from_pretrained(fresh / part, torch_dtype=torch.float16)
        half.save_pretrained(fresh / part)
    defaults = {"default_guidance_scale": GUIDANCE, "default_num_inference_steps": STEPS}
    edit_json(fresh / "model_index.json", {"_latentrt": defaults})
    edit_json(fresh / "scheduler" / "scheduler_config.json", {"lambda_min_clipped": None})  # -Infinity is no JSON
    edit_json(fresh / "unet" / "config.json", {"_name_or_path": None})
    edit_json(fresh / "vae" / "config.json", {"_name_or_path": None, "force_upcast": False})
    # transformers opens a text encoder in the precision that its config names: without this it alone would be half.
    edit_json(fresh / "text_encoder" / "config.json", {"dtype": "float32"})
    shutil.rmtree(fresh / "tokenizer")
    write_tokenizer(fresh / "tokenizer")
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def edit_json(file: Path, changes: dict[str, Any]) -> None:
    """Set keys of a JSON object in a file; None removes a key."""
    table = json.loads(file.read_text()) | changes
    for key in [key for key, value in changes.items() if value is None]:
        del table[key]
    file.write_text(json.dumps(table, indent=2) + "\n")


def score_checkpoint(checkpoint: Path, count: int, guidance_scale: float = GUIDANCE, steps: int = STEPS) -> list[Score]:
    """Score a checkpoint in diffusers, in full precision, on `count` held-out scenes of each kind."""
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "generator": noise}
        pictures: np.ndarray = pipeline(prompts, output_type="np", **options).images
        return (pictures * 255).round().astype(np.uint8)

    return [score(generate, kind, count) for kind in ("single", "pair")]


def main() -> None:
    """Train the tokenizer, the text encoder, the autoencoder and the denoiser, in this order, and score the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the log and for resumable states")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint folder to replace")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--score", type=int, default=200, help="held-out scenes of each kind to score at the end")
    parser.add_argument("--score-only", action="store_true", help="score the checkpoint as it is")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(work / "train.log"), logging.StreamHandler()]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(arguments.threads)
    if not arguments.score_only:
        train(work, arguments.out)
    for result in score_checkpoint(arguments.out, arguments.score):
        log.info("score: %s", result)


def train(work: Path, out: Path) -> None:
    """Train all parts and write the checkpoint; states in `work` let a killed run continue."""
    tokenizer = write_tokenizer(work / "tokenizer")
    torch.manual_seed(0)
    encoder = new_text_encoder(tokenizer)
    train_text_encoder(encoder, tokenizer, work)
    encoder.eval().requires_grad_(False)
    torch.manual_seed(0)
    vae = new_vae()
    train_vae(vae, work)
    vae.eval().requires_grad_(False)
    polish_decoder(vae, work)
    shrink_activations(vae)
    torch.manual_seed(1)
    unet = new_unet()

    def save(step: int, average: torch.nn.Module) -> None:
        save_checkpoint(out, vae, encoder, tokenizer, average)

    train_denoiser(unet, vae, encoder, tokenizer, work, on_save=save)


if __name__ == "__main__":
    main()
