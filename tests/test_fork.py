"""Servers and pools fork processes that have computed already; the children compute as well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from time_limits import deadline, patience

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# In a process of its own, whose threads are as many as a user's.
SCRIPT = """
import multiprocessing, os, signal, sys
import torch
torch.set_num_threads(2)
from gpt2fast import GPT2, GPT2Config

torch.manual_seed(0)
model = GPT2(GPT2Config(
    n_layer=2, n_head=4, n_embd=256, vocab_size=5000, n_positions=512, eos_token_id=None,
)).eval()

def ids(rows, length):
    return torch.arange(rows * length).view(rows, length) % 4999

def train():
    loss = model(ids(8, 128), labels=ids(8, 128)).loss
    loss.backward()
    return loss.item()

JOBS = {
    "long text": lambda: model.generate(ids(1, 8), max_new_tokens=100).tolist(),
    "batch": lambda: model.generate(ids(16, 8), max_new_tokens=10).tolist(),
    "beams": lambda: model.generate(ids(2, 8), max_new_tokens=10, num_beams=4).tolist(),
    "long prompt": lambda: model.generate(ids(1, 400), max_new_tokens=5).tolist(),
    "training": train,
}
"""
FORKED = """
job = JOBS[sys.argv[1]]
expected = job()
child = os.fork()
if child == 0:
    signal.alarm(120)
    found = job()
    os._exit(0 if found == expected or abs(found - expected) < 1e-3 else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
POOL = """
def work(name):
    signal.alarm(120)
    return JOBS[name]()

expected = work("batch")
signal.alarm(0)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(work, ["batch", "batch"]) == [expected, expected]
"""


def run(code: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.parametrize("job", ["long text", "batch", "beams", "long prompt", "training"])
def test_a_forked_child_computes_what_its_parent_has_computed(job):
    run(SCRIPT + FORKED, job)


def test_a_pool_of_forked_processes_computes():
    run(SCRIPT + POOL)


# An application as `gunicorn --preload` imports it: it has written before its workers are forked.
APPLICATION = (
    SCRIPT
    + """
import json
EXPECTED = JOBS["long text"]()
BATCH = JOBS["batch"]()

def application(environ, start_response):
    found = {
        "worker": os.getpid(), "parent": os.getppid(),
        "long text": JOBS["long text"]() == EXPECTED, "batch": JOBS["batch"]() == BATCH,
    }
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(found).encode()]
"""
)


def test_workers_of_a_gunicorn_that_has_written_before_the_fork_write(tmp_path):
    pytest.importorskip("gunicorn", reason='needs gunicorn: pip install "gpt2fast[test]"')
    (tmp_path / "application.py").write_text(APPLICATION)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2"]
    # A worker answers one request at a time, and waits for none that a client keeps open.
    options = ["--worker-class", "sync", "--timeout", str(int(patience())), "--bind", "127.0.0.1:0"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [*command, *options, "application:application"],
            cwd=tmp_path, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        end = deadline()
        port = None
        while port is None:
            said = (tmp_path / "log").read_text(errors="replace")
            assert server.poll() is None and time.monotonic() < end, said
            port = re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", said)
            time.sleep(0.05)
        answered: dict[int, dict] = {}
        while len(answered) < 2:
            assert time.monotonic() < end, f"only {list(answered)} answered: {said}"
            # Two at once, so that both workers have something to do.
            with ThreadPoolExecutor(2) as pool:
                for found in pool.map(lambda _: ask(int(port[1]), end), range(2)):
                    answered[found["worker"]] = found
        assert {found["parent"] for found in answered.values()} == {server.pid}
        for found in answered.values():
            assert found["long text"] and found["batch"], "a worker writes what its parent wrote"
    finally:
        server.terminate()
        try:
            server.wait(patience())
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def ask(port: int, end: float) -> dict:
    left = max(1.0, end - time.monotonic())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=left) as answer:
        return json.loads(answer.read())
