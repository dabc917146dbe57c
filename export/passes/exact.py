"""The optimizer, held to the numbers that a graph has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnxscript.rewriter import _pattern_ir


@contextmanager
def exact_constants() -> Iterator[None]:
    """Let rewrite rules take a constant for another only where they are equal, inside the block.

    Their tolerances are 1e-8 and 1e-5 of the number: `x + 1e-15` would be taken for `x`, and where x is 0, 1 / x for
    something finite.
    """
    zero = property(lambda _: 0.0, lambda _, value: None)
    kind, names = _pattern_ir.Constant, ("_abs_tol", "_rel_tol")
    for name in names:
        setattr(kind, name, zero)
    try:
        yield
    finally:
        for name in names:
            delattr(kind, name)
