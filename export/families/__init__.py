"""Model families, one module each: every module of this folder that has an object called `FAMILY` is one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from .base import Family

__all__ = ["Family", "families", "family_named", "family_of_pipeline"]


@cache
def families() -> tuple[Family, ...]:
    """Return every family, in the order of their modules' names."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def family_of_pipeline(name: str | None) -> Family | None:
    """Return the family of a pipeline's class name in `model_index.json`, or None."""
    return next((family for family in families() if name in family.pipelines), None)


def family_named(name: str) -> Family:
    """Return the family that manifests and checkpoints call `name`."""
    return next(family for family in families() if family.name == name)
