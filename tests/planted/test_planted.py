"""The galleries of planted bugs stay whole, and (slow) every bug in them is caught."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import cpu_bugs
import triton_bugs
from bugs import Bug, planted

ROOT = Path(__file__).parents[2]
GALLERIES = {"cpu": cpu_bugs.BUGS, "triton": triton_bugs.BUGS}
BUGS = [bug for bugs in GALLERIES.values() for bug in bugs]
ENOUGH = 12


@pytest.mark.parametrize("gallery", GALLERIES)
def test_every_bug_has_its_place_and_its_name(gallery):
    bugs = GALLERIES[gallery]
    assert len(bugs) >= ENOUGH
    assert max(Counter(bug.name for bug in bugs).values()) == 1
    for file in {bug.file for bug in bugs}:
        text = (ROOT / file).read_text()
        here = [bug for bug in bugs if bug.file == file]
        # One library holds all of the CPU's; of a Triton module there is a copy for each.
        for chosen in [here] if gallery == "cpu" else [[bug] for bug in here]:
            assert planted(text, chosen, lambda bug, _: bug.wrong) != text


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_tests_that_should_notice_are_there(bug):
    for node in bug.node_ids():
        file, _, test = node.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("gallery", GALLERIES)
def test_the_page_names_every_bug(gallery):
    page = (ROOT / "docs" / "simulator.md").read_text()
    missing = [bug.name for bug in GALLERIES[gallery] if f"| {bug.name} |" not in page]
    assert not missing, "python tests/planted/planted.py --write rewrites the tables"


def test_a_place_that_is_not_there_once_is_an_error():
    bug = Bug("a name", "a file", "x = «1»;", "2", ())
    assert planted("y = 1; x = 1;", [bug], lambda bug, _: bug.wrong) == "y = 1; x = 2;"
    for text in ("x = 3;", "x = 1; x = 1;"):
        with pytest.raises(ValueError, match="a file has its place . times, not once"):
            planted(text, [bug], lambda bug, _: bug.wrong)
    same = Bug("another", "a file", "«x = 1»;", "2", ())
    with pytest.raises(ValueError, match="replace the same characters"):
        planted("x = 1;", [bug, same], lambda bug, _: bug.wrong)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("gallery", GALLERIES)
def test_every_planted_bug_is_caught(gallery):
    script = [sys.executable, "tests/planted/planted.py", gallery, "--verbose"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
