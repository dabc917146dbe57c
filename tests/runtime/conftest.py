"""diffusers' schedulers as the reference for step tables, run on a synthetic denoiser."""

from __future__ import annotations

import inspect
import json
from copy import deepcopy
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
from latentrt.runtime.sampling import Churn, step_table
from latentrt.runtime.sampling.noise import Generator

from . import loops

SHAPE = (1, 4, 4, 4)
SEED = 9
START = Generator(5).randn(SHAPE)
IMAGE = Generator(6).randn(SHAPE)
MASK = Generator(7).randn((1, 1, 4, 4)) > 0
FLOATS = (
    *("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"),
    *("alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "alphas", "betas", "s", "_init_alpha_cumprod"),
)
"""What a scheduler computes with, when its arithmetic is to be float64."""
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def denoiser(latents: Any, timestep: float) -> Any:
    return 0.9 * np.tanh(0.8 * latents + np.sin(timestep / 200)) + 0.1 * latents


def with_variance(latents: Any, timestep: float) -> Any:
    """Return a prediction, and behind its channels what a network says of the noise's variance: -1 to 1 and beyond."""
    return np.concatenate([denoiser(latents, timestep), 1.2 * np.cos(3 * latents + timestep / 300)], axis=1)


class Schedulers:
    """Runs a scheduler config on diffusers and as a step table, as the three Stable Diffusion pipelines would."""

    def config(self, cls: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return a complete config of a class from the options that it knows."""
        known = inspect.signature(self.scheduler_class(cls).__init__).parameters
        given = {key: value for key, value in (STABLE_DIFFUSION | options).items() if key in known}
        return given | {"_class_name": cls}

    def scheduler_class(self, name: str) -> Any:
        import diffusers

        return getattr(diffusers, name)

    def new(self, config: dict[str, Any]) -> Any:
        """Return a fresh scheduler; each is built once, because some constructors take half a second."""
        return deepcopy(self._built(json.dumps(config)))

    @lru_cache(maxsize=8)  # noqa: B019  (one instance a session)
    def _built(self, config: str) -> Any:
        options = json.loads(config)
        cls = self.scheduler_class(options.pop("_class_name"))
        if not cls.__name__.startswith("KDPM2"):
            return cls(**options)
        few = partial(cls.set_timesteps, num_inference_steps=20)  # in place of a thousand, which take half a second
        with mock.patch.object(cls, "set_timesteps", lambda self, *_: few(self)):
            return cls(**options)

    def run(
        self,
        config: dict[str, Any],
        steps: int,
        *,
        inpaint: bool = False,
        strength: float = 1.0,
        eta: float = 0.0,
        mu: float | None = None,
        single: bool = False,
        scheduler: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        churn: Churn | None = None,
        network: Any = denoiser,
    ) -> Any:
        """Return the final latents of diffusers, float64; `single` leaves all arithmetic in float32."""
        import torch

        torch.set_num_threads(1)
        scheduler = self.new(config) if scheduler is None else scheduler  # one of them has a length
        given = {"mu": mu, "timesteps": timesteps, "sigmas": sigmas}
        keywords = {key: value for key, value in given.items() if value is not None} | loops.schedule(scheduler, steps)
        if "UniPC" in config["_class_name"] and sigmas is not None:
            keywords["sigmas"] = np.array(sigmas)
        scheduler.set_timesteps(steps if timesteps is None and sigmas is None else None, **keywords)
        dtype = torch.float32 if single else torch.float64
        for name in FLOATS:
            if isinstance(getattr(scheduler, name, None), torch.Tensor):
                setattr(scheduler, name, getattr(scheduler, name).to(dtype))
        start, image = torch.from_numpy(START).to(dtype), torch.from_numpy(IMAGE).to(dtype)
        custom = timesteps if timesteps is not None else sigmas
        if custom is not None:
            last_ends = loops.ends(scheduler) or (sigmas is not None and type(scheduler).__name__.startswith("EulerD"))
            steps = len(custom) - last_ends
        flow = hasattr(scheduler, "scale_noise")
        first = int(max(steps - min(steps * strength, steps), 0)) if flow else steps - min(int(steps * strength), steps)
        timesteps = scheduler.timesteps[first * scheduler.order : -1 if loops.ends(scheduler) else None]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first * scheduler.order)

        def with_noise(t: Any) -> Any:
            return scheduler.scale_noise(image, t, start) if flow else scheduler.add_noise(image, start, t)

        latents = with_noise(timesteps[:1]) if strength < 1 else start * getattr(scheduler, "init_noise_sigma", 1.0)
        keywords = {"generator": torch.Generator().manual_seed(SEED), "eta": eta, **(churn._asdict() if churn else {})}
        keywords = {key: keywords[key] for key in keywords if key in inspect.signature(scheduler.step).parameters}
        step = loops.step(scheduler, timesteps, keywords)
        with mock.patch.dict(vars(inspect.getmodule(type(scheduler))), randn_tensor=_float32_draws):
            for i, t in enumerate(timesteps):
                scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
                prediction = torch.from_numpy(network(scaled.double().numpy(), float(t))).to(dtype)
                latents = step(i, prediction, latents).to(dtype)
                if inpaint:
                    given = with_noise(timesteps[i + 1 : i + 2]) if i + 1 < len(timesteps) else image
                    latents = torch.where(torch.from_numpy(MASK), latents, given)
        return latents.double().numpy()

    def run_table(
        self, config: dict[str, Any], steps: int, *, inpaint: bool = False, network: Any = denoiser, **arguments: Any
    ) -> Any:
        """Return the final latents of the step table, float64."""
        table = step_table(config, steps, **arguments)
        generator = Generator(SEED)
        latents = START.astype(np.float64) * table.init_noise_sigma
        if arguments.get("strength", 1.0) < 1:
            latents = table.original[0, 0] * IMAGE.astype(np.float64) + table.original[0, 1] * START
        history = [np.zeros(SHAPE)] * table.history
        for i in range(len(table)):
            prediction = network(table.input_scales[i] * latents, float(table.timesteps[i]))
            noise = 0.0
            for _ in range(table.draws[i]):
                noise = generator.randn(SHAPE)
            latents, history = table.apply(i, latents, prediction, history, noise)
            if inpaint:
                latents = np.where(MASK, latents, table.original[i + 1, 0] * IMAGE + table.original[i + 1, 1] * START)
        return latents

    def assert_same(
        self, config: dict[str, Any], steps: int, tolerance: float = 1e-5, *, single: bool = False, **arguments: Any
    ) -> None:
        """Assert that both end at the same latents, to a tolerance relative to the largest."""
        reference = self.run(config, steps, single=single, **arguments)
        assert np.isfinite(reference).all()
        error = np.abs(self.run_table(config, steps, **arguments) - reference).max() / np.abs(reference).max()
        assert error <= tolerance, f"{error:.1e} with {config}, {steps} steps"


def _float32_draws(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Any:
    """Draw as a float32 pipeline does, also for a scheduler that runs in float64."""
    import torch

    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(scope="session")
def schedulers() -> Schedulers:
    pytest.importorskip("diffusers")
    return Schedulers()
