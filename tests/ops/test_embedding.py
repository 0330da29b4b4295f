from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from comparison import BACKENDS, DTYPES, backend, compare, random, seeded
from gpt2fast import ops
from gpt2fast.errors import ArgumentError
from gpt2fast.ops.embedding import _forward


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [1, 17, 1023])
@pytest.mark.parametrize("per_row", [False, True])
def test_matches_torch(name, dtype, time, per_row):
    tokens = torch.randint(13, (3, time))
    positions = torch.randint(1023, (3, time)) if per_row else torch.arange(time)
    compare(
        lambda wte, wpe: ops.embedding(tokens, positions, wte, wpe),
        lambda wte, wpe: F.embedding(tokens, wte) + F.embedding(positions, wpe),
        [random(13, 8), random(1023, 8)],
        dtype,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_equal_runs_give_equal_gradients(name):
    tokens, positions = torch.randint(5, (8, 100)), torch.arange(100)
    gradients = []
    for _ in range(3):
        wte = torch.ones(5, 16, requires_grad=True)
        wpe = torch.ones(100, 16, requires_grad=True)
        weight = torch.randn(8, 100, 16, generator=seeded(2))
        with backend(name):
            (ops.embedding(tokens, positions, wte, wpe) * weight).sum().backward()
        gradients.append(wte.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("name", BACKENDS)
def test_passes_opcheck(name):
    wte, wpe = (random(9, 8).float().requires_grad_() for _ in range(2))
    with backend(name):
        opcheck(_forward.call, (torch.randint(9, (2, 5)), torch.arange(5), wte, wpe))


@pytest.mark.parametrize("name", BACKENDS)
def test_an_index_outside_its_table_is_an_error(name):
    if name.startswith("cuda"):
        pytest.skip("it ends all work on the GPU, as torch's own assertion does")
    tables = torch.ones(9, 8), torch.ones(4, 8)
    with backend(name):
        for token, position in [(9, 0), (-1, 0), (0, 4)]:
            with pytest.raises(ArgumentError, match=r"\[0(, 0)?\] = -?\d is not in 0 .. "):
                ops.embedding(torch.tensor([[token]]), torch.tensor([position]), *tables)


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_into_one_graph(name):
    wte, wpe = (random(9, 8).float().requires_grad_() for _ in range(2))
    tokens, positions = torch.randint(9, (2, 5)), torch.arange(5)

    def run(wte, wpe):
        return ops.embedding(tokens, positions, wte, wpe).square().sum()

    with backend(name):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(run(wte, wpe), (wte, wpe))
        got = torch.autograd.grad(compiled(wte, wpe), (wte, wpe))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
