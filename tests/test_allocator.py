from __future__ import annotations

import subprocess
import sys

import pytest

_COUNT_FAULTS = """
import resource, sys, torch
from gpt2fast.training.machine.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
before = faults()
for _ in range(4):
    torch.ones(16 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc only")
def test_kept_memory_is_not_faulted_in_again():
    def page_faults(mode: str) -> int:
        command = [sys.executable, "-c", _COUNT_FAULTS, mode]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    # Four times 64 MB, in pages of 4 KiB or, where the system gives them, of 2 MiB.
    assert page_faults("default") >= 4 * 32
    assert page_faults("keep") < 32
