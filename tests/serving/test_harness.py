"""lm-evaluation-harness over HTTP: `local-completions` finds what our own evaluation finds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpt2fast.evaluation.likelihood import Request, Scorer
from harness_tasks import TASKS
from server_process import NAME, POSITIONS
from small_bpe import BPE, TEXT

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tasks as files, and their data."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    words = TEXT.split()
    lines = [
        {
            "question": " ".join(words[i : i + 5 + i % 7]),
            "choices": [f" {words[i + 3 + j]} {words[i + j]}" for j in range(3)],
            "answer": i % 3,
            "text": " ".join(words[i : i + 40]),
        }
        for i in range(12)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(data)), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def answers(server, tasks) -> dict[str, Any]:
    """What the harness finds at the server, whose tokenizer it takes."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        harness = LocalCompletionsAPI(
            base_url=server.url + "/v1/completions", model=NAME, max_length=POSITIONS,
            max_gen_toks=12, batch_size=4, num_concurrent=2,
        )  # fmt: skip
        assert type(harness.tokenizer).__name__ == "RemoteTokenizer"
        found = lm_eval.simple_evaluate(
            harness, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0
        )
    assert found is not None
    return found


def responses(answers: dict[str, Any], task: str) -> list[tuple[list[Any], list[Any]]]:
    """The questions of each document of a task, and what was found."""
    return [
        ([tuple(each) for each in sample["arguments"]] if isinstance(sample["arguments"], list)
         else [tuple(each.values()) for each in sample["arguments"].values()],
         [each[0] for each in sample["resps"]])
        for sample in answers["samples"][task]
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["choosing", "predicting"])
def test_likelihoods_are_those_of_our_own_evaluation(answers, generator, task):
    scorer = Scorer(generator.model, generator.tokenizer)
    compared = 0
    for arguments, found in responses(answers, task):
        for (context, ending), (logprob, greedy) in zip(arguments, found, strict=True):
            before = BPE.encode(context)
            tokens = BPE.encode(context + ending)[len(before) :]
            ((ours,),) = scorer.score([Request(before, [tokens])])
            assert float(logprob) == pytest.approx(ours.total, abs=5e-5)
            assert bool(greedy) == ours.is_greedy
            compared += 1
    assert compared >= 12


def test_perplexities_of_long_texts_are_those_of_our_own_evaluation(answers, generator):
    for ((((text,),), (logprob,)),) in zip(responses(answers, "reading"), strict=True):
        (ours,) = generator.score([text])
        assert len(ours.token_ids) < POSITIONS - 1, "windows differ beyond one"
        assert float(logprob) == pytest.approx(ours.total, abs=5e-4)


def test_written_answers_are_the_generators(answers, generator):
    for ((((context, _),), (text,)),) in zip(responses(answers, "writing"), strict=True):
        alone = generator(context, max_new_tokens=12, do_sample=False, stop=["."])
        assert text == alone.text


def test_the_numbers_of_the_tasks_are_there(answers):
    for task in TASKS:
        assert [x for x in answers["results"][task].values() if isinstance(x, float)]
