"""Every combination of the suite has its day, and limits grow with the machine's slowness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rotation

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("test", rotation.PARTS, ids=range(len(rotation.PARTS)))
def test_every_combination_runs_within_as_many_days_as_there_are_parts(test):
    file, function = test.split("::")
    found = [path for path in (ROOT / "tests").rglob(file) if f"def {function}" in path.read_text()]
    assert found, f"{test} is the name of no test"
    names = [f"tests/ops/{test}[{i}]" for i in range(40)]
    days = [
        {n for n in names if rotation.runs_today(n, day)}
        for day in range(7, 7 + rotation.PARTS[test])
    ]
    assert set().union(*days) == set(names) and sum(map(len, days)) == len(names)


def test_a_test_without_parts_runs_every_day():
    assert all(rotation.runs_today("tests/test_nn.py::test_x[1]", day) for day in range(9))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "GPT2FAST_TEST_DAY=12 "),
        (["-m", "slow or not slow"], "combinations: all"),
    ],
)
def test_the_header_says_how_to_run_the_same_again(options, says, monkeypatch):
    monkeypatch.setenv("GPT2FAST_TEST_DAY", "12")
    monkeypatch.delenv("GPT2FAST_TEST_ALL", raising=False)
    monkeypatch.delenv("GPT2FAST_TEST_FAST", raising=False)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run(
        [*command, *options, "tests/test_rotation.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and says in done.stdout


def test_a_slower_machine_has_longer_limits(request, monkeypatch):
    before = request.node.get_closest_marker("timeout")  # this test has its own limit already
    usual = before.args[0] if before is not None and before.args else rotation.LIMIT
    monkeypatch.setattr(rotation, "_work", lambda: 4 * rotation.QUIET)
    monkeypatch.setattr(rotation.os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    rotation.Clock().set_limit(request.node)
    assert request.node.get_closest_marker("timeout").args == (pytest.approx(4 * usual),)
    monkeypatch.setattr(rotation, "_work", lambda: rotation.QUIET / 4)
    request.node.add_marker(pytest.mark.timeout(7.0), append=False)
    rotation.Clock().set_limit(request.node)
    assert request.node.get_closest_marker("timeout").args == (7.0,)
