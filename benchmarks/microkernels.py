"""How fast the kernels of each instruction set multiply packed weights, by where those lie.

    python benchmarks/microkernels.py
    python benchmarks/microkernels.py --isa avx2 avx512 --threads 1

One row is decoding: its floor is the speed at which its level of the cache, or memory, can be
read. Many rows are prompts and batches: their floor is the processor's multiply-adds. From memory
also with the prefetching of a decoding step, which pays on some processors and costs on others.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import machine
from gpt2fast.kernels.toolchain import source_folder
from gpt2fast.ops import native

TOOL = Path(__file__).with_suffix(".cpp")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    every = sorted(path.stem for path in (source_folder() / "cpu" / "isa").glob("*.cpp"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", nargs="+", choices=every, help="default: the one that runs here")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="for each measurement; default: %(default)s"
    )
    options = parser.parse_args(argv)
    if options.threads < 1 or options.seconds <= 0:
        parser.error("--threads and --seconds must be positive")
    sets = options.isa
    if sets is None:
        here = native.loaded()
        if here is None:
            print(f"error: {native.unavailable()}; name an instruction set: --isa", file=sys.stderr)
            return 1
        sets = [here.isa]
    for isa in sets:
        try:
            lines = measure(isa, options.threads, options.seconds)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or ""
            print(f"error: {isa}: {error}\n{said}".rstrip(), file=sys.stderr)
            return 1
        print(f"{isa}, {options.threads} threads, memory reads "
              f"{machine.read_bandwidth(options.threads) / 1e9:.1f} GB/s")  # fmt: skip
        print(f"{'format':10} {'rows':>5} {'weights in':14} {'GB/s':>8} {'GMAC/s':>8}")
        for form, rows, level, rate, products in lines:
            print(f"{form:10} {rows:>5} {level:14} {rate:>8} {products:>8}")
    return 0


def measure(isa: str, threads: int, seconds: float) -> list[list[str]]:
    """Compile the tool for an instruction set and run it; returns the fields of its lines."""
    csrc = source_folder()
    with tempfile.TemporaryDirectory() as folder:
        tool = Path(folder, "microkernels")
        kernels = csrc / "cpu" / "isa" / f"{isa}.cpp"
        others = re.findall(r"#define GPT2FAST_OPS_OF (\w+)", kernels.read_text())
        command = [
            os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-pthread", f"-I{csrc}",
            f'-DGPT2FAST_KERNELS_FILE="{kernels}"', str(TOOL), str(csrc / "cpu" / "team.cpp"),
            *(str(kernels.with_name(f"{other}.cpp")) for other in others),
            "-o", str(tool),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, text=True)
        done = subprocess.run(
            [tool, str(threads), str(seconds)], check=True, capture_output=True, text=True
        )
    return [line.split() for line in done.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
