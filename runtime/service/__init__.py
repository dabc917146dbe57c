"""What a server serves, without HTTP: bundles by name, requests as jobs, limits, and pictures as bytes.

The HTTP server, its shims and other front ends hand over a `Work` and get a `Job`.
"""

from .job import Ended, Event, Job, Pictured, Previewed, Stepped
from .models import Model, Models, ModelSettings
from .service import Service
from .work import Limits, Output, Work

__all__ = [
    "Ended",
    "Event",
    "Job",
    "Limits",
    "Model",
    "ModelSettings",
    "Models",
    "Output",
    "Pictured",
    "Previewed",
    "Service",
    "Stepped",
    "Work",
]
