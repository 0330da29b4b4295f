"""Sum of a token and a position embedding (Radford et al., 2018, eq. 2).

out[b, t, :] = wte[tokens[b, t], :] + wpe[positions[b, t], :]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .backend import Op
from .cuda import by_device, cuda, kernels, unsuitable
from .native import native, refuses_tensors, rows
from .requirements import check_floating, check_indices, check_shape
from .triton import triton
from .triton import unsuitable as unsuitable_for_triton


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
    if positions.dim() == tokens.dim() > 1:
        pairs = zip(positions.shape, tokens.shape, strict=True)
        if all(given in (1, wanted) for given, wanted in pairs):
            positions = positions.expand(tokens.shape)
    return _forward.call(tokens, positions, wte, wpe)


def _check(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> None:
    check_floating(wte=wte, wpe=wpe)
    if wte.dim() != 2 or wpe.dim() != 2 or wte.shape[1] != wpe.shape[1]:
        raise ArgumentError(
            f"wte {tuple(wte.shape)} and wpe {tuple(wpe.shape)} must be matrices of one width"
        )
    _check_indices(tokens, positions)


def _check_indices(tokens: Tensor, positions: Tensor) -> None:
    for name, indices in (("tokens", tokens), ("positions", positions)):
        if indices.dtype not in (torch.int64, torch.int32):
            raise ArgumentError(f"{name} must be int64, not {indices.dtype}")
    if positions.shape not in (tokens.shape, tokens.shape[-1:]) or not tokens.dim():
        raise ArgumentError(
            f"positions {tuple(positions.shape)} must have the shape of tokens "
            f"{tuple(tokens.shape)}, or of its last dimension"
        )


def _check_values(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> None:
    check_indices("tokens", tokens, 0, len(wte) - 1, of="the rows of wte")
    check_indices("positions", positions, 0, len(wpe) - 1, of="the rows of wpe")


def _check_backward(
    grad: Tensor, tokens: Tensor, positions: Tensor, vocab_size: int, n_positions: int
) -> None:
    check_floating(grad=grad)
    _check_indices(tokens, positions)
    check_shape("grad", grad, *tokens.shape, *grad.shape[-1:], says="a row for each token")
    for name, size in (("vocab_size", vocab_size), ("n_positions", n_positions)):
        if size < 0:
            raise ArgumentError(f"{name}={size} must be 0 at least")


def _check_backward_values(
    grad: Tensor, tokens: Tensor, positions: Tensor, vocab_size: int, n_positions: int
) -> None:
    check_indices("tokens", tokens, 0, vocab_size - 1, of="the rows of wte")
    check_indices("positions", positions, 0, n_positions - 1, of="the rows of wpe")


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


def _each(positions: Tensor, tokens: Tensor) -> Tensor:
    """A position for every token, in one row."""
    return positions.expand(tokens.shape).reshape(-1).contiguous()


def _native(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    out = kernels(wte).embedding(
        tokens.reshape(-1).contiguous(),
        _each(positions, tokens),
        wte.contiguous(),
        wpe.contiguous(),
    )
    return out.view(*tokens.shape, wte.shape[1])


def _backward_native(
    grad: Tensor, tokens: Tensor, positions: Tensor, vocab_size: int, n_positions: int
) -> tuple[Tensor, Tensor]:
    grad = rows(grad)
    gradient = torch.ops.gpt2fast_native.embedding_backward
    return (
        gradient(grad, tokens.reshape(-1).contiguous(), vocab_size),
        gradient(grad, _each(positions, tokens), n_positions),
    )


def _backward_cuda(
    grad: Tensor, tokens: Tensor, positions: Tensor, vocab_size: int, n_positions: int
) -> tuple[Tensor, Tensor]:
    grad = rows(grad)

    def gradient(indices: Tensor, size: int) -> Tensor:
        # Stable: what one row of the table gets is added up in the order of the look-ups.
        ordered, order = torch.sort(indices, stable=True)
        # On a GPU this stops the device; nothing waits for it.
        inside = (ordered[0] >= 0) & (ordered[-1] < size)
        torch._assert_async(inside, f"an index is outside of a table of {size} rows")
        return torch.ops.gpt2fast_cuda.embedding_backward(grad, ordered, order, size)

    return gradient(tokens.reshape(-1), vocab_size), gradient(_each(positions, tokens), n_positions)


def _cuda_refuses(tokens: Tensor, positions: Tensor, *floating: Tensor) -> str | None:
    if tokens.dtype != torch.int64 or positions.dtype != torch.int64:
        return "the CUDA kernels take int64 tokens and positions"
    return unsuitable(tokens, positions, *floating, one_dtype=True)


def _refuses(tokens: Tensor, positions: Tensor, *floating: Tensor) -> str | None:
    if tokens.dtype != torch.int64 or positions.dtype != torch.int64:
        return "the native kernels take int64 tokens and positions"
    if not tokens.numel():
        return "the native kernels need at least one token"
    return refuses_tensors(*floating)


def _triton_refuses(*tensors: Tensor) -> str | None:
    return unsuitable_for_triton(*tensors, one_dtype=True)


_backward = Op(
    "embedding_backward",
    "(Tensor grad, Tensor tokens, Tensor positions, SymInt vocab_size, SymInt n_positions) "
    "-> (Tensor, Tensor)",
    check=_check_backward,
    values=_check_backward_values,
    native=by_device(
        cpu=native(
            _backward_native,
            lambda grad, tokens, positions, *sizes: _refuses(tokens, positions, grad),
        ),
        cuda=cuda(
            _backward_cuda,
            lambda grad, tokens, positions, *sizes: _cuda_refuses(tokens, positions, grad),
        ),
    ),
    triton=triton(
        "embedding",
        "backward",
        lambda grad, tokens, positions, *sizes: unsuitable_for_triton(grad, tokens, positions),
    ),
    torch=_backward_reference,
    reference=_backward_reference,
)
_forward = Op(
    "embedding",
    "(Tensor tokens, Tensor positions, Tensor wte, Tensor wpe) -> Tensor",
    check=_check,
    values=_check_values,
    native=by_device(cpu=native(_native, _refuses), cuda=cuda(_native, _cuda_refuses)),
    triton=triton("embedding", "forward", _triton_refuses),
    torch=_reference,
    reference=_reference,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    tokens, positions, wte, wpe = inputs
    ctx.sizes = (wte.shape[0], wpe.shape[0])
    ctx.save_for_backward(tokens, positions)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (None, None, *_backward.gradient(grad, *ctx.saved_tensors, *ctx.sizes))


_forward.register_autograd(_differentiate, _setup_context)


@_forward.register_fake
def _(tokens, positions, wte, wpe):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(wte.dtype, wpe.dtype)
    return wte.new_empty((*tokens.shape, wte.shape[1]), dtype=dtype)


@_backward.register_fake
def _(grad, tokens, positions, vocab_size, n_positions):  # type: ignore[no-untyped-def]
    width = grad.shape[-1]
    return grad.new_empty((vocab_size, width)), grad.new_empty((n_positions, width))
