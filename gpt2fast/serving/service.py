"""What all endpoints share: the model, the engine, limits, and what is counted."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..errors import shown
from ..inference.batching import BatchEngine
from ..inference.generator import Generator
from .choices import TokenNames
from .connections import Connections
from .failures import Refusal
from .limits import Limits
from .metrics import Metrics
from .parameters import Parameters
from .planning import Planner
from .streaming import OpenStreams
from .submission import Bridge

_THREADS = 2
"""For what takes long beside the engine; more would take processors from it."""


@dataclass
class Service:
    """The parts of a running server.

    Args:
        generator: the model and its tokenizer; its model may be without what embeddings need.
        engine: carries jobs out, already started.
        name: of the model, for clients.
        limits: of requests.
        log_prompts: write texts to the log.
    """

    generator: Generator
    engine: BatchEngine
    name: str
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        model, tokenizer = self.generator.model, self.generator.tokenizer
        config = model.config
        self.parameters = Parameters(
            self.limits,
            config.n_positions,
            min(tokenizer.vocab_size, config.vocab_size),
            config.n_embd,
            (config.n_layer, config.n_head),
        )
        self.connections = Connections(self.limits.max_connections, self.limits.header_timeout)
        self.metrics = Metrics(self.engine.stats, lambda: len(self.connections))
        self.pool = ThreadPoolExecutor(_THREADS, "gpt2fast-serving")
        self.planner = Planner(self.generator, self.parameters, self.pool)
        self.bridge = Bridge(self.engine, self.metrics, self.limits.max_unread)
        self.streams = OpenStreams(self.limits.write_timeout)
        self.names = TokenNames(tokenizer)
        self.created = int(time.time())
        self.is_draining = False
        """The server is about to end, and takes no new work."""

    @property
    def positions(self) -> int:
        """Tokens that the model can see."""
        return self.generator.model.config.n_positions

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model."""
        if name not in (None, self.name):
            raise Refusal(
                f"there is no model {shown(name)}; this server has {shown(self.name)}",
                404,
                param="model",
                code="model_not_found",
            )
