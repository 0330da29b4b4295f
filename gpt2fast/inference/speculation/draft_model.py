"""Proposals of a smaller model with the same vocabulary (Leviathan et al., 2023)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...errors import GenerationError
from ...model import GPT2
from ...nn.kv_cache import KVCache
from ...tokenizer import Tokenizer
from ..engine import choose
from ..packed import PackedGPT2
from .drafter import DraftRow
from .lengths import Chance, DraftLengths

_BLOCK = 512
"""Tokens in one pass, as for any packed model."""
_RATE = 0.6
"""Share of places that are right before it is known."""
_FIRST_LENGTH = 64
"""Entries a row that a cache begins with."""


@dataclass
class _Row:
    slot: int
    """Its row of the cache."""
    read: list[int] = field(default_factory=list)
    """The tokens whose keys and values are there, the proposed ones among them."""


class ModelDrafter:
    """A `Drafter` that continues each row with a model of its own.

    Greedy rows get its likeliest tokens. Rows that draw get its draws, from the same random numbers
    as those of the model that verifies: both invert a cumulative distribution at one number, and
    agree the more often the more alike the distributions are. Temperature, top-k and the like apply
    in both; options that the ops do not have (`logit_bias`, say) in the verification alone.

    Args:
        model: a GPT2 that can be packed, on the CPU, or a PackedGPT2.
        vocab_size: proposes ids below this only; None means all that the model has.
        lengths: decides how many tokens to propose.

    Raises:
        GenerationError: the model cannot be packed here.
    """

    def __init__(
        self,
        model: GPT2 | PackedGPT2,
        vocab_size: int | None = None,
        lengths: DraftLengths | None = None,
    ):
        self._model = packed_draft(model)
        known = model.config.vocab_size
        self._vocab_size = known if vocab_size is None else min(vocab_size, known)
        self._lengths = DraftLengths() if lengths is None else lengths
        self._rows: dict[int, _Row] = {}
        self._free: list[int] = []
        self._cache: KVCache | None = None

    @property
    def cache_rows(self) -> int:
        """Rows that there is memory for; none once all have been forgotten."""
        return 0 if self._cache is None else self._cache.batch_size

    def propose(self, rows: Sequence[DraftRow]) -> list[list[int]]:
        """See `Drafter`."""
        room = self._model.config.n_positions
        chances, places = [], []
        for place, row in enumerate(rows):
            most = min(row.most, room + 1 - len(row.tokens))
            if most < 1:
                continue
            chances.append(Chance(row.id, "model", _RATE, most))
            places.append(place)
        proposals: list[list[int]] = [[] for _ in rows]
        seconds = 0.0
        if chances:
            lengths = self._lengths.choose(chances, len(rows))
            chosen = [(p, n) for p, n in zip(places, lengths, strict=True) if n]
            if chosen:
                begun = time.perf_counter()
                drafts = self._draft([rows[place] for place, _ in chosen], [n for _, n in chosen])
                seconds = (time.perf_counter() - begun) / max(lengths)
                for (place, _), draft in zip(chosen, drafts, strict=True):
                    proposals[place] = draft
        self._lengths.start(len(rows) + sum(map(len, proposals)), seconds)
        return proposals

    def observe(self, row_id: int, proposed: int, accepted: int, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        self._lengths.observe(row_id, proposed, accepted)

    def forget(self, row_id: int) -> None:
        """See `Drafter`."""
        self._lengths.forget(row_id)
        row = self._rows.pop(row_id, None)
        if row is not None:
            self._free.append(row.slot)
        if not self._rows:
            self._cache, self._free = None, []

    @torch.inference_mode()
    def _draft(self, rows: Sequence[DraftRow], lengths: Sequence[int]) -> list[list[int]]:
        """Tokens that may follow each row, `lengths` of them."""
        longest = max(len(row.tokens) + n - 1 for row, n in zip(rows, lengths, strict=True))
        held = [self._row(row.id) for row in rows]
        self._reserve(longest)
        numbers = [
            None if row.uniforms is None else row.uniforms(n)
            for row, n in zip(rows, lengths, strict=True)
        ]
        news = []
        for row, mine in zip(rows, held, strict=True):
            kept = _common(mine.read, row.tokens)
            del mine.read[kept:]
            news.append(list(row.tokens[kept:]))
        drafts: list[list[int]] = [[] for _ in rows]
        live = list(range(len(rows)))
        for depth in range(max(lengths)):
            logits = self._read([held[i] for i in live], [news[i] for i in live])
            chosen = self._choose(
                logits,
                [rows[i] for i in live],
                [drafts[i] for i in live],
                [None if (drawn := numbers[i]) is None else drawn[depth] for i in live],
            )
            for i, token in zip(live, chosen, strict=True):
                drafts[i].append(token)
                news[i] = [token]
            live = [i for i in live if len(drafts[i]) < lengths[i]]
        return drafts

    def _choose(
        self,
        logits: Tensor,
        rows: Sequence[DraftRow],
        drafts: Sequence[Sequence[int]],
        numbers: Sequence[float | None],
    ) -> list[int]:
        """A token for each row of logits; rows with equal options are done together."""
        groups: dict[tuple[bool, tuple[float, ...]], list[int]] = {}
        for place, row in enumerate(rows):
            key = (numbers[place] is None, tuple(row.options.processors().values()))
            groups.setdefault(key, []).append(place)
        chosen = [0] * len(rows)
        for (is_greedy, _), places in groups.items():
            options = rows[places[0]].options
            history = torch.empty(len(places), 0, dtype=torch.int64, device="cpu")
            if options.reads_history:
                history = _padded([[*rows[place].tokens, *drafts[place]] for place in places])
            uniform = None
            if not is_greedy:
                drawn = [numbers[place] for place in places]
                uniform = torch.tensor(drawn, dtype=torch.float32, device="cpu")
            found = choose(
                logits[places], history, uniform, self._vocab_size, **options.processors()
            )
            for place, token in zip(places, found.tolist(), strict=True):
                chosen[place] = token
        return chosen

    def _read(self, rows: Sequence[_Row], news: Sequence[list[int]]) -> Tensor:
        """Logits (rows, V) after the new tokens of each row, which enter the cache."""
        assert self._cache is not None
        cache = self._cache
        outputs: list[Tensor] = []
        piece: list[tuple[_Row, list[int], bool]] = []
        size = 0

        def run() -> None:
            counts = torch.tensor([len(tokens) for _, tokens, _ in piece], device="cpu")
            lengths = torch.tensor([len(row.read) for row, _, _ in piece], device="cpu")
            starts = F.pad(counts.cumsum(0), (1, 0))
            tokens = torch.tensor([t for _, some, _ in piece for t in some], device="cpu")
            within = torch.arange(len(tokens), device="cpu") - starts[:-1].repeat_interleave(counts)
            ends = [index for index, (_, _, is_last) in enumerate(piece) if is_last]
            outputs.append(
                ops.packed_step(
                    self._model.weights,
                    cache.k,
                    cache.v,
                    tokens,
                    lengths.repeat_interleave(counts) + within,
                    starts,
                    torch.tensor([row.slot for row, _, _ in piece], device="cpu"),
                    lengths,
                    starts[1:][ends] - 1,
                    k_scales=cache.k_scales,
                    v_scales=cache.v_scales,
                )
            )
            for row, some, _ in piece:
                row.read += some
            piece.clear()

        for row, tokens in zip(rows, news, strict=True):
            begin = 0
            while begin < len(tokens):
                part = tokens[begin : begin + _BLOCK - size]
                begin += len(part)
                size += len(part)
                piece.append((row, part, begin == len(tokens)))
                if size == _BLOCK:
                    run()
                    size = 0
        if piece:
            run()
        return torch.cat(outputs)

    def _row(self, row_id: int) -> _Row:
        """What is kept for a row; a new one gets a slot."""
        if row_id not in self._rows:
            if not self._free:
                before = self.cache_rows
                rows = max(1, 2 * before)
                self._resize(rows, _FIRST_LENGTH if before == 0 else self._cache_length)
                self._free = list(range(rows - 1, before - 1, -1))
            self._rows[row_id] = _Row(self._free.pop())
        return self._rows[row_id]

    @property
    def _cache_length(self) -> int:
        return 0 if self._cache is None else self._cache.max_length

    def _reserve(self, entries: int) -> None:
        """Make room for so many entries a row."""
        if entries > self._cache_length:
            length = min(max(entries, 2 * self._cache_length), self._model.config.n_positions)
            self._resize(self.cache_rows, length)

    def _resize(self, rows: int, length: int) -> None:
        """Move what is in the cache to a larger one."""
        before = self._cache
        self._cache = after = self._model.new_cache(
            rows, min(length, self._model.config.n_positions)
        )
        if before is None:
            return
        for old, new in (
            (before.k, after.k),
            (before.v, after.v),
            (before.k_scales, after.k_scales),
            (before.v_scales, after.v_scales),
        ):
            if old is not None and new is not None:
                new[:, : old.shape[1], : old.shape[2]] = old


def packed_draft(model: GPT2 | PackedGPT2) -> PackedGPT2:
    """The packed form of a draft model.

    Raises:
        GenerationError: there is none here.
    """
    fastest = model.for_decoding()
    if isinstance(fastest, PackedGPT2):
        return fastest
    raise GenerationError(
        "a draft model runs on packed weights, and this one cannot be packed: it must be on the "
        f"CPU (it is on {model.device}), without hooks, where the compiled kernels run"
    )


def check_same_vocabulary(draft: Tokenizer, tokenizer: Tokenizer) -> None:
    """Refuse a draft model whose ids do not mean what the model's do.

    Args:
        draft: the draft model's tokenizer; it may have fewer tokens at its end, or more.
        tokenizer: the model's.

    Raises:
        GenerationError: names the first difference.
    """
    reason = draft.difference(tokenizer)
    if reason is not None and tokenizer.difference(draft) is not None:
        raise GenerationError(
            f"the tokenizer of the draft model is not the model's: {reason}; speculate with a "
            'smaller model that has the same vocabulary, or with "lookup"'
        )


def _common(read: Sequence[int], tokens: Sequence[int]) -> int:
    """Number of tokens at the beginning that are in the cache and need not be read again; the
    last one always is, for its logits."""
    most = min(len(read), len(tokens) - 1)
    return next((i for i in range(most) if read[i] != tokens[i]), most)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(rows, S) int64 with -1 before shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[-1] * (longest - len(row)) + list(row) for row in rows], device="cpu")
