"""Fragments and swizzles lie where NVIDIA's CuTe says that they lie."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def mismatches(simulator: ModuleType) -> dict[str, int]:
    if not hasattr(simulator, "layout_mismatches"):
        pytest.skip("no CUTLASS headers: install nvidia-cutlass")
    return simulator.layout_mismatches()


def test_layouts_are_those_of_cute(mismatches: dict[str, int]) -> None:
    assert mismatches.pop("ldmatrix x4 against trans") > 0  # the comparison can fail
    assert set(mismatches) >= {
        "mma bf16",
        "mma fp16",
        "ldmatrix x4",
        "ldmatrix x4 trans",
        "128-byte swizzle",
        "wgmma bf16 n64",
        "wgmma bf16 n128",
    }
    assert not any(mismatches.values()), mismatches
