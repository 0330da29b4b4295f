"""Tuning: spaces that are checked, studies that are shared, continued and survive their trials."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt2fast.cli import train as train_command
from gpt2fast.cli import tune as command
from gpt2fast.errors import ConfigError
from gpt2fast.training import Interrupted, TrainConfig, TrainingError, TrainResult
from gpt2fast.tuning.space import parse_space, read_space, spaces
from small_runs import write_text
from time_limits import patience

BASE = TrainConfig(data="x.txt")
LR = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}}
TINY = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8"),
    *("--batch-size", "4", "--max-steps", "6", "--eval-interval", "2", "--warmup-steps", "2"),
    *("--device", "cpu", "--threads", "1"),
]


# -- spaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "a setting a line"),
        ({"lrr": [1.0]}, "'lrr' is no setting; did you mean lr?"),
        ({"out": ["a", "b"]}, "out cannot be tuned"),
        ({"data": ["a", "b"]}, "data cannot be tuned: all trials train on the same data"),
        ({"lr": 1e-3}, "give a range"),
        ({"lr": {"low": 1}}, "lr has no high"),
        ({"lr": {"low": 2, "high": 1}}, "low is 2, above high, 1"),
        ({"lr": {"low": 0, "high": 1, "log": True}}, "low is 0, but must be above 0"),
        ({"lr": {"low": 1, "high": 2, "log": "yes"}}, "log is 'yes'"),
        ({"lr": {"low": 1, "high": 2, "log": True, "step": 1}}, "log and step"),
        ({"lr": {"low": 1, "high": 2, "step": -1}}, "step is -1"),
        ({"lr": {"low": "small", "high": 2}}, "low is 'small', but must be a number"),
        ({"lr": {"low": 1, "high": 2, "lag": True}}, "'lag'; did you mean log?"),
        ({"lr": {"low": 1, "high": float("inf")}}, "high is inf"),
        ({"n_layer": {"low": 1.5, "high": 3}}, "low is 1.5, but must be a whole number"),
        ({"n_layer": {"type": "float", "low": 1, "high": 3}}, "must be int or categorical"),
        ({"optimizer": {"low": 1, "high": 3}}, "choices is None"),
        ({"optimizer": {"type": "int", "low": 1, "high": 3}}, "type is 'int'"),
        ({"optimizer": []}, "choices is []"),
        ({"optimizer": ["adamw", "adamw"]}, "twice"),
        ({"optimizer": {"choices": ["adamw"], "log": True}}, "choices and log"),
        ({"momentum": {"low": 0, "high": 0.9, "when": {"optimizer": "muon"}}}, "not in the space"),
        ({"lr": {"low": 1, "high": 2, "when": {"lr": 1}}}, "cannot depend on itself"),
        (
            {
                "momentum": {"low": 0, "high": 0.9, "when": {"optimizer": "muon"}},
                "optimizer": {"choices": ["muon"], "when": {"momentum": 0.5}},
            },
            "optimizer comes after it",
        ),
        (
            {
                "optimizer": ["adamw", "muon"],
                "momentum": {"low": 0, "high": 0.9, "when": {"optimizer": "sgd"}},
            },
            "'sgd', which optimizer never is",
        ),
        ({**LR, "dropout": {"low": 0, "high": 0.5, "when": {"lr": 1}}}, "any number of a range"),
    ],
)
def test_a_mistake_in_a_space_is_found_and_named(content, words):
    with pytest.raises(ConfigError) as error:
        parse_space(content)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"lr": {"low": -1, "high": 1}}, "lr: lr is -1.0, but must be above 0"),
        ({"optimizer": ["adamw", "sgd"]}, "optimizer is 'sgd', but must be one of"),
        ({"lr": ["fast"]}, "lr is 'fast', but must be a number"),
        ({"n_embd": [100, 384]}, "n_embd is 100, but must be a multiple of n_head (6)"),
        ({"dropout": {"low": 0, "high": 1}}, "dropout is 1.0"),
    ],
)
def test_a_value_that_no_run_can_have_is_found_before_the_first_trial(content, words):
    with pytest.raises(ConfigError) as error:
        parse_space(content).possible(BASE)
    assert words in str(error.value)


def test_values_that_only_fit_each_other_are_no_mistake():
    space = parse_space({"n_head": [4, 6], "n_embd": [100, 384]})
    assert space.possible(BASE)


def test_a_file_may_be_short(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("lr: {low: 1e-4, high: 1e-2, log: true}\nn_layer: {low: 2, high: 7, step: 2}\n")
    lr, n_layer = read_space(str(file)).parameters
    assert (lr.kind, lr.low, lr.high) == ("float", 1e-4, 1e-2)
    assert (n_layer.kind, n_layer.high) == ("int", 6)
    with pytest.raises(ConfigError, match="neither a file nor a shipped space"):
        read_space("nowhere")
    file.write_text("lr: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML: it is not valid YAML"):
        read_space(str(file))


def test_steps_end_below_the_end_of_the_range(optuna):
    space = parse_space(
        {
            "dropout": {"low": 0, "high": 0.35, "step": 0.1},
            "n_layer": {"low": 2, "high": 7, "step": 3},
        }
    )
    dropout, n_layer = space.parameters
    assert (dropout.high, n_layer.high) == (0.3, 5)
    chance = random.Random(0)
    assert {dropout.draw(chance) for _ in range(50)} == {0, 0.1, 0.2, 0.3}
    assert {n_layer.draw(chance) for _ in range(50)} == {2, 5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(space.suggest(optuna.create_study().ask())) == {"dropout", "n_layer"}


def test_a_condition_holds():
    space = parse_space(
        {
            "optimizer": ["adamw", "muon"],
            "momentum": {"low": 0.8, "high": 0.9, "when": {"optimizer": "muon"}},
            "schedule": {"choices": ["wsd", "cosine"], "when": {"optimizer": ["muon"]}},
            "decay_share": {"low": 0.1, "high": 0.3, "when": {"schedule": "wsd"}},
        }
    )
    chance = random.Random(0)
    seen = {tuple(space.draw(chance)) for _ in range(50)}
    assert seen == {
        ("optimizer",),
        ("optimizer", "momentum", "schedule"),
        ("optimizer", "momentum", "schedule", "decay_share"),
    }


@pytest.mark.parametrize("name", spaces())
def test_a_shipped_space_suits_the_recipes(name):
    base, _ = train_command.parse(["--config", "shakespeare_cpu"])
    assert read_space(name).possible(base)


# -- studies --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "story.txt")


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


@pytest.fixture
def arguments(optuna, text, tmp_path) -> list[str]:
    """Arguments of a study of the learning rate in tmp_path/study."""
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(LR))
    names = ["--space", str(space), "--data", str(text), "--out", str(tmp_path / "study")]
    return [*names, *TINY]


def of(arguments: list[str], **changes: Any) -> Any:
    return dataclasses.replace(command.settings_of(arguments), **changes)


class FakeTrain:
    """In place of training: a loss that grows with the distance of lr from 1e-2."""

    def __init__(self, failures: dict[int, Exception] | None = None) -> None:
        self.failures = failures or {}
        self.calls: list[TrainConfig] = []

    def __call__(self, config: TrainConfig, on_validation) -> TrainResult:
        self.calls.append(config)
        out = Path(config.out)
        (out / "checkpoints" / "best").mkdir(parents=True)
        (out / "model.safetensors").write_bytes(b"")
        (out / "log.csv").write_text("")
        if len(self.calls) - 1 in self.failures:
            raise self.failures[len(self.calls) - 1]
        assert config.max_steps is not None
        loss = 1 + abs(config.lr - 1e-2)
        for step in range(0, config.max_steps + 1, config.eval_interval):
            on_validation(step, loss + 1 / (1 + step))
        return TrainResult(out, config.max_steps, 1, loss, None, loss, config.max_steps)


def study_in(arguments: list[str], optuna):
    out = Path(arguments[arguments.index("--out") + 1])
    return optuna.load_study(study_name="study", storage=f"sqlite:///{out / 'study.db'}")


def test_a_study_ends_with_settings_that_train_takes_and_can_go_on(
    arguments, optuna, tmp_path, capsys
):
    out = tmp_path / "study"
    assert command.main([*arguments, "--trials", "6"]) == 0
    first = [trial.params for trial in study_in(arguments, optuna).trials]
    assert len(first) == 6
    printed = capsys.readouterr().out
    assert printed.count("\npreparing") + printed.startswith("preparing") == 1
    assert "the best so far" in printed and "no importances" in printed
    assert command.main([*arguments, "--trials", "8"]) == 0
    trials = study_in(arguments, optuna).trials
    assert [trial.params for trial in trials[:6]] == first and len(trials) == 8
    assert "preparing" not in capsys.readouterr().out

    best = study_in(arguments, optuna).best_trial
    config, _ = train_command.parse(
        ["--config", str(out / "best.yaml"), "--out", str(tmp_path / "again")]
    )
    assert config.lr == best.params["lr"] and config.out == str(tmp_path / "again")
    assert train_command.main(["--config", str(out / "best.yaml")]) == 0
    assert f"{best.value:.4f}" in capsys.readouterr().out, "the same loss as in the study"

    kept = [p.parent.name for p in sorted(out.glob("trials/*/model.safetensors"))]
    assert kept == [f"{best.number:04}"]
    assert len(list(out.glob("trials/*/log.csv"))) == 8
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == 9 and "data:image/png;base64," in page
    assert (out / "history.png").read_bytes().startswith(b"\x89PNG")
    assert command.main([*arguments, "--trials", "0"]) == 0, "a report alone"
    assert len(study_in(arguments, optuna).trials) == 8


@pytest.mark.slow
def test_a_study_repeats_itself(arguments, optuna, tmp_path):
    from gpt2fast.tuning.study import tune

    whole = tune(of(arguments, trials=13), FakeTrain())
    parts = of(arguments, out=tmp_path / "parts", trials=4)
    tune(parts, FakeTrain())
    pieced = tune(dataclasses.replace(parts, trials=13), FakeTrain())
    assert [t.params for t in whole.trials] == [t.params for t in pieced.trials]
    assert len({t.params["lr"] for t in whole.trials}) == 13
    assert whole.best_value < 1.005, "it comes near the lowest loss, at 1e-2"


def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(arguments, optuna):
    from gpt2fast.tuning.study import StudyError, tune

    failures = {
        1: TrainingError("at step 3 the loss is nan"),
        2: RuntimeError("a kernel broke"),
        4: MemoryError(),
    }
    fake = FakeTrain(failures)
    study = tune(of(arguments, trials=6, pruner="none"), fake)
    assert [t.state.name for t in study.trials] == [
        *("COMPLETE", "FAIL", "FAIL", "COMPLETE", "FAIL", "COMPLETE")
    ]
    assert [study.trials[i].user_attrs["error"] for i in failures] == [
        "at step 3 the loss is nan", "RuntimeError: a kernel broke", "MemoryError: MemoryError",
    ]  # fmt: skip
    log = Path(fake.calls[2].out) / "output.log"
    assert "Traceback" in log.read_text() and "a kernel broke" in log.read_text()
    always = FakeTrain({i: RuntimeError("no device") for i in range(99)})
    with pytest.raises(StudyError, match="10 trials in a row have failed.*no device"):
        tune(of(arguments, trials=40), always)


@pytest.mark.parametrize("pruner", ["hyperband", "median"])
def test_a_trial_that_is_behind_is_ended(arguments, optuna, pruner):
    from gpt2fast.tuning.study import tune

    settings = of(arguments, trials=12, sampler="random", pruner=pruner)
    base = dataclasses.replace(settings.base, max_steps=100, eval_interval=20)
    study = tune(dataclasses.replace(settings, base=base), FakeTrain())
    pruned = [t for t in study.trials if t.state.name == "PRUNED"]
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert pruned and complete
    assert all(0 < t.last_step < 100 for t in pruned)
    assert min(t.value for t in complete) == min(
        t.value for t in study.trials if t.value is not None
    )


def test_a_report_shows_what_matters(arguments, optuna, tmp_path):
    from gpt2fast.tuning.report import importances, write_report
    from gpt2fast.tuning.study import tune

    space = parse_space(
        {
            **LR,
            "dropout": {"low": 0.0, "high": 0.5},
            "optimizer": ["adamw", "muon"],
            "momentum": {"low": 0.8, "high": 0.9, "when": {"optimizer": "muon"}},
        }
    )
    base = of(arguments).base
    base = dataclasses.replace(base, eval_interval=base.max_steps)
    settings = of(arguments, trials=16, pruner="none", space=space, base=base)
    study = tune(settings, FakeTrain())
    found = importances(study)
    assert set(found) == {"lr", "dropout", "optimizer", "momentum"}
    assert max(found, key=found.__getitem__) == "lr"
    names = [path.name for path in write_report(study, space, settings.out)]
    assert names == ["report.html", "history.png", "importances.png"]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_what_was_lost_with_its_worker_is_made_again(arguments, optuna, monkeypatch):
    from gpt2fast.tuning.database import sign
    from gpt2fast.tuning.study import tune

    settings = of(arguments, trials=3)
    study = tune(of(arguments, trials=1), FakeTrain())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lost = study.ask()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: gone.pid)
        sign(lost)
    value = lost.suggest_float("lr", 1e-3, 1e-1, log=True)
    alive = study.ask()
    sign(alive)
    fake = FakeTrain()
    trials = tune(settings, fake).trials
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "RUNNING", "COMPLETE"]
    assert trials[3].user_attrs["repeats"] == 1
    assert fake.calls[0].lr == value and len(fake.calls) == 1


def test_ctrl_c_ends_a_study_that_can_go_on(arguments, optuna):
    from gpt2fast.tuning.study import Stopped, tune

    for stop in (Interrupted(signal.SIGTERM, "stopped at step 3"), KeyboardInterrupt()):
        before = len(tune(of(arguments, trials=0), FakeTrain()).trials)
        with pytest.raises(Stopped, match="same command") as stopped:
            tune(of(arguments, trials=9), FakeTrain({1: stop}))
        assert stopped.value.signum in (signal.SIGTERM, signal.SIGINT)
        assert len(study_in(arguments, optuna).trials) == before + 3 - bool(before)
    study = tune(of(arguments, trials=4), FakeTrain())
    states = [t.state.name for t in study.trials]
    assert states.count("FAIL") == 2 and states.count("RUNNING") == 0
    again = [t for t in study.trials if "repeats" in t.user_attrs]
    assert len(again) == 2
    for trial in again:
        assert trial.params == study.trials[trial.user_attrs["repeats"]].params


def test_another_study_is_refused(arguments, optuna, tmp_path, text, capsys):
    from gpt2fast.tuning.study import tune

    tune(of(arguments, trials=1), FakeTrain())
    assert command.main([*arguments, "--batch-size", "8"]) == 2
    error = capsys.readouterr().err
    assert "another config: batch_size was 4 and is 8 now" in error and "another --out" in error
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"lr": {"low": 1e-4, "high": 1e-1, "log": True}}))
    assert command.main([*arguments, "--space", str(other)]) == 2
    assert "another space: lr was" in capsys.readouterr().err
    longer = write_text(tmp_path / "longer.txt", documents=9)
    shared = ["--storage", f"sqlite:///{tmp_path / 'study' / 'study.db'}"]
    elsewhere = [*arguments, *shared, "--out", str(tmp_path / "elsewhere")]
    assert command.main([*elsewhere, "--data", str(longer)]) == 2
    assert "another data: train_tokens was" in capsys.readouterr().err
    (tmp_path / "study" / "study.db").unlink()
    assert command.main(arguments) == 2
    assert "is of another study" in capsys.readouterr().err


def test_a_study_keeps_to_the_text_that_it_prepared(arguments, tmp_path, capsys):
    text, other = (write_text(tmp_path / f"{seed}.txt", seed=seed) for seed in (1, 2))
    assert command.main([*arguments, "--data", str(text), "--trials", "1"]) == 0
    for data in (str(other), "nowhere.txt"):
        assert command.main([*arguments, "--data", data, "--trials", "2"]) == 2
        assert f"another source: data was {str(text)!r}" in capsys.readouterr().err


def test_a_study_whose_trials_all_failed_is_a_failure(arguments, optuna, capsys):
    settings, study = command.settings_of(arguments), optuna.create_study()
    states = optuna.trial.TrialState
    assert command._code(study, settings) == 0
    study.add_trial(optuna.trial.create_trial(state=states.FAIL))
    assert command._code(study, settings) == 1
    assert "every trial failed" in capsys.readouterr().err
    study.add_trial(optuna.trial.create_trial(state=states.COMPLETE, value=1.0))
    assert command._code(study, settings) == 0


def test_a_refused_study_leaves_no_database(arguments, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    out = tmp_path / "fresh"
    asked = [*arguments, "--data", str(tmp_path / "empty.txt"), "--out", str(out)]
    assert command.main(asked) == 1
    assert not (out / "study.db").exists()
    (out / "log.csv").write_text("step\n")
    assert command.main(asked) == 2
    assert "folder of a training run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--storage", "study.db"], 2, "is no database URL"),
        (["--storage", "nosuch://a/b"], 2, "--storage"),
        (["--storage", "mysql://me:secret@host/db"], 2, "driver that is not installed"),
        (["--storage", "sqlite:////nowhere/at/all.db"], 2, "cannot be opened"),
        (["--trials", "-1"], 2, "--trials is -1"),
        (["--timeout-hours", "0"], 2, "--timeout-hours is 0"),
        (["--resume"], 2, "same command"),
        (["--sampler", "grid"], 2, "--sampler"),
        (["--data", "nowhere.txt"], 1, "'nowhere.txt' was not found"),
        (["--max-stepps", "3"], 2, "did you mean --max-steps?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, capsys, change, code, words):
    try:
        found = command.main([*arguments, *change])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert (found, error.count("\n")) == (code, 1) and words in error and "secret" not in error


def test_without_optuna_it_says_what_to_install(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert command.main(arguments) == 2
    assert 'pip install "gpt2fast[tune]"' in capsys.readouterr().err


def start(arguments: list[str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2fast.tune", *arguments, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.slow
def test_two_workers_share_a_study(arguments, optuna):
    workers = [start(arguments, "--trials", "9") for _ in range(2)]
    printed = [worker.communicate(timeout=patience())[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    trials = study_in(arguments, optuna).trials
    assert len(trials) == 9 and all(t.state.is_finished() for t in trials)
    assert {t.state.name for t in trials} <= {"COMPLETE", "PRUNED"}
    assert len({t.user_attrs["process"] for t in trials}) == 2
    assert len({t.params["lr"] for t in trials}) == 9


@pytest.mark.slow
def test_a_killed_worker_costs_no_trial(arguments, optuna):
    worker = start(arguments, "--trials", "3", "--max-steps", "100000")
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("trial 0"):
            break
    time.sleep(1)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    study = study_in(arguments, optuna)
    assert [t.state.name for t in study.trials] == ["RUNNING"]
    worker = start(arguments, "--trials", "3", "--max-steps", "100000")
    for line in worker.stdout or []:
        if line.startswith("trial 1"):
            break
    worker.send_signal(signal.SIGINT)
    printed = worker.communicate(timeout=patience())[0]
    assert worker.returncode == 130 and "same command" in printed
    trials = study.trials
    assert [t.state.name for t in trials] == ["FAIL", "FAIL", "WAITING"]
    assert trials[1].params == trials[0].params and trials[1].user_attrs["repeats"] == 0
