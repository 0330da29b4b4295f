"""A good checkpoint to damage, and the bounds of time and memory in which it is refused."""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, Error, GPT2Config

SECONDS = 5
MEGABYTES = 300

CONFIG = GPT2Config(
    vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=16
)
torch.manual_seed(0)
MODEL = GPT2(CONFIG)
STATE = {name: tensor.detach() for name, tensor in MODEL.state_dict().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MODEL.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch) -> Path:
    """A good checkpoint, the working directory of the test, to be damaged by it."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(load: Callable[[], object], file: Path) -> str:
    """`load` raises one Error that names `file`, within bounds of time and memory."""
    faulthandler.dump_traceback_later(60, exit=True)  # a hang ends the run, and says where
    with suppress(OSError):  # Linux: forget the highest memory use so far
        Path("/proc/self/clear_refs").write_text("5")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()  # what other programs do meanwhile does not count
    try:
        with pytest.raises(Error) as caught:
            load()
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - start
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    message = str(caught.value)
    assert file.name in message
    assert len(message) < 2000
    assert seconds < SECONDS
    assert growth < MEGABYTES * 1024
    assert not os.path.exists("canary"), "the file's code was run"
    return message


def refused(path: Path, file: Path | None = None) -> str:
    return assert_refused(lambda: GPT2.from_pretrained(path), file or path)
