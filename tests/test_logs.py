"""Logs of a run: rows, TensorBoard, samples of text, MFU."""

from __future__ import annotations

import csv
import dataclasses
import errno
import gc
import importlib.util
import json
import math
import random
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import ConfigError
from gpt2fast.inference.packed import PackedGPT2
from gpt2fast.tokenizer.char import CharTokenizer
from gpt2fast.training import TrainConfig, train
from gpt2fast.training.logs.columns import COLUMNS
from gpt2fast.training.logs.histogram import BINS, histogram
from gpt2fast.training.logs.log import check_logs, open_logs, read_json_lines, read_rows
from gpt2fast.training.logs.reporter import Reporter
from gpt2fast.training.logs.runs import read_runs
from gpt2fast.training.logs.samples import prompt_for, sample_text
from gpt2fast.training.machine import flops


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(out=str(tmp_path))


def make_row(step: int, **more: Any) -> dict[str, Any]:
    row = {"step": step, "tokens": 64 * step, "train_loss": 3 - step / 100, "lr": 1e-3}
    return {**row, "grad_norm": 1.0, "tokens_per_second": 500.0, "elapsed_seconds": 2.0, **more}


def csv_rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def json_rows(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# -- log.csv and log.jsonl ------------------------------------------------------------------------


def test_both_files_hold_the_same_rows(config, tmp_path):
    logs = open_logs(config, tmp_path, None)
    logs.row(make_row(0, train_loss=None, val_loss=4.25))
    logs.row(make_row(10, epoch=0.5, memory_gib=1.5, loss_scale=1024.0))
    # On disk already: a run that is killed now has lost nothing.
    assert list(csv_rows(tmp_path)[0]) == list(COLUMNS)
    first, second = json_rows(tmp_path / "log.jsonl")
    logs.close()
    assert list(first) == list(COLUMNS)
    assert first["train_loss"] is None and first["val_loss"] == 4.25
    assert second["train_loss"] == 2.9 and second["loss_scale"] == 1024
    assert read_rows(tmp_path / "log.csv") == [first, second]


def test_numbers_that_json_lacks_are_null_there_and_named_in_the_csv(config, tmp_path):
    logs = open_logs(config, tmp_path, None)
    logs.row(make_row(1, grad_norm=math.inf, train_loss=math.nan))
    logs.close()
    assert json_rows(tmp_path / "log.jsonl")[0]["grad_norm"] is None
    assert csv_rows(tmp_path)[0]["grad_norm"] == "inf"
    assert math.isnan(read_rows(tmp_path / "log.csv")[0]["train_loss"])


@pytest.mark.parametrize(
    "torn",
    ["", "9,99", "9," + "1," * 11 + "1.23", "9," + "1," * 11 + "\0\0\n"],
    ids=["whole", "few cells", "last cell", "zeros"],
)
def test_a_resumed_run_goes_on_behind_its_step(config, tmp_path, torn):
    logs = open_logs(config, tmp_path, None)
    for step in (5, 10, 15, 20):
        logs.row(make_row(step))
        logs.text(step, "a", f"text {step}")
    logs.close()
    with (tmp_path / "log.csv").open("a") as file:
        file.write(torn)
    for name in ("log.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 9, "tok')  # what a crash cut short
    logs = open_logs(config, tmp_path, 10)
    logs.row(make_row(15, train_loss=1.0))
    logs.text(15, "a", "another text")
    logs.close()
    assert [row["step"] for row in csv_rows(tmp_path)] == ["5", "10", "15"]
    assert csv_rows(tmp_path)[-1]["train_loss"] == "1"
    assert [row["step"] for row in json_rows(tmp_path / "log.jsonl")] == [5, 10, 15]
    samples = json_rows(tmp_path / "samples.jsonl")
    assert [row["text"] for row in samples] == ["text 5", "text 10", "another text"]


def test_a_new_run_starts_every_file_afresh(config, tmp_path):
    logs = open_logs(config, tmp_path, None)
    logs.row(make_row(5))
    logs.text(5, "a", "b")
    logs.close()
    open_logs(config, tmp_path, None).close()
    assert csv_rows(tmp_path) == []
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text() == ""


def test_a_log_of_an_older_version_is_continued(config, tmp_path):
    (tmp_path / "log.csv").write_text("step,tokens,train_loss,val_loss\n0,0,,5.5\n10,640,3.25,\n")
    logs = open_logs(config, tmp_path, 10)
    logs.row(make_row(20))
    logs.close()
    assert [row["train_loss"] for row in csv_rows(tmp_path)] == ["", "3.25", "2.8"]
    first, second, third = json_rows(tmp_path / "log.jsonl")
    assert first["val_loss"] == 5.5 and second["train_loss"] == 3.25 and third["step"] == 20
    assert list(first) == list(COLUMNS) and first["epoch"] is None


def test_the_column_utilisation_of_an_older_version_is_read_as_mfu(config, tmp_path):
    (tmp_path / "log.csv").write_text("step,tokens,utilisation,memory_gib\n10,640,0.25,1.5\n")
    (tmp_path / "log.jsonl").write_text('{"step": 10, "utilisation": 0.25, "memory_gib": 1.5}\n')
    for read, name in ((read_rows, "log.csv"), (read_json_lines, "log.jsonl")):
        (row,) = read(tmp_path / name)
        assert row["mfu"] == 0.25 and row["memory_gib"] == 1.5 and "utilisation" not in row
    assert read_runs([tmp_path])[0].median("mfu") == 0.25
    logs = open_logs(config, tmp_path, 10)
    logs.row(make_row(20, mfu=0.5))
    logs.close()
    assert [row["mfu"] for row in csv_rows(tmp_path)] == ["0.25", "0.5"]
    assert [row["mfu"] for row in json_rows(tmp_path / "log.jsonl")] == [0.25, 0.5]


def test_mfu_is_filled_in(config, tmp_path):
    logs = open_logs(config, tmp_path, None, flops_per_token=2e9, peak_flops=4e12)
    assert logs.row(make_row(10))["mfu"] == pytest.approx(0.25)
    assert "mfu" not in logs.row(make_row(10, tokens_per_second=None))
    logs.close()
    assert csv_rows(tmp_path)[0]["mfu"] == "0.25"


def test_a_share_above_the_peak_is_left_out(config, tmp_path):
    logs = open_logs(config, tmp_path, None, flops_per_token=2e9, peak_flops=0.5e12)
    assert logs.is_above_peak(make_row(10))  # twice what the machine can do
    assert "mfu" not in logs.row(make_row(10))
    logs.hold_against(4e12)
    assert not logs.is_above_peak(make_row(20))
    assert logs.row(make_row(20))["mfu"] == pytest.approx(0.25)
    logs.close()
    assert [row["mfu"] for row in csv_rows(tmp_path)] == ["", "0.25"]


def test_a_peak_that_the_run_is_above_is_measured_again(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, out=str(tmp_path))
    peaks = iter([flops.Peak(1.0, "a busy moment"), flops.Peak(1e18, "a quiet one")])
    # Stands for what is measured on a machine that was busy, and is so no longer.
    monkeypatch.setattr(flops, "peak", lambda device, dtype: next(peaks))
    reporter, device = Reporter(config, None, 10, silent=False), torch.device("cpu")
    reporter.open(GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8)), device, 1, None, 0.0)
    reporter.row(make_row(5), device)
    reporter.close()
    (row,) = json_rows(tmp_path / "log.jsonl")
    assert 0 < row["mfu"] < 1


