"""The gallery of planted bugs: which check catches which.

python tests/simulator/gallery.py     rewrites the table in docs/simulator.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from programs import ROOT, build

sys.path.append(str(ROOT / "tests"))

from time_limits import patience

SANITIZERS = {"plain": "", "asan": "address,undefined", "tsan": "thread"}

# A column of the table: the build, and the order in which threads run.
CHECKS = {
    "fifo": ("plain", "fifo"),
    "lifo": ("plain", "lifo"),
    "random": ("plain", "random"),
    "ASan, UBSan": ("asan", "fifo"),
    "TSan": ("tsan", "fifo"),
}

# What a caught bug looks like in the output, and what the table calls it.
VERDICTS = {
    r"simulator error": "error",
    r"wrong result": "wrong result",
    r"ERROR: AddressSanitizer": "bounds",
    r"runtime error:": "undefined",
    r"WARNING: ThreadSanitizer: data race": "race",
}


def build_galleries(folder: Path) -> dict[str, Path]:
    """The gallery without sanitizers and with each."""
    return {
        name: build("gallery", folder / name, sanitize) / "gallery"
        for name, sanitize in SANITIZERS.items()
    }


def run(gallery: Path, what: str, order: str) -> tuple[int, str]:
    environment = os.environ | {
        "GPT2FAST_SIM_ORDER": order,
        "GPT2FAST_SIM_SEED": "1",
        "GPT2FAST_SIM_ASYNC": "deferred",
    }
    done = subprocess.run(
        [gallery, what], env=environment, capture_output=True, text=True, timeout=patience()
    )
    return done.returncode, done.stdout + done.stderr


def names(gallery: Path) -> list[str]:
    return run(gallery, "--list", "fifo")[1].splitlines()


def catch(gallery: Path, number: int, order: str) -> list[str]:
    """By what this bug was caught, which may be several things at once, or nothing."""
    code, output = run(gallery, str(number), order)
    caught = [verdict for pattern, verdict in VERDICTS.items() if re.search(pattern, output)]
    if code != 0 and not caught:
        caught.append("crash")
    return caught


def catch_all(
    galleries: dict[str, Path], report: Callable[[str], None] = lambda name: None
) -> dict[str, dict[str, list[str]]]:
    """For each bug, by check, what caught it."""
    caught = {}
    for number, name in enumerate(names(galleries["plain"])):
        caught[name] = {
            check: catch(galleries[build_name], number, order)
            for check, (build_name, order) in CHECKS.items()
        }
        report(name)
    return caught


def table(caught: dict[str, dict[str, list[str]]]) -> str:
    lines = [
        "| planted bug | " + " | ".join(CHECKS) + " |",
        "|---|" + "---|" * len(CHECKS),
    ]
    for name, checks in caught.items():
        cells = [", ".join(checks[check]) or "–" for check in CHECKS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rewrite(document: Path, new_table: str) -> None:
    begin, end = "<!-- gallery -->\n", "<!-- end of gallery -->\n"
    before, rest = document.read_text().split(begin)
    after = rest.split(end)[1]
    document.write_text(before + begin + new_table + end + after)


def main() -> None:
    with TemporaryDirectory() as folder:
        rewrite(
            ROOT / "docs" / "simulator.md",
            table(catch_all(build_galleries(Path(folder)), report=print)),
        )


if __name__ == "__main__":
    main()
