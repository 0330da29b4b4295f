"""Output projection and cross-entropy in one, without all logits in memory at once.

    logits = hidden @ weight^T
    loss   = mean over n with targets[n] != ignore_index of
             logsumexp(logits[n, :]) - logits[n, targets[n]]

The loss is kept in at least float32. With no target left the mean is NaN, as in torch.

Gradients are computed along with the loss, so that each chunk of logits is computed once: the
backward pass only multiplies them with the gradient that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .backend import Arguments, Op, autocast, statistics_dtype
from .cuda import by_device, cuda
from .derivatives import outside_autocast, wants_graph
from .matmul import matmul, product, reads_wider_weights
from .native import native
from .requirements import check_floating, check_indices, check_integers
from .support import Tensors
from .triton import triton

# Most bytes of logits to hold at once, by kind of device. Every chunk reads the weight and adds to
# its gradient, so fewer rows cost more (docs/performance.md); GPUs have memory to spare for that.
_CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
# A GPU multiplies tiles of so many rows: a chunk of one more would take another tile for it.
_TILE_ROWS = 128


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """Mean next-token loss of `hidden @ weight.T` against `targets`.

    Args:
        hidden: (N, C).
        weight: (V, C), the output projection.
        targets: (N,) int64 class indices in [0, V), or `ignore_index`.
        ignore_index: the target that does not count.

    Returns:
        Scalar loss in nats, at least float32.
    """
    if reads_wider_weights(hidden):
        (hidden,) = autocast(hidden)
    else:
        hidden, weight = autocast(hidden, weight)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    return _forward.call(hidden, weight, targets, ignore_index, *wanted)[0]


def _check(call: Arguments) -> None:
    hidden, weight, targets = call.hidden, call.weight, call.targets
    check_floating(hidden=hidden, weight=weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ArgumentError(
            f"hidden (N, C) and weight (V, C) do not fit: {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    check_integers(targets=targets)
    if targets.shape != hidden.shape[:1]:
        raise ArgumentError(
            f"targets must be ({hidden.shape[0]},), one per row of hidden, "
            f"not {tuple(targets.shape)}"
        )


def _check_values(call: Arguments) -> None:
    last = len(call.weight) - 1
    check_indices(
        "targets", call.targets, 0, last, but=call.ignore_index, of="the classes of weight"
    )


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    narrow = weight.to(hidden.dtype)
    logits = product(hidden, narrow.t()).to(statistics_dtype(hidden.dtype))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index)
    if not (hidden_grad or weight_grad):
        return loss, hidden.new_empty(0), weight.new_empty(0)
    counted = (targets != ignore_index)[:, None]
    chosen = targets[:, None].where(counted, 0)
    excess = logits.softmax(-1).scatter_add(
        1, chosen, logits.new_full((), -1.0).expand(chosen.shape)
    )
    grad_logits = (excess * counted / counted.sum().clamp(min=1)).to(hidden.dtype)
    return (
        loss,
        product(grad_logits, narrow) if hidden_grad else hidden.new_empty(0),
        product(grad_logits.t(), hidden).to(weight.dtype) if weight_grad else weight.new_empty(0),
    )


def _loss_alone(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    # Where torch differentiates the loss as an expression, no gradients are computed beside it.
    return _reference(*call._replace(hidden_grad=False, weight_grad=False))


def _count(call: Arguments) -> Tensor:
    return (call.targets != call.ignore_index).sum()


def _grad_logits(logits: Tensor, lse: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """softmax(logits) - onehot(targets), in the storage of `logits`."""
    counted = targets != ignore_index
    grad = logits.sub_(lse[:, None]).exp_()
    rows = torch.arange(len(targets), device=targets.device)
    grad[rows, targets.where(counted, 0)] -= 1.0
    return grad.mul_(counted[:, None])


def _chunk_rows(rows: int, row_bytes: int, device: str) -> int:
    """Rows of logits held at once: chunks of nearly equal size."""
    most = max(64, _CHUNK_BYTES.get(device, _CHUNK_BYTES["cpu"]) // max(1, row_bytes))
    if device == "cuda" and rows > most > _TILE_ROWS:
        most -= most % _TILE_ROWS
    chunks = max(1, -(-rows // most))
    equal = max(1, -(-rows // chunks))
    if device == "cuda" and chunks > 1:
        equal = min(most, -(-equal // _TILE_ROWS) * _TILE_ROWS)
    return equal


def _chunked(
    turn: Callable[[Tensor, Tensor, Tensor], Tensor],
    add: Callable[[Tensor, Tensor], object],
    call: Arguments,
    alignment: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all rows and the wanted gradients, a chunk of logits at a time.

    turn(logits, targets, losses) fills in the losses of a chunk and returns the gradient of its
    logits, which may overwrite them; add(total, x) adds x to a sum of a wider dtype. Rows of
    logits lie a multiple of `alignment` elements apart. The weight is read in `hidden`'s dtype.
    """
    hidden, targets = call.hidden, call.targets
    weight = call.weight.to(hidden.dtype)
    dtype = statistics_dtype(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    grad_hidden = hidden.new_empty(hidden.shape if call.hidden_grad else 0)
    grad_weight = weight.new_empty(weight.shape if call.weight_grad else 0)
    if call.weight_grad and not len(hidden):
        grad_weight.zero_()
    row = -(-len(weight) // alignment) * alignment
    step = _chunk_rows(len(hidden), row * hidden.element_size(), hidden.device.type)
    logits = hidden.new_empty((step, row))
    logits[:, len(weight) :] = 0  # torch's AMX products may multiply these with 0: no NaN here
    logits = logits[:, : len(weight)]
    # Several chunks add up in at least float32.
    total = grad_weight
    if len(hidden) > step and dtype != weight.dtype:
        total = torch.empty_like(grad_weight, dtype=dtype)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        chunk = logits[: len(hidden[rows])]
        product(hidden[rows], weight.t(), out=chunk)
        grad_logits = turn(chunk, targets[rows], losses[rows])
        if call.hidden_grad:
            product(grad_logits, weight, out=grad_hidden[rows])
        if call.weight_grad:
            if start > 0 and total is grad_weight:
                total.addmm_(grad_logits.t(), hidden[rows])
            else:
                product(grad_logits.t(), hidden[rows], out=grad_weight)
                if start > 0:
                    add(total, grad_weight)
                elif total is not grad_weight:
                    total.copy_(grad_weight)
    return losses, grad_hidden, total.to(weight.dtype).to(call.weight.dtype)


def _chunked_products(
    turn: Callable[[Tensor, Tensor, Tensor], Tensor],
    call: Arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_chunked` for a CPU: the weight may be wider than `hidden`, sums are float32 throughout."""
    hidden, weight, targets = call.hidden, call.weight, call.targets
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    grad_hidden = hidden.new_empty(hidden.shape if call.hidden_grad else 0)
    grad_weight = weight.new_empty(weight.shape if call.weight_grad else 0, dtype=torch.float32)
    if call.weight_grad and not len(hidden):
        grad_weight.zero_()
    row_bytes = len(weight) * hidden.element_size()
    step = _chunk_rows(len(hidden), row_bytes, hidden.device.type)
    logits = hidden.new_empty((step, len(weight)))
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        chunk = logits[: len(hidden[rows])]
        matmul(hidden[rows], weight.t(), hidden.dtype, out=chunk)
        grad_logits = turn(chunk, targets[rows], losses[rows])
        if call.hidden_grad:
            matmul(grad_logits, weight, hidden.dtype, out=grad_hidden[rows])
        if call.weight_grad:
            matmul(grad_logits.t(), hidden[rows], hidden.dtype, out=grad_weight, add=start > 0)
    return losses, grad_hidden, grad_weight.to(weight.dtype)


def _torch(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    count = _count(call)

    def turn(logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        wide = logits.to(losses.dtype)
        lse = wide.logsumexp(-1)
        counted = targets != call.ignore_index
        picked = wide.gather(1, targets.where(counted, 0)[:, None])[:, 0]
        losses.copy_((lse - picked) * counted)
        if not (call.hidden_grad or call.weight_grad):
            return logits
        grad = _grad_logits(wide, lse, targets, call.ignore_index)
        return grad.div_(count.clamp(min=1)).to(logits.dtype)

    losses, grad_hidden, grad_weight = _chunked(turn, Tensor.add_, call)
    return losses.sum() / count, grad_hidden, grad_weight


@native(Tensors("hidden", may_be_empty=True), Tensors("weight", may_be_empty=True))
def _native(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    count = int(_count(call))

    def turn(logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        torch.ops.gpt2fast_native.cross_entropy(
            logits,
            targets.contiguous(),
            losses,
            call.ignore_index,
            1.0 / max(1, count),
            call.hidden_grad or call.weight_grad,
        )
        return logits

    losses, grad_hidden, grad_weight = _chunked_products(turn, call)
    return losses.sum() / count, grad_hidden, grad_weight


@cuda(Tensors("hidden", "weight", one_dtype=True), Tensors("targets"))
def _cuda(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    count = _count(call)
    factor = count.clamp(min=1).to(torch.float32).reciprocal()  # stays on the device

    def turn(logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        torch.ops.gpt2fast_cuda.cross_entropy(
            logits,
            targets.contiguous(),
            losses,
            call.ignore_index,
            factor,
            call.hidden_grad or call.weight_grad,
        )
        return logits

    # GPT-2's vocabulary is odd: without gaps between the rows, most would not be aligned.
    losses, grad_hidden, grad_weight = _chunked(turn, Tensor.add_, call, alignment=64)
    return losses.sum() / count, grad_hidden, grad_weight


_forward = Op(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool hidden_grad, "
    "bool weight_grad) -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight)",
    check=_check,
    values=_check_values,
    native=by_device(cpu=_native, cuda=_cuda),
    triton=triton(
        "cross_entropy",
        "forward",
        Tensors("hidden", "weight", one_dtype=True, may_be_empty=True),
        Tensors("weight"),
    ),
    torch=_torch,
    reference=_reference,
)


def _setup_context(ctx: Any, call: Arguments, results: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_hidden, grad_weight = results
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    # Or else the two results that are gradients would get zeros of their size as gradients.
    ctx.set_materialize_grads(False)
    ctx.ignore_index = call.ignore_index
    ctx.wanted = call.hidden_grad, call.weight_grad
    ctx.save_for_backward(grad_hidden, grad_weight, call.hidden, call.weight, call.targets)


def _differentiate(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    if grad is None:  # nothing depends on the loss; happens in second derivatives
        return ()
    grad_hidden, grad_weight, hidden, weight, targets = ctx.saved_tensors
    # Unless the graph is kept, the saved gradients are read once: they are scaled in place.
    # A traced program must not change its values.
    kept = (
        torch._C._autograd._get_current_graph_task_keep_graph()
        or type(grad) is not Tensor
        or wants_graph()
    )
    if torch.is_grad_enabled():  # the saved results are constants
        _, grad_hidden, grad_weight = outside_autocast(
            _reference, hidden, weight, targets, ctx.ignore_index, *ctx.wanted
        )
    multiply = Tensor.mul if kept else Tensor.mul_
    return tuple(
        multiply(gradient, grad) if wanted else None
        for gradient, wanted in zip((grad_hidden, grad_weight), ctx.wanted, strict=True)
    )


_forward.register_autograd(_differentiate, _setup_context)
_forward.register_plain(_loss_alone)


@_forward.register_fake
def _(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = call.hidden, call.weight
    return (
        hidden.new_empty((), dtype=statistics_dtype(hidden.dtype)),
        hidden.new_empty(hidden.shape if call.hidden_grad else 0),
        weight.new_empty(weight.shape if call.weight_grad else 0),
    )
