"""A job while the engine works on it: its tokens, pages, random numbers and text."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...tokenizer import Tokenizer
from ..continuation import Continuation, Generation
from ..processors import Processors
from ..sampling import Draw, uniforms
from ..scores import Scores
from .job import Job, Ticket
from .pages import page_keys

WAITING, RUNNING, ENDED = "waiting", "running", "ended"


class Numbers:
    """The random numbers of one continuation, by the place of the token that each chooses.

    Args:
        draw: their source.
    """

    def __init__(self, draw: Draw):
        self._blocks: Iterator[Tensor] = uniforms([draw])
        self._known: list[float] = []

    def at(self, place: int) -> float:
        """The number that chooses new token `place`."""
        while place >= len(self._known):
            self._known += next(self._blocks)[0].tolist()
        return self._known[place]


class Row:
    """A job and its state.

    Args:
        job, ticket: what is asked, and who is told.
        limit: most new tokens.
        draw: source of random numbers; None where nothing is drawn.
        tokenizer: makes text of tokens.
        vocab_size: token ids below this may be chosen.
        page_size: tokens of a page.
        device: of the logits.
    """

    def __init__(
        self,
        job: Job,
        ticket: Ticket,
        limit: int,
        draw: Draw | None,
        tokenizer: Tokenizer,
        vocab_size: int,
        page_size: int,
        device: torch.device,
    ):
        request, options = job.request, job.request.options
        self.job, self.ticket, self.limit, self.draw = job, ticket, limit, draw
        self.id = ticket.id
        self.state = WAITING
        self.tokens = list(job.tokens)
        """Prompt and continuation."""
        self.prompted = len(self.tokens)
        """Length of the prompt."""
        self.ids = np.empty(self.prompted + limit, np.int64)
        """The same tokens as `tokens`, in its first places."""
        self.ids[: self.prompted] = self.tokens
        self.length = 0
        """Tokens whose keys and values are in pages: not the newest one's, until it is read."""
        self.pages: list[int] = []
        self.published = 0
        """Pages of the prompt that others may find, or that came from others."""
        self.slot = -1
        """The row of the engine's page table, while it runs."""
        self.admissions = 0
        """How often it began to run."""
        self.served = -1
        """The step in which some of it was read as part of a prompt last, while it runs."""
        self.cached = 0
        """Tokens of the prompt that were not read, the first time."""
        self.told = False
        """`PromptRead` has been sent."""
        keys = page_keys(self.tokens, page_size)
        self.keys = keys[: self.prompted // page_size]
        """Keys of the prompt's full pages."""
        self.whole_key = keys[-1]
        """The key of the whole prompt."""
        self.first_logits: Tensor | None = None
        """(V,) the logits after the prompt, if it was not read, since another job had the same."""
        self.numbers = None if draw is None else Numbers(draw)
        self.continuation = Continuation(tokenizer, request)
        grammar = request.grammar
        self.matcher = None if grammar is None else grammar.matcher(request.criteria.eos)
        self.alternatives = job.prompt_alternatives
        if self.alternatives is None and request.scores_prompt:
            self.alternatives = request.alternatives
        self.prompt_scores = None if self.alternatives is None else Scores()
        processors = Processors(options, request.criteria, request.callables, vocab_size, device)
        self.processors = processors if processors.stepwise else None
        """All processors, if there are any that the ops do not have."""
        self.choice = tuple(options.processors().items())
        self.reads_history = options.reads_history
        self.group = (self.choice, draw is None, self.matcher is None)
        """Rows with the same one, and without `processors`, are chosen for together."""
        self.deadline = job.deadline
        if options.max_time is not None:
            end = time.monotonic() + options.max_time
            self.deadline = end if self.deadline is None else min(end, self.deadline)

    def append(self, token: int) -> None:
        """Add a new token; the one before it, which chose it, has been read."""
        self.ids[len(self.tokens)] = token
        self.tokens.append(token)
        self.length = len(self.tokens) - 1

    @property
    def generated(self) -> int:
        """Number of new tokens."""
        return len(self.tokens) - self.prompted

    @property
    def decodes(self) -> bool:
        """True if the newest token is one of the continuation, and the only one to read."""
        count = len(self.tokens)
        return self.length == count - 1 and count > self.prompted

    @property
    def remaining(self) -> int:
        """Tokens to read before it decodes, or has the logits of its first token."""
        count = len(self.tokens)
        return (count if count == self.prompted else count - 1) - self.length

    def single(self, position: int) -> bool:
        """True if the token at a position is computed as in a step of one token."""
        return position >= self.prompted or self.prompted == 1

    def generation(self) -> Generation:
        """The result."""
        continuation, prompt = self.continuation, self.prompt_scores
        fields = continuation.scored(None)
        if prompt is not None and len(prompt.logprobs) == self.prompted - 1:
            fields["prompt_logprobs"] = [None, *prompt.logprobs]
            if self.alternatives:
                fields["prompt_top_logprobs"] = [None, *prompt.top]
        return Generation(
            prompt=self.job.prompt,
            text=continuation.text,
            tokens=continuation.tokens,
            prompt_tokens=self.prompted,
            finish_reason=continuation.reason or "length",
            seed=None if self.draw is None else self.draw.seed,
            prompt_token_ids=self.tokens[: self.prompted],
            **fields,
        )
