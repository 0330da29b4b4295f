"""Random numbers of a continuation, which follow from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256
"""Steps to draw random numbers for at a time."""


@dataclass(frozen=True)
class Draw:
    """The source of the random numbers of one continuation."""

    seed: int
    sample: int
    """Index among the samples of its prompt that use this seed."""

    def after(self, samples: int) -> Draw:
        """The draw of the sample that comes `samples` later."""
        return Draw(self.seed, self.sample + samples)


class Draws:
    """Assigns every prompt of a call the draw of its first continuation.

    With a seed, a repeated prompt gets the samples after those of its first occurrence: its rows
    are drawn independently, and the first is the same as for the prompt alone. Without one, every
    prompt gets a seed of its own from torch's global generator.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[int, tuple[int, ...]], int] = {}

    def take(self, prompt: Sequence[int], seed: int | None, samples: int) -> Draw:
        """The draw of the first of the next `samples` continuations of `prompt`.

        Args:
            prompt: token ids.
            seed: the call's; None draws a new one for each prompt.
            samples: continuations wanted of this occurrence of the prompt.
        """
        if seed is None:
            return Draw(draw_seed(), 0)
        key = (seed, tuple(prompt))
        first = self._taken.get(key, 0)
        self._taken[key] = first + samples
        return Draw(seed, first)


def uniforms(draws: Sequence[Draw]) -> Iterator[Tensor]:
    """The random numbers of these continuations, on the CPU.

    The number of a draw at step t depends on its seed, its sample and t only: more samples or more
    steps change none of the others, and every prompt of a batch gets the same ones as alone.

    Returns:
        An endless iterator of blocks (draws, steps), float32 in [0, 1), each for the next steps.
    """
    # torch's CPU generator reads 32 bits of its seed; hashing spreads all of ours over them.
    seeds = [random.Random(f"{draw.seed}/{draw.sample}").getrandbits(32) for draw in draws]
    generators = [torch.Generator("cpu").manual_seed(mixed) for mixed in seeds]
    while True:
        yield torch.stack(
            [
                torch.rand(_BLOCK, generator=generator, dtype=torch.float32, device="cpu")
                for generator in generators
            ]
        )


class RowRandom:
    """The random numbers of the continuations that still run, step after step, on the CPU.

    Args:
        draws: the draw of each row.
    """

    def __init__(self, draws: Sequence[Draw]):
        # Rows of different prompts may share a draw.
        places = {draw: place for place, draw in enumerate(dict.fromkeys(draws))}
        self._blocks = uniforms(list(places))
        self._rows = torch.tensor([places[draw] for draw in draws], device="cpu")
        self._left = torch.empty(len(draws), 0, dtype=torch.float32, device="cpu")

    def take(self, count: int) -> Tensor:
        """(rows, count) float32: the numbers of each row's next steps."""
        while self._left.shape[1] < count:
            self._left = torch.cat([self._left, next(self._blocks)[self._rows]], dim=1)
        taken, self._left = self._left[:, :count], self._left[:, count:]
        return taken

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        kept = torch.tensor(rows, device="cpu")
        self._rows, self._left = self._rows[kept], self._left[kept]


def draw_seed() -> int:
    """A fresh seed from torch's global generator, so that `torch.manual_seed` fixes it."""
    return int(torch.randint(2**31, (), dtype=torch.int64, device="cpu"))
