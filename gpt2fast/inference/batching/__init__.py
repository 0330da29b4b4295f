"""Many jobs at once: continuous batching over a paged cache of keys and values."""

from .engine import BatchEngine, EngineStats
from .events import Event, Failed, Finished, PromptRead, Token
from .job import Job, Ticket

__all__ = [
    "BatchEngine",
    "EngineStats",
    "Event",
    "Failed",
    "Finished",
    "Job",
    "PromptRead",
    "Ticket",
    "Token",
]
