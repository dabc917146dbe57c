"""What pictures look like to networks: FID, Inception Score, CLIP score and PickScore.

The formulas work on features in numpy; the networks that make the features are the user's own local weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.errors import CheckpointError, MissingExtraError, RequestError

Floats = npt.NDArray[np.floating[Any]]
Pictures = Sequence[npt.NDArray[np.uint8]]

Score = Callable[[Pictures, Sequence[str]], Floats]
"""From pictures and their prompts to one figure for each pair [N]."""

MLPERF_SDXL = {"fid": (23.01085758, 23.95007626), "clip_score": (31.68631873, 31.81331801)}
"""What MLPerf Inference demands of SDXL on its 5,000 prompts: FID within 2 % of the reference's, CLIP score 0.2 %."""


def fid_of_moments(mean_a: Floats, cov_a: Floats, mean_b: Floats, cov_b: Floats) -> float:
    """Return the Fréchet distance of two Gaussians, given means [D] and covariances [D, D] (Heusel et al. 2017, eq. 6).

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½); means and covariances are those of Inception's pool features.
    """
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    # Σ₁Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: no complex square root of a matrix is needed
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0))
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def inception_score(logits: Floats, splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over splits of exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 2016, section 4).

    `logits` are Inception's [N, classes].
    """
    from scipy.special import log_softmax, logsumexp

    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    scores = []
    for part in np.array_split(log_p, min(splits, len(log_p))):
        log_mean = logsumexp(part, axis=0) - np.log(len(part))
        divergence = (np.exp(part) * (part - log_mean)).sum(1)
        scores.append(float(np.exp(divergence.mean())))
    return float(np.mean(scores)), float(np.std(scores))


def clip_scores(images: Floats, texts: Floats) -> Floats:
    """Return 100 · max(cos(image, text), 0) of each pair of CLIP features [N, D] (Hessel et al. 2021)."""
    return 100 * np.maximum(cosine(images, texts), 0)


def pick_scores(images: Floats, texts: Floats, scale: float) -> Floats:
    """Return scale · cos(image, text) of each pair of PickScore features [N, D] (Kirstain et al. 2023).

    `scale` is the exponential of the network's learned logit scale.
    """
    return scale * cosine(images, texts)


def cosine(a: Floats, b: Floats) -> Floats:
    """Return the cosine of each pair of rows [N]."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    products: Floats = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return products


