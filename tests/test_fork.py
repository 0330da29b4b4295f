"""Servers and pools fork processes that have computed already; the children compute as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
