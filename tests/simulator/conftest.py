"""Programs for the simulator's tests, built once, and again only if the source changed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import gallery
from programs import Missing, build


@pytest.fixture(scope="session")
def build_folder(pytestconfig: pytest.Config) -> Path:
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("simulator"))


@pytest.fixture(scope="session")
def built_module(build_folder: Path) -> ModuleType:
    pytest.importorskip("pybind11")
    try:
        folder = build("simulator_tests", build_folder / "plain")
    except Missing as missing:
        pytest.skip(str(missing))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("simulator_tests")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def simulator(built_module: ModuleType) -> Iterator[ModuleType]:
    """The simulated machine, with its first settings before and after."""
    built_module.use_settings()
    built_module.reset_statistics()
    yield built_module
    built_module.use_environment()


@pytest.fixture(scope="session")
def galleries(build_folder: Path) -> dict[str, Path]:
    try:
        return gallery.build_galleries(build_folder)
    except Missing as missing:
        pytest.skip(str(missing))
