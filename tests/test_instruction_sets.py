"""On every instruction set of this processor the ops are right, and models write the same text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from gpt2fast.kernels.toolchain import source_folder
from gpt2fast.ops.native import unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

TESTS = Path(__file__).parent
CPU = source_folder() / "cpu"
ISAS = sorted(path.stem for path in (CPU / "isa").glob("*.cpp"))

PROBE = """
import torch
from gpt2fast.ops.native import unavailable
unavailable()
print(torch.ops.gpt2fast_native.isa())
"""

GREEDY = """
import json
from gpt2fast import Generator, GPT2, Tokenizer
tokenizer = Tokenizer.from_pretrained("adventures")
generator = Generator(GPT2.from_pretrained("adventures").eval().pack(), tokenizer)
prompts = ["Once upon a time there was an old wolf.", "The captain", "It was a dark night and"]
print(json.dumps([generator(p, max_new_tokens=40, temperature=0.0).text for p in prompts]))
"""


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GPT2FAST_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True,
        cwd=TESTS.parent, check=False,
    )  # fmt: skip


def need(isa: str) -> None:
    """Skip unless the processor has the instruction set, which then has to be the one that runs."""
    found = run(isa, "-c", PROBE)
    if "cannot run on this processor" in found.stderr:
        pytest.skip(f"no {isa} here")
    assert found.stdout.split()[-1:] == [isa], found.stderr


@cache
def greedy(isa: str) -> list[str]:
    done = run(isa, "-c", GREEDY)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_can_be_chosen(isa):
    assert f"{{&kernels_{isa}, " in (CPU / "isa.cpp").read_text()


@pytest.mark.parametrize("isa", ISAS)
def test_ops_are_right_on_every_instruction_set(isa):
    need(isa)
    # Where only the step is its own, the ops run the same machine code as another set's.
    shared = re.search(r"#define GPT2FAST_OPS_OF", (CPU / "isa" / f"{isa}.cpp").read_text())
    where = TESTS / "ops" / "test_packed_borders.py" if shared else TESTS / "ops"
    done = run(isa, "-m", "pytest", "-q", "-x", "-k", "native or packed_borders", str(where))
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_writes_the_same_text(isa):
    """In float32. Sums of int8 and int4 are exact, but a last bit of a float sum between them can
    change how an activation is rounded to 8 bits, and so a close choice."""
    need(isa)
    assert greedy(isa) == greedy("portable")
