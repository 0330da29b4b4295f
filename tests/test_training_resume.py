"""Runs repeat, and a run that was stopped goes on bit for bit."""
# ruff: noqa: F811

from __future__ import annotations

import logging
import os
import pty
import random
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from gpt2fast.checkpoints.run_folder import OLD_STATE, OPTIMIZER, STATE
from gpt2fast.cli import train as command
from gpt2fast.data import prepare_data
from gpt2fast.errors import ConfigError, Error, WeightsError
from gpt2fast.model import GPT2
from gpt2fast.tokenizer import Tokenizer
from gpt2fast.training import Interrupted, TrainConfig, train
from gpt2fast.training.checkpoints.folder import clean_up, find_checkpoint, step_checkpoints
from gpt2fast.training.checkpoints.shards import load_tensors, save_tensors
from gpt2fast.training.checkpoints.state import load_state, read_state, write_state
from gpt2fast.training.distributed import Group
from gpt2fast.training.logs.columns import COLUMNS
from gpt2fast.training.optimizers import ModelOptimizer
from gpt2fast.training.stopping import SignalWatch
from run_hooks import before_updates
from small_runs import (  # noqa: F401
    changed,
    config,
    digest,
    outcome,
    prepared,
    rows,
    settings_of,
    start,
    text,
    trained,
    write_text,
)
from time_limits import deadline, patience, wait_until

RESUMABLE = {"max_steps": 20, "dropout": 0.2, "grad_accumulation": 2, "log_interval": 4}


def test_same_seed_gives_the_same_run(config, trained):
    train(config)
    assert outcome(Path(config.out)) == outcome(trained)


