"""Every combination of the suite has its day, and limits grow with the machine's slowness."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rotation
import thread_order
import time_limits

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


@pytest.mark.parametrize(("begin", "end"), rotation.BACKEND_PARTS)
def test_a_slow_backend_has_its_day_for_every_test(begin, end):
    names = [f"{begin}test_{i}[7-native-{end.lstrip('-[')}" for i in range(40)]
    if end.startswith("["):
        names = [f"{begin}test_{i}{end}" for i in range(40)]
    count = rotation.BACKEND_PARTS[begin, end]
    days = [{n for n in names if rotation.runs_today(n, day)} for day in range(7, 7 + count)]
    assert set().union(*days) == set(names) and sum(map(len, days)) == len(names)
    assert all(rotation.runs_today(f"{begin}test_several_rows{end}", day) for day in range(20))
    assert all(rotation.runs_today(name.replace(end, "native]"), 3) for name in names)


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


def test_the_simulators_order_differs_between_tests_and_days():
    names = [f"tests/ops/test_x.py::test[{i}]" for i in range(40)]
    chosen = [thread_order.settings_of(name, day) for name in names for day in (7, 8)]
    seeds = {each["GPT2FAST_SIM_SEED"] for each in chosen}
    assert len(seeds) > 70 and {each["GPT2FAST_SIM_ORDER"] for each in chosen} == {"random"}
    assert {each["GPT2FAST_SIM_ASYNC"] for each in chosen} == {"deferred", "immediate"}
    assert thread_order.settings_of(names[0], 7) == chosen[0]


FAILS = """
import os
from thread_order import THREAD_ORDER

def test_without_the_simulator():
    assert False

def test_in_the_simulator():
    print("seed", os.environ["GPT2FAST_SIM_SEED"])
    THREAD_ORDER.simulated = True
    assert False
"""


@pytest.mark.parametrize("named", [{}, {"GPT2FAST_SIM_ORDER": "lifo", "GPT2FAST_SIM_SEED": "5"}])
def test_a_failure_names_the_order_that_repeats_it(tmp_path, named):
    (tmp_path / "test_fails.py").write_text(FAILS)
    environment = {k: v for k, v in os.environ.items() if k not in thread_order.VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-c"]
    done = subprocess.run(
        [*command, str(ROOT / "pyproject.toml"), str(tmp_path)],
        cwd=tmp_path, env=environment | named, capture_output=True, text=True,
    )  # fmt: skip
    said = "The same order of the simulator's threads once more: "
    assert done.stdout.count(said) == 1, done.stdout
    order = done.stdout.partition(said)[2].partition("\n")[0]
    seed = done.stdout.partition("seed ")[2].split()[0]
    if named:
        assert order == "GPT2FAST_SIM_ORDER=lifo GPT2FAST_SIM_SEED=5" and seed == "5"
    else:
        assert f"GPT2FAST_SIM_ORDER=random GPT2FAST_SIM_SEED={seed} GPT2FAST_SIM_ASYNC=" in order


def test_a_slower_machine_has_longer_limits(request, monkeypatch):
    before = request.node.get_closest_marker("timeout")  # this test has its own limit already
    usual = before.args[0] if before is not None and before.args else time_limits.LIMIT
    monkeypatch.setattr(time_limits, "_work", lambda: 4 * time_limits.QUIET)
    monkeypatch.setattr(time_limits.os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    time_limits.Clock().set_limit(request.node)
    assert request.node.get_closest_marker("timeout").args == (pytest.approx(4 * usual),)
    monkeypatch.setattr(time_limits, "_work", lambda: time_limits.QUIET / 4)
    request.node.add_marker(pytest.mark.timeout(7.0), append=False)
    time_limits.Clock().set_limit(request.node)
    assert request.node.get_closest_marker("timeout").args == (7.0,)
