"""The tokenizer and the text encoder of the embedded model, trained to say what a prompt describes and where."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..quality.scenes import COLORS, RELATIONS, SHAPES, SIZES, Scene, describe, held_out_scenes, training_scenes
from .loop import fit

log = logging.getLogger(__name__)

STEPS = 1200
BATCH = 64
TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
PLACES = ("middle", *RELATIONS)  # where an object can be; a pair fills two opposite places
ANSWERS = {"background": len(COLORS), "size": len(SIZES)} | {
    f"{place} {what}": count
    for place in PLACES
    for what, count in (("color", len(COLORS) + 1), ("shape", len(SHAPES) + 1))
}


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes in CLIP's vocabulary, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one token; ties go to the smaller pair."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in spelled.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer whose merges come from the prompts of training scenes, in both file layouts."""
    rng = np.random.default_rng(3)
    words: Counter[str] = Counter()
    for scene in training_scenes(rng, 6000):
        words.update(re.findall(r"[a-z]+|,", describe(scene, rng)))
    merges = learn_merges(words)
    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder with random weights: 3 layers, 128 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            projection_dim=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Padded and truncated token ids: int64 [B, 77]."""
    batch = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: torch.Tensor = batch["input_ids"]
    return ids


def answers(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """The right class of each of ANSWERS: int64 [B]; the last class of a place means that nothing is there."""
    classes: dict[str, list[int]] = {name: [] for name in ANSWERS}
    for scene in scenes:
        classes["background"].append(COLORS.index(scene.background))
        classes["size"].append(SIZES.index(scene.objects[0].size))
        spots = ["middle"]
        if scene.relation:
            x, y = RELATIONS[scene.relation]
            spots = [scene.relation, {side: place for place, side in RELATIONS.items()}[-x, -y]]
        there = dict(zip(spots, scene.objects, strict=True))
        for place in PLACES:
            thing = there.get(place)
            classes[f"{place} color"].append(COLORS.index(thing.color) if thing else len(COLORS))
            classes[f"{place} shape"].append(SHAPES.index(thing.shape) if thing else len(SHAPES))
    return {name: torch.tensor(values) for name, values in classes.items()}


def train_text_encoder(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, folder: Path, steps: int = STEPS) -> None:
    """Train in place: linear probes must read every answer from the end token and from the last padding token.

    Answers name absolute places, so `A left of B` and `B right of A` get the same conditioning, and what the
    denoiser has to learn is where to look and how to paint, not grammar.
    """
    probes = torch.nn.Linear(encoder.config.hidden_size, sum(ANSWERS.values()))
    both = torch.nn.ModuleDict({"encoder": encoder, "probes": probes})

    def logits(model: Any, prompts: list[str], length: int) -> tuple[torch.Tensor, ...]:
        ids = token_ids(tokenizer, prompts)[:, :length]
        hidden = model["encoder"](ids).last_hidden_state  # [B, L, E]
        end = (ids == tokenizer.eos_token_id).int().argmax(1)
        seen = torch.cat([hidden[torch.arange(len(ids)), end], hidden[:, -1]])  # [2B, E]
        split: tuple[torch.Tensor, ...] = model["probes"](seen).split(list(ANSWERS.values()), 1)
        return split

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([4, step])
        scenes = training_scenes(rng, BATCH)
        # Attention is causal: shorter rows give the same states, faster. Late positions are learned every fourth step.
        scores = logits(both, [describe(scene, rng) for scene in scenes], TOKENS if step % 4 == 0 else 32)
        right = answers(scenes)
        losses = [
            torch.nn.functional.cross_entropy(score, right[name].repeat(2))
            for name, score in zip(ANSWERS, scores, strict=True)
        ]
        return torch.stack(losses).mean()

    def report(step: int, average: torch.nn.Module) -> None:
        rng = np.random.default_rng(5)
        scenes = [*held_out_scenes("single", 100), *held_out_scenes("pair", 300)]
        with torch.no_grad():
            scores = logits(average, [describe(scene, rng) for scene in scenes], TOKENS)
        right = answers(scenes)
        hits = torch.stack([s.argmax(1) == right[n].repeat(2) for n, s in zip(ANSWERS, scores, strict=True)]).all(0)
        log.info("text: step %d, all answers right on held-out scenes: %.1f %%", step, 100 * hits.float().mean())

    fit("text", both, loss, steps, 1e-3, folder, on_save=report)
