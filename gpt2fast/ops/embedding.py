"""Sum of a token and a position embedding (Radford et al., 2018, eq. 2).

out[b, t, :] = wte[tokens[b, t], :] + wpe[positions[b, t], :]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .backend import Arguments, Op
from .cuda import by_device, cuda, kernels
from .derivatives import is_transformed, wants_graph
from .native import DTYPES, native, rows
from .requirements import check_floating, check_indices, check_shape
from .support import Tensors
from .triton import triton


def embedding(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """Look up and add token and position embeddings.

    Args:
        tokens: (B, T) int64, in [0, V).
        positions: (T,) or (B, T) int64, in [0, P).
        wte: (V, C).
        wpe: (P, C).

    Returns:
        (B, T, C). The gradient is summed in a fixed order: equal runs give equal bits.
    """
    return _forward.call(tokens, _expanded(positions, tokens), wte, wpe)


def _expanded(positions: Tensor, tokens: Tensor) -> Tensor:
    """Positions of shape (1, T) or (B, 1) for each token."""
    if positions.dim() == tokens.dim() > 1:
        pairs = zip(positions.shape, tokens.shape, strict=True)
        if all(given in (1, wanted) for given, wanted in pairs):
            return positions.expand(tokens.shape)
    return positions


def tied_embedding(
    tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor
) -> tuple[Tensor, Tensor]:
    """`embedding`, and `wte` again for an output projection that is tied to it.

    The two are one node of autograd's graph: its backward pass adds the look-ups' gradient to the
    projection's, in the same memory, where autograd would add two matrices of the table's size. So
    nothing but `linear_cross_entropy` may take the second result.
    """
    tensors = tokens, _expanded(positions, tokens), wte, wpe
    if (
        torch.compiler.is_compiling()
        or is_transformed()
        or not (torch.is_grad_enabled() and wte.requires_grad)
        or not {Tensor, torch.nn.Parameter}.issuperset(map(type, tensors))
    ):
        return embedding(*tensors), wte
    return _Tied.apply(*tensors)


def _check(call: Arguments) -> None:
    wte, wpe = call.wte, call.wpe
    check_floating(wte=wte, wpe=wpe)
    if wte.dim() != 2 or wpe.dim() != 2 or wte.shape[1] != wpe.shape[1]:
        raise ArgumentError(
            f"wte {tuple(wte.shape)} and wpe {tuple(wpe.shape)} must be matrices of one width"
        )
    _check_indices(call)


def _check_indices(call: Arguments) -> None:
    tokens, positions = call.tokens, call.positions
    for name, indices in (("tokens", tokens), ("positions", positions)):
        if indices.dtype not in (torch.int64, torch.int32):
            raise ArgumentError(f"{name} must be int64, not {indices.dtype}")
    if positions.shape not in (tokens.shape, tokens.shape[-1:]) or not tokens.dim():
        raise ArgumentError(
            f"positions {tuple(positions.shape)} must have the shape of tokens "
            f"{tuple(tokens.shape)}, or of its last dimension"
        )


def _check_values(call: Arguments) -> None:
    check_indices("tokens", call.tokens, 0, len(call.wte) - 1, of="the rows of wte")
    check_indices("positions", call.positions, 0, len(call.wpe) - 1, of="the rows of wpe")


def _check_backward(call: Arguments) -> None:
    grad = call.grad
    check_floating(grad=grad)
    _check_indices(call)
    check_shape("grad", grad, *call.tokens.shape, *grad.shape[-1:], says="a row for each token")
    for name in ("vocab_size", "n_positions"):
        if getattr(call, name) < 0:
            raise ArgumentError(f"{name}={getattr(call, name)} must be 0 at least")


def _check_backward_values(call: Arguments) -> None:
    check_indices("tokens", call.tokens, 0, call.vocab_size - 1, of="the rows of wte")
    check_indices("positions", call.positions, 0, call.n_positions - 1, of="the rows of wpe")


def _reference(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return (F.embedding(tokens, wte) + F.embedding(positions, wpe)).contiguous()


def _backward_reference(
    grad: Tensor, tokens: Tensor, positions: Tensor, vocab_size: int, n_positions: int
) -> tuple[Tensor, Tensor]:
    grad_positions = grad
    if positions.shape != tokens.shape:  # shared by all rows
        grad_positions = grad.reshape(tokens.shape[:-1].numel(), *grad.shape[-2:]).sum(0)
    return (
        torch.ops.aten.embedding_dense_backward(grad, tokens, vocab_size, -1, False),
        torch.ops.aten.embedding_dense_backward(grad_positions, positions, n_positions, -1, False),
    )


def _each(call: Arguments) -> tuple[Tensor, Tensor]:
    """Flat tokens and positions, one of each per look-up."""
    tokens = call.tokens
    positions = call.positions.expand(tokens.shape)
    return tokens.reshape(-1).contiguous(), positions.reshape(-1).contiguous()


def _native(call: Arguments) -> Tensor:
    wte = call.wte.contiguous()
    out = kernels(wte).embedding.default(*_each(call), wte, call.wpe.contiguous())
    return out.view(*call.tokens.shape, wte.shape[1])


def _backward_native(call: Arguments) -> tuple[Tensor, Tensor]:
    grad = rows(call.grad)
    tokens, positions = _each(call)
    gradient = torch.ops.gpt2fast_native.embedding_backward.default
    return gradient(grad, tokens, call.vocab_size), gradient(grad, positions, call.n_positions)


def _backward_cuda(call: Arguments) -> tuple[Tensor, Tensor]:
    grad = rows(call.grad)
    tokens, positions = _each(call)

    def gradient(indices: Tensor, size: int) -> Tensor:
        # Stable, so that a table row's gradients are added in the order of the look-ups.
        ordered, order = torch.sort(indices, stable=True)
        # On a GPU the assertion fails on the device: no wait for the result.
        inside = (ordered[0] >= 0) & (ordered[-1] < size)
        torch._assert_async(inside, f"an index is outside of a table of {size} rows")
        return torch.ops.gpt2fast_cuda.embedding_backward(grad, ordered, order, size)

    return gradient(tokens, call.vocab_size), gradient(positions, call.n_positions)


def _refuses(call: Arguments) -> str | None:
    if call.tokens.dtype != torch.int64 or call.positions.dtype != torch.int64:
        return "the compiled kernels take int64 tokens and positions"
    return None


_INDICES = Tensors("tokens", "positions")
_GRADIENT = Tensors("grad")
_TABLES = Tensors("wte", "wpe", one_dtype=True)
_backward = Op(
    "embedding_backward",
    "(Tensor grad, Tensor tokens, Tensor positions, SymInt vocab_size, SymInt n_positions) "
    "-> (Tensor, Tensor)",
    check=_check_backward,
    values=_check_backward_values,
    native=by_device(
        cpu=native(_INDICES, _GRADIENT, refuses=_refuses)(_backward_native),
        cuda=cuda(_INDICES, _GRADIENT, refuses=_refuses)(_backward_cuda),
    ),
    triton=triton("embedding", "backward", _INDICES, _GRADIENT),
    reference=_backward_reference,
)
_forward = Op(
    "embedding",
    "(Tensor tokens, Tensor positions, Tensor wte, Tensor wpe) -> Tensor",
    check=_check,
    values=_check_values,
    native=by_device(
        cpu=native(_INDICES, _TABLES, refuses=_refuses)(_native),
        cuda=cuda(_INDICES, _TABLES, refuses=_refuses)(_native),
    ),
    triton=triton("embedding", "forward", _INDICES, _TABLES),
    reference=_reference,
)


def _setup_context(ctx: Any, call: Arguments, results: Tensor) -> None:
    ctx.sizes = len(call.wte), len(call.wpe)
    ctx.save_for_backward(call.tokens, call.positions)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (None, None, *_backward.gradient(grad, *ctx.saved_tensors, *ctx.sizes))


_forward.register_autograd(_differentiate, _setup_context)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.sizes = len(wte), len(wpe)
        ctx.save_for_backward(tokens, positions)
        # Not wte itself, of which it would be a view: torch's message where weights change before
        # the backward pass would speak of views.
        return embedding(tokens, positions, wte, wpe), wte.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, total: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, total, None
        call = _backward.bind(grad, *ctx.saved_tensors, *ctx.sizes)
        if total is not None and _adds_look_ups(call, total):
            tokens, positions = _each(call)
            torch.ops.gpt2fast_native.embedding_backward_add(rows(grad), tokens, total)
            native_gradient = torch.ops.gpt2fast_native.embedding_backward.default
            return None, None, total, native_gradient(rows(grad), positions, call.n_positions)
        grad_wte, grad_wpe = _backward.gradient(*call)
        return None, None, grad_wte if total is None else total + grad_wte, grad_wpe


def _adds_look_ups(call: Arguments, total: Tensor) -> bool:
    """True if the CPU kernels may add the look-ups' gradient to `total`."""
    return (
        not wants_graph()
        and type(total) is Tensor
        and total.is_cpu
        and total.dtype in DTYPES
        and total.is_contiguous()
        and _backward.chosen(call) == "native"
    )


@_forward.register_fake
def _(call: Arguments) -> Tensor:
    wte, wpe = call.wte, call.wpe
    dtype = torch.promote_types(wte.dtype, wpe.dtype)
    return wte.new_empty((*call.tokens.shape, wte.shape[1]), dtype=dtype)


@_backward.register_fake
def _(call: Arguments) -> tuple[Tensor, Tensor]:
    grad, width = call.grad, call.grad.shape[-1]
    return grad.new_empty((call.vocab_size, width)), grad.new_empty((call.n_positions, width))
