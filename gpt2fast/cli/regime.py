"""What bounds decoding on this machine, for `gpt2fast benchmark`: its memory, what a core can load,
or computing. Each is measured by itself, and the lowest of them is the answer."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..config import GPT2Config
from ..inference.packed import PackedGPT2
from ..ops import native
from ..ops.packed import MatrixFormat, ModelShape, PackedWeights, QuantizedMatrix

_READ_BYTES = 512 << 20
_READ_PASSES = 5

_PROBE_WIDTH = 256
_PROBE_BYTES = 256 << 10
"""A thread's part of the probe's weights: half of a small second level of cache."""
_PROBE_SECONDS = 0.3
_PROBE_POSITIONS = 64

_NO_LESS = 0.7
"""The share of the lowest bound from which on it counts as the reason."""
_NO_GAIN = 0.85
"""Threads that read at least this share of what each would alone are not held up by each other."""


@dataclass(frozen=True)
class MemorySpeed:
    """Bytes per second that the memory gives, measured next to each other."""

    threads: int
    """Torch's threads, which decode."""
    cores: int
    """Cores that this process may use."""
    one: float
    """To one thread."""
    together: float
    """To all of torch's threads."""
    every_core: float
    """To as many threads as there are cores; `together` where torch uses them all."""


def memory_speed() -> MemorySpeed | None:
    """Measure it; None without compiled kernels."""
    if native.loaded() is None:
        return None
    threads, cores = torch.get_num_threads(), _cores()
    together = _read(threads)
    return MemorySpeed(
        threads,
        cores,
        one=_read(1) if threads > 1 else together,
        together=together,
        every_core=_read(cores) if cores > threads else together,
    )


def read_bandwidth() -> float | None:
    """Bytes per second that torch's threads read from memory; None without compiled kernels."""
    return None if native.loaded() is None else _read(torch.get_num_threads())


def _read(threads: int) -> float:
    return torch.ops.gpt2fast_native.read_bandwidth(threads, _READ_BYTES, _READ_PASSES)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def computing_speed(form: MatrixFormat, rows: int) -> float | None:
    """Bytes of weights per second that torch's threads multiply with `rows` rows while the weights
    lie in the cores' own caches; None where the clock does not tell.

    It comes from steps of two tiny models that differ in their vocabulary alone, so that neither
    calls nor attention count.
    """
    threads = torch.get_num_threads()
    columns = threads * (_PROBE_BYTES * 8 // _bits(form) // _PROBE_WIDTH)
    probes = [_probe(form, vocabulary) for vocabulary in (32 * threads, 32 * threads + columns)]
    best = _fastest([_stepper(probe, rows) for probe in probes])
    if best[1] <= best[0]:
        return None
    return (probes[1].weight_bytes - probes[0].weight_bytes) / (best[1] - best[0])


def _probe(form: MatrixFormat, vocabulary: int) -> PackedGPT2:
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=_PROBE_POSITIONS, n_embd=_PROBE_WIDTH, n_layer=1,
        n_head=_PROBE_WIDTH // 64, n_inner=32,
    )  # fmt: skip
    shape = ModelShape(
        config.n_head, _PROBE_WIDTH, 32, vocabulary, _PROBE_POSITIONS,
        config.activation_function, config.layer_norm_epsilon, (0.125,), tied=True,
    )  # fmt: skip
    weights = PackedWeights(shape, dict.fromkeys(shape.matrices(), form))
    for name, (inputs, outputs) in shape.matrices().items():
        # Written, whatever the values: memory that was only read would be one page of zeros.
        if form.group:
            q = torch.ones(inputs, outputs, dtype=torch.int8)
            scales = torch.ones(-(-inputs // form.group), outputs, dtype=torch.float16)
            weights.put(name, QuantizedMatrix(q, scales, _bits(form), form.group))
        else:
            weights.put(name, torch.ones(inputs, outputs))
    return PackedGPT2(config, weights)


def _bits(form: MatrixFormat) -> int:
    return int(re.findall(r"\d+$", form.name)[0])


def _stepper(model: PackedGPT2, rows: int) -> Callable[[], float]:
    """A function that takes one decoding step and returns its seconds."""
    tokens = torch.zeros(rows, dtype=torch.int64)
    cache = model.new_cache(rows)
    steps = 0

    def step() -> float:
        nonlocal cache, steps
        if steps == _PROBE_POSITIONS:
            cache, steps = model.new_cache(rows), 0
        steps += 1
        start = time.perf_counter()
        model.decode_step(tokens, cache)
        return time.perf_counter() - start

    return step


def _fastest(steps: Sequence[Callable[[], float]]) -> list[float]:
    """Each one's least seconds, taken in turns."""
    best = [float("inf")] * len(steps)
    end = time.perf_counter() + _PROBE_SECONDS * len(steps)
    while time.perf_counter() < end:
        for index, step in enumerate(steps):
            # The second of two finds its weights in the caches.
            step()
            best[index] = min(best[index], step())
    return best


def bound(reached: float, bandwidth: float, memory: MemorySpeed, computing: float) -> str:
    """What holds decoding up: "memory", "loading" (what a core can load), "computing", or "other"
    where it stays far below each of these.

    Args:
        reached: bytes of weights, keys and values that decoding read per second.
        bandwidth: what memory gave while it did; it may have changed since `memory`.
        memory, computing: of `memory_speed` and `computing_speed`.
    """
    if reached < _NO_LESS * min(bandwidth, computing):
        return "other"
    if computing < bandwidth:
        return "computing"
    if memory.cores == 1:
        return "memory"  # nothing tells the core from its memory
    undisturbed = memory.together >= _NO_GAIN * memory.threads * memory.one
    idle = memory.threads < memory.cores
    if idle and memory.every_core <= memory.together / _NO_GAIN:
        return "memory"
    return "loading" if undisturbed else "memory"


def advice(
    kind: str, reached: float, bandwidth: float, memory: MemorySpeed, computing: float
) -> str:
    """What a bound is, by the figures, and what would help; arguments as for `bound`."""
    together, one = _gigabytes(memory.together), _gigabytes(memory.one)
    reading = "1 thread reads" if memory.threads == 1 else f"{memory.threads} threads read"
    idle = memory.cores - memory.threads
    if kind == "computing":
        remedy = f"more threads do ({idle} cores are idle)" if idle > 0 else "faster cores would"
        return (
            f"bound by computing: the cores multiply {_gigabytes(computing)} of weights from their "
            f"caches, memory gives {_gigabytes(bandwidth)}; fewer bits do not help, {remedy}"
        )
    if kind == "loading":
        each = "" if memory.threads == 1 else f", each what one alone does ({one})"
        more = f", and more threads ({memory.cores} read {_gigabytes(memory.every_core)})"
        return (
            f"bound by what a core can load: {reading} {together}{each}; fewer bits per weight "
            f"help{more if idle > 0 else ''}"
        )
    if kind == "memory":
        alone = "" if memory.threads == 1 else f", one alone {one}"
        return (
            f"bound by the memory: {reading} {together}{alone}; fewer bits per weight help, more "
            "threads do not"
        )
    share = 100 * reached / min(bandwidth, computing)
    return (
        f"bound by neither: {share:.0f} % of what memory ({_gigabytes(bandwidth)}) and computing "
        f"({_gigabytes(computing)}) allow; attention, calls or other programs take the rest"
    )


def _gigabytes(speed: float) -> str:
    return f"{speed / 1e9:.0f} GB/s"
