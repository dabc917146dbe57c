"""Noise schedules: how much signal and noise is left at each step, and the timestep that the network is told."""

from __future__ import annotations

from .schedule import Options, Schedule

__all__ = ["Options", "Schedule"]
