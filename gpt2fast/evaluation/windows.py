"""Sliding windows over long texts, in which each token is predicted once.

With a first token to begin from (GPT-2's end-of-text token) every token of the text is predicted;
the windows are those of lm-evaluation-harness's `get_rolling_token_windows`. Without one they are
those of transformers' guide to perplexity, and the first token of a window is not predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .likelihood import Request


def rolling_windows(
    tokens: Sequence[int], context: int, stride: int, first_token: int | None
) -> Iterator[Request]:
    """Windows that predict each token of a text once, except those with nothing before them.

    Args:
        tokens: the text.
        context: tokens that the model reads at most, C.
        stride: tokens that each window after the first predicts, S <= C. Then a token is predicted
            from at least C - S tokens before it (at least one where S = C), once the text is C
            long. The smaller, the better the predictions and the longer it takes: about C / S
            times.
        first_token: read before the first token of the text, which is then predicted as well.
            None: windows begin at multiples of S, and what stands first in the text (where S = C,
            in every window) is not predicted.

    Yields:
        A request with one ending, the tokens to predict.
    """
    tokens = list(tokens)
    if not tokens:
        return
    if first_token is None:
        yield from _strided(tokens, context, stride)
        return
    done = min(context, len(tokens))
    yield Request([first_token], [tokens[:done]])
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        # The last token predicted is not read: C tokens read are C + 1 with it.
        yield Request(tokens[end - context - 1 : done], [tokens[done:end]])
        done = end


def _strided(tokens: list[int], context: int, stride: int) -> Iterator[Request]:
    done = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        done = max(done, begin + 1)
        if end > done:
            yield Request(tokens[begin:done], [tokens[done:end]])
        done = end
        if end == len(tokens):
            return
