"""Fixtures that every room's tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rotation
from thread_order import THREAD_ORDER
from time_limits import CLOCK

# The tests' tensors are small: threads would wait for each other longer than they compute.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    # Triton reads this when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header(config: pytest.Config) -> str:
    return rotation.header(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rotation.select(config, items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if item.config.pluginmanager.hasplugin("timeout"):
        CLOCK.set_limit(item)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, object]:
    report = yield
    if report.failed and (order := THREAD_ORDER.explanation()):
        report.sections.append(("simulator", order))
    return report


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real texts and vocabularies; skips where there is none."""
    named = os.environ.get("GPT2FAST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is not a folder (set GPT2FAST_DATA)")
    return folder


@pytest.fixture(scope="session")
def nanogpt() -> ModuleType:
    """nanoGPT's model.py, from the checkout that GPT2FAST_NANOGPT names; skips without one."""
    folder = os.environ.get("GPT2FAST_NANOGPT")
    if not folder or not (Path(folder) / "model.py").is_file():
        pytest.skip("GPT2FAST_NANOGPT names no checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs the simulator's threads in an order of its own."""
    for variable, value in THREAD_ORDER.begin(request.node.nodeid, rotation.day()).items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Puts a pipe, a folder or a device in the place of a file, in the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def make(kind: str, path: Path) -> Path:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
        return path

    return make


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, seeded: None) -> Iterator[None]:
    """Tests of a backend called "cuda..." create their tensors on the GPU."""
    callspec = getattr(request.node, "callspec", None)
    name = callspec.params.get("name") if callspec is not None else None
    if isinstance(name, str) and name.startswith("cuda"):
        with torch.device("cuda"):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def compiled_afresh() -> Iterator[None]:
    """Forgets what a test compiled: torch compiles a function for eight models, no more."""
    yield
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.reset()
