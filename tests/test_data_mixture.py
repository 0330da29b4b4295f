"""Mixtures of corpora, worker processes, and how `train` finds and prepares its data."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch

from gpt2fast.cli import prepare as command
from gpt2fast.cli import train as train_command
from gpt2fast.data import DataModule, encoders, prepare_data
from gpt2fast.data.text import END_OF_TEXT
from gpt2fast.errors import ConfigError, DataError, TokenizerError
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.start.data import located, prepared_data
from small_library import Killed, contents, interrupt_after, interruptible, set_pace

ROOT = Path(__file__).parents[1]
_draw = random.Random(5)


def prose(words: str, count: int) -> str:
    return " ".join(_draw.choices(words.split(), k=count)) + ".\n"


SEA = "".join(prose("sea ship wave sail storm anchor whale", 30) for _ in range(60))
LAND = "".join(prose("hill FOREST road STONE field", 30) for _ in range(25))


@pytest.fixture
def corpora(tmp_path):
    """Two texts and the weights of their mixture."""
    (tmp_path / "sea.txt").write_text(SEA)
    lines = [json.dumps({"text": line}) for line in LAND.splitlines()]
    (tmp_path / "land.jsonl").write_text("\n".join(lines))
    return {str(tmp_path / "sea.txt"): 0.25, str(tmp_path / "land.jsonl"): 0.75}


# -- preparing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["position", "documents"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_each_corpus_of_a_mixture_has_its_own_part_held_out(tmp_path, corpora, split, tokenizer):
    if split == "documents":
        (tmp_path / "sea.txt").write_text(SEA.replace("\n", f"\n{END_OF_TEXT}\n"))
    data = prepare_data(corpora, tmp_path / "out", tokenizer, 300, split, val_fraction=0.2, seed=1)
    names, weights = zip(*corpora.items(), strict=True)
    assert [c["name"] for c in data.meta.corpora] == list(names)
    assert [c["weight"] for c in data.meta.corpora] == list(weights)
    for part in ("train", "val"):
        sizes = [corpus[f"{part}_tokens"] for corpus in data.meta.corpora]
        assert sum(sizes) == getattr(data.meta, f"{part}_tokens")
        ids = array("H", (data.directory / f"{part}.bin").read_bytes()).tolist()
        decode = Tokenizer.from_pretrained(data.directory).decode
        sea, land = decode(ids[: sizes[0]]), decode(ids[sizes[0] :])
        assert "sea" in sea and "hill" not in sea and "hill" in land and "sea" not in land
        share = {"train": 0.8, "val": 0.2}[part]
        assert len(sea.replace(END_OF_TEXT, "")) == pytest.approx(share * len(SEA), rel=0.15)
    if split == "position" and tokenizer == "char":
        alone = prepare_data(tmp_path / "sea.txt", tmp_path / "alone", val_fraction=0.2).meta
        assert alone.train_tokens == data.meta.corpora[0]["train_tokens"]

    loader = DataModule(data.directory, 16, 8).train_dataloader()
    decode = Tokenizer.from_pretrained(data.directory).decode
    texts = [decode(row.tolist()) for step in range(25) for row in loader[step][0]]
    from_land = sum(any(c in text for c in "hdfFOREST") for text in texts)
    assert from_land > 120  # three quarters of 200, though the text is the smaller one
    assert not any("sh" in text and "F" in text for text in texts)


def test_a_mixture_on_the_command_line(tmp_path, corpora, capsys):
    named = [f"{name}={weight}" for name, weight in corpora.items()]
    assert command.main([*named, "--out", str(tmp_path / "out")]) == 0
    assert "land.jsonl, weight 0.75" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(
        prepare_data(corpora, tmp_path / "library").directory
    )


def test_an_interrupted_mixture_ends_with_the_same_bytes(tmp_path, corpora, monkeypatch):
    interruptible(monkeypatch, 900)
    straight = prepare_data(corpora, tmp_path / "straight")
    for calls in range(2, 300, 5):
        try:
            data = prepare_data(corpora, tmp_path / "out", progress=interrupt_after(calls))
            break
        except Killed:
            pass
    assert data.resumed and contents(data.directory) == contents(straight.directory)
    with pytest.raises(Killed):
        prepare_data(corpora, tmp_path / "again", progress=interrupt_after(20))
    other = {name: 1.0 for name in corpora}
    with pytest.raises(DataError, match="interrupted run with other settings .weights"):
        prepare_data(other, tmp_path / "again")


def test_an_empty_or_small_corpus_of_a_mixture_is_named(tmp_path, corpora):
    (tmp_path / "land.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"there is no text in the input \(.*land\.jsonl\)"):
        prepare_data(corpora, tmp_path / "out")
    (tmp_path / "land.jsonl").write_text('{"text": "a hill in the sea"}\n')
    data = prepare_data(corpora, tmp_path / "out").directory
    with pytest.raises(DataError, match=r"the val part of .*land\.jsonl has 2 tokens, a block_s"):
        DataModule(data, 8, 2)


def test_a_torn_description_of_corpora_is_refused(tmp_path, corpora):
    data = prepare_data(corpora, tmp_path / "out").directory
    meta = json.loads((data / "meta.json").read_text())
    for change in ({"weight": -1}, {"weight": None}, {"val_tokens": 1}, {"train_tokens": "many"}):
        torn = [{**meta["corpora"][0], **change}, meta["corpora"][1]]
        (data / "meta.json").write_text(json.dumps({**meta, "corpora": torn}))
        with pytest.raises(DataError, match=r"meta\.json: corpora does not fit"):
            DataModule(data, 8, 2)


def test_folders_of_different_tokenizers_do_not_mix(tmp_path, corpora):
    folders = [prepare_data(name, tmp_path / str(n)).directory for n, name in enumerate(corpora)]
    with pytest.raises(DataError, match="prepared with different tokenizers .char of .* char of"):
        DataModule({str(folder): 1 for folder in folders}, 8, 2)
    same = {
        str(prepare_data(name, tmp_path / f"gpt{n}", tokenizer=str(folders[0])).directory): 1.0
        for n, name in enumerate([next(iter(corpora))] * 2)
    }
    data = DataModule(same, 8, 2)
    assert data.meta.train_tokens == 2 * DataModule(next(iter(same)), 8, 2).meta.train_tokens
    assert data.meta.characters_per_token("val") == 1
    assert data.tokenizer is not None


# -- worker processes ----------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    set_pace(monkeypatch, block_size=2000, seconds_between_saves=0.0, bytes_for_processes=0)


@pytest.mark.parametrize("split", ["position", "documents"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, corpora, small, split):
    (tmp_path / "sea.txt").write_text(SEA.replace("\n", f"\n{END_OF_TEXT}\n"))
    arguments = {"tokenizer": "bpe", "vocab_size": 300, "split": split}
    alone = prepare_data(list(corpora), tmp_path / "alone", **arguments)
    for workers in (2, 3):
        out = tmp_path / f"{workers}"
        data = prepare_data(list(corpora), out, **arguments, workers=workers)
        assert contents(data.directory) == contents(alone.directory)


def test_an_interruption_with_workers_loses_nothing(tmp_path, corpora, small):
    class Killed(BaseException):
        pass

    def progress(stage, done, total):
        if stage == "encode" and done > 0.6 * total:
            raise Killed

    alone = prepare_data(list(corpora), tmp_path / "alone")
    with pytest.raises(Killed):
        prepare_data(list(corpora), tmp_path / "out", workers=2, progress=progress)
    saved = json.loads((tmp_path / "out" / ".unfinished" / "position.json").read_text())
    assert sum(saved["tokens"]) > 0
    data = prepare_data(list(corpora), tmp_path / "out", workers=2)
    assert data.resumed and contents(data.directory) == contents(alone.directory)


def test_a_mistake_in_a_worker_is_told_as_without(tmp_path, corpora, small):
    CharTokenizer.train([SEA]).save_pretrained(tmp_path)
    for workers in (1, 2):
        with pytest.raises(TokenizerError, match=r"the character 'h|the character '[A-Z]"):
            prepare_data(next(reversed(corpora)), tmp_path / "out", str(tmp_path), workers=workers)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="workers is 0"):
        prepare_data(list(corpora), tmp_path / "out", workers=0)


def test_a_worker_that_dies_ends_the_run_with_one_line(tmp_path, corpora, small):
    BPETokenizer.train([SEA], 300).save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    with encoders.Encoders(tokenizer, tmp_path / "tokenizer", 2) as several:
        assert several.submit([(0, "sea", False)]).result().tokens[1] == 0
        for process in several._processes:
            process.kill()
        with pytest.raises(DataError, match="ended with code -9; .* fewer --workers"):
            several.submit([(0, "sea", False)]).result()


def test_workers_do_not_run_the_users_script_again(tmp_path):
    (tmp_path / "sea.txt").write_text(SEA)
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from gpt2fast.data import preparation, prepare_data\n"
        "preparation.PACE = preparation.Pace(bytes_for_processes=0)\n"
        "prepare_data('sea.txt', 'out', workers=2)\n"
        "import sys; print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\nFalse\n", "")


# -- the settings of a run -----------------------------------------------------------------------


def settings(*arguments: str) -> TrainConfig:
    return train_command.parse(list(arguments))[0]


def test_weights_on_the_command_line_are_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings("--data", "a.txt=0.7", "b.jsonl=0.3", "--sampling", "epoch")
    assert config.mixture == {"a.txt": 0.7, "b.jsonl": 0.3}
    assert (config.data, config.sampling) == (None, "epoch")
    assert settings("--data=a.txt=1").mixture == {"a.txt": 1.0}
    (tmp_path / "x=1").touch()  # a name as it stands
    assert settings("--data", "x=1").data == "x=1"


def test_a_mixture_in_yaml(tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text("mixture:\n  a.txt: 0.7\n  folder/b.jsonl: 1\nmax_steps: 5\n")
    config = settings("--config", str(recipe))
    assert config.mixture == {"a.txt": 0.7, "folder/b.jsonl": 1.0}
    assert TrainConfig.from_dict(config.to_dict(), "it") == config
    assert settings("--config", str(recipe), "--data", "c.txt").mixture is None


def test_flags_replace_the_data_set_of_a_recipe():
    config = settings("--config", "wikitext2")
    assert (config.dataset, config.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    config = settings("--config", "wikitext2", "--data", "my.txt")
    assert (config.data, config.dataset, config.dataset_config) == ("my.txt", None, None)
    config = settings("--config", "wikitext2", "--dataset", "other")
    assert (config.dataset, config.dataset_config) == ("other", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "a", "b"], "--data has 2 values without weights; write a=0.5 b=0.5"),
        (["--data", "a=1", "b"], "b has no weight"),
        (["--data", "a=-1"], "the weight of a is -1.0"),
        (["--mixture", "{a: .nan}"], "mixture is .* must be names with weights above 0"),
        (["--mixture", "{}"], "mixture is {}"),
        (["--mixture", "{1: 1}"], "mixture is {1: 1}"),
        (["--mixture", "7"], "mixture is 7, but must be names with numbers or null"),
        (["--dataset-config", "x"], "dataset_config is 'x', but must be null without dataset"),
        (["--data", "a", "--dataset", "b"], "dataset is 'b', but must be null beside data"),
        (["--sampling", "shuffled"], "sampling is 'shuffled', but must be one of random, epoch"),
    ],
)
def test_impossible_data_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        settings(*arguments)


def test_a_run_prepares_a_mixture_once(tmp_path, corpora, capsys):
    config = TrainConfig(mixture=corpora, out=str(tmp_path / "run"))
    made = prepared_data(config, resuming=False)
    assert made == tmp_path / "run" / "data"
    data = DataModule(made, 16, 4, sampling="epoch")
    assert len(data.corpora) == 2
    assert [corpus.weight for corpus in data.corpora] == [0.25, 0.75]
    x, y = data.train_dataloader()[3]
    assert x.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1])
    assert prepared_data(config, resuming=True) == made
    assert located(config) == {"mixture": corpora}


def test_a_run_goes_on_with_an_interrupted_preparation(tmp_path, corpora, monkeypatch):
    config = TrainConfig(mixture=corpora, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    plan = tmp_path / "run" / "data" / ".unfinished" / "plan.json"

    def interrupt() -> int:
        with monkeypatch.context() as patched:
            # Memory that runs out in the middle.
            patched.setattr(encoders.Encoders, "submit", out_of_memory)
            with pytest.raises(MemoryError):
                prepared_data(config, resuming=False)
        return plan.stat().st_mtime_ns

    def out_of_memory(*_):
        raise MemoryError

    assert interrupt() == interrupt()  # the plan stands
    prepared_data(config, resuming=False)
    assert not plan.exists()
    interrupt()  # and one of something else is begun anew
    other = TrainConfig(data=next(iter(corpora)), out=config.out)
    assert DataModule(prepared_data(other, resuming=False), 16, 4).meta.corpora is None


def test_prepared_folders_and_texts_do_not_mix(tmp_path, corpora):
    sea, land = corpora
    folder = str(prepare_data(sea, tmp_path / "sea").directory)
    config = TrainConfig(mixture={folder: 1, land: 1}, out=str(tmp_path / "run"))
    with pytest.raises(DataError, match="prepare the text with the same tokenizer first: python"):
        prepared_data(config, resuming=False)
    both = {folder: 1.0, str(prepare_data(sea, tmp_path / "two").directory): 2.0}
    assert prepared_data(TrainConfig(mixture=both), resuming=False) == both


def test_a_run_reads_shards_by_pattern(tmp_path, monkeypatch):
    for name in ("a_train_1.bin", "a_train_2.bin", "a_val_0.bin"):
        (tmp_path / name).write_bytes(array("H", range(60)).tobytes())
    monkeypatch.setenv("GPT2FAST_DATA", str(tmp_path))
    for name in ("a_train_*.bin", "."):
        config = TrainConfig(data=name if name != "." else str(tmp_path))
        with pytest.warns(UserWarning):
            data = DataModule(prepared_data(config, resuming=False), 8, 2)
        assert data.meta.train_tokens == 120
    assert located(TrainConfig(data="a_train_*.bin")) == {"data": str(tmp_path / "a_train_*.bin")}
    with pytest.raises(DataError, match=r"'b_train_\*\.bin' was not found"):
        prepared_data(TrainConfig(data="b_train_*.bin"), resuming=False)


def test_a_run_trains_on_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": SEA.splitlines()})
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "saved")
    config = TrainConfig(dataset=str(tmp_path / "saved"), out=str(tmp_path / "run"))
    data = DataModule(prepared_data(config, resuming=False), 16, 4)
    assert data.meta.train_tokens == data.meta.val_tokens and data.meta.split == "given"
    assert located(config) == {"dataset": str(tmp_path / "saved")}
