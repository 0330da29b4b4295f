"""AdamW (Loshchilov & Hutter, 2019, algorithm 2) over many tensors in one call.

p   = p * (1 - lr * weight_decay)
m   = beta1 * m + (1 - beta1) * g
v   = beta2 * v + (1 - beta2) * g^2
p   = p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Arguments, Implementation, Op
from .cuda import by_device, cuda
from .native import native
from .requirements import check_at_least, check_below_one, check_floating
from .support import Kernels, Tensors
from .triton import triton


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
            share shape, dtype and device, but moments may be bfloat16 beside float32 parameters:
            they are rounded when they are stored, the update is computed before.
        masters: float32 parameters, as many, which are updated in place of `params`; those become
            their rounded copies, and the moments are float32, too. For training in 16 bits, where
            steps are smaller than what a parameter can be rounded to.
        step: number of this update, counted from 1.
        lr, eps, weight_decay: as in the formula above, 0 or more.
        beta1, beta2: as in the formula above, in [0, 1).
    """
    masters = [] if masters is None else list(masters)
    call = _adamw.bind(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), masters,
        step, lr, beta1, beta2, eps, weight_decay,
    )  # fmt: skip
    if not params:
        _check(call)
        return
    _adamw.call(*call)
    if not torch.compiler.is_compiling():
        # torch counts changes of a tensor by its own ops only.
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *masters])


def _updates(call: Arguments) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each updated tensor with its gradient and its moments."""
    updated = call.masters or call.params
    return zip(updated, call.grads, call.exp_avgs, call.exp_avg_sqs, strict=True)


def _check(call: Arguments) -> None:
    params, masters = call.params, call.masters
    if call.step < 1:
        raise ArgumentError(f"step={call.step}: updates are counted from 1")
    check_at_least(0, lr=call.lr, eps=call.eps, weight_decay=call.weight_decay)
    check_below_one(beta1=call.beta1, beta2=call.beta2)
    if not len(params) == len(call.grads) == len(call.exp_avgs) == len(call.exp_avg_sqs):
        raise ArgumentError("params, grads, exp_avgs and exp_avg_sqs must have equal lengths")
    if masters and len(masters) != len(params):
        raise ArgumentError(f"{len(masters)} masters do not fit {len(params)} params")
    for tensors in zip(params, call.grads, call.exp_avgs, call.exp_avg_sqs, strict=True):
        _check_alike(*tensors)
    for param, master in zip(params, masters, strict=False):
        _check_alike(param, master)
    for master, _, exp_avg, exp_avg_sq in _updates(call) if masters else ():
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
    masters: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    updated = masters or params
    for param, grad, *moments in zip(updated, grads, exp_avgs, exp_avg_sqs, strict=True):
        if masters:
            grad = grad.float()
        first, second = (x.to(torch.promote_types(x.dtype, param.dtype)) for x in moments)
        param.mul_(1.0 - lr * weight_decay)
        first.mul_(beta1).add_(grad, alpha=1.0 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        spread = (second / (1.0 - beta2**step)).sqrt_().add_(eps)
        param.addcdiv_(first, spread, value=-lr / (1.0 - beta1**step))
        for moment, computed in zip(moments, (first, second), strict=True):
            if computed is not moment:
                moment.copy_(computed)
    for param, master in zip(params, masters, strict=False):
        param.copy_(master)


def _through_masters(update: Callable[[Arguments], None]) -> Callable[[Arguments], None]:
    """`update` of the masters where there are any; the parameters become their rounded copies."""

    def run(call: Arguments) -> None:
        if not call.masters:
            update(call)
            return
        grads = [grad.float() for grad in call.grads]
        update(call._replace(params=call.masters, grads=grads))
        for param, master in zip(call.params, call.masters, strict=True):
            param.copy_(master)

    return run


def _scalars(call: Arguments) -> tuple[float, ...]:
    return call.step, call.lr, call.beta1, call.beta2, call.eps, call.weight_decay


@_through_masters
def _native(call: Arguments) -> None:
    grads = [grad.contiguous() for grad in call.grads]
    torch.ops.gpt2fast_native.adamw(
        call.params, grads, call.exp_avgs, call.exp_avg_sqs, *_scalars(call)
    )


def _cuda(call: Arguments) -> None:
    grads = [grad.contiguous() for grad in call.grads]
    torch.ops.gpt2fast_cuda.adamw(*call._replace(grads=grads))


def _is_dense(x: Tensor) -> bool:
    """True if the elements fill their memory without gaps, in some order of the dimensions."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).is_contiguous()


