"""The syntaxes that prompts may be written in, by name."""

from __future__ import annotations

from typing import Literal

PromptSyntax = Literal["a1111", "compel"]
"""How prompts are read that are more than text."""
