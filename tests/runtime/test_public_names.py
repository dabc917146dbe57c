"""What `latentrt.runtime` promises its users."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import latentrt.runtime
import pytest
from latentrt.runtime import Pipeline
from latentrt.runtime.arguments import READ_BY_SOME, RequestArguments


def test_every_public_name_is_there_and_sorted() -> None:
    assert latentrt.runtime.__all__ == sorted(latentrt.runtime.__all__) == dir(latentrt.runtime)
    for name in latentrt.runtime.__all__:
        found = getattr(latentrt.runtime, name)
        assert inspect.isclass(found) and found.__name__ == name and found.__doc__


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(latentrt.runtime.__file__ or "").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(seen) == latentrt.runtime.__all__


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        latentrt.runtime.Pipelines  # noqa: B018


def test_typed_arguments_are_those_of_a_call() -> None:
    parameters = inspect.signature(Pipeline.__call__).parameters
    keywords = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} - {"output_type", "return_dict"}
    assert set(RequestArguments.__annotations__) == keywords | set(READ_BY_SOME)
