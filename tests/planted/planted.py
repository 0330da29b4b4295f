"""Plants one bug after another in the kernels and sees which tests notice.

    python tests/planted/planted.py                the bugs of all galleries
    python tests/planted/planted.py cpu top-k      those of one, whose name has this in it
    python tests/planted/planted.py --write        all, and their tables in docs/simulator.md

Ends with 1 if a bug is in a kernel and its tests pass all the same, or if tests fail without one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "planted"))
os.environ["TRITON_INTERPRET"] = "1"

# All but gpt2fast itself: what runs may be a copy of it.
import hypothesis  # noqa: E402
import numpy  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402, F401
import triton  # noqa: E402, F401

import cpu_bugs  # noqa: E402
import triton_bugs  # noqa: E402
from bugs import Bug  # noqa: E402

DOCUMENT = ROOT / "docs" / "simulator.md"


@dataclass(frozen=True)
class Job:
    """Tests to be run in a process of their own."""

    bug: Bug | None
    prepare: Callable[[Path], None]
    """Puts what is tested in place of what would be imported; takes a folder of its own."""
    tests: Sequence[str]
    only: str
    """Selection of them for pytest's -k: those of a backend."""


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    code: int
    """pytest's exit code; negative: the signal that ended it."""
    test: str
    """The first test that failed, or nothing."""
    message: str
    """Its message, on a line."""
    output: str
    seconds: float

    @property
    def caught(self) -> bool:
        """True if a test failed by itself: no crash, and there were tests."""
        return self.code == 1 and bool(self.test)


class _First:
    """A plugin of pytest that keeps the first failure."""

    def __init__(self) -> None:
        self.test = self.message = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.when == "call" and not self.test:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.test = report.nodeid.rpartition("/")[2]
            self.message = " ".join((crash.message if crash else str(report.longrepr)).split())


def _run_tests(job: Job) -> tuple[int, _First]:
    first = _First()
    # Shrinking an example takes longer than finding it.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("planted", phases=phases)
    hypothesis.settings.load_profile("planted")
    code = pytest.main(
        ["-q", "-x", "-m", "slow or not slow", "-k", job.only, "-p", "no:cacheprovider",
         "-p", "no:xdist", "--rootdir", str(ROOT), *job.tests],
        plugins=[first],
    )  # fmt: skip
    return int(code), first


