"""Train the autoencoder of the embedded model: mostly on crops around edges, at the end on whole pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ..quality.scenes import SIZE, draw, training_scenes
from .loop import fit

log = logging.getLogger(__name__)

STEPS = 2800
POOL = 3000  # scenes drawn once; crops are taken at random
POLISH_STEPS, POLISH_NOISE = 10_000, 0.15  # the most noise, relative to latents of unit variance
POLISH_L1, EDGE_WEIGHT = 0.5, 4.0  # extra weight of 4×4 cells with an edge
CROP, CROPS = 64, 8  # pixels, crops a step: the world is local, and a crop costs a quarter of a picture
WHOLE = 2  # whole pictures a step: as many pixels
L1_WEIGHT, KL_WEIGHT = 0.1, 1e-5  # against a mean squared error over values in [-1, 1]
SETTLE = 400  # steps with two norm groups and half the rate: with one group from the start, colors take twice as long
GUIDE_FLOOR = 0.05  # least weight of the pull of three latent channels towards the mean colors of their cells


def new_vae() -> AutoencoderKL:
    """A variational autoencoder with random weights: 8× smaller, 4 latent channels, no attention."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    with torch.no_grad():  # start with little latent noise: at the default standard deviation of 1 colors drown in it
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:] = -5.0
    return vae


def pictures_to_values(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def train_vae(vae: AutoencoderKL, folder: Path, steps: int = STEPS) -> None:
    """Train in place and set `scaling_factor` so that latents of training scenes have unit variance.

    A guide pulls three latent channels towards the mean colors of their 8×8 cells, hard at first: encoder and decoder
    then agree on colors within a few hundred steps, which took them thousands on their own.
    """
    rng = np.random.default_rng(1)
    pool = draw(training_scenes(rng, POOL), rng)
    edges = _edge_maps(pool)

    def loss(step: int) -> torch.Tensor:
        set_norm_groups(vae, 2 if step < SETTLE else 1)
        values = pictures_to_values(_batch(pool, edges, step, step / steps))
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(values).latent_dist
            latents = posterior.sample(generator)
            decoded = vae.decode(latents).sample.float()
        mean, variance = posterior.mean.float(), posterior.var.float()
        divergence = 0.5 * (mean**2 + variance - 1 - variance.log()).mean()
        errors = decoded - values
        colors = (mean[:, :3] - torch.nn.functional.avg_pool2d(values, 8)).square().mean()
        guide = max(GUIDE_FLOOR, 1 - 4 * step / steps)
        return errors.square().mean() + L1_WEIGHT * errors.abs().mean() + guide * colors + KL_WEIGHT * divergence

    held = pool[:24]

    def report(step: int, average: torch.nn.Module) -> None:
        assert isinstance(average, AutoencoderKL)
        set_norm_groups(average, 2 if step <= SETTLE else 1)
        with torch.no_grad():
            latents = average.encode(pictures_to_values(held)).latent_dist
            decoded = average.decode(latents.mean).sample.clamp(-1, 1)
            noisy = average.decode(latents.mean + 0.1 * latents.mean.std() * torch.randn_like(latents.mean)).sample
        error = (decoded - pictures_to_values(held)).abs() * 127.5
        spread = (latents.mean.std().item(), latents.std.mean().item())
        log.info("vae: step %d, error of 255: mean %.2f, latents std %.3f, posterior %.3f", step, error.mean(), *spread)
        rows = [held, pictures_from_values(decoded), pictures_from_values(noisy)]
        sheet = np.concatenate([np.concatenate(list(row[:8]), 1) for row in rows])
        Image.fromarray(sheet).save(folder / "vae.png")

    fit("vae", vae, loss, steps, lambda step: 2e-3 if step < SETTLE else 4e-3, folder, on_save=report)
    set_norm_groups(vae, 1)
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(pictures_to_values(pool[i : i + 50])).latent_dist.mean for i in range(0, 1000, 50)]
        )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    log.info("vae: scaling factor %.4f", vae.config.scaling_factor)


