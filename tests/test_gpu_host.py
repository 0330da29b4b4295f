"""The host's side of work on a GPU, on a machine without one, where stand-ins are one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.inference import packing, transfers


def small_model() -> GPT2:
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=64)
    return GPT2(config).eval()


def test_a_model_elsewhere_has_no_use_for_the_cpus_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(packing, "unavailable", lambda: asked.append(True))
    assert not small_model().to("meta").can_be_packed()
    assert asked == [], "they would be compiled now"
    assert small_model().can_be_packed() and asked


@dataclass
class FakeEvent:
    """Stand-in for `torch.cuda.Event`: where it was recorded."""

    recorded: list[str] = field(default_factory=list)

    def record(self, stream: str) -> None:
        self.recorded.append(stream)


@dataclass
class FakeTensor:
    """Stand-in for a tensor: what was asked of it."""

    device: torch.device
    pinned: bool = False
    non_blocking: bool | None = None
    shape: tuple[int, ...] = (3,)
    dtype: torch.dtype = torch.int64

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def pin_memory(self) -> FakeTensor:
        return FakeTensor(self.device, pinned=True)

    def to(self, device: torch.device, non_blocking: bool = False) -> FakeTensor:
        return FakeTensor(device, self.pinned, non_blocking)

    def copy_(self, other: FakeTensor, non_blocking: bool = False) -> FakeTensor:
        self.non_blocking = non_blocking
        return self


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    """Two devices, the first of which is the current one, as it is by default."""

    def empty(shape, *, dtype, device=None, pin_memory=False):
        assert not pin_memory or device == "cpu", "only the CPU's memory can be pinned"
        return FakeTensor(torch.device("cpu"), pinned=pin_memory)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: f"stream of {device or 'cuda:0'}"
    )


def test_the_host_waits_for_the_stream_of_the_tensors_own_device(two_gpus):
    host, done = transfers.to_host(FakeTensor(torch.device("cuda:1")))
    assert host.device.type == "cpu" and host.pinned and host.non_blocking
    assert done is not None and done.recorded == ["stream of cuda:1"]


def test_nothing_waits_for_what_is_sent_to_a_gpu(two_gpus):
    there = transfers.to_device(FakeTensor(torch.device("cpu")), torch.device("cuda:1"))
    assert (there.device, there.pinned, there.non_blocking) == (torch.device("cuda:1"), True, True)


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.arange(3)
    assert transfers.to_device(tensor, torch.device("cpu")) is tensor
    assert transfers.to_host(tensor) == (tensor, None)
