"""One training loop for the three parts of the embedded model: AdamW, warm-up and cosine decay, EMA, exact resume."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

log = logging.getLogger(__name__)

WARM_UP = 100  # steps
SAVE_EVERY = 200  # steps


def fit(
    name: str,
    module: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    steps: int,
    rate: float | Callable[[int], float],
    folder: Path,
    ema_decay: float = 0.998,
    on_save: Callable[[int, torch.nn.Module], None] | None = None,
) -> None:
    """Minimise `loss(step)` over the parameters of `module`, which holds its averaged weights afterwards.

    `rate` is the learning rate, or a function of the step, before warm-up and decay.

    A step's data must depend on its number alone: then a killed run, continued from `folder/name.pt`, takes the same
    way. `on_save(step, averaged module)` is called at every save. Raises FloatingPointError where the loss is not
    finite.
    """
    average = copy.deepcopy(module).requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    saved, start, spent, running = folder / f"{name}.pt", 0, 0.0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent, running = state["step"], state["spent"], state["running"]
        log.info("%s: continuing at step %d", name, start)
    clock = time.process_time()
    for step in range(start, steps):
        decay = min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = decay * (rate(step) if callable(rate) else rate)
        value = loss(step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: the loss at step {step} is {value.item()}")
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        keep = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), module.parameters(), strict=True):
                mean.lerp_(weight, 1 - keep)
        running = value.item() if step == 0 else 0.98 * running + 0.02 * value.item()
        if (step + 1) % 50 == 0:
            seconds = spent + time.process_time() - clock
            log.info("%s: step %d of %d, loss %.5f, %.0f CPU seconds", name, step + 1, steps, running, seconds)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"module": module.state_dict(), "average": average.state_dict(), "running": running}
            state |= {
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "spent": spent + time.process_time() - clock,
            }
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
            if on_save:
                on_save(step + 1, average)
    module.load_state_dict(average.state_dict())
