"""Several processes train as one does: the same losses, weights, checkpoints; and fail together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast.model import GPT2
from gpt2fast.training import TrainConfig, train
from gpt2fast.training.logs.log import read_rows
from small_runs import flags, write_text
from time_limits import patience, wait_until

SETTINGS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 8,
    "batch_size": 4,
    "grad_accumulation": 2,
    "max_steps": 6,
    "warmup_steps": 2,
    "lr": 1e-2,
    "eval_interval": 3,
    "log_interval": 1,
    "checkpoint_interval": 3,
    "device": "cpu",
    "threads": 1,
}


def torchrun(processes: int, arguments: list[str], *options: str, **environment: str):
    """`torchrun -m gpt2fast.train`, as a user starts it."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", *options, "-m", "gpt2fast.train", *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def run(processes: int, settings: dict[str, object], *more: str) -> str:
    process = torchrun(processes, [*flags(settings), *more])
    out, err = process.communicate(timeout=patience())
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "story.txt")


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(TrainConfig(data=str(text), out=str(out), **SETTINGS))
    return out


def assert_same(out: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Equal losses at every step and equal weights, up to the order of sums."""
    for ours, theirs in zip(
        read_rows(out / "log.csv"), read_rows(reference / "log.csv"), strict=True
    ):
        for name in ("step", "tokens", "train_loss", "val_loss", "grad_norm"):
            if theirs[name] is not None:
                assert ours[name] == pytest.approx(theirs[name], abs=tolerance), name
    weights = GPT2.from_pretrained(reference).state_dict()
    for name, weight in GPT2.from_pretrained(out).state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("parallel", ["ddp", "zero", "fsdp"])
def test_two_processes_train_as_one(parallel, text, alone, tmp_path):
    settings = {**SETTINGS, "data": text, "out": tmp_path / "run", "parallel": parallel}
    said = run(2, settings)
    assert f"2 processes, {parallel}" in said
    assert_same(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("first", "then"),
    [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "zero")), ((2, "zero"), (2, "fsdp"))],
)
def test_a_run_goes_on_with_another_number_of_processes(first, then, text, alone, tmp_path):
    out = tmp_path / "run"
    # The schedule must be the long run's: stop by the clock, not by max_steps.
    settings = {**SETTINGS, "data": text, "out": out}
    run(first[0], {**settings, "parallel": first[1], "max_hours": 1e-9, "eval_interval": 3})
    assert read_rows(out / "log.csv")[-1]["step"] < 6
    run(
        then[0],
        {"parallel": then[1], "max_hours": None},
        f"--resume={out}",
    )
    assert_rows_by_step(out, alone)


def assert_rows_by_step(out: Path, reference: Path) -> None:
    theirs = {row["step"]: row for row in read_rows(reference / "log.csv")}
    for row in read_rows(out / "log.csv"):
        loss = theirs[row["step"]]["train_loss"]
        assert row["train_loss"] == pytest.approx(loss, abs=1e-5)
    weights = GPT2.from_pretrained(reference).state_dict()
    for name, weight in GPT2.from_pretrained(out).state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0)


def test_resumed_on_as_many_processes_bit_for_bit(text, tmp_path):
    settings = {**SETTINGS, "data": text, "dropout": 0.1}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(2, {**settings, "out": straight})
    run(2, {**settings, "out": stopped, "max_hours": 1e-9})
    run(2, {"max_hours": None}, f"--resume={stopped}")
    weights = GPT2.from_pretrained(straight).state_dict()
    for name, weight in GPT2.from_pretrained(stopped).state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_what_cannot_be_shared_evenly_is_refused(text, tmp_path):
    settings = {**SETTINGS, "data": text, "out": tmp_path / "run", "batch_size": 3}
    process = torchrun(2, flags({**settings, "grad_accumulation": 1}))
    _, err = process.communicate(timeout=patience())
    assert process.returncode == 1
    assert "make one of them a multiple of 2" in err
    assert "gpt2fast/cli/train.py" not in err  # no traceback of ours
    assert not (tmp_path / "run").exists()


def trainers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


LONG = {**SETTINGS, "max_steps": 100_000, "checkpoint_interval": 5, "eval_batches": 1}
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")


@needs_proc
def test_a_process_that_dies_ends_the_job_and_the_checkpoint_stands(text, tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, flags({**LONG, "data": text, "out": out}))
    wait_until((out / "checkpoints" / "step-00000005").exists, process)
    os.kill(trainers(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=patience())
    assert process.returncode != 0
    assert "SIGKILL" in err or "Signal 9" in err
    from gpt2fast.training.checkpoints.folder import find_checkpoint

    at = int(find_checkpoint(out).name.removeprefix("step-"))
    said = run(2, {"max_steps": at + 1}, f"--resume={out}")
    assert f"done: {at + 1} steps" in said


@needs_proc
def test_restarted_processes_go_on_from_the_last_checkpoint(text, tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, flags({**LONG, "data": text, "out": out}), "--max-restarts=1")
    wait_until((out / "checkpoints" / "step-00000005").exists, process)
    os.kill(trainers(process)[0], signal.SIGKILL)
    for line in process.stdout:
        if "resumed from" in line:
            break
    else:
        pytest.fail(process.communicate()[1])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=patience())


@needs_proc
def test_sigterm_saves_a_checkpoint_in_every_process(text, tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, flags({**LONG, "data": text, "out": out}))
    wait_until((out / "checkpoints" / "step-00000005").exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=patience())
    assert "stopped at step" in err and err.count("stopped at step") == 1
    saved = sorted((out / "checkpoints").glob("step-*"))
    assert (saved[-1] / "training_state.safetensors").is_file()
