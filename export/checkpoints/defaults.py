"""Steps and guidance of a request that names none, as somebody asks for them."""

from __future__ import annotations

from typing import Any

from ...engines.errors import RequestError

NAMES = ("default_guidance_scale", "default_num_inference_steps")


def asked_defaults(num_inference_steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    """Return the manifest's fields for what an export was asked for; raises `RequestError` for what cannot be."""
    found = {"default_num_inference_steps": num_inference_steps, "default_guidance_scale": guidance_scale}
    for name, value in found.items():
        if value is not None and not fits(name, value):
            raise RequestError(
                f"{name.removeprefix('default_')} is {value!r}: give "
                + ("a number from 0 to 1000" if name == NAMES[0] else "a whole number from 1 to 100000")
            )
    return {name: value for name, value in found.items() if value is not None}


def fits(name: str, value: Any) -> bool:
    """Tell whether a value can be one of the two defaults."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    if name == NAMES[0]:
        return 0 <= value <= 1000
    return isinstance(value, int) and 1 <= value <= 100_000
