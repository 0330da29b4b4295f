"""The same scores as lm-evaluation-harness, which runs its own tasks on the same files.

It is an outside check and no dependency: `pip install lm_eval==0.4.13` into an environment, then
these tests run; or, for one checkpoint,

python tests/test_evaluation_peers.py CHECKPOINT --limit 1000
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT2, Generator, GPT2Config, Tokenizer
from gpt2fast.evaluation import Settings, evaluate
from gpt2fast.evaluation.hellaswag import HellaSwag
from gpt2fast.evaluation.wikitext import pages

# As the harness calls a task, as we do, and the metrics of both.
TASKS = {
    "lambada_openai": ("lambada", {"perplexity": "perplexity", "acc": "acc"}),
    "hellaswag": ("hellaswag", {"acc": "acc", "acc_norm": "acc_norm"}),
    "wikitext": (
        "wikitext2",
        {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    ),
}
SPLITS = {"lambada_openai": "test", "hellaswag": "validation", "wikitext": "test"}


def write_data(
    data_dir: Path, folder: Path, limit: int, teller: Path | None = None
) -> dict[str, Path]:
    """Files that the harness's tasks and ours read, from the folder of texts.

    With a teller, a checkpoint, every third passage of LAMBADA ends in what it would write: a small
    model would otherwise never get one right.
    """
    lines = (data_dir / "lambada_test.jsonl").read_text().splitlines()[:limit]
    passages = [json.loads(line) for line in lines]
    if teller is not None:
        generator = Generator.from_pretrained(teller, window="slide")
        for passage in passages[::3]:
            written = generator(passage["context"], max_new_tokens=1, temperature=0).text
            if written.startswith(" ") and written.strip():
                passage["continuation"] = written.strip()
    wiki = (data_dir / "wiki.test.raw").read_text()
    rows: dict[str, list[dict[str, Any]]] = {
        "lambada_openai": [
            {"text": f"{passage['context']} {passage['continuation']}"} for passage in passages
        ],
        "hellaswag": [
            original(choice.context, choice.endings, choice.gold, number)
            for number, choice in enumerate(
                HellaSwag().read(data_dir / "hellaswag_val_full.txt.bz2")[:limit]
            )
        ],
        "wikitext": [{"page": page} for page in list(pages(wiki))[: max(1, limit // 10)]],
    }
    files = {}
    for task, found in rows.items():
        files[task] = folder / f"{task}.jsonl"
        files[task].write_text("".join(json.dumps(row) + "\n" for row in found))
    # Ours reads the articles from one text.
    files["wikitext2"] = folder / "wiki.raw"
    files["wikitext2"].write_text("\n".join(row["page"] for row in rows["wikitext"]))
    return files


def original(context: str, endings: Any, gold: int, number: int) -> dict[str, Any]:
    """A prepared example of HellaSwag in the fields of the original, WikiHow's markers included."""
    label, _, rest = context.partition(": ")
    first, dot, second = rest.rpartition(". ")
    if number % 3 == 0:
        first = first.replace(". ", " [title]", 1) + " [step] "
        endings = [ending + " [substeps]  And so on." for ending in endings]
    return {
        "activity_label": label,
        "ctx_a": (first + dot).strip(),
        "ctx_b": second,
        "endings": [ending.strip() for ending in endings],
        "label": str(gold),
    }


def harness_scores(checkpoint: Path, files: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Its scores by its task's name."""
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM

    recipes = {
        "lambada_openai": "lambada/lambada_openai.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml",
        "wikitext": "wikitext/wikitext.yaml",
    }
    configs = []
    for task, recipe in recipes.items():
        # Its own task in all but where the data come from.
        config = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / recipe),
            "task": f"local_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {SPLITS[task]: str(files[task])}},
            **{f"{split}_split": None for split in ("training", "validation", "test")},
            f"{SPLITS[task]}_split": SPLITS[task],
        }
        configs.append(files[task].with_suffix(".yaml"))
        configs[-1].write_text(yaml.safe_dump(config))
    model = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=4, dtype="float32")
    found = lm_eval.simple_evaluate(model=model, tasks=list(map(str, configs)), bootstrap_iters=2)
    results = found["results"]
    return {
        task: {key.removesuffix(",none"): value for key, value in results[f"local_{task}"].items()}
        for task in TASKS
    }


def our_scores(checkpoint: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Ours, by our task's name."""
    generator = Generator.from_pretrained(checkpoint)
    data = {ours: files.get(ours, files[theirs]) for theirs, (ours, _) in TASKS.items()}
    results = evaluate(
        generator.model, generator.tokenizer, list(data), data=data, settings=Settings()
    )
    return {result.task.name: result.metrics for result in results}


def save_checkpoint(folder: Path, data_dir: Path, steps: int) -> None:
    """A small GPT-2 with the real tokenizer, trained on WikiText for so many steps."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(data_dir / "gpt2")
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=128, dropout=0.0)
    model = GPT2(config)
    with torch.no_grad():
        for parameter in model.parameters():  # predictions that are far from uniform
            parameter.mul_(4) if parameter.dim() > 1 else None
    if steps:
        model = GPT2(config)
    tokens = torch.tensor(tokenizer.encode((data_dir / "wiki.test.raw").read_text()[:400_000]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        begins = torch.randint(len(tokens) - 128, (4, 1))
        batch = tokens[begins + torch.arange(128)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, tokenizer)


@pytest.mark.parametrize("steps", [0, 100])
@pytest.mark.timeout(1200)
def test_scores_equal_the_harness(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval, an outside check, is not installed")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "model", data_dir, steps)
    files = write_data(data_dir, tmp_path, 40, tmp_path / "model")
    theirs = harness_scores(tmp_path / "model", files)
    if steps:
        assert 0 < theirs["lambada_openai"]["acc"] < 1
    ours = our_scores(tmp_path / "model", files)
    for task, (name, metrics) in TASKS.items():
        for their_metric, metric in metrics.items():
            expected = theirs[task][their_metric]
            assert ours[name][metric].value == pytest.approx(expected, rel=5e-5), (task, metric)
        if "acc" in metrics:
            assert ours[name]["acc"].stderr == pytest.approx(theirs[task]["acc_stderr"], rel=1e-6)


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPT2FAST_DATA"))
    parser.add_argument("--limit", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(args.data), Path(folder), args.limit)
        ours = our_scores(args.checkpoint, files)
        theirs = harness_scores(args.checkpoint, files)
    print(f"{'task':<12}{'metric':<18}{'gpt2fast':>18}{'lm_eval':>18}")
    for task, (name, metrics) in TASKS.items():
        for their_metric, metric in metrics.items():
            value, expected = ours[name][metric].value, theirs[task][their_metric]
            print(f"{name:<12}{metric:<18}{value:>18.6f}{expected:>18.6f}")


if __name__ == "__main__":
    main()
