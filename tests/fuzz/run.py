"""Fuzzes what reads files: by coverage with atheris where that is installed, else by chance.

    python tests/fuzz/run.py [TARGET ...] [--seconds 60] [--jobs 2] [--engine auto|atheris|chance]

Inputs are those in corpus/TARGET, changed by `mutate`. A finding is an exception that is none of
the package's errors, an input that takes more than ten seconds, or more than two gigabytes. It is
written to build/fuzz/TARGET, told with its traceback, and the exit code is 1. Mend it, and move the
input into the corpus: `tests/test_fuzz.py` runs all of that.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
FOUND = ROOT / "build" / "fuzz"
REACHED = ROOT / "build" / "fuzz-corpus"
"""Inputs that reached new code, from which the next run goes on."""
SECONDS = 10
"""The longest that one input may take: of the processor's time, others may use the machine."""
WAITS = 60
"""Seconds on the clock after which it is taken for one that waits."""
BYTES = 2 << 30
"""The most memory that may be asked for beside what the program has."""


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


class TooLong(BaseException):
    """An input takes too long."""


class Runner:
    """Runs a target on inputs, one after the other, within limits of time and memory."""

    def __init__(self, name: str, limited: bool = True) -> None:
        import logging
        import warnings

        import torch
        from targets import TARGETS

        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        self.name, self.function, self.limited = name, TARGETS[name], limited
        self.folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        self.outcomes: Counter[str] = Counter()

    def __enter__(self) -> Runner:
        signal.signal(signal.SIGPROF, self._too_long)
        # What is imported, or compiled, at first use counts for no input.
        signal.setitimer(signal.ITIMER_PROF, 30 * SECONDS)
        with contextlib.suppress(Exception, TooLong):
            self.function(corpus(self.name)[0], self.folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + BYTES
        if self.limited:
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return self

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _too_long(self, *_: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    def run(self, data: bytes) -> None:
        """Raises whatever the target raises, the package's errors aside."""
        from gpt2fast.errors import Error

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        # Waiting, or a hang outside of Python, ends the process, and says where.
        faulthandler.dump_traceback_later(WAITS, exit=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            self.function(data, self.folder)
            self.outcomes["read"] += 1
        except Error as error:
            self.outcomes["refused"] += 1
            message = str(error)
            assert message.isprintable() or "\n" in message, "a message moves the cursor"
            assert len(message) < 5000, "a long message"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()


def keep(name: str, data: bytes) -> Path:
    path = FOUND / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def by_chance(
    name: str, seconds: float, seed: int, limited: bool = True, most_findings: int = 20
) -> int:
    """The number of different findings (by where they were raised)."""
    from mutate import mutate

    chance = random.Random(f"{name} {seed}")
    inputs = corpus(name)
    places: set[str] = set()
    current = FOUND / name / "running"
    current.parent.mkdir(parents=True, exist_ok=True)
    count, end = 0, time.monotonic() + seconds
    with Runner(name, limited) as runner:
        while count < len(inputs) or time.monotonic() < end:
            if len(places) == most_findings:
                break
            data = (
                inputs[count]
                if count < len(inputs)
                else mutate(chance.choice(inputs), chance, inputs)
            )
            count += 1
            current.write_bytes(data)  # found there after a crash
            try:
                runner.run(data)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{type(error).__name__} {frame.filename}:{frame.lineno}"
                if place not in places:
                    places.add(place)
                    print(f"FINDING in {name}: {keep(name, data)}", flush=True)
                    traceback.print_exception(error)
                    sys.stderr.flush()
    current.unlink()
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(runner.outcomes.items()))
    print(f"{name}: {count} inputs by chance ({told}), {len(places)} findings", flush=True)
    return len(places)


def by_coverage(name: str, seconds: float, seed: int) -> None:
    """Ends the process: with 0 after that time, with something else at the first finding."""
    import atheris

    with atheris.instrument_imports(include=["gpt2fast"]):
        import targets  # noqa: F401
    from mutate import mutate

    inputs = corpus(name)

    def custom(data: bytes, most: int, seed: int) -> bytes:
        return mutate(bytes(data), random.Random(seed), inputs)[:most]

    work = REACHED / name
    work.mkdir(parents=True, exist_ok=True)
    (FOUND / name).mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds:.0f}",
        f"-seed={seed}",
        f"-timeout={WAITS}",
        "-rss_limit_mb=0",  # what one input asks for is limited by the runner
        "-max_len=65536",
        f"-artifact_prefix={FOUND / name}/",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    runner = Runner(name).__enter__()

    def one(data: bytes) -> None:
        runner.run(bytes(data))

    arguments = [sys.argv[0], *options, str(work), str(CORPUS / name)]
    atheris.Setup(arguments, one, custom_mutator=custom)
    atheris.Fuzz()


def engine(asked: str) -> str:
    if asked == "auto":
        import importlib.util

        return "atheris" if importlib.util.find_spec("atheris") else "chance"
    return asked


def main() -> int:
    names = sorted(path.name for path in CORPUS.iterdir())
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=int(time.time()) // 86400)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at once")
    parser.add_argument("--engine", choices=("auto", "atheris", "chance"), default="auto")
    parser.add_argument(
        "--no-memory-limit", action="store_true", help="for sanitizers, which map terabytes"
    )
    parser.add_argument("--one", action="store_true", help="in this process")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(names):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = options.targets or names
    how = engine(options.engine)
    if options.one:
        sys.path.insert(0, str(HERE))
        if how == "atheris":
            by_coverage(chosen[0], options.seconds, options.seed)
        limited = not options.no_memory_limit
        done = [by_chance(name, options.seconds, options.seed, limited) for name in chosen]
        return int(any(done))
    print(f"{len(chosen)} targets, {options.seconds:g} s each, {how}, seed {options.seed}")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="gpt2fast-fuzz-", dir=memory) as scratch:
        failed = all_of(chosen, options, how, scratch)
    print(f"{len(chosen) - len(failed)} targets without a finding, {len(failed)} with")
    return int(bool(failed))


def all_of(chosen: list[str], options: argparse.Namespace, how: str, scratch: str) -> list[str]:
    """Run each target in a process of its own, some at once; those that failed."""
    waiting, failed = list(chosen), []
    running: dict[str, tuple[subprocess.Popen[bytes], Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            command = [sys.executable, __file__, name, "--one", "--engine", how]
            command += ["--seconds", str(options.seconds), "--seed", str(options.seed)]
            output = tempfile.TemporaryFile()  # noqa: SIM115
            where = {**os.environ, "TMPDIR": scratch}
            process = subprocess.Popen(command, cwd=ROOT, env=where, stdout=output, stderr=output)
            running[name] = (process, output, time.monotonic())
        time.sleep(0.1)
        for name, (process, output, start) in list(running.items()):
            stuck = time.monotonic() - start > options.seconds + 5 * WAITS
            if process.poll() is None and not stuck:
                continue
            if stuck:
                process.kill()
                process.wait()
            del running[name]
            output.seek(0)
            text = output.read().decode(errors="replace")
            bad = stuck or process.returncode != 0
            if bad:
                failed.append(name)
                print(text[-20000:])
            for line in text.splitlines():
                if line.startswith((f"{name}: ", "stat::number_of_executed_units")):
                    line = line.replace("stat::number_of_executed_units", f"{name}, inputs")
                    print(" ".join(line.split()), flush=True)
            if bad:
                print(f"{name} failed (exit code {process.returncode}); inputs: {FOUND / name}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
