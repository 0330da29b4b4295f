"""Engines over small models, and jobs for them, in tests."""

from __future__ import annotations

from typing import Any

import pytest

from gpt2fast.inference.batching import BatchEngine, Job
from gpt2fast.inference.requests import make_request
from gpt2fast.ops.native import loaded
from gpt2fast.tokenizer import CharTokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456 .,"[:61]
TOKENIZER = CharTokenizer({char: id for id, char in enumerate(ALPHABET)})
"""One for `small_generators.small_model`."""


def job(model: Any, prompt: str, **options: Any) -> Job:
    """A job for a prompt; options are those of a Generator's call, and fields of `Job`."""
    options = {"max_new_tokens": 10, **options}
    own = {name: options.pop(name) for name in list(options) if name in Job.__dataclass_fields__}
    return Job(TOKENIZER.encode(prompt), make_request(model, TOKENIZER, **options), prompt, **own)


def small_engine(model: Any, **sizes: Any) -> BatchEngine:
    """An engine that has to cut prompts, and turns pages often."""
    return BatchEngine(
        model, TOKENIZER, **{"page_size": 16, "max_rows": 4, "chunk_tokens": 16, **sizes}
    )


def assert_idle(engine: BatchEngine) -> None:
    """No job is left, and no page is held."""
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.pages_used == 0
    engine._worker.scheduler.pool.check()


def skip_where_sums_vary(form: str) -> None:
    """Skip where a token's logits are rounded by what is computed beside it.

    Args:
        form: of packed weights: float32, bfloat16, int8 or int4.
    """
    library = loaded()
    if library is None:
        pytest.skip("the reference sums in an order of torch's")
    if form != "float32" and library.isa.endswith("amx"):
        pytest.skip("AMX's tiles round otherwise than vectors")
