"""Time several ways of one computation on a GPU, in turns, and hold them against the floor.

The floor is what the machine allows: the bytes that have to move at the speed of a copy that was
measured here, or the operations at the rate of a matrix product, whichever takes longer.

Calls go through a CUDA graph, so that what is timed is the GPU's work and not Python's; a way that
cannot be captured is timed as it is, and the row says so. Each call of a graph has other inputs,
together more than the second-level cache holds. All are random: zeros draw less power and run
faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from picture import CAN_DRAW, picture

_ROUNDS = 15
_SECONDS = 0.02  # that one measurement lasts, at least


@dataclass(frozen=True)
class Work:
    """The least work of a computation."""

    bytes: float
    """Read once and written once."""
    flops: float = 0.0
    """In matrix products; a multiplication and an addition are two."""
    dtype: torch.dtype = torch.bfloat16
    """Dtype of the products' operands."""
    tokens: float = 0.0
    """Generated, where it is these that count."""

    def floor(self) -> float:
        """Seconds."""
        products = self.flops / product_rate(self.dtype) if self.flops else 0.0
        return max(self.bytes / copy_bandwidth(), products)

    def amount(self) -> tuple[float, str]:
        """The quantity counted per second, and its unit."""
        if self.tokens:
            return self.tokens, "tok/s"
        return (self.flops / 1e12, "TFLOP/s") if self.flops else (self.bytes / 1e9, "GB/s")


@dataclass(frozen=True)
class Row:
    """One way of one computation."""

    benchmark: str
    way: str
    seconds: float
    """Median of one call."""
    ratio: float
    """Its time over that of the first way, ours, in the same rounds: above 1, ours is faster."""
    share: float
    """Share of the floor: 1 is as fast as the machine allows."""
    rate: float
    unit: str
    peak_bytes: int
    """Memory that one call takes beyond its inputs."""
    graph: bool
    """True if it was timed in a CUDA graph."""


def contest(
    benchmark: str,
    ways: Mapping[str, Callable[..., Any]],
    inputs: Sequence[tuple[Any, ...]],
    work: Work,
    capture: bool = True,
) -> list[Row]:
    """Time each way of a computation; the first is ours.

    Args:
        inputs: sets of arguments, taken in turn.
        capture: false where the ways bring CUDA graphs of their own.
    """
    runs = {}
    for way, function in ways.items():
        peak = _peak(function, inputs[0])
        replay, captured = _captured(function, inputs) if capture else (function, True)
        runs[way] = (replay, captured, peak, _repeats(replay))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_ROUNDS):
        for way, (replay, _, _, repeats) in runs.items():
            seconds[way].append(_time(replay, repeats) / len(inputs))
    rows = []
    first = next(iter(ways))
    floor, (amount, unit) = work.floor(), work.amount()
    for way, (_, captured, peak, _) in runs.items():
        median = statistics.median(seconds[way])
        ratios = [a / b for a, b in zip(seconds[way], seconds[first], strict=True)]
        rows.append(
            Row(
                benchmark,
                way,
                median,
                statistics.median(ratios),
                floor / median,
                amount / median,
                unit,
                peak,
                captured,
            )  # fmt: skip
        )
    return rows


def sets_beyond_cache(bytes_a_set: float) -> int:
    """The number of sets of inputs that together exceed twice the second-level cache."""
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    return max(2, min(32, -(-2 * cache_bytes // int(bytes_a_set))))


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(_time(lambda: target.copy_(source), 5) for _ in range(9))
    return 2 * source.numel() * source.element_size() / seconds


@cache
def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of torch's product of two large matrices."""
    size = 8192
    a, b = torch.randn(2, size, size, device="cuda").to(dtype)
    seconds = statistics.median(_time(lambda: torch.mm(a, b), 5) for _ in range(9))
    return 2 * size**3 / seconds


def describe() -> dict[str, Any]:
    """The device and the versions that figures depend on."""
    properties = torch.cuda.get_device_properties()
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_gb_per_second": copy_bandwidth() / 1e9,
        "bfloat16_tflops": product_rate(torch.bfloat16) / 1e12,
    }


def as_markdown(rows: Sequence[Row]) -> str:
    """A table of rows."""
    lines = [
        "| benchmark | way | us | theirs / ours | of the floor | rate | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        way = row.way if row.graph else f"{row.way} (no graph)"
        lines.append(
            f"| {row.benchmark} | {way} | {row.seconds * 1e6:.1f} | {row.ratio:.2f} | "
            f"{row.share:.2f} | {row.rate:.0f} {row.unit} | {row.peak_bytes / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], file: Path) -> None:
    """A bar for each row: its share of the floor. Nothing without matplotlib."""
    if not CAN_DRAW:
        return
    colors = {"ours": "tab:red", "ours (Triton)": "tab:orange"}
    with picture(file, 9, 1 + 0.2 * len(rows)) as (axis,):
        axis.barh(
            [f"{row.benchmark}: {row.way}" for row in rows],
            [row.share for row in rows],
            color=[colors.get(row.way, "tab:gray") for row in rows],
        )
        axis.axvline(1, color="black", linestyle=":")
        axis.invert_yaxis()
        axis.set_xlabel("share of the floor")
        axis.tick_params(labelsize=6)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [asdict(row) for row in rows]


def _peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    function(*arguments)  # libraries load, kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _captured(
    function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]
) -> tuple[Callable[[], Any], bool]:
    def run() -> None:
        for arguments in inputs:
            function(*arguments)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            run()
    except RuntimeError:  # it waits for the host: a capture that fails would spoil those to come
        return run, False
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, True


def _repeats(run: Callable[[], Any]) -> int:
    run()
    return max(1, round(_SECONDS / max(_time(run, 3), 1e-6)))


def _time(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of one run, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
