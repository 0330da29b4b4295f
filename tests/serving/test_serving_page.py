"""docs/serving.md: its client runs, its forms are taken, and its lists are those of the server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from documentation import ROOT, fences
from gpt2fast.serving.limits import Limits
from server_process import NAME

PAGE = ROOT / "docs" / "serving.md"
TEXT = PAGE.read_text(encoding="utf-8")
FENCES = fences(PAGE)


def test_the_client_runs(server, capsys):
    pytest.importorskip("openai")
    (fence,) = [fence for fence in FENCES if fence.language == "py"]
    fence.execute({"http://127.0.0.1:8000": server.url, "adventures": NAME})
    assert capsys.readouterr().out.strip()


def test_the_forms_are_taken(client):
    pytest.importorskip("llguidance")
    (fence,) = [fence for fence in FENCES if fence.language == "json"]
    for line in fence.text.splitlines():
        body = {"prompt": "a", "max_tokens": 3, "response_format": json.loads(line)}
        assert client.post("/v1/completions", json=body).status_code == 200, line


def test_every_limit_endpoint_and_metric_is_named(client):
    for field in fields(Limits):
        assert f"`--{field.name.replace('_', '-')}`" in TEXT
    for path in client.get("/openapi.json").json()["paths"]:
        assert path.replace("{name}", "NAME") in TEXT
    for name in re.findall(r"^# TYPE (gpt2fast_\w+)", client.get("/metrics").text, re.MULTILINE):
        if name.endswith("_created"):  # when each counter began
            continue
        assert f"`{name}`" in TEXT or f"`{name}{{" in TEXT or f"`{name}_total" in TEXT, name


def test_every_field_of_completions_is_named(client):
    schema = client.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]["requestBody"]
    for name in schema["content"]["application/json"]["schema"]["properties"]:
        assert f"`{name}" in TEXT or name in ("store", "penalty_alpha"), name


def test_systemd_takes_the_unit(tmp_path: Path):
    analyzer = shutil.which("systemd-analyze")
    if analyzer is None:
        pytest.skip("no systemd-analyze")
    (fence,) = [fence for fence in FENCES if fence.language == "ini"]
    unit = tmp_path / "gpt2fast.service"
    unit.write_text(re.sub(r"/opt/\S+/gpt2fast serve", "/bin/true serve", fence.text))
    done = subprocess.run([analyzer, "verify", str(unit)], capture_output=True, text=True)
    mine = [line for line in done.stderr.splitlines() if "gpt2fast.service" in line]
    assert not mine, mine
