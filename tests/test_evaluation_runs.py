"""`evaluate` on training runs: the part held out, and warnings of text seen in training.

The right losses are sums over the token files, written out here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2fast.cli.evaluate import main
from gpt2fast.cli.train import main as train
from gpt2fast.data import prepare_data
from gpt2fast.errors import DataError
from gpt2fast.evaluation.training_runs import held_out_text, training_run, unigram_loss
from gpt2fast.tokenizer import Tokenizer

WORDS = ("ship", "storm", "island", "captain", "Größe", "海", "tree", "night", "sand", "gold")
SMALL = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "16"]


def story(seed: int, words: int = 3000) -> str:
    draw = np.random.default_rng(seed).integers(0, len(WORDS), words)
    lines = [" ".join(WORDS[i] for i in draw[at : at + 9]) + ".\n" for at in range(0, words, 9)]
    return "".join(line + "<|endoftext|>\n" * (n % 50 == 49) for n, line in enumerate(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with texts, and runs on them: of characters, of a BPE, of a mixture."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 1), ("b", 2), ("other", 3)):
        (folder / f"{name}.txt").write_text(story(seed))
    prepare_data(folder / "a.txt", folder / "bpe", tokenizer="bpe", vocab_size=300)
    for out, *data in (
        ("char-run", str(folder / "a.txt")),
        ("bpe-run", str(folder / "bpe")),
        ("mixed-run", f"{folder / 'a.txt'}=0.7", f"{folder / 'b.txt'}=0.3"),
    ):
        steps = ["--max-steps", "2", "--batch-size", "2", "--out", str(folder / out)]
        assert train(["--data", *data, *SMALL, *steps]) == 0
    return folder


def score(capsys, *arguments: str) -> tuple[dict, list[str]]:
    """The metrics of perplexity, and the remarks."""
    assert main(["--task", "perplexity", "--json", "-", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)["tasks"]["perplexity"]
    return {name: m["value"] for name, m in result["metrics"].items()}, result["remarks"]


def held_out(folder: Path) -> np.ndarray:
    return np.fromfile(folder / "val.bin", "<u2")


@pytest.mark.parametrize("run", ["char-run", "bpe-run", "mixed-run"])
def test_the_held_out_part_is_the_default_and_its_tokens_are_those_of_the_data(runs, capsys, run):
    data = runs / "bpe" if run == "bpe-run" else runs / run / "data"
    tokenizer = Tokenizer.from_pretrained(str(data))
    place, text = held_out_text(runs / run, tokenizer)
    assert place == str(data)
    assert tokenizer.encode(text, add_special_tokens=False) == held_out(data).tolist()

    metrics, remarks = score(capsys, "--model", str(runs / run))
    for named in (runs / run, data, runs / run / "checkpoints" / "best"):
        other, _ = (
            score(capsys, "--model", str(runs / run), "--data", str(named))
            if (named.name != "best")
            else score(capsys, "--model", str(named))
        )
        assert other == pytest.approx(metrics, rel=1e-3)
    (remark,) = remarks
    assert f"{metrics['token_perplexity']:.4g} equally likely ones" in remark
    last = training_run(runs / run).run
    assert f"{last.last('train_loss'):.4f} in training" in remark
    assert f"{last.last('val_loss'):.4f} held out" in remark


@pytest.mark.parametrize("run", ["char-run", "bpe-run"])
def test_the_unigram_model_counts_the_training_part(runs, run):
    data = runs / "bpe" if run == "bpe-run" else runs / run / "data"
    tokenizer = Tokenizer.from_pretrained(str(data))
    counts = np.bincount(np.fromfile(data / "train.bin", "<u2"), minlength=tokenizer.vocab_size) + 1
    tokens = held_out(data)
    right = -np.log(counts / counts.sum())[tokens].mean()
    loss, where = unigram_loss(tokens.tolist(), tokenizer, training_run(runs / run))
    assert loss == pytest.approx(right, rel=1e-12) and where == "in the training data"
    own = np.bincount(tokens)
    right = -np.log(own[tokens] / len(tokens)).mean()
    loss, where = unigram_loss(tokens.tolist(), tokenizer, None)
    assert loss == pytest.approx(right, rel=1e-12) and where == "in this text"


@pytest.mark.parametrize("run", ["char-run", "bpe-run", "mixed-run"])
@pytest.mark.parametrize("part", ["whole", "first half", "renamed, packed"])
def test_a_text_that_was_trained_on_is_told(runs, capsys, tmp_path, run, part):
    text = (runs / "a.txt").read_text()
    path = tmp_path / "other name.md"
    path.write_text(text[: len(text) // 2] if part == "first half" else text)
    if part == "renamed, packed":
        import gzip

        path.write_bytes(gzip.compress(path.read_bytes()))
    _, remarks = score(capsys, "--model", str(runs / run), "--data", str(path))
    assert any(remark.startswith("warning: 1") and run in remark for remark in remarks)
    assert main(["--task", "perplexity", "--model", str(runs / run), "--data", str(path)]) == 0
    assert "how well the model remembers" in capsys.readouterr().out


def test_other_text_is_not_said_to_have_been_seen(runs, capsys):
    for run in ("char-run", "bpe-run"):
        tokens = ["--model", str(runs / run), "--data", str(runs / "other.txt")]
        _, remarks = score(capsys, *tokens)
        assert not any("warning" in remark for remark in remarks)


def test_samples_are_looked_for_at_whole_tokens_and_in_the_same_tokens_only(runs):
    run = training_run(runs / "bpe-run")
    tokenizer = Tokenizer.from_pretrained(str(runs / "bpe"))
    trained = np.fromfile(runs / "bpe" / "train.bin", "<u2")
    assert run.seen(trained[:2000].tolist(), tokenizer) == (16, 16)
    shifted = np.frombuffer(trained.tobytes()[1:-1], "<u2")[:2000]
    assert run.seen(shifted.tolist(), tokenizer)[0] == 0
    char = Tokenizer.from_pretrained(str(runs / "char-run"))
    assert run.seen(trained[:2000].tolist(), char) == (0, 0)


def test_what_is_gone_or_no_data_is_told(runs, tmp_path, capsys):
    shutil.copytree(runs / "bpe-run", tmp_path / "moved")
    config = (tmp_path / "moved/config.yaml").read_text()
    (tmp_path / "moved/config.yaml").write_text(config.replace(str(runs), "/nowhere"))
    assert main(["--task", "perplexity", "--model", str(tmp_path / "moved")]) == 1
    assert "data are no longer where they were" in capsys.readouterr().err
    _, remarks = score(
        capsys, "--model", str(tmp_path / "moved"), "--data", str(runs / "a.txt"), "--limit", "2"
    )
    assert "was trained on this text is not known" in remarks[1]
    (tmp_path / "empty").mkdir()
    tokenizer = Tokenizer.from_pretrained(str(runs / "bpe"))
    with pytest.raises(DataError, match="neither prepared data nor a training run"):
        held_out_text(tmp_path / "empty", tokenizer)
    raw = tmp_path / "raw"
    raw.mkdir()
    for split in ("train", "val"):
        np.arange(200, 500, dtype="<u2").tofile(raw / f"{split}.bin")
    with pytest.raises(DataError, match="token 299 is 499, and the tokenizer has 300"):
        held_out_text(raw, tokenizer)


@pytest.mark.parametrize("run", ["char-run", "bpe-run"])
def test_records_are_scored_as_they_are_trained_on(runs, capsys, tmp_path, run):
    paragraphs = (runs / "a.txt").read_text().split("<|endoftext|>\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs))
    (tmp_path / "a.json").write_text(json.dumps([{"text": p} for p in paragraphs]))
    (tmp_path / "a.txt").write_text("".join(p + "<|endoftext|>\n" for p in paragraphs))
    found = [
        score(
            capsys, "--model", str(runs / run), "--data", str(tmp_path / f"a.{end}"), "--limit", "9"
        )
        for end in ("txt", "json", "jsonl")
    ]
    assert found[0] == found[1] == found[2]
    assert any("warning" in remark for remark in found[1][1])


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("wikitext2", "A storm blew.\n", "no heading .* task perplexity"),
        ("wikitext2_joined", "A storm blew.\n", "no heading"),
        ("text8", "a storm. blew", r"holds '\.': it is not text8"),
        ("enwik8", "A storm blew.\n", "no markup"),
        ("lambada", '{"text": "a b"}\n\n{"no": 1}\n', r"data\.jsonl, line 3: .*needs 'text'"),
        ("lambada", '{"text": "a b"}\n{"text": "ends "}\n', r"data\.jsonl, line 2: .*no word"),
        ("hellaswag", '{"ctx_a": "x"}\n', r"data\.jsonl, line 1: .*'ctx_b'"),
        ("cbt_cn", '{"sentences": 1}\n', r"data\.jsonl, line 1: .*'sentences' \(list\)"),
    ],
)
def test_other_data_than_the_task_needs_are_told_with_their_place(tmp_path, task, content, message):
    from gpt2fast.evaluation import TASKS

    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        TASKS[task]().read(path)
