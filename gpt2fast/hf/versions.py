"""Versions of transformers: those that were tried, and a look at those that were not."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers

from .._system.output import warn
from ..errors import Error

_LOG = logging.getLogger(__name__)

TRIED = frozenset({"5.20", "5.21", "5.22", "5.23", "5.24"})
"""Versions that the tests ran with."""


class VersionError(Error):
    """Fused models differ from plain ones with the installed version of transformers."""


def installed() -> str:
    """The first two numbers of the installed version."""
    found = re.match(r"\d+\.\d+", transformers.__version__)
    return found[0] if found else transformers.__version__


@cache
def check_version(fuse: Callable[[Any], Any]) -> None:
    """With a version that was not tried, hold a small fused model against the plain one, once.

    Raises:
        VersionError: they differ.
    """
    version = installed()
    if version in TRIED:
        return
    warn(_LOG, f"gpt2fast was not tried with transformers {version}: comparing a small model first")
    try:
        difference = _largest_difference(fuse)
    except Exception as error:
        reason: object = f"{type(error).__name__}: {error}"
    else:
        if difference < 1e-4:
            return
        reason = f"they differ by {difference:.2g}"
    raise VersionError(
        f"fused models do not work with transformers {version} ({reason}); "
        f"use one of {', '.join(sorted(TRIED))}"
    )


def _largest_difference(fuse: Callable[[Any], Any]) -> float:
    """Between the logits, losses and gradients of a fused and a plain model."""
    config = transformers.GPT2Config(
        vocab_size=67, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=1,
        eos_token_id=2, initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        plain = transformers.GPT2LMHeadModel(config)
        tokens = torch.randint(3, 67, (2, 11))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    found: list[list[Any]] = []
    for model in (plain, fuse(copy.deepcopy(plain))):
        with torch.enable_grad():
            output = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
            output.loss.backward()
        text = model.eval().generate(tokens[:1], max_new_tokens=5, do_sample=False)
        logits = output.logits.masked_fill(mask[..., None] == 0, 0.0)
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([text.float(), output.loss, logits, *gradients])
    if any((x is None) != (y is None) for x, y in zip(*found, strict=True)):
        return float("inf")  # gradients of other parameters
    pairs = [(x, y) for x, y in zip(*found, strict=True) if x is not None]
    return max(float((x - y).abs().max()) for x, y in pairs)
