"""A run's tensors in shards, as torch.distributed.checkpoint writes them."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from gpt2fast.training.checkpoints.shards import save_tensors
from gpt2fast.training.distributed import Group


def test_ctrl_c_while_torch_writes_stays_an_interruption(tmp_path, monkeypatch):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSystemWriter, "write_data", press)
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"x": torch.ones(3)}, tmp_path / "optimizer", Group("cpu"))
