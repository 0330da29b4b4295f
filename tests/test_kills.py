"""A run that is stopped, whenever and however, and resumed ends as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("needs fork and /proc", allow_module_level=True)

import kills
from gpt2fast._system.files import remove_unfinished
from gpt2fast.checkpoints.run_folder import STATE
from gpt2fast.cli import train as command
from gpt2fast.training import Interrupted, loop, stopping, train
from kills import RECIPES, Stop, Trial
from run_hooks import before_updates
from run_outcomes import differences, outcome
from small_runs import TINY, changed, config, prepared, rows, text  # noqa: F401


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    return Trial(tmp_path_factory.mktemp("kills"))


# The moments at which earlier versions went wrong, and those that look dangerous.
MOMENTS = {
    "data have just been published": ("os.rename", "data/.meta.json.*", 2),
    "the best is put in place": ("os.rename", "checkpoints/.best.new", 0),
    "the best has been put in place": ("os.rename", "checkpoints/.best.new", 1),
    "the best is moved aside": ("os.rename", "checkpoints/best", 1),
    "an old one is dropped": ("os.rename", "checkpoints/step-*", 2),
    "the last one is there": ("os.rename", "checkpoints/.step-*.new", 1),
    "a log is rewritten": ("os.rename", ".log.csv.*", 0),
    "the model is delivered": ("os.rename", ".model.safetensors.*", 0),
}


@pytest.fixture(scope="module")
def made(trial) -> list[tuple[str, str]]:
    """The changes of a run that ends by its loss."""
    out = trial.folder / "counted"
    return kills.changes(trial.forks, trial.settings("target", out))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_when(moment, trial, made):
    event, pattern, later = MOMENTS[moment]
    found = [
        number
        for number, (kind, name) in enumerate(made)
        if kind == event and Path(name).match(pattern)
    ]
    trial.against("target", iter([Stop("KILL", change=found[-1] + later)]))


@pytest.mark.parametrize("kind", ["KILL", "TERM", "INT", "refused", "small"])
def test_stopped_at_random(kind, trial, made):
    draw = random.Random(kind)
    stops = [Stop(kind, change=draw.randrange(60, len(made) - 20), size=500) for _ in range(2)]
    trial.against("target", iter(stops))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_hundred_random_stops(recipe, trial, monkeypatch, tmp_path):
    monkeypatch.setattr(kills, "RECIPES", {recipe: RECIPES[recipe]})
    happened, _ = kills.by_chance(trial, 10, seed=1)
    assert happened.total() >= 10


@pytest.mark.slow
def test_a_disk_that_is_full(trial, tmp_path):
    try:
        with kills.small_disk(tmp_path / "disk") as disk:
            draw = random.Random(0)
            for _ in range(10):
                stop = Stop("full", change=draw.randrange(60, 500), size=draw.randrange(40_000))
                trial.against("plain", iter([stop]), folder=disk)
    except OSError as error:
        pytest.skip(f"no disk of its own: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_one_of_two_processes(seed, trial):
    happened, _ = kills.by_chance(trial, 5, seed, processes=2)
    assert happened.total() >= 5


def test_the_comparison_sees_a_difference(trial, tmp_path):
    expected, _ = trial.straight("target")
    out = tmp_path / "run"
    trial._finish({**trial.settings("target", out), "seed": 1})
    found = differences(outcome(out), expected)
    assert any(line.startswith("weights") for line in found)
    assert any(line.startswith("log.csv") for line in found)


# -- what else can be in the way ------------------------------------------------------------------


def test_resuming_before_the_first_checkpoint_says_to_start_again(config, capsys):  # noqa: F811
    Path(config.out).mkdir()
    assert command.main(["--resume", config.out]) == 2
    told = capsys.readouterr().err
    assert told == (
        f"error: cannot resume from {config.out}: no checkpoint in it; start without --resume\n"
    )


def test_a_best_one_that_was_displaced_is_found(config):  # noqa: F811
    """Killed between the two renames, before there was any other checkpoint."""
    config = changed(config, max_steps=6, checkpoint_interval=6)
    train(config)
    straight = outcome(Path(config.out))
    folder = Path(config.out) / "checkpoints"
    shutil.rmtree(folder / "step-00000006")
    (Path(config.out) / "model.safetensors").unlink()
    (folder / "best").rename(folder / ".best.old")
    (folder / ".best.new").mkdir()
    assert command.main(["--resume", config.out]) == 0
    assert outcome(Path(config.out)) == straight


def test_half_a_deletion_is_finished(config):  # noqa: F811
    config = changed(config, max_steps=6, checkpoint_interval=2)
    train(config)
    folder = Path(config.out) / "checkpoints"
    shutil.copytree(folder / "step-00000004", folder / ".step-00000002.gone")
    (folder / ".step-00000002.gone" / STATE).unlink()
    train(config, resume=config.out)
    assert not list(folder.glob(".*"))


def test_only_remains_of_the_named_files_are_removed(tmp_path):
    for name in (".log.csv.abcd_123", ".log.csv.abc", ".other.csv.abcd1234", "log.csv"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, ["log.csv"])
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".log.csv.abc", ".other.csv.abcd1234", "log.csv"]


def test_torn_lines_are_left_out(config):  # noqa: F811
    config = changed(config, max_steps=4, checkpoint_interval=2, sample_interval=2, sample_tokens=2)
    train(config)
    straight = outcome(Path(config.out))
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000004")
    for name in ("log.csv", "log.jsonl", "samples.jsonl"):
        with (Path(config.out) / name).open("ab") as file:
            file.write(b'\0\0\0\n\xff\xfe\n3,9\n{"step": 1}, {\n{"step": 3, "tok')
    train(config, resume=config.out)
    assert outcome(Path(config.out)) == straight


def test_a_signal_in_the_middle_of_a_validation(config, monkeypatch, tmp_path):  # noqa: F811
    straight = changed(config, out=str(tmp_path / "straight"), max_steps=6)
    train(straight)
    real, count = loop.mean_loss, itertools.count()

    def interrupted(*args):
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    config = changed(config, max_steps=6)
    # Not by a hook, beside which the modules compute with other kernels, and other last bits.
    monkeypatch.setattr(loop, "mean_loss", interrupted)
    with pytest.raises(Interrupted, match="stopped at step"):
        train(config)
    train(config, resume=config.out)
    ours, theirs = outcome(Path(config.out)), outcome(Path(straight.out))
    del ours["number of checkpoints"], theirs["number of checkpoints"]
    assert ours == theirs


def test_a_second_interruption_acts_at_once(config, monkeypatch):  # noqa: F811
    """Ctrl-C while the first one's checkpoint is written: nothing half is left."""
    # Here the second one does not take its second to come.
    monkeypatch.setattr(stopping, "_SAME_SIGNAL", 0.0)
    real = Path.rename

    def again(self, target):
        if self.parent.name == "checkpoints":  # all in it is written
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, target)

    def interrupt(updates):
        if updates == 1:
            monkeypatch.setattr(Path, "rename", again)
            os.kill(os.getpid(), signal.SIGINT)

    with before_updates(interrupt), pytest.raises(KeyboardInterrupt):
        train(changed(config, eval_interval=100))
    assert not list((Path(config.out) / "checkpoints").iterdir())


def test_two_resumptions_at_once_leave_one(config):  # noqa: F811
    config = changed(config, max_steps=60, eval_interval=30, log_interval=30)
    train(changed(config, max_steps=2))
    refused = []

    def second() -> None:
        try:
            train(config, resume=config.out)
        except Exception as error:
            refused.append(str(error))

    threads = [threading.Thread(target=second) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1 and "another process is training in" in refused[0]
    assert rows(config.out)[-1]["step"] == "60"