def read_moments(directory: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state of a checkpoint, in tensors of its own."""
    model = GPT2.from_pretrained(directory)
    optimizers = ModelOptimizer(model.named_parameters(), TrainConfig())
    tensors = optimizers.tensors()
    load_tensors(tensors, directory / OPTIMIZER, Group("cpu"))
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_killed_and_resumed_run_equals_the_straight_one_bit_for_bit(config, tmp_path, dtype):
    config = changed(config, **RESUMABLE, dtype=dtype)
    straight = tmp_path / "straight"
    train(changed(config, out=str(straight), checkpoint_interval=10))

    out = tmp_path / "killed"
    # Saving at step 10 alone, then many more steps: the kill falls between two checkpoints.
    process = start(settings_of(config, out=str(out), checkpoint_interval=10, keep_checkpoints=9))
    wait_until((out / "checkpoints" / "step-00000010").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for later in step_checkpoints(out / "checkpoints"):
        if later.name != "step-00000010":
            shutil.rmtree(later)
    (out / "model.safetensors").unlink(missing_ok=True)

    resumed = start(["--resume", str(out)])
    printed, errors = resumed.communicate(timeout=patience())
    assert resumed.returncode == 0, errors
    assert "resumed from" in printed and "at step 10" in printed
    assert digest(out / "model.safetensors") == digest(straight / "model.safetensors")
    ours, theirs = outcome(out), outcome(straight)
    assert ours["log"] == theirs["log"]
    for name in ("step-00000020",):
        moments = [read_moments(x / "checkpoints" / name) for x in (out, straight)]
        for key, mine in moments[0].items():
            assert mine.any() and torch.equal(mine, moments[1][key]), key


@pytest.mark.parametrize("at", [1, 7, 13])
def test_resuming_at_any_step_equals_the_straight_run(config, tmp_path, at):
    config = changed(config, **RESUMABLE, checkpoint_interval=at)
    straight = changed(config, out=str(tmp_path / "straight"))
    train(straight)

    def stop_after(updates):
        if updates == at:
            raise KeyboardInterrupt

    with before_updates(stop_after), pytest.raises(KeyboardInterrupt):
        train(config)
    train(config, resume=config.out)
    assert outcome(Path(config.out)) == outcome(Path(straight.out))


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_signal_saves_a_checkpoint_and_says_how_to_go_on(config, signum, code):
    out = Path(config.out)
    process = start(settings_of(config, max_steps=100_000, checkpoint_interval=5, log_interval=500))
    wait_until((out / "checkpoints" / "step-00000005").exists, process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=patience())
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert f"--resume {out}" in errors
    stopped = find_checkpoint(out)
    step = load_state(stopped)["position"]["step"]
    assert stopped.name == f"step-{step:08d}" and f"stopped at step {step}" in errors
    config, resume = command.parse(["--resume", str(out), "--max-steps", str(step + 2)])
    assert resume == stopped
    assert train(config, resume).steps == step + 2


def test_a_closed_terminal_saves_a_checkpoint(config):
    """The terminal takes no more lines by then, and nobody is left to read an error."""
    out = Path(config.out)
    arguments = settings_of(config, max_steps=100_000, checkpoint_interval=5, log_interval=500)
    root = str(Path(__file__).parent.parent)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = root
        os.execv(sys.executable, [sys.executable, "-m", "gpt2fast.train", *arguments])
    end = deadline()
    while not (out / "checkpoints" / "step-00000005").exists():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
        assert time.monotonic() < end
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 128 + signal.SIGHUP
    stopped = find_checkpoint(out)
    step = load_state(stopped)["position"]["step"]
    config, resume = command.parse(["--resume", str(out), "--max-steps", str(step + 1)])
    assert train(config, resume).steps == step + 1


def test_a_run_under_nohup_goes_on_when_the_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalWatch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.received is None
            os.kill(os.getpid(), signal.SIGUSR2)
            assert watch.received == signal.SIGUSR2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupted_evaluation_is_made_up_for_on_resuming(config):
    """A run stopped between a step and its validation validates first when it goes on."""

    def interrupt(updates):
        if updates == 1:
            signal.raise_signal(signal.SIGINT)

    with before_updates(interrupt), pytest.raises(Interrupted, match="stopped at step 2"):
        train(config)
    assert [row["step"] for row in rows(config.out) if row["val_loss"]] == ["0"]
    train(config, resume=config.out)
    assert [row["step"] for row in rows(config.out) if row["val_loss"]] == ["0", "2", "3"]


def test_log_continues_without_the_rows_that_are_made_again(config):
    config = changed(config, max_steps=6, checkpoint_interval=4)
    train(config)
    once = rows(config.out)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000006")
    with (Path(config.out) / "log.csv").open("a") as file:
        file.write("7,99")  # a row that a crash cut short
    train(config, resume=config.out)
    again = rows(config.out)
    assert list(again[0]) == list(COLUMNS)
    assert [row["step"] for row in again] == [row["step"] for row in once]
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in once]


def test_last_checkpoints_and_the_best_are_kept(config):
    train(changed(config, max_steps=7, checkpoint_interval=2, keep_checkpoints=2))
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["best", "step-00000006", "step-00000007"]


def test_best_checkpoint_has_the_lowest_validation_loss(config):
    result = train(changed(config, max_steps=12, lr=0.3, warmup_steps=0, min_lr=0.3))
    losses = {int(r["step"]): float(r["val_loss"]) for r in rows(config.out) if r["val_loss"]}
    del losses[0]
    best = min(losses, key=lambda step: losses[step])
    assert result.best_step == best
    state = load_state(Path(config.out) / "checkpoints" / "best")
    assert state["position"]["step"] == best


def test_killed_while_saving_leaves_whole_checkpoints(config, trained):
    folder = trained / "checkpoints"
    (folder / ".step-00000009.new").mkdir()
    (folder / "best").rename(folder / ".best.old")
    clean_up(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-00000003"]


def test_finished_run_loads_as_a_model_with_its_tokenizer(trained, text):
    model = GPT2.from_pretrained(trained)
    tokenizer = Tokenizer.from_pretrained(trained)
    ids = torch.tensor([tokenizer.encode("a storm")])
    assert model(ids).logits.shape == (1, 7, tokenizer.vocab_size)
    for name in ("config.yaml", "log.csv", "checkpoints/best/config.json"):
        assert (trained / name).is_file()
    final = GPT2.from_pretrained(trained / "checkpoints" / "step-00000003")
    assert torch.equal(final.wte.weight, model.wte.weight)


def test_a_run_is_not_resumed_on_another_text(config, tmp_path, capsys):
    text, other = (write_text(tmp_path / f"{seed}.txt", seed=seed) for seed in (1, 2))
    config = changed(config, data=str(text))
    train(config)
    for flag in (f"--data={other}", "--data=nowhere.txt", "--val-fraction=0.3"):
        assert command.main(["--resume", config.out, "--max-steps=99", flag]) == 2
        name, _, value = flag[2:].partition("=")
        message = capsys.readouterr().err
        assert f"{name.replace('-', '_')} was" in message and value in message
    assert str(other) not in (Path(config.out) / "config.yaml").read_text()
    text.unlink()  # what was prepared of it is enough
    steps = str(config.max_steps + 1)
    assert command.main(["--resume", config.out, "--max-steps", steps]) == 0


def test_a_run_without_its_settings_says_what_to_name(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "copy"))
    (run / "config.yaml").unlink()
    assert command.main(["--resume", str(run), "--max-steps", "9"]) == 2
    assert "config.yaml" in (message := capsys.readouterr().err) and "--config" in message
    _, resume = command.parse(["--resume", str(run), "--config", str(trained / "config.yaml")])
    assert resume == run / "checkpoints" / "step-00000003"


def test_run_is_not_overwritten(trained):
    config, _ = command.parse(["--config", str(trained / "config.yaml")])
    with pytest.raises(ConfigError, match="already holds a run.*--resume.*--out"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_layer": 2}, "n_layer was 1 there and is 2 now"),
        ({"block_size": 6}, "block_size was 8 there and is 6 now"),
        ({"max_steps": 1}, "past the end of this run"),
        ({"data": "OTHER"}, "the data's"),
    ],
)
def test_resuming_with_other_settings_is_refused(config, trained, tmp_path, changes, told):
    if changes.get("data") == "OTHER":
        other = write_text(tmp_path / "other.txt", seed=1)
        prepare_data([other], tmp_path / "other", tokenizer="char")
        changes = {"data": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=told):
        train(changed(config, **changes), resume=trained)


@pytest.mark.parametrize("damage", ["gone", "cut", "pickle", "other"])
def test_damaged_optimizer_state_is_refused(config, trained, tmp_path, damage):
    copy = tmp_path / "step-00000003"
    shutil.copytree(trained / "checkpoints" / "step-00000003", copy)
    folder = copy / OPTIMIZER
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "cut":
        (shard,) = folder.glob("*.distcp")
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "pickle":  # an index that would run a command
        (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran")
                                           + b"'\ntR.")  # fmt: skip
    else:
        shutil.rmtree(folder)
        save_tensors({"exp_avg.wte.weight": torch.zeros(3, 3)}, folder, Group("cpu"))
    with pytest.raises((ConfigError, WeightsError), match="optimizer") as caught:
        train(config, resume=copy)
    assert isinstance(caught.value, ConfigError) is (damage == "other")
    assert str(copy) in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle"])
def test_damaged_training_state_is_refused(config, trained, tmp_path, damage):
    copy = tmp_path / "step-00000003"
    shutil.copytree(trained / "checkpoints" / "step-00000003", copy)
    state = copy / STATE
    if damage == "missing":
        state.unlink()
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:200])
    else:
        state.unlink()
        torch.save({"format": 2, "config": Path("x")}, copy / OLD_STATE)
    with pytest.raises((ConfigError, WeightsError)) as caught:
        train(config, resume=copy)
    assert isinstance(caught.value, ConfigError) is (damage == "missing")
    assert str(copy) in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("entry", ["position", "random", "scale", "config", "updates", "data"])
@pytest.mark.parametrize("damage", ["gone", "another type"])
def test_a_training_state_without_an_entry_is_a_damaged_one(
    config, trained, tmp_path, entry, damage
):
    copy = tmp_path / "step-00000003"
    shutil.copytree(trained / "checkpoints" / "step-00000003", copy)
    state = load_state(copy)
    if damage == "gone":
        del state[entry]
    else:
        state[entry] = "nonsense"
    write_state(copy / STATE, state)
    with pytest.raises(Error) as caught:
        train(changed(config, max_steps=5), resume=copy)
    assert str(copy) in str(caught.value) or entry == "config"


def test_a_run_that_an_older_version_began_goes_on_bit_for_bit(config, trained, tmp_path):
    runs = []
    for name in ("new", "old"):
        run = tmp_path / name
        shutil.copytree(trained, run)
        copy = run / "checkpoints" / "step-00000003"
        if name == "old":  # which kept a pickle
            state = load_state(copy)
            (copy / STATE).unlink()
            torch.save(state, copy / OLD_STATE)
        train(changed(config, out=str(run), max_steps=5), resume=copy)
        runs.append((run / "checkpoints" / "step-00000005" / "model.safetensors").read_bytes())
    assert runs[0] == runs[1]


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = {
        "python": random.Random(1).getstate(),
        "torch": [torch.get_rng_state(), torch.randn(2, 3, dtype=torch.float64)],
        "numbers": [0.1, 1e-300, float("inf"), -0.0, 2**63, True, None, "é\n", []],
        "within": {"a.b": {"c": (1, (2.5, None))}, "": {}},
    }
    write_state(tmp_path / STATE, state)
    read = read_state(tmp_path / STATE)
    for ours, theirs in zip(read.pop("torch"), state.pop("torch"), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert repr(read) == repr(state)


def test_an_empty_newest_checkpoint_does_not_hide_the_older_ones(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "checkpoints" / "step-00000009").mkdir()
    assert find_checkpoint(copy).name == "step-00000003"


def test_an_index_that_leads_out_of_its_folder_is_refused(config, trained, tmp_path):
    copy = tmp_path / "step-00000003"
    shutil.copytree(trained / "checkpoints" / "step-00000003", copy)
    index = copy / OPTIMIZER / ".metadata"
    content = index.read_bytes()
    assert b"__0_0.distcp" in content
    index.write_bytes(content.replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(WeightsError, match="secret"):
        train(changed(config, max_steps=5), resume=copy)


# -- resuming from an older checkpoint, or from the best one --------------------------------------


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(config, caplog, capsys):
    config = changed(config, max_steps=8, checkpoint_interval=2, keep_checkpoints=4)
    train(config)
    folder = Path(config.out) / "checkpoints"
    shorter = changed(config, max_steps=5, keep_checkpoints=1, lr=1e-3)
    with caplog.at_level(logging.INFO, "gpt2fast"):
        train(shorter, resume=folder / "step-00000004")
    assert "set aside the checkpoints of later steps" in caplog.text
    assert capsys.readouterr() == ("", ""), "a program that trains says itself what it prints"
    assert find_checkpoint(Path(config.out)).name == "step-00000005"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best", "replaced-step-00000006", "replaced-step-00000008", "step-00000005"
    ]  # fmt: skip
    state = load_state(folder / "best")
    assert state["position"]["step"] == 5  # not the one of the branch that was left


@pytest.fixture
def only_best(config) -> TrainConfig:
    """A run that was killed before its first step checkpoint."""
    config = changed(config, max_steps=6)
    train(config)
    out = Path(config.out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    return config


def test_a_run_with_only_its_best_checkpoint_is_found(only_best):
    best = Path(only_best.out) / "checkpoints" / "best"
    with pytest.raises(ConfigError, match="already holds a run.*best"):
        train(only_best)
    saved = GPT2.from_pretrained(best)
    assert torch.equal(GPT2.from_pretrained(only_best.out).wte.weight, saved.wte.weight)
    config, resume = command.parse(["--resume", only_best.out])
    assert resume == best
    assert train(config, resume).steps == 6
