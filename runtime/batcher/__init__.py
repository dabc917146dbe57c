"""In-flight batching: images of unlike requests share every call of the network, and come and go between steps."""

from .batcher import Batcher
from .events import Admitted, Drawn, Event, Previewed, Stepped
from .future import BatchFuture, JobProgress
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