def _lying_like(x: Tensor, other: Tensor) -> Tensor:
    """x, or a copy of it, with the strides of `other`, which is dense."""
    if x.stride() == other.stride():
        return x
    return torch.empty_like(other, dtype=x.dtype).copy_(x)


@_through_masters
def _torch(call: Arguments) -> None:
    params = call.params
    steps = [torch.full((), call.step, dtype=torch.float32, device=params[0].device)] * len(params)
    torch._fused_adamw_(
        params,
        [_lying_like(grad, param) for grad, param in zip(call.grads, params, strict=True)],
        call.exp_avgs,
        call.exp_avg_sqs,
        [],
        steps,
        lr=call.lr,
        beta1=call.beta1,
        beta2=call.beta2,
        weight_decay=call.weight_decay,
        eps=call.eps,
        amsgrad=False,
        maximize=False,
    )


def _torch_refuses(call: Arguments) -> str | None:
    if len({(tensor.device, tensor.dtype) for tensor in call.masters or call.params}) != 1:
        return "torch's fused AdamW takes tensors of one dtype on one device"
    # torch's kernel walks through the memory of all tensors alike and ignores strides.
    for param, _, *moments in _updates(call):
        if any(each.dtype != param.dtype for each in moments):
            return "torch's fused AdamW takes moments in the parameters' dtype"
        if not _is_dense(param) or any(each.stride() != param.stride() for each in moments):
            return "torch's fused AdamW takes parameters and moments that lie alike, without gaps"
    return None


_ALIKE = Tensors("params", one_dtype=True, may_be_empty=True)


def _refuses_unlike(kernels: Kernels) -> Callable[[Arguments], str | None]:
    """A check that tensors suit kernels which need equal layouts and one dtype; gives a reason
    against, or None."""

    def refusal(call: Arguments) -> str | None:
        for pair in zip(call.params, call.grads, strict=True):
            reason = kernels.wrong_device(pair[0]) or kernels.unsuitable(_ALIKE, pair)
            if reason is not None:
                return reason
        for updated, _, *moments in _updates(call):
            narrow = updated.dtype == torch.float32 and moments[0].dtype == torch.bfloat16
            apart = [(updated,), moments] if kernels is native and narrow else None
            for tensors in apart or [(updated, *moments)]:
                reason = kernels.unsuitable(_ALIKE, tensors)
                if reason is not None:
                    return reason
        return _refuses_strided(call, kernels.name.removesuffix(" kernels"))

    return refusal


def _refuses_strided(call: Arguments, backend: str) -> str | None:
    lists = call.params, call.exp_avgs, call.exp_avg_sqs, call.masters
    if all(x.is_contiguous() for tensors in lists for x in tensors):
        return None
    return f"the {backend} AdamW takes contiguous parameters and moments"


def _native_refuses(call: Arguments) -> str | None:
    if call.masters:  # torch writes the parameters
        call = call._replace(params=call.masters, grads=call.masters, masters=[])
    return _refuses_unlike(native)(call)


def _triton_refuses(call: Arguments) -> str | None:
    devices = {x.device for x in call.params}
    if len(devices) > 1:
        return f"tensors are on {' and on '.join(map(str, devices))}"
    if any(each.dtype != param.dtype for param, _, *both in _updates(call) for each in both):
        return "the Triton AdamW takes moments in the parameters' dtype"
    return _refuses_strided(call, "Triton")


_adamw = Op(
    "fused_adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, int step, float lr, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
    check=_check,
    one_device=False,
    native=by_device(
        cpu=native(refuses=_native_refuses)(_native),
        cuda=cuda(refuses=_refuses_unlike(cuda))(_cuda),
    ),
    triton=triton(
        "optimizer",
        "adamw",
        *(
            Tensors(name, may_be_empty=True)
            for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters")
        ),
        refuses=_triton_refuses,
    ),
    torch=Implementation(_torch, _torch_refuses),
    reference=_reference,
)


_adamw.refuse_gradient(
    "it updates parameters in place; call it under torch.no_grad(), and write a step that is to be "
    "differentiated with torch's own operations"
)


@_adamw.register_fake
def _(call: Arguments) -> None:
    return None
