"""Training runs on our kernels, forward and backward: nothing else falls in."""

from __future__ import annotations

import pytest
import torch

from gpt2fast import GPT2, GPT2Config, backend, ops
from gpt2fast.nn import Block, LinearCrossEntropy, ResidualLayerNorm
from gpt2fast.ops.backend import record_calls
from gpt2fast.ops.native import unavailable
from gpt2fast.training import TrainConfig
from gpt2fast.training.optimizers import ModelOptimizer
from tolerance import assert_close

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

TRAINING_OPS = {
    "embedding",
    "embedding_backward",
    "residual_layer_norm",
    "residual_layer_norm_backward",
    "causal_attention",
    "causal_attention_backward",
    "gelu_mlp",
    "gelu_mlp_backward",
    "linear_cross_entropy",
    "projection",
    "projection_backward",
    "fused_adamw",
}


def small_model(dropout: float) -> GPT2:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=3, dropout=dropout,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2(config).train()


def train(model: GPT2, steps: int, autocast: bool) -> list[float]:
    optimizer = ModelOptimizer(model.named_parameters(), TrainConfig(weight_decay=0.1))
    ids = torch.randint(97, (3, 34), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
        loss.backward()
        optimizer.step(3e-3)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_step_runs_on_native_kernels_only(dtype, autocast, dropout):
    model = small_model(dropout).to(dtype)
    with backend("native"), record_calls() as calls:
        losses = train(model, 20, autocast)
    assert {call.op for call in calls} == TRAINING_OPS
    assert {call.backend for call in calls} == {"native"}
    assert losses[-1] < 0.75 * losses[0]


def test_auto_takes_the_native_kernels():
    with record_calls() as calls:
        train(small_model(0.1), 1, autocast=True)
    assert {call.backend for call in calls} == {"native"}


def test_losses_follow_the_reference():
    with backend("reference"):
        expected = train(small_model(0.0).double(), 10, autocast=False)
    with backend("torch"):
        other = train(small_model(0.0), 10, autocast=False)
    with backend("native"):
        ours = train(small_model(0.0), 10, autocast=False)
    assert_close(
        [torch.tensor(ours)], [torch.tensor(other)], [torch.tensor(expected).double()], 3.0
    )


def test_modules_with_padding_and_dropout_run_on_native_kernels_only():
    block, norm, loss = (
        Block(48, 3, dropout=0.1, attention_dropout=0.2),
        ResidualLayerNorm(48),
        (LinearCrossEntropy()),
    )
    weight = torch.randn(31, 48, requires_grad=True)
    x = torch.randn(2, 19, 48, requires_grad=True)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :7] = False
    with backend("native"), record_calls() as calls:
        normed, _ = norm(block(x, mask))
        loss(normed, weight, torch.randint(31, (2, 19))).backward()
    assert {call.backend for call in calls} == {"native"}
    assert x.grad.isfinite().all() and (x.grad != 0).any()


def test_results_do_not_depend_on_the_number_of_threads():
    def gradients(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        model = small_model(0.1)
        ids = torch.randint(97, (8, 65), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(5)
        inputs = torch.randn(1000, 96, requires_grad=True)
        weight, bias = torch.randn(2, 96).requires_grad_().unbind()
        normed, _ = ops.residual_layer_norm(inputs, inputs, weight, bias)
        out = ops.bias_gelu(normed, bias)
        q = out.view(10, 100, 3, 32)
        out = ops.causal_attention(q, q, q, dropout_p=0.1, seed=torch.tensor([3]))
        positions = torch.arange(64)
        embedded = ops.embedding(ids[:, :-1], positions, model.wte.weight, model.wpe.weight)
        leaves = [inputs, weight, bias, model.wte.weight, model.wpe.weight]
        return list(torch.autograd.grad(out.square().sum() + embedded.pow(3).sum(), leaves))

    before = torch.get_num_threads()
    try:
        with backend("native"):
            one, two = gradients(1), gradients(2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
