"""Settings of the web UI that have a meaning here, and the request of each key that is being drawn."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..service import Job, Model, Models, Output
from ..service.errors import NotFoundError, RefusedError
from .fields import CLIP_SKIP, is_none

MEANT = ("sd_model_checkpoint", "samples_format", "jpeg_quality", "live_previews_enable", "CLIP_stop_at_last_layers")
"""Options that have a meaning here."""
FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
DROPPED_SECONDS = 2.0
"""For how long an interrupt may mean a request whose client has gone away."""


@dataclass(frozen=True)
class Settings:
    """What /sdapi/v1/options holds for a key."""

    model: str | None = None
    """The name of a bundle; None: the first one."""
    output: Output = field(default_factory=Output)
    previews: bool = False

    def with_options(self, options: Mapping[str, Any], models: Models) -> Settings:
        """Return settings with some options changed; raises `RefusedError` for values that are none.

        Options without a meaning here are taken and do nothing, as clients send back all that they were given.
        """
        changed = self
        if (name := options.get("sd_model_checkpoint")) is not None:
            changed = replace(changed, model=model_of(name, models).name)
        if (kind := options.get("samples_format")) is not None:
            if not isinstance(kind, str) or kind.lower() not in FORMATS:
                raise RefusedError(f"samples_format is {kind!r:.60}: choose {', '.join(FORMATS)}", "samples_format")
            changed = replace(changed, output=replace(changed.output, format=FORMATS[kind.lower()]))  # type: ignore[arg-type]
        if (quality := options.get("jpeg_quality")) is not None:
            if isinstance(quality, bool) or not isinstance(quality, (int, float)) or not 0 <= quality <= 100:
                raise RefusedError(f"jpeg_quality is {quality!r:.60}: give 0 to 100", "jpeg_quality")
            changed = replace(changed, output=replace(changed.output, quality=int(quality)))
        if (previews := options.get("live_previews_enable")) is not None:
            changed = replace(changed, previews=bool(previews))
        layers = options.get("CLIP_stop_at_last_layers")
        if isinstance(layers, (int, float)) and layers > 1:
            raise RefusedError(f"CLIP_stop_at_last_layers is not supported: {CLIP_SKIP}", "CLIP_stop_at_last_layers")
        return changed

    def ignored(self, options: Mapping[str, Any], models: Models) -> list[str]:
        """Return the options without a meaning here, but those that are given as they are, or as none."""
        said = self.said(models)
        idle = {name: value for name, value in options.items() if name not in MEANT and not is_none(value)}
        return [name for name, value in idle.items() if name not in said or said[name] != value]

    def said(self, models: Models) -> dict[str, Any]:
        """Return the options of these settings."""
        model = models.find(self.model)
        return {
            "sd_model_checkpoint": title_of(model),
            "sd_checkpoint_hash": model.digest,
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "samples_format": self.output.format,
            "jpeg_quality": self.output.quality,
            "live_previews_enable": self.previews,
            "samples_save": False,
        }


def title_of(model: Model) -> str:
    """Return the web UI's title of a model: its name and the begin of its digest."""
    return f"{model.name} [{model.digest[:10]}]"


def model_of(name: Any, models: Models) -> Model:
    """Return a model by its title, name, alias or hash; raises `RefusedError`."""
    given = str(name).strip()
    for model in models:
        if given in (title_of(model), model.digest, model.digest[:10]) and given:
            return model
    try:
        return models.find(re.sub(r" \[[0-9a-f]{10}\]$", "", given))
    except NotFoundError as error:
        titles = ", ".join(map(title_of, models))
        raise RefusedError(
            f"sd_model_checkpoint is {given[:60]!r}, which is not served here: choose {titles}", "sd_model_checkpoint"
        ) from error


@dataclass(eq=False)
class Asked:
    """A request of this API that is not answered yet."""

    images: int
    task: str | None
    job: Job | None = None
    """None until the service has taken it."""
    interrupted: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be drawn for it."""
        return self.job.is_over if self.job else self.interrupted

    def takes(self, job: Job) -> Job:
        """Note its job, and return it: one that was interrupted before ends here."""
        self.job = job
        if self.interrupted:
            job.cancel()
        return job

    def interrupt(self) -> None:
        """End it, or have it end as soon as the service has taken it; from any thread."""
        self.interrupted = True
        if self.job:
            self.job.cancel()


class Board:
    """Whose settings are which, and who has asked for what: for any number of threads."""

    def __init__(self) -> None:
        """Know nobody."""
        self._settings: dict[str, Settings] = {}
        self._asked: dict[str, list[Asked]] = {}
        self._dropped: dict[str, float] = {}
        self._lock = threading.Lock()

    def settings(self, owner: str) -> Settings:
        """Return the settings of a key."""
        return self._settings.get(owner, Settings())

    def change(self, owner: str, options: Mapping[str, Any], models: Models) -> None:
        """Change some settings of a key, and leave the others as they are now; raises `RefusedError`."""
        with self._lock:
            self._settings[owner] = self.settings(owner).with_options(options, models)

    def add(self, whose: str, asked: Asked) -> None:
        """Note a request."""
        with self._lock:
            self._asked.setdefault(whose, []).append(asked)

    def remove(self, whose: str, asked: Asked, *, dropped: bool = False) -> None:
        """Forget a request; `dropped`: its client went away."""
        with self._lock:
            left = self._asked.get(whose, [])
            left.remove(asked)
            if not left:
                self._asked.pop(whose, None)
            now = time.monotonic()
            self._dropped = {name: at for name, at in self._dropped.items() if now - at < DROPPED_SECONDS}
            if dropped:
                self._dropped[whose] = now

    def asked(self, whose: str) -> list[Asked]:
        """Return the requests of somebody, the oldest first."""
        with self._lock:
            return list(self._asked.get(whose, ()))

    def take_dropped(self, whose: str) -> bool:
        """Tell, once, whether a client of somebody has just gone away."""
        with self._lock:
            at = self._dropped.pop(whose, None)
        return at is not None and time.monotonic() - at < DROPPED_SECONDS
