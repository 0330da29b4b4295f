"""Memory on huge pages: the weights' and the cache's."""

from pathlib import Path

import pytest
import torch

from gpt2fast import KVCache
from gpt2fast._system.memory import zeros


def mapping(tensor):
    """The permissions and flags of the mapping that holds the middle of a tensor."""
    middle = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            inside, permissions = begin <= middle < end, words[1]
        elif inside and words[0] == "VmFlags:":
            return permissions, words[1:]
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a system without huge pages"
)
@pytest.mark.parametrize(
    "tensor",
    [zeros((3 << 20,), torch.bfloat16), KVCache(2, 1, 1024, 12, 64, torch.float32).v],
    ids=["memory", "cache"],
)
def test_large_tensors_ask_for_huge_pages(tensor):
    permissions, flags = mapping(tensor)
    assert permissions == "rw-p"  # shared memory would have other rules
    assert "hg" in flags


@pytest.mark.parametrize("rows", [1, 1 << 20])
def test_a_tensor_of_zeros_like_any_other(rows):
    tensor = zeros((rows, 3), torch.float32)
    assert tensor.shape == (rows, 3) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert not tensor.any()
    tensor[-1] = torch.tensor([1.0, 2.0, 3.0])
    assert tensor.clone()[-1].tolist() == [1, 2, 3]
    assert zeros((rows, 3)).dtype == torch.get_default_dtype()


def test_an_empty_tensor():
    assert zeros((0, 5)).shape == (0, 5)
