"""Model FLOPs utilization (MFU), the share of the machine that a run uses (Chowdhery et al., 2022,
PaLM, appendix B).

    MFU = tokens per second * FLOPs per token / the machine's peak FLOP/s

Only what the model needs is counted: activations that are computed a second time to save memory are
not.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from ...config import GPT2Config


def flops_per_token(config: GPT2Config, block_size: int, trained: int | None = None) -> int:
    """FLOPs of a training step (forward and backward pass) for each token.

    `6 N + 12 L H Q T` with L layers, H heads of size Q and T = `block_size`. N counts the
    parameters that a token is multiplied with: all of them except the position embeddings, and
    the token embeddings where they are not the output projection as well. (nanoGPT counts the
    same.) The second term is attention to T tokens, as in the paper; a causal model needs only half
    of it, which is not subtracted.

    Args:
        config: of the model.
        block_size: T.
        trained: parameters that get gradients; None means all. Each of the others saves 2 FLOPs.
            Those of adapters are not counted.
    """
    looked_up = config.n_positions * config.n_embd
    if not config.tie_word_embeddings:
        looked_up += config.vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_dim * block_size
    multiplied = config.parameter_count - looked_up
    trained = multiplied if trained is None else min(trained, multiplied)
    return 4 * multiplied + 2 * trained + attention


@dataclass(frozen=True)
class Peak:
    """The speed at which MFU is 1."""

    flops: float
    """FLOP/s of one device."""
    source: str
    """The number and its origin, for people."""


# Dense TFLOP/s by data sheet: bfloat16, float16, TF32, float32 without tensor cores. Products are
# summed in float32, which GeForce cards do at half speed. A device has the first line whose words
# are all in its name.
_DATA_SHEETS: tuple[tuple[str, float | None, float | None, float | None, float], ...] = (
    ("B200", 2250, 2250, 1125, 75),
    ("GH200", 989.4, 989.4, 494.7, 66.9),
    ("H200 NVL", 835.5, 835.5, 417.5, 60),
    ("H200", 989.4, 989.4, 494.7, 66.9),
    ("H100 NVL", 835.5, 835.5, 417.5, 60),
    ("H100 PCIe", 756, 756, 378, 51),
    ("H100", 989.4, 989.4, 494.7, 66.9),
    ("H20", 148, 148, 74, 44),
    ("A100", 312, 312, 156, 19.5),
    ("A800", 312, 312, 156, 19.5),
    ("A30", 165, 165, 82, 10.3),
    ("A40", 149.7, 149.7, 74.8, 37.4),
    ("A10", 125, 125, 62.5, 31.2),
    ("RTX A6000", 154.8, 154.8, 77.4, 38.7),
    ("L4", 121, 121, 60, 30.3),
    ("L40", 181, 181, 90.5, 90.5),
    ("L40S", 362, 362, 183, 91.6),
    ("RTX 3090", 71, 71, 35.6, 35.6),
    ("RTX 4090", 165.2, 165.2, 82.6, 82.6),
    ("RTX 5090", 209.5, 209.5, 104.8, 104.8),
    ("V100 SXM2", None, 125, None, 15.7),
    ("V100 PCIE", None, 112, None, 14),
    ("T4", None, 65, None, 8.1),
)
_OTHER_CHIPS = {"laptop", "mobile", "max", "mig", "ti", "super", "d", "dc"}
"""Words after which a name means a slower or a faster chip, or a part of one."""


def gpu_peak(name: str, dtype: torch.dtype, tf32: bool = False) -> Peak | None:
    """The data sheet's peak of a GPU; None where it is not known.

    Args:
        name: as torch.cuda.get_device_name gives it.
        dtype: of the factors of the matrix products.
        tf32: float32 products run on tensor cores.
    """
    words = set(re.split(r"[\s-]+", name.lower()))
    if words & _OTHER_CHIPS:
        return None
    column = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3 if tf32 else 4}.get(dtype)
    for row in _DATA_SHEETS:
        if column is not None and set(row[0].lower().split()) <= words:
            found = row[column]
            kind = "TF32" if column == 3 else str(dtype).removeprefix("torch.")
            if not isinstance(found, (int, float)):
                return None
            return Peak(found * 1e12, f"{found:g} TFLOP/s, {name}'s data sheet, {kind}, dense")
    return None


def measured_peak(dtype: torch.dtype, seconds: float = 0.2) -> Peak:
    """The fastest torch.mm that this CPU makes within about that many seconds."""

    def timed(size: int) -> float:
        matrix = torch.full((size, size), 1 / size, dtype=dtype, device="cpu")
        result = torch.empty_like(matrix)
        began = time.perf_counter()
        torch.mm(matrix, matrix, out=result)
        return max(time.perf_counter() - began, 1e-9)

    end = time.perf_counter() + seconds
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        # The first call of a kind prepares; another may have to wait for a processor.
        small = min(timed(256) for _ in range(5))
        # A type that the processor lacks is slow: 64 times the work would take too long.
        size = 1024 if 64 * small < seconds / 2 else 256
        best = small if size == 256 else timed(size)
        while time.perf_counter() < end:
            best = min(best, timed(size))
    flops = 2 * size**3 / best
    kind, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    return Peak(
        flops,
        f"{flops / 1e9:.3g} GFLOP/s, torch.mm of {size} x {size} matrices measured here, {kind}, "
        f"{threads} thread{'s' if threads > 1 else ''}",
    )


def peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """The peak of one device: a GPU's by its data sheet, a CPU's as measured in 0.2 seconds."""
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return gpu_peak(torch.cuda.get_device_name(device), dtype, tf32)
    return measured_peak(dtype) if device.type == "cpu" else None
