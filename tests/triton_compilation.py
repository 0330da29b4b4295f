"""Compile every Triton kernel ahead of time, as the ops launch it, for a GPU that need not be here.

    python tests/triton_compilation.py 90

prints a JSON object: `kernels`, one for each kernel and signature compiled for sm_90, with its
name, registers a thread, bytes of spilled registers and of shared memory, and whether it multiplies
with wgmma; and `missing`, the kernels that no op launched.

The ops are called with CPU tensors whose contents do not matter. A launch is replaced by the
compilation that would precede it on that GPU.
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

import gpt2fast.ops.triton
from gpt2fast.config import BLOCK_PARAMETERS
from gpt2fast.ops.backend import OPS, Implementation
from gpt2fast.ops.triton import tuning


class Driver:
    """Driver of a GPU that compiles kernels and runs none."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(ptx: str, arch: int) -> dict[str, int]:
    """Resources that ptxas needs for a kernel: registers a thread, and bytes that it spills."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", source.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill", log)
    (registers,) = re.findall(r"Used (\d+) registers", log)
    return {"registers": int(registers), "spilled": sum(map(int, spilled))}


def kernels_of_package() -> set[JITFunction]:
    """Every function for a GPU in gpt2fast.ops.triton that no other one calls."""
    functions: set[JITFunction] = set()
    called: set[str] = set()
    for module in pkgutil.iter_modules(gpt2fast.ops.triton.__path__):
        name = f"{gpt2fast.ops.triton.__name__}.{module.name}"
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, JITFunction) and value.__module__ == name:
                functions.add(value)
                for node in ast.walk(value.parse()):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                        called.add(node.func.id)
    return {function for function in functions if function.__name__ not in called}


def call(op: str, *arguments: Any) -> None:
    """Run the Triton implementation of an op, whatever device the tensors are on."""
    implementation = OPS[op].implementations["triton"]
    assert isinstance(implementation, Implementation)
    implementation.run(OPS[op].bind(*arguments))


def call_ops(dtype: torch.dtype, batch: int = 2, time: int = 256, heads: int = 12) -> None:
    """Call every op once or more often, with the shapes of GPT-2's smallest size."""
    width, vocab_size, entries = 64 * heads, 5027, 1024

    def some(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    q, k, v = some(batch, time, 3, heads, 64).unbind(2)
    out, lse = some(batch, time, heads, 64), torch.zeros(batch, heads, time)
    mask, seed = torch.ones(batch, time, dtype=torch.bool), integers(1)
    for key_heads, causal in ((heads, True), (heads, False), (heads // 3, True), (1, False)):
        shared = k[:, :, :key_heads], v[:, :, :key_heads]
        for options in ((0.125, None, 0.0, None, causal), (0.125, mask, 0.1, seed, causal)):
            call("causal_attention", q, *shared, *options)
            call("causal_attention_backward", out, q, *shared, out, lse, *options)
    cache, lengths = some(batch, entries, heads, 64), integers(batch)
    for new in (1, 5, time):
        call("attention_with_cache", q[:, :new], cache, cache, lengths, 0.125)
    call("append_to_cache", k, v, cache, cache, lengths, lengths)
    integers_8, scales = cache.to(torch.int8), torch.zeros(cache.shape[:-1])
    for new in (1, 5, time):
        call(
            "attention_with_cache", q[:, :new], integers_8, integers_8, lengths, 0.125,
            scales, scales,
        )  # fmt: skip
    call("append_to_cache", k, v, integers_8, integers_8, lengths, lengths, scales, scales)
    call("reorder_cache", cache, cache, lengths)
    call("release_rows", lengths, lengths)

    x, weight = some(batch, time, width), some(width)
    statistics = torch.zeros(batch, time, 1)
    call("residual_layer_norm", x, x, weight, weight, 1e-5)
    call("residual_layer_norm_backward", x, x, x, statistics, statistics, weight)
    wide, weight = some(2, 12000), some(12000)
    call("residual_layer_norm", wide, wide, weight, weight, 1e-5)
    call(
        "residual_layer_norm_backward", wide, wide, wide, *(torch.zeros(2, 1) for _ in "mr"), weight
    )

    inner, bias = some(batch, time, 4 * width), some(4 * width)
    w_fc, w_proj = some(width, 4 * width), some(4 * width, width)
    call("bias_gelu", inner, bias)
    call("bias_gelu_backward", inner, inner, bias)
    rows, inner = x.view(-1, width), inner.view(-1, 4 * width)
    call("gelu_mlp", rows, w_fc, bias, w_proj, some(width))
    call("gelu_mlp_backward", rows, rows, inner, w_fc, bias, w_proj)

    tokens = integers(batch, time)
    wte, wpe = some(vocab_size, width), some(entries, width)
    call("embedding", tokens, tokens, wte, wpe)
    call("embedding_backward", x, tokens, tokens, vocab_size, entries)
    call("linear_cross_entropy", rows, wte, tokens.view(-1), -100, True, True)
    params, averages = [wpe], [torch.zeros(wpe.shape)]
    for moments, masters in ((params, []), (averages, averages)):
        settings = (1, 1e-3, 0.9, 0.95, 1e-8, 0.1)
        call("fused_adamw", params, params, moments, moments, masters, *settings)

    logits, history = some(batch, vocab_size), integers(batch, 32)
    mask = integers(batch, -(-vocab_size // 32)).int()
    call("sample", logits, history, torch.zeros(batch), mask, 0.8, 40, 0.9, 0.05, 0.95, 1.2, 3)
    call("sample", logits, history, None, None, 1.0, 0, 1.0, 0.0, 1.0, 1.0, 0)
    shapes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    shapes += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    assert len(shapes) == len(BLOCK_PARAMETERS)
    weights = [wte, wpe, *(some(*shape) for shape in shapes), some(width), some(width), wte]
    for count in (1, 8):
        caches = some(1, count, entries, heads, 64)
        call(
            "decode_step", weights, caches, caches, *(integers(count) for _ in "tpl"),
            heads, [0.125], "gelu_new", 1e-5,
        )  # fmt: skip
        caches, scales = caches.to(torch.int8), torch.zeros(caches.shape[:-1])
        call(
            "decode_step", weights, caches, caches, *(integers(count) for _ in "tpl"),
            heads, [0.125], "gelu_new", 1e-5, scales, scales,
        )  # fmt: skip


def main(arch: int) -> None:
    found: dict[str, dict[str, Any]] = {}
    launched: set[str] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.add(self.__name__)
        if compiled.hash not in found:
            ptx = compiled.asm["ptx"]
            found[compiled.hash] = {
                "name": self.__name__,
                "shared": compiled.metadata.shared,
                "wgmma": "wgmma.mma_async" in ptx,
                **resources(ptx, arch),
            }

    triton.runtime.driver.set_active(Driver(arch))
    tuning.architecture = lambda device: arch  # type: ignore[assignment]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    call_ops(torch.bfloat16)
    missing = {kernel.__name__ for kernel in kernels_of_package()} - launched
    print(json.dumps({"kernels": list(found.values()), "missing": sorted(missing)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
