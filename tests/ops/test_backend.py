from __future__ import annotations

import pytest
import torch

from gpt2fast import backend, ops
from gpt2fast.errors import BackendError
from gpt2fast.ops.backend import OPS, ORDER, record_calls, requested_backend


def test_every_op_has_a_reference_and_a_schema_in_torchs_dispatcher():
    for name in ops.__all__:
        op = "causal_attention" if name == "attention" else name
        assert "reference" in OPS[op].implementations
        assert getattr(torch.ops.gpt2fast, op).default is OPS[op].call


def test_a_block_restores_the_backend_and_a_call_keeps_it():
    with backend("reference"):
        assert requested_backend() == "reference"
        with backend("torch"):
            assert requested_backend() == "torch"
        assert requested_backend() == "reference"
    assert requested_backend() == "auto"
    try:
        backend("reference")
        assert requested_backend() == "reference"
    finally:
        backend("auto")


def test_a_choice_made_earlier_holds_in_its_block():
    chosen = backend("reference")
    backend("auto")
    with chosen:
        assert requested_backend() == "reference"
    assert requested_backend() == "auto"


def test_a_forced_backend_is_the_one_that_runs():
    x, bias = torch.ones(2, 3).double(), torch.ones(3).double()
    with record_calls() as calls:
        ops.bias_gelu(x, bias)
        with backend("reference"):
            ops.bias_gelu(x, bias)
    ops.bias_gelu(x, bias)
    assert [(call.op, call.backend) for call in calls] == [
        ("bias_gelu", "torch"),
        ("bias_gelu", "reference"),
    ]
    assert [name for name, _ in calls[0].refused] == ["native", "triton"]


def test_unknown_and_absent_backends_are_errors_that_say_why():
    with pytest.raises(BackendError, match="'cuda'.*choose one of auto"):
        backend("cuda")
    for name in ORDER:
        if not any(name in op.implementations for op in OPS.values()):
            with pytest.raises(BackendError, match=f"{name}.*not available"):
                backend(name)
    assert requested_backend() == "auto"
