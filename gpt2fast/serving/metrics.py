"""Counters and times in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..inference.batching import EngineStats, Failed, Finished

CONTENT_TYPE = CONTENT_TYPE_PLAIN_1_0_0
_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_FORGETS = 0.9


class Metrics:
    """What a server counts.

    Args:
        stats: reads the engine's own counters.
        connections: says how many are open.
    """

    def __init__(self, stats: Callable[[], EngineStats], connections: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=True)
        registry.register(_Engine(stats, connections))
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "gpt2fast_requests", "Requests answered.", ("endpoint", "status"), registry=registry
        )
        self._seconds = Histogram(
            "gpt2fast_request_seconds", "Time from a request to the end of its answer.",
            ("endpoint",), buckets=_FIRST, registry=registry,
        )  # fmt: skip
        self._finished = Counter(
            "gpt2fast_choices_finished", "Choices that have ended, by the reason.",
            ("reason",), registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "gpt2fast_time_to_first_token_seconds",
            "Time from a choice's submission to its first token.",
            buckets=_FIRST, registry=registry,
        )  # fmt: skip
        self._between = Histogram(
            "gpt2fast_time_between_tokens_seconds", "Time from a token to the next one.",
            buckets=_BETWEEN, registry=registry,
        )  # fmt: skip
        self.usual_seconds = 1.0
        """Seconds that choices have taken lately."""

    def first_token(self, seconds: float) -> None:
        """Note a choice's first token."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Note a further token."""
        self._between.observe(seconds)

    def finished(self, event: Finished | Failed, seconds: float) -> None:
        """Note the end of a choice."""
        reason = event.generation.finish_reason if isinstance(event, Finished) else "error"
        self._finished.labels(reason).inc()
        if reason in ("eos", "stop", "length"):
            self.usual_seconds = _FORGETS * self.usual_seconds + (1 - _FORGETS) * seconds

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Note the end of an answer."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, stats: Callable[[], EngineStats], connections: Callable[[], int]) -> None:
        self._stats, self._connections = stats, connections

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "requests_running": ("Choices that are being generated.", stats.running),
            "requests_waiting": ("Choices that wait for a place.", stats.waiting),
            "cache_pages": ("Pages of the cache.", stats.pages_total),
            "cache_pages_used": ("Pages that running choices hold.", stats.pages_used),
            "connections": ("Open connections.", self._connections()),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts, those of prefix_hit_tokens included.",
                              stats.prompt_tokens),
            "prefix_hit_tokens": ("Tokens of prompts that were in the cache already.",
                                  stats.prefix_hit_tokens),
            "generated_tokens": ("New tokens.", stats.generated_tokens),
            "steps": ("Steps of the model.", stats.steps),
            "drafted_tokens": ("Tokens that were guessed.", stats.drafted_tokens),
            "accepted_tokens": ("Guessed tokens that were right.", stats.accepted_tokens),
        }  # fmt: skip
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(f"gpt2fast_{name}", about, value=value)
        for name, (about, value) in counters.items():
            yield CounterMetricFamily(f"gpt2fast_{name}", about, value=value)
