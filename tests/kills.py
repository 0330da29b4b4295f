"""Training runs that are stopped at random moments and resumed, against one that nothing disturbed.

    python tests/kills.py --stops 100             # signals, full disks, lost processes, by chance
    python tests/kills.py --every plain           # SIGKILL before each change that a run makes

A run is a fork of this process, which has imported everything: it takes a fraction of a second.
It is started by the command line's `main` and resumed as a user does, with --resume.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no threads but the one that forks

# Imported here so that no fork has to.
import jsonargparse  # noqa: F401
import torch
import yaml  # noqa: F401

from gpt2fast.cli import train as command
from gpt2fast.training.checkpoints.folder import newest_checkpoint
from gpt2fast.training.machine import flops
from run_outcomes import differences, outcome
from time_limits import deadline

PLAIN: dict[str, object] = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 8,
    "batch_size": 4,
    "grad_accumulation": 2,
    "dropout": 0.1,
    "max_steps": 12,
    "warmup_steps": 2,
    "lr": 1e-2,
    "eval_interval": 2,
    "eval_batches": 2,
    "log_interval": 2,
    "checkpoint_interval": 3,
    "device": "cpu",
    "threads": 1,
}
RECIPES: dict[str, dict[str, object]] = {
    "plain": {},
    "samples": {"sample_interval": 2, "sample_tokens": 3},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "muon": {"optimizer": "muon"},
    "batch_warmup": {"batch_warmup_steps": 8, "grad_accumulation": 4},
    "epoch": {"sampling": "epoch"},
    "target": {"target_loss": 2.9, "checkpoint_interval": 2},
    "stopping": {"early_stopping": 2, "lr": 0.5, "min_lr": 0.5, "max_steps": 60},
    "lora": {"lora_rank": 2, "lora_dropout": 0.1, "n_layer": None, "n_head": None, "n_embd": None},
    "tensorboard": {"tensorboard": True},
}
PARALLEL = ("ddp", "zero", "fsdp")


# -- ways to stop a run ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """A way to stop a run: `kind` of stop, and its time.

    kind: KILL, TERM, INT (signals); refused (one change is answered with "no space left"), small
        (no file may grow longer than `size` bytes), full (the disk has `size` bytes left).
    change: before this change in the run's folder, counted from 0; or
    seconds: so long after the start.
    rank: of the process that it happens to.
    """

    kind: str
    change: int | None = None
    seconds: float = 0.0
    size: int = 0
    rank: int = 0

    def __str__(self) -> str:
        when = f"at {self.seconds:.2f} s" if self.change is None else f"at change {self.change}"
        size = f" ({self.size} bytes)" if self.kind in ("small", "full") else ""
        return f"{self.kind}{size} {when}" + (f" in process {self.rank}" if self.rank else "")


def watch_changes(folder: Path, change: Callable[[str, str], None]) -> None:
    """Call `change` before everything that this process opens for writing, makes, renames, removes
    or synchronizes below `folder`, with what and where. Cannot be undone: for forks."""
    inside = os.path.realpath(folder)

    def place(path: Any, directory: Any = None) -> str | None:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        base = os.getcwd()
        if isinstance(directory, int) and directory >= 0:
            base = os.readlink(f"/proc/self/fd/{directory}")
        return os.path.normpath(os.path.join(base, os.fsdecode(path)))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, opened = arguments
            if not opened & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or isinstance(path, int):
                return
            where = place(path)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "tests.fsync"):
            directory = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}.get(event)
            where = place(arguments[0], None if directory is None else arguments[directory])
        else:
            return
        if where is not None and where.startswith(inside + os.sep):
            change(event, where)

    fsync = os.fsync

    def audited_fsync(descriptor: int) -> None:
        sys.audit("tests.fsync", descriptor)
        fsync(descriptor)

    os.fsync = audited_fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def arrange(stop: Stop, folder: Path) -> None:
    """Prepare this process, a fork, to be stopped at a change in `folder`."""
    count = 0

    def change(event: str, where: str) -> None:
        nonlocal count
        count += 1
        if count - 1 < (stop.change or 0):
            return
        if stop.kind in ("KILL", "TERM", "INT"):
            if count - 1 == stop.change:
                os.kill(os.getpid(), getattr(signal, f"SIG{stop.kind}"))
        elif stop.kind == "refused":
            # What removes files needs no space; fsync is where some file systems find out.
            if event not in ("os.remove", "os.rmdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        elif count - 1 == stop.change:
            happen_to_the_disk(stop, folder)

    if stop.change is not None:
        watch_changes(folder, change)


def happen_to_the_disk(stop: Stop, folder: Path) -> None:
    if stop.kind == "small":
        resource.setrlimit(resource.RLIMIT_FSIZE, (stop.size, resource.RLIM_INFINITY))
        return
    ballast = os.open(folder.parent / "ballast", os.O_WRONLY | os.O_CREAT)
    free = os.statvfs(folder.parent)
    os.posix_fallocate(ballast, 0, max(free.f_bavail * free.f_frsize - stop.size, 1))
    os.close(ballast)


@contextmanager
def small_disk(folder: Path, megabytes: int = 8) -> Iterator[Path]:
    """A disk of that size as `folder`. Raises OSError where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr.decode().strip()) from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# -- runs -----------------------------------------------------------------------------------------


