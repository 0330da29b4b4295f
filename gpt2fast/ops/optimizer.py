"""AdamW (Loshchilov & Hutter, 2019, algorithm 2) over many tensors in one call.

p   = p * (1 - lr * weight_decay)
m   = beta1 * m + (1 - beta1) * g
v   = beta2 * v + (1 - beta2) * g^2
p   = p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Implementation, Op
from .cuda import by_device, cuda, unsuitable
from .native import native, refuses_tensors
from .requirements import check_at_least, check_below_one, check_floating
from .triton import triton
from .triton import unsuitable as unsuitable_for_triton


def fused_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    masters: Sequence[Tensor] | None = None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update parameters and both moments in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length; the tensors at one index
            share shape, dtype and device.
        masters: float32 parameters, as many, which are updated in place of `params`; those become
            their rounded copies, and the moments are float32, too. For training in 16 bits, where
            steps are smaller than what a parameter can be rounded to.
        step: number of this update, counted from 1.
        lr, eps, weight_decay: as in the formula above, 0 or more.
        beta1, beta2: as in the formula above, in [0, 1).
    """
    masters = [] if masters is None else list(masters)
    if not params:
        _check(
            params, grads, exp_avgs, exp_avg_sqs, masters, step, lr, beta1, beta2, eps, weight_decay
        )
        return
    _adamw.call(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), masters,
        step, lr, beta1, beta2, eps, weight_decay,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        # torch counts changes of a tensor for its own ops alone.
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *masters])


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if step < 1:
        raise ArgumentError(f"step={step}: updates are counted from 1")
    check_at_least(0, lr=lr, eps=eps, weight_decay=weight_decay)
    check_below_one(beta1=beta1, beta2=beta2)
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ArgumentError("params, grads, exp_avgs and exp_avg_sqs must have equal lengths")
    if masters and len(masters) != len(params):
        raise ArgumentError(f"{len(masters)} masters do not fit {len(params)} params")
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        _check_alike(*tensors)
    for param, master in zip(params, masters, strict=False):
        _check_alike(param, master)
    for master, exp_avg, exp_avg_sq in zip(masters, exp_avgs, exp_avg_sqs, strict=False):
        for tensor in (master, exp_avg, exp_avg_sq):
            if tensor.dtype != torch.float32:
                raise ArgumentError(
                    f"with masters, these and the moments must be float32, not {tensor.dtype}"
                )


def _check_alike(first: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.shape != first.shape or other.device != first.device:
            raise ArgumentError(
                f"a parameter of shape {tuple(first.shape)} on {first.device} has a gradient, "
                f"moment or master of shape {tuple(other.shape)} on {other.device}"
            )
        if not other.is_floating_point():
            raise ArgumentError(
                f"gradients, moments and masters must be floating point, not {other.dtype}"
            )
    check_floating(params=first)


def _reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        param.mul_(1.0 - lr * weight_decay)
        exp_avg.mul_(beta1).add_(grad, alpha=1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        spread = (exp_avg_sq / (1.0 - beta2**step)).sqrt_().add_(eps)
        param.addcdiv_(exp_avg, spread, value=-lr / (1.0 - beta1**step))


def _native(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    grads = [grad.contiguous() for grad in grads]
    torch.ops.gpt2fast_native.adamw(
        params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay
    )


def _through_masters(update: Callable[..., None]) -> Callable[..., None]:
    """`update` for the op's arguments, where it knows of no masters itself."""

    def run(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        masters: list[Tensor],
        *scalars: float,
    ) -> None:
        if not masters:
            update(params, grads, exp_avgs, exp_avg_sqs, *scalars)
            return
        update(masters, [grad.float() for grad in grads], exp_avgs, exp_avg_sqs, *scalars)
        for param, master in zip(params, masters, strict=True):
            param.copy_(master)

    return run


def _of_updated(refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    """The same for a refusal: it is asked about the tensors that are updated."""

    def asked(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        masters: list[Tensor],
        *scalars: float,
    ) -> str | None:
        if masters:
            params = grads = masters
        return refuses(params, grads, exp_avgs, exp_avg_sqs)

    return asked


def _cuda(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    *scalars: float,
) -> None:
    grads = [grad.contiguous() for grad in grads]
    torch.ops.gpt2fast_cuda.adamw(params, grads, exp_avgs, exp_avg_sqs, masters, *scalars)


def _cuda_refuses(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    *scalars: object,
) -> str | None:
    pairs = zip(params, grads, strict=True)
    moments = zip(masters or params, exp_avgs, exp_avg_sqs, strict=True)
    for tensors in (*pairs, *moments):
        reason = unsuitable(*tensors, one_dtype=True, may_be_empty=True)
        if reason is not None:
            return reason
    if not all(x.is_contiguous() for x in (*params, *exp_avgs, *exp_avg_sqs, *masters)):
        return "the CUDA AdamW takes contiguous parameters and moments"
    return None


def _native_refuses(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
) -> str | None:
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        reason = refuses_tensors(*tensors)
        if reason is not None:
            return reason
        if not all(tensors[i].is_contiguous() for i in (0, 2, 3)):
            return "the native AdamW takes contiguous parameters and moments"
    return None


def _triton_refuses(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    *scalars: object,
) -> str | None:
    updated = (*params, *exp_avgs, *exp_avg_sqs, *masters)
    if not all(tensor.is_contiguous() for tensor in updated):
        return "the Triton AdamW takes contiguous parameters and moments"
    return unsuitable_for_triton(*updated, *grads, may_be_empty=True)


def _torch_refuses(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
) -> str | None:
    if len({(tensor.device, tensor.dtype) for tensor in params}) != 1:
        return "torch's fused AdamW takes tensors of one dtype on one device"
    # It walks through the memory of all of them at once, whatever their strides are.
    for param, *moments in zip(params, exp_avgs, exp_avg_sqs, strict=True):
        if not _is_dense(param) or any(each.stride() != param.stride() for each in moments):
            return "torch's fused AdamW takes parameters and moments that lie alike, without gaps"
    return None


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in some order of the dimensions."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).is_contiguous()


def _lying_like(x: Tensor, other: Tensor) -> Tensor:
    """x, or a copy of it, with the strides of `other`, which is dense."""
    if x.stride() == other.stride():
        return x
    return torch.empty_like(other, dtype=x.dtype).copy_(x)


def _torch(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    steps = [torch.full((), step, dtype=torch.float32, device=params[0].device)] * len(params)
    torch._fused_adamw_(
        params,
        [_lying_like(grad, param) for grad, param in zip(grads, params, strict=True)],
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


_adamw = Op(
    "fused_adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, int step, float lr, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
    check=_check,
    one_device=False,
    native=by_device(
        cpu=native(_through_masters(_native), _of_updated(_native_refuses)),
        cuda=cuda(_cuda, _cuda_refuses),
    ),
    triton=triton("optimizer", "adamw", _triton_refuses),
    torch=Implementation(_through_masters(_torch), _of_updated(_torch_refuses)),
    reference=_through_masters(_reference),
)


_adamw.refuse_gradient(
    "it updates parameters in place; call it under torch.no_grad(), and write a step that is to be "
    "differentiated with torch's own operations"
)


@_adamw.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, masters, *scalars):  # type: ignore[no-untyped-def]
    return None