class ClipFeatures:
    """A CLIP network from a local folder (CLIP score), or PickScore's, which has CLIP's shape."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load network and processor; raises `CheckpointError` when the folder does not hold them."""
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} holds no CLIP model: give a local folder with config.json and weights")
        try:
            import torch
            from transformers import CLIPModel, CLIPProcessor
        except ModuleNotFoundError as error:
            raise MissingExtraError("quality", "CLIP features") from error
        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no CLIP model with its processor: give a local folder") from error
        self._torch, self._device = torch, device
        self.scale = float(self._model.logit_scale.exp().detach())

    def __call__(self, pictures: Pictures, prompts: Sequence[str], batch: int = 16) -> tuple[Floats, Floats]:
        """Return the projected features [N, D] of pictures and of their prompts."""
        found = []
        for rows in _batches(len(pictures), batch):
            inputs = self._processor(
                text=list(prompts[rows]),
                images=list(pictures[rows]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            ).to(self._device)
            with self._torch.no_grad():
                outputs = self._model(**inputs)
            found.append((outputs.image_embeds.float().cpu().numpy(), outputs.text_embeds.float().cpu().numpy()))
        images, texts = zip(*found, strict=True)
        return np.concatenate(images), np.concatenate(texts)


def inception_features(weights: Path, device: str = "cpu") -> Callable[[Pictures], tuple[Floats, Floats]]:
    """Return a function from pictures to Inception's pool features [N, 2048] and logits [N, 1008].

    `weights` is the file of the FID network in PyTorch's form, as torch-fidelity and pytorch-fid use it.
    """
    try:
        import torch

        extractor: Any = import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ModuleNotFoundError as error:
        raise MissingExtraError("quality", "Inception features") from error
    if not weights.is_file():
        raise CheckpointError(f"{weights} does not exist: give the file of the FID Inception network")
    names = ["2048", "logits_unbiased"]
    network = extractor.FeatureExtractorInceptionV3(
        "inception-v3-compat", names, feature_extractor_weights_path=str(weights)
    )
    network = network.eval().to(device)

    def run(pictures: Pictures) -> tuple[Floats, Floats]:
        found = []
        for rows in _batches(len(pictures), 16):
            pixels = torch.from_numpy(np.stack(pictures[rows]).transpose(0, 3, 1, 2)).to(device)
            with torch.no_grad():
                found.append([tensor.float().cpu().numpy() for tensor in network(pixels)])
        pools, logits = zip(*found, strict=True)
        return np.concatenate(pools), np.concatenate(logits)

    return run


def draw(
    bundle: Path,
    prompts: Sequence[str],
    steps: int | None,
    seed: int,
    *,
    backend: str = "auto",
    options: Mapping[str, Any] | None = None,
    request: Mapping[str, Any] | None = None,
) -> list[npt.NDArray[np.uint8]]:
    """Return one picture [H, W, 3] for each prompt; picture i has seed `seed + i`.

    `options` go to the backend, `request` are further arguments of the request.
    """
    from ...runtime.pipeline import Pipeline

    with Pipeline.open(bundle, backend, **(options or {})) as pipe:
        result = pipe(prompts, num_inference_steps=steps, seed=seed, **(request or {}))
    return [np.asarray(picture) for picture in result.images]


def check(
    bundle: Path,
    prompts: Sequence[str],
    steps: int | None,
    *,
    backend: str = "auto",
    options: Mapping[str, Any] | None = None,
    request: Mapping[str, Any] | None = None,
) -> None:
    """Raise what `draw` would before it draws; no engine is opened."""
    from ...runtime.pipeline import Pipeline

    with Pipeline.open(bundle, backend, low_memory=True, **(options or {})) as pipe:
        pipe.check(prompts, num_inference_steps=steps, **(request or {}))


def bounds(found: Mapping[str, float]) -> dict[str, bool]:
    """Return, for each score that MLPerf bounds for SDXL, whether it is within; meant for its 5,000 prompts."""
    return {name: low <= found[name] <= high for name, (low, high) in MLPERF_SDXL.items() if name in found}


def moments(file: Path) -> tuple[Floats, Floats]:
    """Return mean and covariance from an .npz file with `mu` and `sigma`, the form that pytorch-fid writes."""
    try:
        with np.load(file) as data:
            return data["mu"], data["sigma"]
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{file} cannot be read as statistics: give an .npz file with mu and sigma") from error


def paired(*, clip: ClipFeatures | None = None, pick: ClipFeatures | None = None) -> dict[str, Score]:
    """Return the scores of single pictures whose network is given, by name."""
    found: dict[str, Score] = {}
    if clip is not None:
        found["clip_score"] = lambda pictures, prompts: clip_scores(*clip(pictures, prompts))
    if pick is not None:
        found["pick_score"] = lambda pictures, prompts: pick_scores(*pick(pictures, prompts), pick.scale)
    return found


def scores(
    pictures: Pictures,
    prompts: Sequence[str],
    *,
    clip: ClipFeatures | None = None,
    pick: ClipFeatures | None = None,
    inception: Callable[[Pictures], tuple[Floats, Floats]] | None = None,
    reference: tuple[Floats, Floats] | None = None,
) -> dict[str, float]:
    """Return every score whose network is given; `reference` are mean and covariance of Inception features for FID."""
    found = {name: float(np.mean(score(pictures, prompts))) for name, score in paired(clip=clip, pick=pick).items()}
    if inception is not None:
        pools, logits = inception(pictures)
        found["inception_score"], found["inception_score_std"] = inception_score(logits)
        if reference is not None:
            found["fid"] = fid_of_moments(pools.mean(0), np.cov(pools, rowvar=False), *reference)
    return found


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
