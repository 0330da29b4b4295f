"""Texts that outgrow the model's positions: refused, stopped there, or continued from their newest
half."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import GenerationError
from ..model import GPT2
from ..sampling import SamplingOptions
from .generation import check_length

WINDOWS = ("error", "slide", "stop")


class Window:
    """Treatment of texts longer than a model's `n_positions`; see `Generator`.

    Args:
        kind: one of `WINDOWS`.
        notify: called with a message when a text slides for the first time.

    Raises:
        GenerationError: no such window.
    """

    def __init__(self, kind: str, notify: Callable[[str], None]):
        if kind not in WINDOWS:
            raise GenerationError(f"window is {kind!r}; choose one of {', '.join(WINDOWS)}")
        self.kind = kind
        self._notify = notify
        self._has_slid = False

    def check(self, model: GPT2, tokens: int, options: SamplingOptions, name: str) -> None:
        """Refuse a prompt that leaves no room for what is asked for.

        Args:
            model: what reads it.
            tokens: length of the prompt.
            options: what is asked for; beam and contrastive search neither slide nor stop.
            name: the prompt's name in errors.
        """
        new_tokens = options.new_tokens(tokens, name)
        room = model.config.n_positions
        if self.kind == "error" or options.num_beams > 1 or options.contrastive:
            check_length(model, tokens, new_tokens, name, options.max_length)
        elif self.kind == "stop" and tokens >= room:
            raise GenerationError(
                f"{name} has {tokens} tokens, which leaves nothing of the model's "
                f"n_positions={room} for new ones: shorten it, or slide the window"
            )
        elif tokens > room:
            self.tell_slide(room)

    def limit(self, new_tokens: int, tokens: int, room: int) -> int:
        """Most tokens to add to a prompt of `tokens`, of `new_tokens` that are asked for."""
        return min(new_tokens, room - tokens) if self.kind == "stop" else new_tokens

    def tell_slide(self, room: int) -> None:
        """Notify, the first time, that a text slides in a window of `room` tokens."""
        if not self._has_slid:
            self._has_slid = True
            self._notify(
                f"the text is longer than the model's {room} positions: it goes on from the "
                f"newest {max(1, room // 2)} tokens each time they are used up"
            )