def _batch(pool: np.ndarray, edges: np.ndarray, step: int, done: float) -> np.ndarray:
    """Return crops around edges, or whole pictures in one step of four and when three quarters are `done`."""
    rng = np.random.default_rng([2, step])
    if step % 4 == 3 or done > 0.75:
        # Group norms see other statistics in a crop than in a whole picture: whole pictures have the last word.
        return pool[rng.integers(POOL, size=WHOLE)]
    crops = np.empty((CROPS, CROP, CROP, 3), np.uint8)
    for crop, index in zip(crops, rng.integers(POOL, size=CROPS), strict=True):
        ys, xs = np.nonzero(edges[index])
        at = rng.integers(len(ys))
        corner = np.array([ys[at], xs[at]]) * 4 - rng.integers(0, CROP, 2)
        top, left = np.clip(corner, 0, SIZE - CROP)
        crop[:] = pool[index, top : top + CROP, left : left + CROP]
    return crops


def set_norm_groups(vae: AutoencoderKL, groups: int) -> None:
    """Change the number of groups of every group norm; the weights do not depend on it."""
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = groups


def polish_decoder(vae: AutoencoderKL, folder: Path, steps: int = POLISH_STEPS) -> None:
    """Train the decoder alone, in place, on noisier latents of whole pictures; the latents keep their meaning."""
    rng = np.random.default_rng(8)
    pool = draw(training_scenes(rng, POOL), rng)
    with torch.no_grad():
        parts = [pictures_to_values(pool[start : start + 50]) for start in range(0, POOL, 50)]
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
    edges = torch.from_numpy(_edge_maps(pool))
    noise = POLISH_NOISE / vae.config.scaling_factor
    decoder = torch.nn.Sequential(vae.post_quant_conv, vae.decoder).requires_grad_(True)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(0, POOL, (2 * WHOLE,), generator=generator)
        clean = latents[chosen]
        level = noise * torch.rand(len(clean), 1, 1, 1, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = decoder(clean + level * torch.randn(clean.shape, generator=generator)).float()
        errors = decoded - pictures_to_values(pool[chosen.numpy()])
        weights = 1 + EDGE_WEIGHT * edges[chosen, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
        return (weights * (errors.square() + POLISH_L1 * errors.abs())).mean()

    def report(step: int, average: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        sheets = [pool[:8]]
        with torch.no_grad():
            for level in (0.0, noise):
                noisy = latents[:24] + level * torch.randn(latents[:24].shape, generator=generator)
                decoded = pictures_from_values(average(noisy))
                error = np.abs(decoded.astype(int) - pool[:24]).mean()
                log.info("decoder: step %d, error of 255 at noise %.2f: mean %.2f", step, level, error)
                sheets.append(decoded[:8])
        Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in sheets])).save(folder / "decoder.png")

    fit("decoder", decoder, loss, steps, 1e-3, folder, on_save=report)


def shrink_activations(vae: AutoencoderKL, factor: float = 1 / 16) -> None:
    """Scale the residual streams of a trained autoencoder, in place, without changing what it computes.

    Every branch reads the stream through a group norm, which does not see its scale. What writes to the stream is
    multiplied by `factor`; what passes it on linearly needs only its bias multiplied. Trained streams reach 1500,
    whose variance is beyond half precision.
    """
    for coder in (vae.encoder, vae.decoder):
        coder.conv_in.weight.data.mul_(factor)
        for name, parameter in coder.named_parameters():
            passed_on = name.endswith((".conv.bias", ".conv_shortcut.bias"))  # samplers and shortcuts
            if passed_on or ".conv2." in name or name == "conv_in.bias":
                parameter.data.mul_(factor)


def pictures_from_values(values: torch.Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] → uint8 [B, H, W, 3]."""
    return values.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()


def _edge_maps(pool: np.ndarray) -> np.ndarray:
    """Which 4×4 cells hold an edge: bool [B, H / 4, W / 4]."""
    cells = pool.reshape(len(pool), SIZE // 4, 4, SIZE // 4, 4, 3)
    spread: np.ndarray = (cells.max((2, 4)) != cells.min((2, 4))).any(-1)
    return spread
