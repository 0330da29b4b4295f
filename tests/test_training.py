"""Training learns, measures its losses as it says, and fails in one line."""
# ruff: noqa: F811

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast.cli import train as command
from gpt2fast.data import DataModule, prepare_data
from gpt2fast.errors import ConfigError, DataError, Error, WeightsError
from gpt2fast.model import GPT2
from gpt2fast.training import TrainConfig, TrainingError, train
from gpt2fast.training.checkpoints.folder import find_checkpoint
from gpt2fast.training.checkpoints.state import load_state
from gpt2fast.training.logs.log import RunLog
from gpt2fast.training.optimizers import ModelOptimizer
from gpt2fast.training.schedule import learning_rate
from run_hooks import before_updates, changed_losses, windows_read
from small_runs import (  # noqa: F401
    changed,
    config,
    prepared,
    rows,
    settings_of,
    start,
    text,
    trained,
    write_text,
)

# -- schedule, optimizer, loss --------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 99, 100, 101, 1050, 1999, 2000])
def test_schedule_is_nanogpts(step):
    lr, min_lr, warmup, steps = 1e-3, 1e-4, 100, 2000
    if step < warmup:
        expected = lr * (step + 1) / (warmup + 1)
    else:
        ratio = (step - warmup) / (steps - warmup)
        expected = min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (lr - min_lr)
    actual = learning_rate(step, lr=lr, min_lr=min_lr, warmup_steps=warmup, steps=steps)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_optimizer_is_torchs_adamw_with_decay_for_matrices_only():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4))
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4))
    theirs.load_state_dict(ours.state_dict())
    optimizer = ModelOptimizer(ours.named_parameters(), TrainConfig(weight_decay=0.5))
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[0].weight], "weight_decay": 0.5},
            {"params": [theirs[0].bias, *theirs[1].parameters()], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(5):
        batch, lr = torch.randn(3, 5), 0.1 / (step + 1)
        for model in (ours, theirs):
            model.zero_grad()
            model(batch).square().sum().backward()
        optimizer.step(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_smaller_batches_with_more_accumulation_are_the_same_run(config, sampling):
    windows, weights, losses = [], [], []
    for parts in (1, 2, 4):
        out = f"{config.out}-{parts}"
        asked = changed(
            config, max_steps=3, batch_size=16 // parts, grad_accumulation=parts, out=out,
            sampling=sampling, dropout=0.0, log_interval=1,
        )  # fmt: skip
        with windows_read() as drawn:
            train(asked)
        windows.append(drawn)
        weights.append(GPT2.from_pretrained(out).state_dict())
        losses.append([float(row["train_loss"]) for row in rows(out) if row["train_loss"]])
    assert windows[0] == windows[1] == windows[2] and len(windows[0]) == 48
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    for name, expected in weights[0].items():
        for found in weights[1:]:
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


def test_a_run_that_is_resumed_with_smaller_batches_goes_on_with_its_windows(config):
    whole = changed(config, max_steps=4, batch_size=8, checkpoint_interval=2, sampling="random")
    with windows_read() as expected:
        train(whole)
    smaller = changed(whole, batch_size=2, grad_accumulation=4)
    with windows_read() as drawn:
        train(smaller, resume=Path(config.out) / "checkpoints" / "step-00000002")
    assert drawn == expected[16:]


def test_validation_loss_is_the_mean_over_the_whole_split(config, trained):
    result = float(rows(trained)[-1]["val_loss"])
    data = DataModule(config.data, config.block_size, 1)
    model = GPT2.from_pretrained(trained).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in data.val_dataloader():
            logits = model(inputs).logits.flatten(0, 1).double()
            total += torch.nn.functional.cross_entropy(
                logits, targets.flatten(), reduction="sum"
            ).item()
            count += targets.numel()
    assert count == data.meta.val_tokens - 1
    assert result == pytest.approx(total / count, abs=1e-4)


def test_loss_per_character_counts_the_characters_of_the_text(text, config):
    result = train(changed(config, data=str(text), tokenizer="bpe", vocab_size=300))
    meta = DataModule(Path(config.out) / "data", config.block_size, 1).meta
    expected = result.val_loss * meta.val_tokens / meta.val_characters
    assert result.val_loss_per_char == pytest.approx(expected)
    assert result.val_loss_per_char < result.val_loss


def test_training_learns(config):
    result = train(changed(config, max_steps=150, n_embd=32, eval_interval=150, log_interval=50))
    log = rows(config.out)
    assert float(log[0]["val_loss"]) > 2.8
    assert result.val_loss < 1.9
    assert result.best_val_loss <= result.val_loss


def test_diverging_loss_stops_the_run_and_names_step_and_rate(config):
    told = r"step 6 .*nan.*learning rate 0\.\d+.*step-00000004"
    with (
        changed_losses(lambda passes, loss: loss * math.nan if passes == 5 else loss),
        pytest.raises(TrainingError, match=told),
    ):
        train(changed(config, max_steps=9, checkpoint_interval=2))
    state = load_state(find_checkpoint(Path(config.out)))
    assert state["position"]["step"] == 4


@pytest.fixture
def no_update():
    with before_updates(lambda _: pytest.fail("a step was made")):
        yield


@pytest.mark.usefixtures("no_update")
def test_bad_data_is_caught_before_the_first_step(config, prepared, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(Error):
        train(changed(config, data=str(empty)))
    with pytest.raises(DataError, match="block_size"):
        train(changed(config, block_size=5000))
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared, damaged)
    tokens = bytearray((damaged / "train.bin").read_bytes())
    tokens[100:102] = b"\xff\xff"
    (damaged / "train.bin").write_bytes(bytes(tokens))
    assert command.main(settings_of(config, data=str(damaged))) == 1
    assert "outside the vocabulary" in capsys.readouterr().err


def test_foreign_tokenizer_is_refused(config, trained, tmp_path):
    other = write_text(tmp_path / "other.txt", seed=1)
    other.write_text(other.read_text().replace("storm", "STORM"))
    prepare_data([other], tmp_path / "other", tokenizer="char")
    start = changed(config, n_layer=None, n_head=None, n_embd=None, init_from=str(trained))
    with pytest.raises(DataError, match="another tokenizer"):
        train(changed(start, data=str(tmp_path / "other")))


def test_progress_bar_shows_on_a_terminal(config, monkeypatch, capsys):
    from gpt2fast._system import output
    from gpt2fast.training.logs import progress

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with output.shown():
        assert isinstance(progress.open_display(3, 0), progress._Bar)
        train(config)
    shown = capsys.readouterr().out
    assert "tok/s" in shown and "val" in shown


# -- two runs at once, lost readers, full disks ---------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(config):
    pytest.importorskip("fcntl")
    refused = []

    def second(step, loss):
        with pytest.raises(ConfigError, match="another process is training in .*--out"):
            train(config)
        refused.append(step)

    train(config, on_validation=second)
    assert refused == [0, 2, 3]
    assert not (Path(config.out) / ".lock").exists()


@pytest.mark.parametrize("redirection", ["| true", ">&-", "> /dev/full"])
def test_a_reader_that_goes_does_not_end_the_run(config, redirection):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    arguments = shlex.join(settings_of(config))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m gpt2fast.train {arguments} "
         + redirection],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (Path(config.out) / "model.safetensors").is_file()


def test_a_file_as_run_folder_is_refused(config, text, capsys):
    assert command.main(settings_of(config, out=str(text))) == 2
    message = capsys.readouterr().err
    assert message == f"error: out is {str(text)!r}, which is a file; name a folder with --out\n"


@pytest.mark.parametrize("full", ["folder", "weights", "state", "log"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(config, monkeypatch, capsys, full):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    def torn_archive(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    def unsaved(*args, **kwargs):
        raise WeightsError("the model cannot be saved to somewhere: [Errno 28] No space left")

    def fill(updates):
        if updates == 4:
            target, name, failure = {
                "folder": (Path, "mkdir", no_space),
                "weights": (GPT2, "save_pretrained", unsaved),
                "state": (torch, "save", torn_archive),
                "log": (RunLog, "write", no_space),
            }[full]
            monkeypatch.setattr(target, name, failure)

    with before_updates(fill):
        assert command.main(settings_of(config, max_steps=9, checkpoint_interval=2)) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    folder = Path(config.out) / "checkpoints"
    assert f"the last checkpoint stands: {folder / 'step-00000004'}" in message
    assert load_state(folder / "step-00000004")["position"]["step"] == 4
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_running_out_of_memory_says_what_to_lower(config, error):
    def fail(updates):
        raise error

    told = r"out of memory.*--batch-size \(now 4"
    with before_updates(fail), pytest.raises(TrainingError, match=told):
        train(config)


def test_commands_to_copy_are_quoted(config, tmp_path, capsys):
    out = tmp_path / "my run"
    from gpt2fast._system import output

    with output.shown():
        train(changed(config, out=str(out), max_steps=1))
    assert f"gpt2fast.generate --model '{out}'" in capsys.readouterr().out
