"""A server that the tests of this folder share, and the same model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2fast import Generator


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    from server_process import save_model

    return save_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def generator(small: Path) -> Generator:
    """The model that the server has."""
    return Generator.from_pretrained(small)


@pytest.fixture(scope="session")
def server(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A server with the defaults."""
    for package in ("starlette", "uvicorn", "prometheus_client", "httpx"):
        pytest.importorskip(package)
    from server_process import serving

    with serving(small, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def client(server) -> Iterator:
    """An HTTP client of it."""
    import httpx

    with httpx.Client(base_url=server.url, timeout=120) as found:
        yield found
