"""This machine's hardware and libraries, and the implementation that each op gets here:

gpt2fast doctor
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__, backend, ops
from .._system.output import deliver
from ..ops import cuda, native, triton
from ..ops.backend import ORDER, Call, record_calls
from ..ops.packed import MatrixFormat, ModelShape, PackedWeights
from .arguments import CommandParser
from .command import command

# Instruction sets that kernels may use, as /proc/cpuinfo names them: x86, then AArch64.
_CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16",
    "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("doctor", description=__doc__)
    parser.add_argument(
        "--backend", default="auto", choices=("auto", *ORDER), metavar="NAME",
        help=f"force one for every op: {', '.join(ORDER)}",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the ops are tried (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    try:
        torch.zeros(1, device=options.device).sum().item()
    except Exception as error:  # torch has a different one for each device that is not there
        reason = str(error).splitlines()[0]
        parser.error(f"--device {options.device}: torch cannot use it here: {reason:.200}")
    return options


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parse(argv)
    for name, value in _environment():
        deliver(f"{name:<14}{value}")
    deliver("")
    with backend(options.backend):
        _print_table(_try_ops(options.device))
    return 0


def _environment() -> list[tuple[str, str]]:
    return [
        ("gpt2fast", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("compiler", _version(os.environ.get("CXX", "c++"))),
        ("nvcc", _version("nvcc")),
        ("ninja", _version("ninja")),
        ("cuda", _cuda()),
        ("cpu", _cpu()),
        ("kernels", _kernels()),
        ("cuda kernels", _cuda_kernels()),
        ("triton", _triton()),
    ]


def _version(command: str) -> str:
    """The line of `command --version` that holds the version."""
    path = shutil.which(command)
    if path is None:
        return f"{command} not found"
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line.strip() for line in shown.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]
    return (release or lines or ["no answer to --version"])[0]


def _kernels() -> str:
    """The library of compiled kernels that runs here, or why there is none."""
    found = native.loaded()
    if found is None:
        return f"none: {native.unavailable()}"
    return f"{found.isa}, {found.library.path} ({found.library.origin})"


def _cuda_kernels() -> str:
    found = cuda.loaded()
    if found is None:
        return f"none: {cuda.unavailable()}"
    return f"{found.path} ({found.origin})"


def _triton() -> str:
    reason = triton.unavailable()
    return f"none: {reason}" if reason else metadata.version("triton")


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return f"no device (this torch is {built})"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.processor() or 'unknown'} ({torch.backends.cpu.get_cpu_capability()})"
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = fields.get("flags", fields.get("Features", "")).split()
    features = " ".join(feature for feature in _CPU_FEATURES if feature in flags)
    return f"{fields.get('model name', platform.machine())}, {os.cpu_count()} cores: {features}"


def samples(device: str) -> dict[str, Callable[[], object]]:
    """A small call of each op on a device, as the model makes it."""
    q = torch.randn(1, 4, 2, 32, device=device)
    cache = torch.zeros(1, 8, 2, 32, device=device)
    x, weight, bias = (
        q.view(4, 64),
        torch.randn(64, 64, device=device),
        torch.ones(64, device=device),
    )
    ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
    row, one = ids[0, :1], torch.zeros_like(x)
    starts = torch.arange(2, device=device)
    layer = [bias, bias, torch.randn(64, 192, device=device), bias.repeat(3), weight, bias,
             bias, bias, weight, bias, weight, bias]  # fmt: skip
    shape = ModelShape(2, 64, 64, 64, 8, "gelu_new", 1e-5, (0.2,), True)
    packed = PackedWeights(shape, dict.fromkeys(shape.matrices(), MatrixFormat("float32")))
    packed.arena = packed.arena.to(device)
    return {
        "causal_attention": lambda: ops.causal_attention(q, q, q),
        "attention": lambda: ops.attention(q, q, q),
        "append_to_cache": lambda: ops.append_to_cache(q, q, cache, cache.clone(), row),
        "reorder_cache": lambda: ops.reorder_cache(cache, cache.clone(), row),
        "release_rows": lambda: ops.release_rows(row.clone(), row),
        "attention_with_cache": lambda: ops.attention_with_cache(q, cache, cache, row),
        "residual_layer_norm": lambda: ops.residual_layer_norm(x, x, bias, bias),
        "bias_gelu": lambda: ops.bias_gelu(x, bias),
        "gelu_mlp": lambda: ops.gelu_mlp(x, weight, bias, weight, bias),
        "projection": lambda: ops.projection(x, weight, bias),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, weight, ids[0]),
        "sample": lambda: ops.sample(x[:1], ids, None),
        "embedding": lambda: ops.embedding(ids, ids[0], weight, weight),
        "fused_adamw": lambda: ops.fused_adamw(
            [one], [x], [one.clone()], [one.clone()],
            step=1, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
        ),  # fmt: skip
        "decode_step": lambda: ops.decode_step(
            [weight, weight, *layer, bias, bias, weight],
            cache[None], cache[None].clone(), row, row, row,
            n_head=2, attention_scales=[0.2], activation="gelu_new", eps=1e-5,
        ),  # fmt: skip
        "packed_step": lambda: ops.packed_step(
            packed, cache[None], cache[None].clone(), row, row, starts, row, row, row
        ),
        "packed_next": lambda: ops.packed_next(
            packed, cache[None], cache[None].clone(), row, row, row, ids
        ),
    }  # fmt: skip


def _try_ops(device: str) -> list[Call]:
    calls = []
    with torch.inference_mode():
        for name, run in samples(device).items():
            with record_calls() as recorded:
                run()
            # On a GPU `ops.projection` is torch's own multiplication, and no op of ours is called.
            direct = Call(name, "torch", (("native", "torch multiplies here, no op is called"),))
            op = "causal_attention" if name == "attention" else name
            found = next((call for call in recorded if call.op == op), direct)
            calls.append(replace(found, op=name))
    return calls


def _print_table(calls: Sequence[Call]) -> None:
    deliver(f"{'op':<23}{'backend':<12}why")
    for call in calls:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in call.refused)
        deliver(f"{call.op:<23}{call.backend:<12}{reasons or 'first in the order'}")
