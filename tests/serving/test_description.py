"""The OpenAPI description: schemathesis finds nothing in the server that it does not say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from server_process import Server, serving
from time_limits import patience

httpx = pytest.importorskip("httpx")
KEY = "a-key-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def described(small, tmp_path_factory) -> Iterator[Server]:
    """A server whose answers are short."""
    for package in ("starlette", "uvicorn", "prometheus_client", "llguidance"):
        pytest.importorskip(package)
    flags = ("--max-tokens", "8", "--max-choices", "4", "--max-prompts", "4", "--api-key", KEY)
    with serving(small, tmp_path_factory.mktemp("described"), *flags) as found:
        yield found
        assert found.log("failure") == []


def test_it_names_every_endpoint_and_every_limit(described):
    found = httpx.get(
        described.url + "/openapi.json", headers={"authorization": f"Bearer {KEY}"}
    ).json()
    assert found["openapi"].startswith("3.1")
    needed = "/v1/completions /v1/chat/completions /v1/embeddings /v1/models /tokenize /detokenize"
    assert {*needed.split(), "/health", "/ready", "/version", "/metrics"} <= set(found["paths"])
    operation = found["paths"]["/v1/completions"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["max_tokens"]["maximum"] == 8
    assert body["required"] == ["prompt"] and body["additionalProperties"] is False
    assert all(field.get("description") or name == "model" for name, field in
               body["properties"].items())  # fmt: skip


@pytest.mark.timeout(600)
def test_schemathesis_finds_nothing(described, tmp_path):
    """Bodies that the description allows are never answered 5xx, all others are refused, and
    every answer is of a kind, a status and a shape that it names."""
    pytest.importorskip("schemathesis")
    code = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [
        sys.executable, "-c", code, "run", described.url + "/openapi.json",
        "--header", f"Authorization:Bearer {KEY}", "--checks", "all",
        # What a schema allows may still be too long for the model, or two fields may not fit.
        "--exclude-checks", "positive_data_acceptance",
        "--phases", "coverage,fuzzing", "--max-examples", "8", "--seed", "1",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=patience(), check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: " in done.stdout