@dataclass
class Ended:
    """Exit of one process, with its standard error."""

    code: int
    """Exit code; minus the signal that ended it."""
    said: str


class Forks:
    """Starts runs as forks of this process."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder

    def start(self, arguments: list[str], stop: Stop | None, processes: int = 1) -> list[Ended]:
        """Run `gpt2fast.train` to its end, in so many processes, and stop one of them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = self._out(arguments)
        pids, pipes = [], []
        for rank in range(processes):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                self._child(arguments, stop, out, rank, processes, port, writer)
            os.close(writer)
            pids.append(pid)
            pipes.append(os.fdopen(reader, errors="replace"))
        if stop is not None and stop.change is None:
            time.sleep(stop.seconds)
            os.kill(pids[stop.rank], getattr(signal, f"SIG{stop.kind}"))
        codes = self._wait(pids)
        (out.parent / "ballast").unlink(missing_ok=True)
        ended = []
        for code, pipe in zip(codes, pipes, strict=True):
            with pipe:
                ended.append(Ended(code, pipe.read()))
        return ended

    def _out(self, arguments: list[str]) -> Path:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name in ("--out", "--resume"):
                path = Path(value)
                return path.parent.parent if path.parent.name == "checkpoints" else path
        raise ValueError(arguments)

    def _child(
        self,
        arguments: list[str],
        stop: Stop | None,
        out: Path,
        rank: int,
        processes: int,
        port: int,
        said: int,
    ) -> None:
        code = 70
        try:
            # A pipe takes what is said when no file can grow.
            os.dup2(said, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has its own
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            flops.peak = lambda *_: None  # it would be measured in every one
            if stop is not None and stop.rank == rank:
                arrange(stop, out)
            code = command.main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _wait(self, pids: list[int]) -> list[int]:
        """Exit codes. As torchrun does, ends those that a lost process has left waiting for it."""
        codes: dict[int, int] = {}
        end, asked = deadline(), math.inf
        while len(codes) < len(pids):
            for pid in set(pids) - set(codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if any(codes.values()):
                asked = min(asked, now + 10)
            late = now > asked
            for pid in set(pids) - set(codes):
                if now > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    raise TimeoutError(f"process {pid} did not end in time")
                if late:
                    os.kill(pid, signal.SIGTERM)
            if late:
                asked = now + 10
            time.sleep(0.005)
        return [codes[pid] for pid in pids]


def flags(settings: dict[str, object]) -> list[str]:
    names = {name.replace("_", "-"): value for name, value in settings.items() if value is not None}
    return [f"--{name}={value!s}" for name, value in names.items()]


class Broken(AssertionError):
    """A run did not do what is promised."""


def resumption(settings: dict[str, object]) -> list[str]:
    """Arguments that a user gives next: --resume, or all anew if there is no checkpoint."""
    out = Path(str(settings["out"]))
    if newest_checkpoint(out / "checkpoints") is not None:
        return [f"--resume={out}"]
    return flags(settings)


def check_end(stop: Stop, ended: list[Ended]) -> None:
    """Raise Broken unless the processes ended as a user may expect: in one line, at most."""
    for rank, end in enumerate(ended):
        if "Traceback" in end.said or "terminate called" in end.said:
            raise Broken(f"{stop}: process {rank} said {end.said}")
    code = ended[stop.rank].code
    signum = getattr(signal, f"SIG{stop.kind}", None)
    if code == 0:
        return
    if signum is None:
        said = ended[stop.rank].said
        if code != 1 or said.count("\n") != 1 or not said.startswith("error: "):
            raise Broken(f"{stop}: exit code {code}, {said}")
    elif code not in (-signum, 128 + signum):
        raise Broken(f"{stop}: exit code {code}, {ended[stop.rank].said}")


def disturbed(
    forks: Forks, settings: dict[str, object], stops: Iterator[Stop], processes: int = 1
) -> list[tuple[Stop, list[Ended]]]:
    """Run `settings` to the end against the odds; what happened on the way.

    stops: one for each start; when there are no more, the run is left in peace.
    """
    history: list[tuple[Stop, list[Ended]]] = []
    while True:
        stop = next(stops, None)
        ended = forks.start(resumption(settings), stop, processes)
        if stop is not None:
            history.append((stop, ended))
            check_end(stop, ended)
        if all(end.code == 0 for end in ended):
            return history
        if stop is None:
            raise Broken(f"undisturbed, but {ended}")


def changes(forks: Forks, settings: dict[str, object]) -> list[tuple[str, str]]:
    """Every change that a run of `settings` makes to its folder, in order."""
    record = forks.folder / "changes"
    pid = os.fork()
    if pid == 0:
        out = Path(str(settings["out"]))
        file = record.open("w")

        def change(event: str, where: str) -> None:
            file.write(json.dumps([event, os.path.relpath(where, out)]) + "\n")

        watch_changes(out, change)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            code = command.main(flags(settings))
        file.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise Broken(f"exit code {code}")
    return [tuple(json.loads(line)) for line in record.read_text().splitlines()]


# -- by chance ------------------------------------------------------------------------------------


def random_stop(
    draw: random.Random, seconds: float, count: int, processes: int, disk: bool
) -> Stop:
    """Any stop of a run that takes so many seconds and makes so many changes."""
    kinds = ["KILL", "KILL", "TERM", "INT", "refused", "small"] + (["full"] if disk else [])
    kind = draw.choice(kinds)
    rank = draw.randrange(processes)
    if kind in ("KILL", "TERM", "INT") and draw.random() < 0.5:
        return Stop(kind, seconds=draw.uniform(0, seconds), rank=rank)
    size = int(10 ** draw.uniform(0, 5))
    most = count if rank == 0 else count // 20
    return Stop(kind, change=draw.randrange(most), size=size, rank=rank)


def prepare(folder: Path) -> dict[str, dict[str, object]]:
    """Text, and the settings of every recipe."""
    from small_runs import write_text

    text = write_text(folder / "story.txt")
    settings = {}
    for name, changed in RECIPES.items():
        settings[name] = {**PLAIN, "data": text, **changed}
    return settings


class Trial:
    """A straight run of each recipe, made when it is first asked for, and runs against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forks = Forks(folder)
        self.recipes = prepare(folder)
        self._straight: dict[tuple[str, int, str], tuple[dict[str, Any], float]] = {}

    def settings(self, recipe: str, out: Path, parallel: str = "ddp") -> dict[str, object]:
        settings = {**self.recipes[recipe], "out": out, "parallel": parallel}
        if recipe == "lora":
            settings["init_from"] = self._start()
        return settings

    def _start(self) -> Path:
        folder = self.folder / "start"
        if not folder.exists():
            self._finish(self.settings("plain", folder))
        return folder

    def _finish(self, settings: dict[str, object], processes: int = 1) -> float:
        began = time.perf_counter()
        ended = self.forks.start(flags(settings), None, processes)
        if any(end.code for end in ended):
            raise Broken(f"undisturbed, but {ended}")
        return time.perf_counter() - began

    def straight(
        self, recipe: str, processes: int = 1, parallel: str = "ddp"
    ) -> tuple[dict[str, Any], float]:
        """The outcome of the run that nothing disturbs, and the seconds it takes."""
        key = recipe, processes, parallel
        if key not in self._straight:
            out = self.folder / f"straight-{recipe}-{processes}-{parallel}"
            seconds = self._finish(self.settings(recipe, out, parallel), processes)
            self._straight[key] = outcome(out), seconds
        return self._straight[key]

    def count(self, recipe: str) -> int:
        """Number of changes that the uninterrupted run makes."""
        out = self.folder / f"counted-{recipe}"
        count = len(changes(self.forks, self.settings(recipe, out)))
        shutil.rmtree(out)
        return count

    def against(
        self,
        recipe: str,
        stops: Iterator[Stop],
        processes: int = 1,
        parallel: str = "ddp",
        folder: Path | None = None,
    ) -> list[tuple[Stop, list[Ended]]]:
        """Run `recipe` through `stops`; raise Broken unless its outcome is the straight one's."""
        expected, _ = self.straight(recipe, processes, parallel)
        out = (folder or self.folder) / "run"
        shutil.rmtree(out, ignore_errors=True)
        settings = self.settings(recipe, out, parallel)
        history = disturbed(self.forks, settings, stops, processes)
        if found := differences(outcome(out), expected):
            told = "; ".join(f"{stop} -> {[end.code for end in ended]}" for stop, ended in history)
            raise Broken(f"{recipe}, {processes} processes, after {told}: " + "\n".join(found))
        return history


def by_chance(
    trial: Trial, stops: int, seed: int, processes: int = 1, disk: Path | None = None
) -> tuple[Counter[str], int]:
    """Stop runs of all recipes so often, at random. Returns stops by kind, and runs."""
    draw = random.Random(seed)
    happened: Counter[str] = Counter()
    runs = 0
    counts: dict[str, int] = {}
    while happened.total() < stops:
        recipe = draw.choice([name for name in RECIPES if processes == 1 or name != "stopping"])
        parallel = "ddp" if processes == 1 else draw.choice(PARALLEL)
        if recipe == "lora" and parallel == "fsdp":
            continue
        if processes > 1 and recipe == "muon" and parallel == "fsdp":
            continue
        counts.setdefault(recipe, trial.count(recipe))
        _, seconds = trial.straight(recipe, processes, parallel)
        planned = [
            random_stop(draw, seconds, counts[recipe], processes, disk is not None)
            for _ in range(draw.randint(1, 5))
        ]
        history = trial.against(recipe, iter(planned), processes, parallel, disk)
        for stop, ended in history:
            if any(end.code for end in ended):  # the others came after the end
                happened[stop.kind] += 1
        runs += 1
    return happened, runs


def every_change(trial: Trial, recipe: str, kind: str = "KILL", step: int = 1) -> int:
    """Stop a run of `recipe` before each `step`-th of its changes. Returns how often."""
    count = trial.count(recipe)
    for change in range(0, count, step):
        trial.against(recipe, iter([Stop(kind, change=change)]))
    return len(range(0, count, step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=0, help="random stops of one process")
    parser.add_argument("--pairs", type=int, default=0, help="random stops of one of two processes")
    parser.add_argument("--every", choices=RECIPES, help="stop a recipe before each change")
    parser.add_argument("--kind", default="KILL", help="what --every does: KILL, TERM, refused")
    parser.add_argument("--step", type=int, default=1, help="every how many changes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs go (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir=arguments.folder))
    trial = Trial(folder)
    began = time.perf_counter()
    if arguments.every:
        count = every_change(trial, arguments.every, arguments.kind, arguments.step)
        print(f"{arguments.kind} before each of {count} changes: all outcomes as undisturbed")
    if arguments.stops:
        try:
            with small_disk(folder / "disk") as disk:
                told = by_chance(trial, arguments.stops, arguments.seed, disk=disk)
        except OSError as error:
            print(f"without a disk that can be full: {error}")
            told = by_chance(trial, arguments.stops, arguments.seed)
        print(f"{told[0].total()} stops in {told[1]} runs, all outcomes as undisturbed: {told[0]}")
    if arguments.pairs:
        told = by_chance(trial, arguments.pairs, arguments.seed, processes=2)
        print(f"{told[0].total()} stops of one of two in {told[1]} runs, likewise: {told[0]}")
    print(f"{time.perf_counter() - began:.0f} s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
