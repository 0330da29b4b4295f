"""GPT-2's building blocks as modules for anybody's model (Radford et al., 2019, section 2.3).

Constructor arguments are plain sizes; parameters carry the names of GPT-2's checkpoints and
projections are stored (in, out) as there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .cache import LayerCache
from .config import ACTIVATION_NAMES, plain_activation
from .errors import ArgumentError
from .ops.activations import ACTIVATIONS
from .ops.backend import statistics_dtype
from .ops.derivatives import is_transformed, refused
from .ops.int8_cache import dequantize
from .plain import is_plain, readable

__all__ = [
    "Block",
    "CausalSelfAttention",
    "GELUMLP",
    "LayerNorm",
    "LinearCrossEntropy",
    "Projection",
    "ResidualLayerNorm",
]

_CHUNK_BYTES = 1 << 27
"""Of logits held at once where the fused loss does not serve."""


@readable
class Projection(nn.Module):
    """`x @ weight + bias` with the weight stored (in, out), as in GPT-2's checkpoints.

    Args:
        in_features: size of x's last dimension.
        out_features: size of the result's last dimension.
        std: standard deviation of the initial weights.
    """

    def __init__(
        self, in_features: int, out_features: int, std: float = 0.02, *, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.std = std
        self.weight = nn.Parameter(torch.empty(in_features, out_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std^2) and set the bias to zero."""
        if self.weight.is_meta:  # nothing to draw, and torch would load its compiler for it
            return
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return ops.projection(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What print shows."""
        inputs, outputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}"


@readable
class Embedding(nn.Embedding):
    """`nn.Embedding` that begins as GPT-2's do.

    Args:
        num_embeddings, embedding_dim: rows of the table, and their size.
        std: standard deviation of the initial weights, which the caller draws.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, std: float = 0.02, *, device=None, dtype=None
    ):
        table = torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        super().__init__(num_embeddings, embedding_dim, _weight=table)
        self.std = std

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std^2)."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=self.std)


@readable
class OutputProjection(nn.Linear):
    """`nn.Linear` without a bias that begins as GPT-2's embeddings do.

    Args:
        in_features, out_features: width, and size of the vocabulary.
        std: standard deviation of the initial weights.
    """

    def __init__(
        self, in_features: int, out_features: int, std: float = 0.02, *, device=None, dtype=None
    ):
        self.std = std
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std^2)."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=self.std)


@readable
class TiedOutputProjection(nn.Module):
    """The output projection of a model whose weight is that of another module: it has none itself,
    so that the weight is there once, in `parameters()` and in `state_dict()`.

    Args:
        model: whose `projection` (vocab, width) it multiplies with. It is not kept alive.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tie(model)

    def tie(self, model: nn.Module) -> None:
        """Take the weight from this model."""
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model that it takes the weight from; None where that is gone."""
        return self._model()

    @property
    def weight(self) -> Tensor:
        """(vocab, width): that of the token embedding.

        Raises:
            ArgumentError: the model is gone.
        """
        model = self._model()
        if model is None:
            raise ArgumentError("this lm_head was tied to a model that is gone: keep the model")
        return cast("Tensor", model.projection)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) hidden states -> (..., vocab) logits."""
        return F.linear(hidden, self.weight)

    def extra_repr(self) -> str:
        """What print shows."""
        return "tied to the token embedding"

    def __getstate__(self) -> dict[str, Any]:
        # The model ties it again when it is copied or loaded.
        return {**super().__getstate__(), "_model": _nothing}  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        model = self._model()
        if model is None or id(model) in memo:  # which is being copied itself
            copy = type(self).__new__(type(self))
            memo[id(self)] = copy
            copy.__setstate__(deepcopy(self.__getstate__(), memo))
            return copy
        # A copy by itself has a weight of its own.
        weight = self.weight.detach()
        alone = OutputProjection(weight.shape[1], weight.shape[0], 0.0, device="meta")
        alone.weight = nn.Parameter(weight.clone())
        return alone

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # transformers gives the tied weight under both names; the embedding is loaded before.
        head, errors = state_dict.get(f"{prefix}weight"), arguments[-1]
        if head is None or self._model() is None or head.is_meta or self.weight.is_meta:
            return
        if head.shape != self.weight.shape or not torch.equal(head.to(self.weight), self.weight):
            errors.append(
                f"{prefix}weight is not wte.weight, to which this model's lm_head is tied; give "
                "the configuration tie_word_embeddings=False"
            )


def _nothing() -> None:
    """In place of a reference to a model."""


@readable
class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al., 2016), alone or with the addition before it.

    Args:
        width: size of the last dimension.
        eps: added to the variance.
        elementwise_affine: multiply by a weight, and add a bias if `bias` says so.
        bias: whether there is a bias.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.width, self.eps = width, eps
        self.weight = self.bias = None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(width, **factory))
            if bias:
                self.bias = nn.Parameter(torch.zeros(width, **factory))

    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.add(x, None)[0]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalise `x + residual` in one pass.

        Args:
            x: (..., width).
            residual: (..., width), or None for x alone.

        Returns:
            The normalised sum and the sum, (..., width) both.
        """
        weight = x.new_ones(self.width) if self.weight is None else self.weight
        bias = weight.new_zeros(self.width) if self.bias is None else self.bias
        return ops.residual_layer_norm(x, residual, weight, bias, self.eps)

    def extra_repr(self) -> str:
        """What print shows."""
        affine = ", elementwise_affine=False" if self.weight is None else ""
        return f"{self.width}, eps={self.eps:g}, bias={self.bias is not None}{affine}"


