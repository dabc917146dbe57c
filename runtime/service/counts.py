"""What a batcher has counted, also after it was closed, and who is told of what a service does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..batcher.stats import Stats

if TYPE_CHECKING:
    from .job import Job


def counts_of(stats: Stats) -> dict[str, float]:
    """Return the numbers that only grow while a batcher is open."""
    return {
        "rows_used": stats.rows_used,
        "rows_run": stats.rows_run,
        "rows_wasted": stats.rows_run - stats.rows_used,
        "steps": sum(stats.steps.values()),
        "admissions": stats.admitted,
        "swaps": stats.swapped,
        "step_retries": stats.retried,
        "cancellations": stats.cancelled,
        "deadlines_missed": stats.too_late,
    }


class ServiceObserver:
    """Is told of what happens in a service: inherit from it, and define what is wanted. Calls come from any thread."""

    def observer(self, model: str) -> Any:
        """Return the `Observer` of a model's batcher, or None."""

    def ended(self, job: Job) -> None:
        """A job is over."""

    def loaded(self, model: str, seconds: float | None) -> None:
        """A bundle was opened in some seconds; None: it could not be."""
