"""Tests that need a GPU: streams, graphs, devices, and that nothing waits for the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comparison import needs_gpu
from gpt2fast import GPT2, GPT2Config, backend, ops
from gpt2fast.cli import doctor
from gpt2fast.ops.backend import record_calls

pytestmark = [needs_gpu, pytest.mark.gpu]

# The packed form of a model, whose steps these are, lives on the CPU.
OPS = sorted(set(doctor.samples("cpu")) - {"packed_step", "packed_next"})
# torch multiplies on a GPU: `ops.projection` calls no op of ours there.
OWN_KERNELS = [op for op in OPS if op != "projection"]
BACKENDS = ["native", "triton"]


def small_model() -> GPT2:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=128, vocab_size=211, n_positions=128)
    return GPT2(config).cuda().eval()


@pytest.mark.parametrize("op", OWN_KERNELS)
def test_by_default_a_cuda_kernel_runs(op):
    with record_calls() as calls, torch.inference_mode():
        doctor.samples("cuda")[op]()
    assert next(call for call in calls if call.op == op).backend == "native"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_no_op_waits_for_the_host(op, name):
    call = doctor.samples("cuda")[op]
    with backend(name), torch.inference_mode():
        call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_every_op_can_be_captured(op, name):
    call = doctor.samples("cuda")[op]
    with backend(name), torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_training_step_can_be_captured(name):
    qkv = torch.randn(2, 65, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    seed = torch.tensor([3], device="cuda")
    weight = torch.randn(211, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(211, (130,), device="cuda")

    def step() -> tuple[Tensor, ...]:
        q, k, v = qkv.unbind(2)
        attended = ops.causal_attention(q, k, v, dropout_p=0.1, seed=seed)
        loss = ops.linear_cross_entropy(attended.reshape(130, 128), weight, targets)
        return torch.autograd.grad(loss, (qkv, weight))

    with backend(name):
        expected = step()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        graph.replay()
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("name", BACKENDS)
def test_ops_run_on_the_current_stream(name):
    x = torch.randn(4096, 768, device="cuda")
    weight = torch.ones(768, device="cuda")
    with backend(name):
        expected = ops.residual_layer_norm(x * 2.0, x, weight, weight)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # whoever does not wait reads before it is written
            doubled = x * 2.0
            found = ops.residual_layer_norm(doubled, x, weight, weight)[0]
        stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("name", BACKENDS)
def test_ops_run_where_their_tensors_are(name):
    with backend(name), torch.inference_mode():
        for op in OPS:
            doctor.samples("cuda:1")[op]()
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(("key_heads", "causal"), [(2, True), (1, True), (1, False)])
def test_deterministic_algorithms_give_equal_bits(key_heads, causal):
    leaves = [
        torch.randn(1, 513, heads, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (2, key_heads, key_heads)
    ]
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(
                ops.attention(*leaves, causal=causal).float().square().sum(), leaves
            )
            for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generation_on_the_gpu_matches_the_cpu(dtype):
    torch.manual_seed(0)
    model = small_model()
    prompt = torch.randint(211, (3, 9))
    expected = model.cpu().generate(prompt, max_new_tokens=60)
    found = model.cuda().generate(prompt.cuda(), max_new_tokens=60)
    assert torch.equal(found.cpu(), expected)
    if dtype == torch.bfloat16:
        model.to(dtype).generate(prompt.cuda(), max_new_tokens=60, do_sample=True, seed=1)


def test_the_default_device_may_be_the_gpu():
    model = small_model()
    prompt = torch.randint(211, (3, 9), device="cuda")
    expected = model.generate(prompt, max_new_tokens=60)
    with torch.device("cuda"):
        assert torch.equal(model.generate(prompt, max_new_tokens=60), expected)


def test_training_on_the_gpu_follows_the_reference():
    tokens = torch.randint(211, (4, 65), device="cuda")

    def losses(name: str) -> list[float]:
        torch.manual_seed(0)
        model = small_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        with backend(name):
            for _ in range(20):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    reference = torch.tensor(losses("reference"))
    for name in ("native", "triton"):
        assert (torch.tensor(losses(name)) - reference).abs().max() < 0.05