@readable
class ResidualLayerNorm(LayerNorm):
    """Add to the residual stream and normalise the sum, in one pass.

    Args:
        width, eps, elementwise_affine, bias: as of `LayerNorm`.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise `x + residual`.

        Args:
            x: (..., width).
            residual: (..., width), or None for x alone.

        Returns:
            The normalised sum, and the sum: the residual stream to go on with.
        """
        return self.add(x, residual)


def add_and_normalize(norm: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """`LayerNorm.add` in one pass, or by calling `norm` with the sum where that can be told."""
    if is_plain(norm, LayerNorm, ResidualLayerNorm):
        return norm.add(x, residual)  # type: ignore[operator]
    stream = x if residual is None else (residual + x).to(residual.dtype)
    normed = norm(stream)
    return normed[0] if isinstance(norm, ResidualLayerNorm) else normed, stream


@readable
class Activation(nn.Module):
    """An elementwise activation by the name that transformers gives it.

    Args:
        name: one of `gpt2fast.config.ACTIVATION_NAMES`.
    """

    def __init__(self, name: str):
        super().__init__()
        if name not in ACTIVATION_NAMES:
            raise ArgumentError(f"activation={name!r} is not one of {', '.join(ACTIVATION_NAMES)}")
        self.name = name
        self.function = plain_activation(name)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return ACTIVATIONS[self.function](x)

    def extra_repr(self) -> str:
        """What print shows."""
        return self.name


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """`dropout(x)`, without the call where it does nothing that can be told."""
    if is_plain(dropout, nn.Dropout) and not (dropout.training and dropout.p):
        return x
    return dropout(x)


def _check_stream(x: Tensor, width: int) -> None:
    if x.dim() != 3 or x.shape[-1] != width:
        way_out = "; x[None] makes a batch of one sequence" if x.shape[1:] == (width,) else ""
        raise ArgumentError(
            f"x has the shape {tuple(x.shape)}; it must be (batch, time, width={width}){way_out}"
        )


def _check_probability(name: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ArgumentError(f"{name}={dropout} is not a probability in [0, 1)")


@readable
class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it.

    Args:
        width: of the residual stream.
        heads: number of heads; divides `width`.
        dropout: probability of dropping an attention weight while training.
        scale: factor on the scores; None means 1 / sqrt(width / heads).
        residual_dropout: probability of dropping an element of the result while training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        scale: float | None = None,
        *,
        residual_dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if width % heads:
            raise ArgumentError(f"width={width} is not a multiple of heads={heads}")
        _check_probability("dropout", dropout)
        _check_probability("residual_dropout", residual_dropout)
        self.width = width
        self.heads = heads
        self.scale = (width // heads) ** -0.5 if scale is None else scale
        self.c_attn = Projection(width, 3 * width, device=device, dtype=dtype)
        self.c_proj = Projection(width, width, device=device, dtype=dtype)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(residual_dropout)

    @property
    def dropout(self) -> float:
        """Probability of dropping an attention weight while training."""
        return self.attn_dropout.p

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self.attn_dropout.p = dropout

    def reset_parameters(self) -> None:
        """Draw new weights."""
        _reset_children(self)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, width).
            attention_mask: (B, T) bool or 0/1, false at positions that must not be seen.
            cache: keys and values of the positions before x; x's own are appended to it.

        Returns:
            (B, T, width).
        """
        _check_stream(x, self.width)
        batch, time, width = x.shape
        qkv = self.c_attn(x).view(batch, time, 3, self.heads, width // self.heads)
        if cache is not None and cache.front is not None:
            qkv = _in_order(qkv, cache.front)
        q, k, v = qkv.unbind(2)
        out = self._attend(q, k, v, attention_mask, cache).reshape(batch, time, width)
        if cache is not None and cache.front is not None:
            out = _in_order(out, cache.front.argsort(1))
        return drop(self.resid_dropout, self.c_proj(out))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """(B, T, heads, head size), from queries, keys and values of that shape."""
        fused = is_plain(self.attn_dropout, nn.Dropout)
        dropout = self.attn_dropout.p if fused and self.training else 0.0
        if cache is not None:
            scales = cache.k_scales, cache.v_scales
            stored = _as_constants(k, v, cache)
            ops.append_to_cache(*stored, cache.k, cache.v, cache.lengths, cache.counts, *scales)
            if not cache.empty and fused and not dropout:
                out = ops.attention_with_cache(
                    q, cache.k, cache.v, cache.lengths, self.scale, *scales
                )
                return _of_constants(out, cache)
            if not cache.empty:
                k = dequantize(cache.k, cache.k_scales, q.dtype)
                v = dequantize(cache.v, cache.v_scales, q.dtype)
                out = self._attend_openly(q, k, v, None, cache.lengths)
                return _of_constants(out, cache)
        if not fused:
            return self._attend_openly(q, k, v, mask, None)
        seed = torch.randint(1 << 62, (1,), device=q.device) if dropout else None
        return ops.causal_attention(q, k, v, self.scale, mask, dropout, seed)

    def _attend_openly(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """Attention whose weights (B, heads, T, S) pass through `attn_dropout`.

        Args:
            q: (B, T, heads, head size).
            k, v: (B, S, heads, head size).
            mask: (B, S), false at keys that must not be seen.
            lengths: (B,) keys before the first query; None: none.
        """
        dtype = statistics_dtype(q.dtype)
        scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), k.to(dtype)) * self.scale
        last = torch.arange(q.shape[1], device=q.device)
        if lengths is not None:
            last = last + lengths[:, None, None]
        seen = torch.arange(k.shape[1], device=q.device) <= last[..., None]
        if mask is not None:
            seen = seen & mask.bool()[:, None, None]
        # Finite: a row that sees nothing is no number otherwise, and spreads.
        scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
        weights = self.attn_dropout(scores.softmax(-1).to(v.dtype))
        return torch.einsum("bhts,bshd->bthd", weights, v)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"width={self.width}, heads={self.heads}, scale={self.scale:g}"


def _as_constants(k: Tensor, v: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Keys and values as a cache stores them, which remembers if they had gradients."""
    if is_transformed() or not torch.is_grad_enabled() or not (k.requires_grad or v.requires_grad):
        return k, v
    if cache.constants is not None:
        cache.constants.lost = True
    return k.detach(), v.detach()


def _of_constants(out: Tensor, cache: LayerCache) -> Tensor:
    """What was computed from a cache, whose backward pass is an error where it would be wrong."""
    lost = cache.constants is not None and cache.constants.lost
    if not torch.is_grad_enabled() or not (lost or out.requires_grad):
        return out
    anchor = out if out.requires_grad else out.new_zeros(()).requires_grad_()
    return refused(
        out,
        anchor,
        "a cache keeps keys and values without their gradients: to train, give all tokens to one "
        "call without a cache; to compute without gradients, use torch.no_grad()",
    )


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """x (B, T, ...) with the positions of each row in `order` (B, T)."""
    index = order.view(*order.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return x.gather(1, index)


def _reset_children(module: nn.Module) -> None:
    for child in module.children():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()  # type: ignore[operator]


@readable
class GELUMLP(nn.Module):
    """Two projections with an activation between them.

    Args:
        width: of the residual stream.
        inner: width of the hidden layer; None means 4 * width.
        activation: gelu_new (fused), gelu, relu, silu, tanh, or an alias of transformers'.
        dropout: probability of dropping an element of the result while training.
    """

    def __init__(
        self,
        width: int,
        inner: int | None = None,
        activation: str = "gelu_new",
        dropout: float = 0.0,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_probability("dropout", dropout)
        inner = 4 * width if inner is None else inner
        self.c_fc = Projection(width, inner, device=device, dtype=dtype)
        self.c_proj = Projection(inner, width, device=device, dtype=dtype)
        self.act = Activation(activation)
        self.dropout = nn.Dropout(dropout)

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self.act.name if isinstance(self.act, Activation) else type(self.act).__name__

    @activation.setter
    def activation(self, name: str) -> None:
        self.act = Activation(name)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        _reset_children(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        fc, act, proj = self.c_fc, self.act, self.c_proj
        if (
            is_plain(act, Activation)
            and act.function == "gelu_new"
            and is_plain(fc, Projection)
            and is_plain(proj, Projection)
        ):
            x = ops.gelu_mlp(x, fc.weight, fc.bias, proj.weight, proj.bias)
        else:
            x = proj(act(fc(x)))
        return drop(self.dropout, x)


@readable
class Block(nn.Module):
    """A pre-norm transformer block.

        x = x + attention(norm(x))
        x = x + mlp(norm(x))

    Args:
        width: of the residual stream.
        heads: number of attention heads.
        inner: width of the MLP's hidden layer; None means 4 * width.
        activation: the MLP's activation.
        dropout: probability of dropping what attention and MLP add, while training.
        attention_dropout: probability of dropping an attention weight, while training.
        scale: factor on the attention scores; None means 1 / sqrt(width / heads).
        eps: of the layer normalisations.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int | None = None,
        activation: str = "gelu_new",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        scale: float | None = None,
        eps: float = 1e-5,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.width = width
        self.ln_1 = LayerNorm(width, eps, **factory)
        self.attn = CausalSelfAttention(
            width, heads, attention_dropout, scale, residual_dropout=dropout, **factory
        )
        self.ln_2 = LayerNorm(width, eps, **factory)
        self.mlp = GELUMLP(width, inner, activation, dropout, **factory)

    @property
    def dropout(self) -> float:
        """Probability of dropping what the MLP adds, while training."""
        return self.mlp.dropout.p

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self.attn.resid_dropout.p = self.mlp.dropout.p = dropout

    def reset_parameters(self) -> None:
        """Draw new weights."""
        _reset_children(self)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, T, width) -> (B, T, width); arguments as in `CausalSelfAttention.forward`."""
        _check_stream(x, self.width)
        added, residual = self.branch(x, None, attention_mask, cache)
        return residual + added

    def branch(
        self,
        x: Tensor,
        residual: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block with its additions left open, so that a stack of blocks fuses them.

        Args:
            x: (B, T, width), what the block before has added.
            residual: (B, T, width), the stream it is added to; None before the first block.
            attention_mask, cache: as for `CausalSelfAttention`.

        Returns:
            What this block's MLP adds, and the stream it is added to.
        """
        normed, residual = add_and_normalize(self.ln_1, x, residual)
        x = self.attn(normed, attention_mask, cache)
        normed, residual = add_and_normalize(self.ln_2, x, residual)
        return self.mlp(normed), residual


REDUCTIONS = ("mean", "sum", "none")


@readable
class LinearCrossEntropy(nn.Module):
    """Cross-entropy of `hidden @ weight.T` that never holds all logits.

    Args:
        ignore_index: the target that does not count.
        reduction: "mean" over the targets that count, their "sum", or "none": each by itself.
        label_smoothing: in [0, 1], how much of each target is spread over the vocabulary
            (Szegedy et al., 2016).

    The mean and the sum without smoothing are one fused op; the others compute each chunk of
    logits again in the backward pass.
    """

    def __init__(
        self, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing={label_smoothing} must lie in [0, 1]")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, hidden: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:
        """The loss of hidden states.

        Args:
            hidden: (..., C).
            weight: (V, C), the output projection; None where `hidden` are logits (..., V) already.
            targets: (...) int64.

        Returns:
            Scalar, in nats; of the shape of `targets` with reduction "none".
        """
        if weight is None:
            return self.of_logits(hidden, targets)
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if self.label_smoothing or self.reduction == "none":
            return self._reduced(self._chunked(rows, weight, flat), targets)
        mean = ops.linear_cross_entropy(rows, weight, flat, self.ignore_index)
        if self.reduction == "mean":
            return mean
        count = (flat != self.ignore_index).sum()
        return torch.where(count > 0, mean * count, 0.0)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits that are there already.

        Args:
            logits: (..., V).
            targets: (...) int64.

        Returns:
            As `forward`.
        """
        flat = logits.reshape(-1, logits.shape[-1])
        return self._reduced(self._each(flat, targets.reshape(-1)), targets)

    def _each(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.to(statistics_dtype(logits.dtype)),
            targets,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def _chunked(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """(N,) losses, a chunk of logits at a time."""

        def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return self._each(F.linear(hidden, weight), targets)

        step: Callable[..., Any] = losses
        if torch.is_grad_enabled():
            step = partial(checkpoint, losses, use_reentrant=False)
        size = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        pairs = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([step(rows, weight, wanted) for rows, wanted in pairs])

    def _reduced(self, losses: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses.view(targets.shape)
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / (targets != self.ignore_index).sum()

    def extra_repr(self) -> str:
        """What print shows."""
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}{smoothing}"