def test_every_log_is_closed_even_if_one_fails(config, tmp_path, monkeypatch):
    logs = open_logs(config, tmp_path, None)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # A full disk, as some file systems tell of it.
    monkeypatch.setattr(logs._json, "close", full)
    with pytest.raises(OSError, match="No space"):
        logs.close()
    assert logs._csv._file.closed


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_log_that_fails_to_open_leaves_none_open(config, tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(OSError) as caught:
        open_logs(config, tmp_path, None)
    assert (tmp_path / "log.csv").exists()
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [name for name in opened if name.startswith(str(tmp_path))]
    assert caught, "it holds what was open: nothing is closed for being collected"


# -- TensorBoard ----------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    """Events that TensorBoard itself reads from a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


@pytest.fixture
def tensorboard(config) -> TrainConfig:
    pytest.importorskip("tensorboard")
    return dataclasses.replace(config, tensorboard=True, log_histograms=True)


def small_model() -> GPT2:
    return GPT2(GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def test_tensorboard_reads_back_what_was_logged(tensorboard, tmp_path):
    model = small_model()
    model.wte.weight.grad = torch.linspace(-1, 3, 9 * 16).view(9, 16)
    logs = open_logs(tensorboard, tmp_path, None, flops_per_token=2e9, peak_flops=4e12)
    logs.row(make_row(0, train_loss=None, val_loss=4.25))
    logs.row(make_row(10, memory_gib=1.5, epoch=0.5))
    logs.text(10, "O ", "* Romeo\n<b>")
    logs.histograms(10, model)
    logs.close()
    read = events(tmp_path / "tensorboard")
    scalars = {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }
    assert scalars["loss/validation"] == [(0, 4.25)]
    assert scalars["loss/train"] == [(10, pytest.approx(2.9))]
    assert scalars["machine/mfu"] == [(0, 0.25), (10, 0.25)]
    assert scalars["machine/memory_gib"] == [(10, 1.5)]
    assert scalars["learning_rate"][1] == (10, pytest.approx(1e-3))
    assert {"gradient_norm", "machine/tokens_per_second", "progress/tokens"} <= set(scalars)
    (sample,) = read.Tensors("sample/text_summary")
    assert sample.tensor_proto.string_val[0].decode() == "    O * Romeo\n    <b>\n"
    (weights,) = read.Histograms("weights/wte.weight")
    assert weights.step == 10 and weights.histogram_value.num == 9 * 16
    (gradients,) = read.Histograms("gradients/wte.weight")
    value = gradients.histogram_value
    assert (value.min, value.max) == (-1, 3) and sum(value.bucket) == 9 * 16
    assert value.sum == pytest.approx(9 * 16)
    assert "gradients/wpe.weight" not in read.Tags()["histograms"]  # it has none


def test_tensorboard_shows_no_step_twice_after_a_resumption(tensorboard, tmp_path):
    for resume, steps in [(None, (5, 10, 15, 20)), (10, (15, 20, 25))]:
        logs = open_logs(tensorboard, tmp_path, resume)
        for step in steps:
            logs.row(make_row(step, train_loss=step + (resume or 0)))
            logs.text(step, "", f"{resume}")
        logs.close()
        newest = max((tmp_path / "tensorboard").iterdir())
        with newest.open("ab") as file:
            file.write(b"\x18\0\0")  # a record that a crash cut short
    read = events(tmp_path / "tensorboard")
    found = [(event.step, event.value) for event in read.Scalars("loss/train")]
    assert found == [(5, 5), (10, 10), (15, 25), (20, 30), (25, 35)]
    # The other reader that TensorBoard has; this one forgets later steps of scalars alone.
    plugin = "tensorboard.backend.event_processing.plugin_event_accumulator"
    whole = pytest.importorskip(plugin).EventAccumulator(str(tmp_path / "tensorboard"))
    whole.Reload()
    texts = [event.step for event in whole.Tensors("sample/text_summary")]
    assert texts == [event.step for event in whole.Tensors("loss/train")] == [5, 10, 15, 20, 25]


def test_a_new_run_removes_the_events_of_one_that_it_replaces(tensorboard, tmp_path):
    for loss in (1.0, 2.0):
        logs = open_logs(tensorboard, tmp_path, None)
        logs.row(make_row(5, train_loss=loss))
        logs.close()
    read = events(tmp_path / "tensorboard")
    assert [event.value for event in read.Scalars("loss/train")] == [2.0]


def test_histogram_counts_every_finite_value():
    values = torch.tensor([1.0, 2.0, 5.0, math.nan, math.inf])
    found = histogram(values)
    assert found is not None and sum(found.counts) == 3 and len(found.edges) == BINS + 1
    assert (found.low, found.high, found.total, found.squares) == (1, 5, 8, 30)
    same = histogram(torch.full((7,), 3.0))
    assert same is not None and sum(same.counts) == 7 and same.low < 3 < same.high
    assert histogram(torch.tensor([math.nan])) is None and histogram(torch.zeros(0)) is None


# -- what is not installed, and Weights & Biases --------------------------------------------------


@pytest.mark.parametrize(
    ("package", "way_out"), [("tensorboard", "gpt2fast\\[logs\\]"), ("wandb", "pip install wandb")]
)
def test_a_missing_package_is_one_line(config, monkeypatch, package, way_out):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else real(name)
    )
    value = True if package == "tensorboard" else "my-project"
    check_logs(config)
    with pytest.raises(ConfigError, match=f"{package} is .*not installed.*{way_out}"):
        check_logs(dataclasses.replace(config, **{package: value}))


class StandInRun:
    def __init__(self, **settings: Any) -> None:
        self.settings, self.finished = settings, False
        self.logged: list[Any] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> Any:
    """Weights & Biases, as far as it is used: its runs are kept."""
    module: Any = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.runs = []
    module.Html = lambda text: ("html", text)
    module.Histogram = lambda np_histogram: ("histogram", np_histogram)

    def init(**settings: Any) -> StandInRun:
        module.runs.append(StandInRun(**settings))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_rows_and_a_resumed_run_goes_on_under_its_id(config, tmp_path, wandb):
    config = dataclasses.replace(config, wandb="shakespeare", log_histograms=True)
    for resume in (None, 10, None):
        logs = open_logs(config, tmp_path, resume)
        logs.row(make_row(10, val_loss=2.5))
        logs.text(10, "a<", "b&")
        logs.histograms(10, small_model())
        logs.close()
    first, again, other = wandb.runs
    assert first.settings["project"] == "shakespeare" and first.settings["name"] == tmp_path.name
    assert first.settings["config"]["wandb"] == "shakespeare"
    assert first.settings["id"] == again.settings["id"] != other.settings["id"]
    row, text, histograms = first.logged
    assert row[0] == 10 and row[1]["loss/validation"] == 2.5
    assert "loss/validation_per_character" not in row[1]
    assert text == (10, {"sample": ("html", "<pre>a&lt;<b>b&amp;</b></pre>")})
    kind, (counts, edges) = histograms[1]["weights/wte.weight"]
    assert kind == "histogram" and len(edges) == len(counts) + 1
    assert first.finished and again.finished


def test_wandb_that_does_not_start_is_one_line(config, tmp_path, wandb, monkeypatch):
    def init(**settings: Any) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    wandb.init = init
    with pytest.raises(ConfigError, match=r"did not start: api_key .*wandb login.*--wandb"):
        open_logs(dataclasses.replace(config, wandb="p"), tmp_path, None)


@pytest.mark.parametrize(
    "wrong",
    [{"sample_interval": 0}, {"sample_tokens": 0}, {"wandb": ""}, {"log_histograms": True}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_setting_that_makes_no_sense_is_named(wrong):
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} is"):
        TrainConfig(**wrong)


# -- samples of text ------------------------------------------------------------------------------

TEXT = "the sea was dark and the storm came near\n"


@pytest.fixture
def tokenizer() -> CharTokenizer:
    return CharTokenizer.train([TEXT])


def train_a_little(tokenizer: CharTokenizer, samples: bool) -> dict[str, torch.Tensor]:
    """Ten steps with dropout, whose masks depend on the global random state."""
    torch.manual_seed(1)
    model = GPT2(
        GPT2Config(
            vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=16, n_layer=2, n_head=2,
            dropout=0.3,
        )
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([tokenizer.encode(TEXT)[:17]])
    for step in range(10):
        model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
        if samples:
            assert sample_text(model, tokenizer, "the", 40, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_a_run_is_bit_for_bit_the_same_with_samples(tokenizer):
    without, with_samples = (train_a_little(tokenizer, samples) for samples in (False, True))
    assert all(torch.equal(without[name], with_samples[name]) for name in without)


def test_training_is_bit_for_bit_the_same_with_every_log_on(tmp_path):
    pytest.importorskip("tensorboard")
    words = random.Random(0).choices(TEXT.split(), k=1500)
    (tmp_path / "story.txt").write_text(" ".join(words))
    plain = TrainConfig(
        data=str(tmp_path / "story.txt"), out=str(tmp_path / "plain"), n_layer=1, n_head=2,
        n_embd=16, block_size=16, batch_size=4, dropout=0.2, max_steps=6, eval_interval=3,
        eval_batches=2, log_interval=2, checkpoint_interval=4, threads=1,
    )  # fmt: skip
    extras = {"tensorboard": True, "log_histograms": True, "sample_interval": 2}
    noisy = dataclasses.replace(
        plain, out=str(tmp_path / "noisy"), sample_tokens=20, sample_prompt="sea", **extras
    )
    for config in (plain, noisy):
        train(config)
    weights = [Path(run.out, "model.safetensors").read_bytes() for run in (plain, noisy)]
    assert weights[0] == weights[1]
    clocks = {"tokens_per_second", "elapsed_seconds", "mfu", "memory_gib"}
    logs = [
        [{k: v for k, v in row.items() if k not in clocks} for row in json_rows(path / "log.jsonl")]
        for path in (tmp_path / "plain", tmp_path / "noisy")
    ]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == 6 and logs[0][-1]["epoch"] > 0

    train(dataclasses.replace(noisy, max_steps=8), resume=tmp_path / "noisy")
    samples = json_rows(tmp_path / "noisy" / "samples.jsonl")
    assert [row["step"] for row in samples] == [2, 4, 6, 8]
    assert all(row["prompt"] == "sea" and len(row["text"]) == 20 for row in samples)
    read = events(tmp_path / "noisy" / "tensorboard")
    assert [event.step for event in read.Scalars("loss/train")] == [2, 3, 4, 6, 8]
    assert [event.step for event in read.Scalars("loss/validation")] == [0, 3, 6, 8]
    assert read.Histograms("gradients/wte.weight")[0].histogram_value.num > 0
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


def packed_models() -> int:
    """Number of packed models in this process."""
    gc.collect()
    return sum(type(thing) is PackedGPT2 for thing in gc.get_objects())


def test_a_sample_leaves_everything_as_it_was(tokenizer):
    model = GPT2(
        GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )
    model.train()
    model.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    packed = packed_models()
    text = sample_text(model, tokenizer, "the", 40, seed=3)
    assert len(text) == 40  # longer than the model's context
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == numpy.random.get_state()[1].tolist()
    assert torch.is_grad_enabled() and packed_models() == packed
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.manual_seed(99)
    assert sample_text(model, tokenizer, "the", 40, seed=3) == text
    assert sample_text(model, tokenizer, "the", 40, seed=4) != text


def test_the_prompt_of_samples(tokenizer):
    assert prompt_for(tokenizer, None) == "\n" and prompt_for(tokenizer, "sea") == "sea"
    assert prompt_for(CharTokenizer.train(["ab"]), None) in ("a", "b")
    with pytest.raises(ConfigError, match="sample_prompt is 'Ω'"):
        prompt_for(tokenizer, "Ω")
    with pytest.raises(ConfigError, match="no tokenizer.*sample_interval to null"):
        prompt_for(None, None)


def test_a_bpe_tokenizer_samples_from_the_beginning_of_a_text():
    from gpt2fast import Tokenizer

    tokenizer, model = (kind.from_pretrained("adventures") for kind in (Tokenizer, GPT2))
    assert prompt_for(tokenizer, None) == ""
    assert sample_text(model, tokenizer, "", 10, seed=1)


# -- FLOPs and MFU --------------------------------------------------------------------------------


def test_flops_per_token_of_gpt2_are_nanogpts():
    # model.py of nanoGPT: 6 * N + 12 * L * H * Q * T, N without position embeddings.
    assert flops.flops_per_token(GPT2Config(), 1024) == 6 * 123_653_376 + 12 * 12 * 12 * 64 * 1024


def test_frozen_weights_spare_the_products_of_their_gradients():
    attention = 12 * 12 * 12 * 64 * 1024
    for trained in (0, 1000):
        found = flops.flops_per_token(GPT2Config(), 1024, trained)
        assert found == 4 * 123_653_376 + 2 * trained + attention
    everything = GPT2Config().parameter_count
    assert flops.flops_per_token(GPT2Config(), 1024, everything) == 6 * 123_653_376 + attention


def test_flops_per_token_are_the_matrix_products_of_a_step():
    """Counted by torch in transformers' model; biases and layer norms are in N and no products."""
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    for tied in (True, False):
        shape = {"vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 3}
        settings = transformers.GPT2Config(
            **shape, tie_word_embeddings=tied, attn_implementation="eager"
        )
        model = transformers.GPT2LMHeadModel(settings)
        ids = torch.randint(101, (2, 32))
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids).loss.backward()
        vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
        ours = flops.flops_per_token(GPT2Config(**shape, tie_word_embeddings=tied), 32)
        assert counter.get_total_flops() == ids.numel() * (ours - 6 * vectors)


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.float16, 756),
        ("NVIDIA H200", torch.float32, 66.9),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("Tesla T4", torch.float16, 65),
        ("Tesla T4", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", torch.bfloat16, None),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("Some GPU 9000", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
    ],
)
def test_the_peak_of_a_gpu_is_its_data_sheets(name, dtype, teraflops):
    found = flops.gpu_peak(name, dtype)
    if teraflops is None:
        assert found is None
    else:
        assert found is not None and found.flops == pytest.approx(teraflops * 1e12)
        assert name in found.source


def test_tf32_has_a_peak_of_its_own():
    found = flops.gpu_peak("NVIDIA A100-PCIE-40GB", torch.float32, tf32=True)
    assert found is not None and found.flops == 156e12 and "TF32" in found.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_cpu_is_measured_quickly(dtype):
    flops.measured_peak(dtype, seconds=0.01)
    state, began = torch.get_rng_state(), time.process_time()
    found = flops.peak(torch.device("cpu"), dtype)
    # One thread, so its processor time is what the measurement takes on a quiet machine.
    assert time.process_time() - began < 0.5
    assert torch.equal(state, torch.get_rng_state())
    assert found is not None and 1e8 < found.flops < 1e13
    assert "measured" in found.source and " x " in found.source
