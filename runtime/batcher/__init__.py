"""In-flight batching: images of unlike requests share every call of the network, and come and go between steps."""

from .batcher import Batcher
from .events import Admitted, BatchFuture, Drawn, Event, JobProgress, Previewed, Stepped
from .stats import Observer, SizeStats, Stats

__all__ = [
    "Admitted",
    "BatchFuture",
    "Batcher",
    "Drawn",
    "Event",
    "JobProgress",
    "Observer",
    "Previewed",
    "SizeStats",
    "Stats",
    "Stepped",
]
