"""Samplers by name: a scheduler config and a number of steps become a StepTable."""

from __future__ import annotations

from .registry import Churn, check_scheduler, clean_factors, names, step_table, takes_eta

__all__ = ["Churn", "check_scheduler", "clean_factors", "names", "step_table", "takes_eta"]
