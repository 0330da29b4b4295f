"""From hidden states to logits and the loss, by reading weights or by calling modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cross_entropy import LinearCrossEntropy, loss_of_logits
from .embedding import Embedding
from .inputs import Tokens
from .output import GPT2Output
from .output_projection import OutputProjection, TiedOutputProjection
from .plain import is_plain


def predict(
    model: Any,
    hidden: Tensor,
    table: Tensor | None,
    wanted: Tensor | None,
    columns: slice,
    kept: slice | Tensor,
) -> GPT2Output:
    """Logits and, where there is something to predict, the loss.

    Args:
        model: a `GPT2`.
        hidden: (B, T, width).
        table: (vocab, width) token embedding as `tied_embedding` returned it; None: it was not
            called.
        wanted: (B, T') tokens to predict; None: no loss.
        columns: the T' columns that predict them.
        kept: the columns whose logits are wanted.
    """
    if reads_projection(model):
        weight, loss = model.projection, None
        if wanted is not None:
            loss = model.loss(hidden[:, columns], weight if table is None else table, wanted)
        return GPT2Output(loss, hidden[:, kept], weight)
    if wanted is None:
        return GPT2Output.computed(None, model.lm_head(hidden[:, kept]))
    logits = model.lm_head(hidden)
    loss = loss_of_logits(model.loss, logits[:, columns], wanted)
    return GPT2Output.computed(loss, logits[:, kept])


def reads_projection(model: Any) -> bool:
    """True if a model's logits are a product with `projection`, and no module has to be called."""
    plain = is_plain(model.lm_head, OutputProjection, TiedOutputProjection)
    return plain and getattr(model.lm_head, "model", model) is model


def reads_one_table(model: Any, tokens: Tokens) -> bool:
    """True if the loss is one op on the very table that a model looks tokens up in."""
    return (
        tokens.ids is not None
        and tokens.types is None
        and model.config.tie_word_embeddings
        and is_plain(model.wte, Embedding)
        and is_plain(model.wpe, Embedding)
        and is_plain(model.loss, LinearCrossEntropy)
        and model.loss.is_one_op
        and reads_projection(model)
    )
