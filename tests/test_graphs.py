"""Steps that run ahead of the host: on a CPU, where they are run instead of replayed."""

from __future__ import annotations

import pytest
import torch

from comparison import backend, needs_simulator
from gpt2fast import GPT2, GPT2Config, decoding, graphs
from gpt2fast.ops.backend import record_calls
from gpt2fast.sampling import SamplingOptions

PROMPTS = torch.tensor([[0, 0, 7, 3], [5, 1, 2, 9], [0, 4, 4, 8]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=64)
    return GPT2(config).eval()


@pytest.fixture
def ahead(monkeypatch) -> list[int]:
    """Lets steps run ahead on the CPU; the rows of each batch that was started are listed."""
    started: list[int] = []
    start = graphs.Ahead._start

    def counted(self, tokens):
        started.append(len(tokens))
        return start(self, tokens)

    monkeypatch.setattr(graphs.Ahead, "_start", counted)
    monkeypatch.setattr(decoding, "is_worthwhile", lambda model, steps: True)
    monkeypatch.setattr(GPT2, "for_decoding", lambda self: self)  # packed models are the CPU's
    return started


OPTIONS = [
    pytest.param({"do_sample": False}, id="greedy"),
    pytest.param({"do_sample": True, "seed": 3, "top_k": 20, "temperature": 0.9}, id="sampled"),
    pytest.param({"do_sample": True, "seed": 3, "num_return_sequences": 3}, id="three-samples"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["torch", pytest.param("simulator", marks=needs_simulator)])
def test_running_ahead_changes_no_token(name, options, model, ahead, monkeypatch):
    arguments = {"max_new_tokens": 37, "eos_token_id": 11, "pad_token_id": 0, **options}
    with backend(name):
        found = model.generate(PROMPTS, MASK, **arguments)
    assert ahead, "nothing ran ahead"
    monkeypatch.undo()
    with backend("torch"):
        assert torch.equal(found, model.generate(PROMPTS, MASK, **arguments))


def test_rows_that_ended_leave_when_half_of_them_have(model, ahead):
    # Each row ends with the token that it would choose at a step of its own.
    with backend("torch"):
        plain = model.generate(PROMPTS, MASK, max_new_tokens=40, do_sample=False)
        model.generate(
            PROMPTS, MASK, max_new_tokens=40, do_sample=False,
            stop=[plain[0, 4:8].tolist(), plain[1, 4:9].tolist()],
        )  # fmt: skip
    assert ahead == [3, 3, 1]


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str
)
def test_choices_that_read_the_history_are_made_one_by_one(options, model, ahead):
    with backend("torch"):
        model.generate(PROMPTS, MASK, max_new_tokens=30, do_sample=False, **options)
    assert ahead == []


def test_rows_that_would_slide_are_taken_one_by_one(model, ahead):
    criteria = decoding.StopCriteria([])
    with backend("torch"):
        steps = list(
            decoding.decode(
                model, [[7, 3]], [70], SamplingOptions(do_sample=False), criteria, slides=True
            )
        )
    assert len(steps) == 70 and ahead == []


def test_a_step_is_one_call_of_each_op(model):
    cache = model.new_cache(2)
    with backend("torch"), torch.inference_mode():
        model(torch.tensor([[1, 2], [3, 4]]), cache=cache)
        steps = graphs.Steps(model, cache, torch.tensor([5, 6]), samples=False, temperature=1.0)
        with record_calls() as calls:
            steps.run(3, None)
    assert [call.op for call in calls if call.op in ("decode_step", "sample")] == [
        "decode_step", "sample"
    ] * 3  # fmt: skip
    assert cache.lengths.tolist() == [5, 5] and cache.positions.tolist() == [5, 5]
    steps.replay_at(2)  # outside of inference mode
    assert steps._lengths.tolist() == [2, 2]
