from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from comparison import BACKENDS, backend, random
from gpt2fast import ops
from gpt2fast.errors import BackendError
from gpt2fast.ops.backend import record_calls
from gpt2fast.ops.native import unavailable
from gpt2fast.ops.optimizer import _adamw
from tolerance import assert_close

SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.97, "eps": 1e-8, "weight_decay": 0.1}


def run_ours(initial, gradients, dtype):
    params = [p.to(dtype, copy=True) for p in initial]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for step, grads in enumerate(gradients, start=1):
        grads = [g.to(dtype) for g in grads]
        ops.fused_adamw(params, grads, first, second, step=step, **SETTINGS)
    return params


def run_torch(initial, gradients, dtype):
    params = [p.to(dtype, copy=True).requires_grad_() for p in initial]
    optimizer = torch.optim.AdamW(
        params, lr=3e-3, betas=(0.9, 0.97), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(dtype)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_steps_match_torch(name, dtype):
    initial = [random(1), random(17, 3), random(1023)]
    gradients = [[random(*p.shape) for p in initial] for _ in range(10)]
    with backend(name):
        ours = run_ours(initial, gradients, dtype)
    exact = run_torch(initial, gradients, torch.float64)
    assert_close(ours, run_torch(initial, gradients, dtype), exact, times=2.0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_keep_what_16_bits_round_away(name, dtype):
    initial = [random(1), random(17, 3), random(1024)]
    gradients = [[random(*p.shape) for p in initial] for _ in range(10)]
    masters = [p.float() for p in initial]
    params = [p.to(dtype) for p in initial]
    first, second = ([torch.zeros_like(p) for p in masters] for _ in range(2))
    with backend(name):
        for step, grads in enumerate(gradients, start=1):
            grads = [g.to(dtype) for g in grads]
            ops.fused_adamw(
                params, grads, first, second, masters=masters, step=step, **SETTINGS
            )  # fmt: skip
    exact = run_torch(initial, gradients, torch.float64)
    assert_close(masters, run_torch(initial, gradients, torch.float32), exact, times=2.0)
    for param, master in zip(params, masters, strict=True):
        assert param.dtype == dtype and torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(1,), (17, 3), (16411,)])
def test_moments_in_bfloat16_are_rounded_after_the_update(name, shape):
    param, grad = random(*shape).float(), random(*shape).float()
    first, second = random(*shape).bfloat16() * 0.1, random(*shape).bfloat16().square() * 0.01
    exact = [x.double() for x in (param, grad, first, second)]
    with backend("reference"):
        ops.fused_adamw(*([x] for x in exact), step=3, **SETTINGS)
    theirs = [x.double().float() for x in (param, grad, first, second)]
    with backend("reference"):
        ops.fused_adamw(*([x] for x in theirs), step=3, **SETTINGS)
    with backend(name), record_calls() as calls:
        ops.fused_adamw([param], [grad], [first], [second], step=3, **SETTINGS)
    if name == "auto" and unavailable() is None:
        assert [call.backend for call in calls] == ["native"]
    assert_close([param], [theirs[0]], [exact[0]], times=2)
    for moment, right in ((first, exact[2]), (second, exact[3])):
        assert moment.dtype == torch.bfloat16
        torch.testing.assert_close(moment.double(), right, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("name", BACKENDS)
def test_passes_opcheck(name):
    tensors = [[random(4, 3).float().abs()] for _ in range(4)]
    half = [[random(4, 3).bfloat16()] for _ in range(2)]
    with backend(name):
        opcheck(_adamw.call, (*tensors, [], 1, 1e-3, 0.9, 0.95, 1e-8, 0.1))
        opcheck(_adamw.call, (*half, *tensors[1:], 1, 1e-3, 0.9, 0.95, 1e-8, 0.1))


def test_bad_arguments_are_named():
    one = [torch.ones(2)]
    with pytest.raises(ValueError, match="counted from 1"):
        ops.fused_adamw(one, one, one, one, step=0, **SETTINGS)
    with pytest.raises(ValueError, match="equal lengths"):
        ops.fused_adamw(one, [], one, one, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="2 masters do not fit 1 params"):
        ops.fused_adamw(one, one, one, one, masters=one * 2, step=1, **SETTINGS)
    half = [torch.ones(2).bfloat16()]
    with pytest.raises(ValueError, match="float32, not torch.bfloat16"):
        ops.fused_adamw(half, half, half, half, masters=one, step=1, **SETTINGS)
    with pytest.raises(ValueError, match=r"shape \(2,\) on cpu has .* shape \(5,\)"):
        ops.fused_adamw(one, one, [torch.ones(5)], one, step=1, **SETTINGS)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_to_update_is_no_mistake(name):
    with backend(name):
        ops.fused_adamw([], [], [], [], step=1, **SETTINGS)


def turned(x):
    return x.t().contiguous().t()


def with_gaps(x):
    return torch.stack([x, torch.full_like(x, 9.0)], -1)[..., 0]


def expanded_row(x):
    return x[:1].expand(x.shape)


ROLES = ["params", "grads", "exp_avgs", "exp_avg_sqs", "masters"]
LAID = [(layout, role) for layout in (turned, with_gaps) for role in ROLES]
LAID.append((expanded_row, "grads"))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("layout", "role"), LAID)
@pytest.mark.parametrize("masters", [False, True])
def test_tensors_of_one_call_may_lie_differently(name, layout, role, masters):
    if role == "masters" and not masters:
        pytest.skip("there are no masters")
    which = ROLES.index(role)
    numbers = [[random(6, 5).float().abs() + 1], [random(6, 5).float()]]
    numbers += [[random(6, 5).float().abs()] for _ in range(2)]
    numbers += [[numbers[0][0].clone()] if masters else []]
    expected = [[x.clone() for x in each] for each in numbers]
    if layout is expanded_row:
        expected[1] = [layout(x) for x in expected[1]]
    if masters:
        for each in (numbers, expected):
            each[0] = [each[0][0].bfloat16()]
            each[1] = [each[1][0].bfloat16()]
    numbers[which] = [layout(x) for x in numbers[which]]
    for given, chosen in ((expected, "reference"), (numbers, name)):
        with backend(chosen):
            try:
                ops.fused_adamw(*given[:4], masters=given[4] or None, step=1, **SETTINGS)
            except BackendError as refusal:
                assert "takes" in str(refusal) and role != "grads"
                return
    for place in (0, 2, 3, 4):
        for found, right in zip(numbers[place], expected[place], strict=True):
            torch.testing.assert_close(found, right)
