"""What the CUDA kernels need of a multiprocessor, and whether it is more than they may.

    python csrc/tests/resources.py                  compare with resources.json: exit code 1 if more
    python csrc/tests/resources.py --table [NAME]   as a table: kernels with NAME in their name
    python csrc/tests/resources.py --driver build/simulated_test [--write]

Registers, stack and static shared memory are read from the library of CUDA kernels, which is
compiled now if there is none of these sources. Threads and dynamic shared memory are those of the
launches in the simulator, the most that a case asks for: `--driver` runs the cases again, otherwise
the committed ones count. `--write` makes what was found the budget; whoever reviews the change of
resources.json reviews what the kernels cost.

A stack frame (spilled registers are in one), static shared memory and a kernel that no case
launches are errors whatever the budget says. Another nvcc than the budget's may count registers
otherwise: then only a lower occupancy is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpt2fast.kernels.library import find_library
from gpt2fast.kernels.toolchain import CUDA, cuda_architectures, find_cuda

BUDGET = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Multiprocessor:
    """Of one architecture (CUDA C++ Programming Guide, "Technical Specifications")."""

    shared: int
    """Bytes; a block of its own has 1 KiB less."""
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32

    def occupancy(self, threads: int, registers: int, shared: int) -> tuple[int, str]:
        """Warps that run at once, and what keeps it from more: as in cuda_occupancy.h."""
        warps = _round_up(threads, 32) // 32
        registers_of_warp = _round_up(max(registers, 1) * 32, 256)
        quarter = self.registers // 4 // registers_of_warp
        limits = {
            "threads": self.threads // 32 // warps,
            "registers": quarter * 4 // warps,
            "shared memory": self.shared // _round_up(shared + 1024, 128),
            "blocks": self.blocks,
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit] * warps, limit


MULTIPROCESSORS = {"80": Multiprocessor(164 * 1024), "90a": Multiprocessor(228 * 1024)}


@dataclass(frozen=True)
class Compiled:
    """A kernel, as it was compiled for one architecture."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Launch:
    """The largest launch of a kernel."""

    threads: int
    shared: int


@dataclass(frozen=True)
class Kernel:
    """What is committed, and compared, of a kernel."""

    launch: Launch | None
    """None: no case launches it."""
    registers: dict[str, int]
    """By architecture."""

    def occupancy(self, architecture: str) -> tuple[int, str]:
        """As of `Multiprocessor`; without a launch nothing is known, and 0 warps."""
        if self.launch is None:
            return 0, "unknown"
        return MULTIPROCESSORS[architecture].occupancy(
            self.launch.threads, self.registers[architecture], self.launch.shared
        )


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# -------------------------------------------------------------------------------- what there is


def compiled_kernels(library: Path) -> dict[str, dict[str, Compiled]]:
    """By architecture and by symbol, what the library holds."""
    command = [cuobjdump(), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, dict[str, Compiled]] = {}
    architecture = symbol = ""
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = (int(number) for number in found.groups())
            if int(architecture.rstrip("af")) >= 90:
                shared -= 1024  # what every block there loses to the system is in the sum
            # Two sources may need the same kernel: it is in the library twice.
            known = kernels.setdefault(architecture, {})
            other = known.get(symbol, Compiled(0, 0, 0))
            known[symbol] = Compiled(
                max(registers, other.registers),
                max(stack, other.stack),
                max(shared, other.shared),
            )
    if not kernels:
        raise SystemExit(f"{library} holds no CUDA kernels")
    return kernels