def _child(job: Job, folder: Path) -> None:
    """In a process of its own: never returns."""
    code = 70
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        job.prepare(folder)
        code, first = _run_tests(job)
        (folder / "first").write_text(f"{first.test}\n{first.message}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(jobs: Sequence[Job], at_once: int) -> Iterator[tuple[Job, Outcome]]:
    """The jobs' outcomes as they end; each runs in a copy of this process, which imports once."""
    waiting = list(jobs)
    running: dict[int, tuple[Job, tempfile.TemporaryDirectory[str], float]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job, temporary = waiting.pop(0), tempfile.TemporaryDirectory()
            child = os.fork()
            if child == 0:
                _child(job, Path(temporary.name))
            running[child] = job, temporary, time.monotonic()
        child, status = os.wait()
        if child not in running:
            continue
        job, temporary, begin = running.pop(child)
        with temporary:
            folder, test, message = Path(temporary.name), "", ""
            if (folder / "first").is_file():
                test, _, message = (folder / "first").read_text().partition("\n")
            output = (folder / "log").read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        yield job, Outcome(code, test, message, output, time.monotonic() - begin)


def _tests_of(bugs: Sequence[Bug]) -> list[str]:
    return list(dict.fromkeys(test for bug in bugs for test in bug.node_ids()))


def _cpu_jobs(bugs: Sequence[Bug]) -> list[Job]:
    script = [sys.executable, str(ROOT / "tests" / "planted" / "cpu_library.py")]
    done = subprocess.run(
        [*script, str(ROOT / "build" / "planted")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    library = done.stdout.splitlines()[-1]
    isa = Path(library).name.split("-")[1]
    for bug in bugs:
        if bug.isa not in ("", isa):
            print(f"left out, for GPT2FAST_ISA={bug.isa}: {bug.name}")
    bugs = [bug for bug in bugs if bug.isa in ("", isa)]

    def showing(number: int) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            os.environ.update(GPT2FAST_LIBRARY=library, GPT2FAST_PLANTED=str(number))

        return prepare

    only = "native or packed_borders"
    numbers = {bug: number for number, bug in enumerate(cpu_bugs.BUGS, 1)}
    jobs = [Job(bug, showing(numbers[bug]), bug.node_ids(), only) for bug in bugs]
    return [Job(None, showing(0), _tests_of(bugs), only), *jobs]


def _triton_jobs(bugs: Sequence[Bug]) -> list[Job]:
    def copy(bug: Bug | None) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            triton_bugs.copy_with(bug, folder)
            os.environ["GPT2FAST_NATIVE"] = "0"
            sys.path.insert(0, str(folder))
            import gpt2fast

            assert gpt2fast.__file__.startswith(str(folder)), gpt2fast.__file__

        return prepare

    jobs = [Job(bug, copy(bug), bug.node_ids(), "triton") for bug in bugs]
    return [Job(None, copy(None), _tests_of(bugs), "triton"), *jobs]


GALLERIES = {"cpu": (cpu_bugs.BUGS, _cpu_jobs), "triton": (triton_bugs.BUGS, _triton_jobs)}


def show(gallery: str, bugs: Sequence[Bug], verbose: bool) -> tuple[dict[Bug, Outcome], int]:
    """Run a gallery; returns what became of its bugs, and how many jobs did not end as they should.

    Args:
        gallery: a key of `GALLERIES`.
        bugs: of it.
        verbose: whether to print all that pytest said where that is so.
    """
    outcomes, wrong = {}, 0
    for job, outcome in run(GALLERIES[gallery][1](bugs), len(os.sched_getaffinity(0))):
        right = outcome.caught if job.bug else outcome.code == 0
        wrong += not right
        name = job.bug.name if job.bug else "without a bug"
        print(f"{'ok  ' if right else 'MISS'} {outcome.seconds:5.1f} s  {gallery}: {name}")
        if outcome.test or not right:
            found = f"{outcome.test}: {outcome.message}"[:200] if outcome.test else outcome.code
            print(f"              {found}")
        if verbose and not right:
            print(outcome.output[-6000:])
        sys.stdout.flush()
        if job.bug:
            outcomes[job.bug] = outcome
    return outcomes, wrong


def table(bugs: Sequence[Bug], outcomes: dict[Bug, Outcome]) -> str:
    """The bugs in their order, and which test found each."""
    lines = ["| planted bug | in | found by |", "|---|---|---|"]
    for bug in bugs:
        if bug not in outcomes:
            sys.exit(f"{bug.name}: the tables are written with GPT2FAST_ISA={bug.isa}")
        test = outcomes[bug].test.partition("[")[0].replace("::test_", ", ").replace("_", " ")
        found = test.replace("test ", "").replace(".py", "") if outcomes[bug].caught else "–"
        lines.append(f"| {bug.name} | {Path(bug.file).name} | {found} |")
    return "\n".join(lines) + "\n"


def rewrite(text: str, gallery: str, new_table: str) -> str:
    """The page with this table in place of the gallery's old one."""
    begin, end = f"<!-- {gallery} gallery -->\n", f"<!-- end of {gallery} gallery -->\n"
    before, rest = text.split(begin)
    return before + begin + new_table + end + rest.split(end)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="galleries, and parts of bugs' names")
    parser.add_argument("--verbose", action="store_true", help="print pytest's words on survivors")
    parser.add_argument("--write", action="store_true", help="rewrite docs/simulator.md")
    chosen = parser.parse_args()
    galleries = [name for name in GALLERIES if name in chosen.names] or list(GALLERIES)
    parts = [name for name in chosen.names if name not in GALLERIES]
    if chosen.write and parts:
        parser.error("--write takes whole galleries")
    begin, wrong = time.monotonic(), 0
    for gallery in galleries:
        bugs = [
            bug for bug in GALLERIES[gallery][0] if not parts or any(p in bug.name for p in parts)
        ]
        outcomes, failed = show(gallery, bugs, chosen.verbose)
        wrong += failed
        if chosen.write:
            text = rewrite(DOCUMENT.read_text(), gallery, table(bugs, outcomes))
            DOCUMENT.write_text(text)
    print(f"{wrong} not as they should be, after {time.monotonic() - begin:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