def cuobjdump() -> str:
    """CUDA's, or the one that Triton brings along."""
    folders = [str(find_cuda() / "bin"), *os.environ.get("PATH", "").split(os.pathsep)]
    for kind in ("platlib", "purelib"):
        folders.append(os.path.join(sysconfig.get_path(kind), "triton/backends/nvidia/bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit("cuobjdump is not found: CUDA's toolkit has it, and so has triton")
    return found


def simulated_launches(driver: Path) -> dict[str, Launch]:
    """By symbol, what the cases of `driver`, a simulated_test, launch."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "launches")
        subprocess.run(
            [str(driver)],
            env={**os.environ, "GPT2FAST_SIM_LAUNCHES": str(written)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        lines = written.read_text().splitlines()
    symbols = _symbols(driver)
    launches = {}
    for line in lines:
        address, base, threads, shared = (int(number, 0) for number in line.split())
        # A program that can be loaded anywhere counts addresses from where it was.
        symbol = symbols.get(address - base) or symbols[address]
        launches[symbol] = Launch(threads, shared)
    return launches


def _symbols(program: Path) -> dict[int, str]:
    """Functions by address, those of one file included."""
    text = subprocess.check_output(["nm", "--defined-only", str(program)], text=True)
    return {
        int(address, 16): symbol
        for address, kind, symbol in (line.split(maxsplit=2) for line in text.splitlines())
        if kind in "tTwW"
    }


def demangled(symbols: Iterable[str]) -> dict[str, str]:
    """Names as they are in the source, without namespaces and arguments."""
    ordered = sorted(symbols)
    done = subprocess.run(
        ["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True
    )
    return dict(zip(ordered, map(_shortened, done.stdout.splitlines()), strict=True))


def _shortened(name: str) -> str:
    name = re.sub(r"gpt2fast::(kernels|device)::", "", name)
    name = name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    name = re.sub(r"\bsigned char", "int8_t", name)
    name = re.sub(r"\(\w+\)(\d+)", r"\1", name)  # (DType)1
    depth = 0
    for i, letter in enumerate(name):  # the arguments begin at the first bracket outside of <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def nvcc_release() -> str:
    """Such as "13.0"."""
    command = [str(find_cuda() / "bin" / "nvcc"), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


# ---------------------------------------------------------------------------------- comparisons


def gather(
    compiled: dict[str, dict[str, Compiled]], launches: dict[str, Launch]
) -> tuple[dict[str, Kernel], list[str]]:
    """The kernels by name, and what is wrong with them whatever the budget says.

    Args:
        launches: by name.
    """
    names = demangled({symbol for kernels in compiled.values() for symbol in kernels})
    registers: dict[str, dict[str, int]] = {}
    errors = []
    for architecture, kernels in compiled.items():
        for symbol, kernel in sorted(kernels.items()):
            where = f"{names[symbol]} for sm_{architecture}"
            if kernel.stack:
                errors.append(
                    f"{where}: a stack frame of {kernel.stack} bytes (spilled registers, or an "
                    "array that is indexed at run time); 0 are allowed"
                )
            if kernel.shared:
                errors.append(
                    f"{where}: {kernel.shared} bytes of static shared memory; 0 are allowed, "
                    "since the simulator sees none of it (GPT2FAST_SHARED)"
                )
            registers.setdefault(names[symbol], {})[architecture] = kernel.registers
    errors += [
        f"{name}: no case in csrc/tests/simulated launches it, so that its occupancy is unknown"
        for name in sorted(registers)
        if name not in launches
    ]
    return {name: Kernel(launches.get(name), registers[name]) for name in sorted(registers)}, errors


def exceeding(found: dict[str, Kernel], budget: dict[str, Kernel], same_nvcc: bool) -> list[str]:
    """What costs more than the budget allows."""
    errors = []
    accept = "; --write accepts it"
    for name, kernel in found.items():
        if name not in budget:
            errors.append(f"{name}: not in {BUDGET.name}{accept}")
            continue
        allowed = budget[name]
        launch, most = kernel.launch or Launch(0, 0), allowed.launch or Launch(0, 0)
        if launch.threads > most.threads:
            errors.append(
                f"{name}: {launch.threads} threads a block, {most.threads} in the budget{accept}"
            )
        if launch.shared > most.shared:
            errors.append(
                f"{name}: {launch.shared} bytes of shared memory, "
                f"{most.shared} in the budget{accept}"
            )
        for architecture, registers in kernel.registers.items():
            if architecture not in allowed.registers:
                continue
            where = f"{name} for sm_{architecture}"
            if same_nvcc and registers > allowed.registers[architecture]:
                errors.append(
                    f"{where}: {registers} registers a thread, "
                    f"{allowed.registers[architecture]} in the budget{accept}"
                )
            warps, limit = kernel.occupancy(architecture)
            before, _ = allowed.occupancy(architecture)
            if kernel.launch is not None and warps < before:
                errors.append(
                    f"{where}: {warps} warps on a multiprocessor (for want of {limit}), "
                    f"{before} in the budget{accept}"
                )
    return errors


def notes(found: dict[str, Kernel], budget: dict[str, Kernel]) -> list[str]:
    """What could be taken back from the budget."""
    gone = [f"{name}: in {BUDGET.name} only" for name in sorted(budget.keys() - found.keys())]
    smaller = [
        f"{name} for sm_{architecture}: {registers} registers, "
        f"{budget[name].registers[architecture]} in the budget"
        for name, kernel in found.items()
        for architecture, registers in kernel.registers.items()
        if name in budget and registers < budget[name].registers.get(architecture, 0)
    ]
    return gone + smaller


def table(kernels: dict[str, Kernel]) -> str:
    """In Markdown: registers and warps for each architecture, and what limits them."""
    architectures = sorted({name for kernel in kernels.values() for name in kernel.registers})
    head = ["kernel", "threads", "shared"]
    for architecture in architectures:
        head += [f"registers sm_{architecture}", "warps of 64", "limit"]
    rows = [head, ["---", *["---:"] * 2, *["---:", "---:", "---"] * len(architectures)]]
    for name, kernel in kernels.items():
        launch = kernel.launch
        row = [f"`{name}`", *((str(launch.threads), str(launch.shared)) if launch else ("", ""))]
        for architecture in architectures:
            row.append(str(kernel.registers.get(architecture, "")))
            if launch and architecture in kernel.registers:
                warps, limit = kernel.occupancy(architecture)
                row += [str(warps), limit]
            else:
                row += ["", ""]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ------------------------------------------------------------------------------- resources.json


def read_budget() -> tuple[str, dict[str, Kernel]]:
    """The release of nvcc it was made with, and the kernels."""
    if not BUDGET.exists():
        return "", {}
    content = json.loads(BUDGET.read_text())
    kernels = {
        name: Kernel(
            Launch(entry["threads"], entry["shared"]) if "threads" in entry else None,
            entry["registers"],
        )
        for name, entry in content["kernels"].items()
    }
    return content["nvcc"], kernels


def write_budget(nvcc: str, kernels: dict[str, Kernel]) -> None:
    lines = []
    for name, kernel in sorted(kernels.items()):
        entry: dict[str, object] = {"registers": kernel.registers}
        if kernel.launch is not None:
            entry |= {
                "threads": kernel.launch.threads,
                "shared": kernel.launch.shared,
                # For the reader of a change only; computed again from the others.
                "warps": {each: kernel.occupancy(each)[0] for each in kernel.registers},
            }
        lines.append(f"    {json.dumps(name)}: {json.dumps(entry)}")
    kernels_text = ",\n".join(lines)
    BUDGET.write_text(f'{{\n  "nvcc": "{nvcc}",\n  "kernels": {{\n{kernels_text}\n  }}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers and occupancy of the CUDA kernels.")
    parser.add_argument("--library", type=Path, help="of CUDA kernels; default: these sources'")
    parser.add_argument("--driver", type=Path, help="simulated_test, to count launches anew")
    parser.add_argument("--write", action="store_true", help="make what was found the budget")
    parser.add_argument("--table", nargs="?", const="", metavar="NAME", help="print a table")
    given = parser.parse_args()

    library = given.library or find_library(CUDA, cuda_architectures()).path
    compiled = {
        name: kernels
        for name, kernels in compiled_kernels(library).items()
        if name in MULTIPROCESSORS
    }
    budgeted_nvcc, budget = read_budget()
    nvcc = nvcc_release()
    launches = {name: kernel.launch for name, kernel in budget.items() if kernel.launch}
    if given.driver is not None:
        by_symbol = simulated_launches(given.driver)
        names = demangled(by_symbol)
        launches = {names[symbol]: launch for symbol, launch in by_symbol.items()}
    found, errors = gather(compiled, launches)

    if given.table is not None:
        print(table({name: each for name, each in found.items() if given.table in name}))
    if given.write:
        if given.driver is None or compiled.keys() != MULTIPROCESSORS.keys():
            raise SystemExit(
                "--write needs --driver and a library for " + " and ".join(MULTIPROCESSORS)
            )
        write_budget(nvcc, found)
        budget = found
    else:
        errors += exceeding(found, budget, nvcc == budgeted_nvcc)
    for line in notes(found, budget):
        print(f"note: {line}", file=sys.stderr)
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(found)} kernels, {len(errors)} errors (nvcc {nvcc})", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
