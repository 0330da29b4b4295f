"""How the CUDA kernels load from memory once they are compiled, and whether it has got worse.

    python csrc/tests/sass.py                       compare with sass.json: exit code 1 if worse
    python csrc/tests/sass.py --table [NAME]        as a table: kernels with NAME in their name
    python csrc/tests/sass.py --write               make what was found the budget

A kernel that memory bounds is as fast as it has bytes under way. The source may ask for eight loads
of 16 bytes, and the compiler still use each before it starts the next: only the machine code shows
it. This reads that of sm_90a, in the library of CUDA kernels, which is compiled now if there is
none of these sources, or in any file that --library names and cuobjdump reads.

An instruction names the scoreboard that its result will clear, and those that it waits for
(Jia et al., 2018, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking"). Loads of
global memory are under way from the one to the other. `3x16+1x4` are four of them at a time, three
of 16 bytes, in one innermost loop or, as `straight`, in the code outside of all. `barrier` is what
is still under way when a block waits for all of its threads: loads that were started early are of
use only if nothing needs them by then. Where paths part, the one with more bytes under way counts,
at most two rounds of a loop.

Loads and stores of local memory (spilled registers) are errors whatever the budget says. Atomic
operations that became loops of compare-and-swap are counted. Another nvcc than the budget's may
arrange code otherwise: then only those are errors.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from resources import cuobjdump, demangled, nvcc_release

from gpt2fast.kernels.library import find_library
from gpt2fast.kernels.toolchain import CUDA, cuda_architectures

BUDGET = Path(__file__).with_suffix(".json")
ARCHITECTURE = "sm_90a"
_SCOREBOARDS = 6

# "        /*0990*/   @!P1 LDG.E.U16 R6, desc[UR8][R18.64] ;   /* 0x0000000812069981 */", and the
# other half of its encoding in the next line.
_FIRST = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;\s+/\* 0x")
_SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
_FUNCTION = re.compile(r"\s*Function : (\S+)")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """An instruction of a kernel."""

    address: int
    name: str
    """With its suffixes: LDG.E.128."""
    conditional: bool
    target: int | None
    """Of a branch."""
    sets: int
    """The scoreboard that is cleared when its result is there; 7: none."""
    waits: int
    """Bits of the scoreboards that it waits for."""

    @cached_property
    def loads(self) -> int:
        """Bytes that a thread loads from global memory; 0 for other instructions."""
        family, *suffixes = self.name.split(".")
        if family != "LDG":
            return 0
        for suffix, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if suffix in suffixes:
                return width
        return 4

    @property
    def leaves(self) -> bool:
        """The instruction after it is not the next one, whatever its condition."""
        return not self.conditional and self.name.split(".")[0] in ("BRA", "EXIT", "RET", "BRX")


@dataclass(frozen=True, order=True)
class Flight:
    """Loads that are under way at once."""

    size: int = 0
    """Bytes of a thread."""
    widths: tuple[tuple[int, int], ...] = ()
    """Bytes of a load and how many there are, widest first."""

    @classmethod
    def of(cls, widths: Iterable[int]) -> Flight:
        """Of these loads' bytes."""
        counted = Counter(widths)
        return cls(
            sum(width * count for width, count in counted.items()),
            tuple(sorted(counted.items(), reverse=True)),
        )

    @classmethod
    def parse(cls, text: str) -> Flight:
        """The inverse of `str`."""
        parts = [part.split("x") for part in text.split("+") if part]
        return cls.of(int(width) for count, width in parts for _ in range(int(count)))

    def __str__(self) -> str:
        return "+".join(f"{count}x{width}" for width, count in self.widths)


@dataclass(frozen=True)
class Kernel:
    """What is committed, and compared, of a kernel."""

    straight: Flight = Flight()
    """The most that is under way outside of innermost loops."""
    loops: tuple[Flight, ...] = ()
    """The same of each innermost loop that loads, most first."""
    barrier: Flight = Flight()
    """The most that is under way over a barrier."""
    spills: int = 0
    """Instructions that load or store local memory."""
    swaps: int = 0
    """Compare-and-swap instructions in loops."""


_State = tuple[tuple[Instruction, ...], ...]
"""Loads under way by scoreboard."""
_NOTHING: _State = ((),) * _SCOREBOARDS


def _size(state: _State) -> int:
    return sum(load.loads for loads in state for load in loads)


@dataclass
class _Block:
    """Instructions that run one after the other, by their places in the kernel."""

    first: int
    end: int
    after: list[int] = field(default_factory=list)
    """Blocks that may follow."""


class Code:
    """A kernel's instructions in the order of their addresses."""

    def __init__(self, instructions: list[Instruction]):
        self.instructions = instructions

    @cached_property
    def blocks(self) -> list[_Block]:
        """In the order of their addresses."""
        code = self.instructions
        places = {each.address: place for place, each in enumerate(code)}
        begins = {0}
        for place, each in enumerate(code):
            if each.target in places:
                begins.add(places[each.target])
            if (each.target in places or each.leaves) and place + 1 < len(code):
                begins.add(place + 1)
        ordered = sorted(begins)
        number = {first: block for block, first in enumerate(ordered)}
        blocks = [
            _Block(first, end)
            for first, end in zip(ordered, [*ordered[1:], len(code)], strict=True)
        ]
        for index, block in enumerate(blocks):
            last = code[block.end - 1]
            if last.target in places and last.name.split(".")[0] != "BSSY":
                block.after.append(number[places[last.target]])
            if not last.leaves and index + 1 < len(blocks):
                block.after.append(index + 1)
        return blocks

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The blocks of each innermost loop."""
        back = [
            (block, header)
            for block, each in enumerate(self.blocks)
            for header in each.after
            if header <= block
        ]
        bodies: dict[int, set[int]] = {}
        for latch, header in back:
            if latch in self._reached(0, without=header):
                continue  # code out of line, which jumps back to where it was left
            bodies.setdefault(header, {header}).update(self._reaching(latch, header))
        return [
            frozenset(body)
            for header, body in bodies.items()
            if not any(other != header and other in body for other in bodies)
        ]

    def _reached(self, start: int, without: int) -> set[int]:
        """Blocks that can be reached past a block that must not be entered."""
        found: set[int] = set()
        waiting = [start] if start != without else []
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += [each for each in self.blocks[block].after if each != without]
        return found

    @cached_property
    def _before(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self.blocks]
        for index, block in enumerate(self.blocks):
            for after in block.after:
                before[after].append(index)
        return before

    def _reaching(self, block: int, header: int) -> set[int]:
        """Blocks from which a block is reached without the header."""
        found = {header}
        waiting = [block]
        while waiting:
            each = waiting.pop()
            if each not in found:
                found.add(each)
                waiting += self._before[each]
        return found

    def _steps(self, block: int, state: _State) -> Iterator[tuple[Instruction, _State]]:
        """The instructions of a block, and the state after each."""
        for each in self.instructions[self.blocks[block].first : self.blocks[block].end]:
            if each.waits:
                state = tuple(
                    () if each.waits >> board & 1 else loads for board, loads in enumerate(state)
                )
            if each.loads and each.sets < _SCOREBOARDS:
                added = (*state[each.sets], each)
                state = (*state[: each.sets], added, *state[each.sets + 1 :])
            yield each, state

    def kernel(self) -> Kernel:
        """What the budget holds of it."""
        loop_of = {block: loop for loop, body in enumerate(self.loops) for block in body}
        addresses = [
            {
                each.address
                for block in body
                for each in self.instructions[self.blocks[block].first : self.blocks[block].end]
                if each.loads
            }
            for body in self.loops
        ]
        straight, barrier, most = Flight(), Flight(), [Flight() for _ in self.loops]
        left: dict[int, _State] = {}
        for _ in range(2):
            for block in range(len(self.blocks)):
                arriving = [left[each] for each in self._before[block] if each in left]
                if not arriving and block:
                    continue
                arrived = state = max(arriving, key=_size, default=_NOTHING)
                loop = loop_of.get(block)
                for each, state in self._steps(block, arrived):
                    is_barrier = each.name.startswith("BAR.")
                    if not (each.loads or is_barrier):
                        continue  # no more is under way than before
                    under_way = [load for loads in state for load in loads]
                    if is_barrier:
                        barrier = max(barrier, Flight.of(load.loads for load in under_way))
                    if loop is None:
                        straight = max(straight, Flight.of(load.loads for load in under_way))
                    else:
                        own = (x.loads for x in under_way if x.address in addresses[loop])
                        most[loop] = max(most[loop], Flight.of(own))
                left[block] = state
        in_loops = {
            each.address
            for index, block in enumerate(self.blocks)
            if index in loop_of
            for each in self.instructions[block.first : block.end]
        }
        names = [each.name.split(".") for each in self.instructions]
        return Kernel(
            straight,
            tuple(sorted((each for each in most if each.size), reverse=True)),
            barrier,
            sum(name[0] in ("LDL", "STL") for name in names),
            sum(
                # A cast that spins is one of two instructions, in a loop with the other.
                "CAST" in name or ("CAS" in name and each.address in in_loops)
                for name, each in zip(names, self.instructions, strict=True)
            ),
        )


def parse(text: str) -> dict[str, Code]:
    """By symbol, the kernels in what `cuobjdump -sass` prints."""
    kernels: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    pending: re.Match[str] | None = None
    for line in text.splitlines():
        if pending is not None and (second := _SECOND.match(line)):
            control = int(second[1], 16) >> 41
            address, guard, name, operands = pending.groups()
            target = _TARGET.search(operands) if name.startswith(("BRA", "BSSY")) else None
            assert current is not None
            current.append(
                Instruction(
                    int(address, 16),
                    name,
                    # Constant conditions are of no interest: PT is always true.
                    (guard is not None and guard != "@PT") or name.startswith("BRA.DIV"),
                    int(target[1], 16) if target else None,
                    control >> 5 & 7,
                    control >> 11 & 63,
                )
            )
            pending = None
        elif found := _FUNCTION.match(line):
            current = kernels.setdefault(found[1], [])
            current.clear()  # two sources may need the same kernel
        else:
            pending = _FIRST.match(line)
    return {symbol: Code(instructions) for symbol, instructions in kernels.items()}


def disassembled(library: Path) -> str:
    """The machine code in a library or an object file, for one architecture."""
    command = [cuobjdump(), "-sass", str(library)]
    if library.suffix != ".cubin":
        command[1:1] = ["-arch", ARCHITECTURE]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------------------------- comparisons


def worse(found: dict[str, Kernel], budget: dict[str, Kernel], same_nvcc: bool) -> list[str]:
    """What loads less at once, or swaps more, than the budget says."""
    errors = []
    accept = "; --write accepts it"
    for name, kernel in found.items():
        if kernel.spills:
            errors.append(f"{name}: {kernel.spills} instructions on local memory; 0 are allowed")
        if not same_nvcc:
            continue
        if name not in budget:
            errors.append(f"{name}: not in {BUDGET.name}{accept}")
            continue
        allowed = budget[name]
        if kernel.swaps > allowed.swaps:
            errors.append(
                f"{name}: {kernel.swaps} compare-and-swap instructions in loops, "
                f"{allowed.swaps} in the budget{accept}"
            )
        for where, now, before in _pairs(kernel, allowed):
            if now.size < before.size:
                errors.append(
                    f"{name}: {now or 'nothing'} is under way {where}, "
                    f"{before} in the budget{accept}"
                )
    return errors


def _pairs(kernel: Kernel, other: Kernel) -> Iterator[tuple[str, Flight, Flight]]:
    """Places of two kernels, what is under way there in the one, and in the other."""
    yield "outside of loops", kernel.straight, other.straight
    yield "over a barrier", kernel.barrier, other.barrier
    # A loop that is gone was perhaps unrolled, so that there is nothing to compare.
    for place, (mine, theirs) in enumerate(zip(kernel.loops, other.loops, strict=False), 1):
        yield f"in loop {place} by bytes", mine, theirs


def notes(found: dict[str, Kernel], budget: dict[str, Kernel]) -> list[str]:
    """What the budget could be raised to."""
    gone = [f"{name}: in {BUDGET.name} only" for name in sorted(budget.keys() - found.keys())]
    return gone + [
        f"{name}: {now} is under way {where}, {before or 'nothing'} in the budget"
        for name, kernel in found.items()
        if name in budget
        for where, now, before in _pairs(kernel, budget[name])
        if now.size > before.size
    ]


def table(kernels: dict[str, Kernel]) -> str:
    """In Markdown."""
    rows = [["kernel", "straight", "barrier", "loops", "spills", "swaps"], ["---", *["---:"] * 5]]
    rows += [
        [f"`{name}`", str(each.straight), str(each.barrier), ", ".join(map(str, each.loops)),
         str(each.spills), str(each.swaps)]
        for name, each in kernels.items()
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ------------------------------------------------------------------------------------ sass.json


def read_budget() -> tuple[str, dict[str, Kernel]]:
    """The release of nvcc it was made with, and the kernels."""
    if not BUDGET.exists():
        return "", {}
    content = json.loads(BUDGET.read_text())
    return content["nvcc"], {
        name: Kernel(
            Flight.parse(entry.get("straight", "")),
            tuple(Flight.parse(loop) for loop in entry.get("loops", [])),
            Flight.parse(entry.get("barrier", "")),
            swaps=entry.get("swaps", 0),
        )
        for name, entry in content["kernels"].items()
    }


def write_budget(nvcc: str, kernels: dict[str, Kernel]) -> None:
    lines = []
    for name, kernel in sorted(kernels.items()):
        entry: dict[str, object] = {}
        if kernel.straight.size:
            entry["straight"] = str(kernel.straight)
        if kernel.barrier.size:
            entry["barrier"] = str(kernel.barrier)
        if kernel.loops:
            entry["loops"] = [str(loop) for loop in kernel.loops]
        if kernel.swaps:
            entry["swaps"] = kernel.swaps
        lines.append(f"    {json.dumps(name)}: {json.dumps(entry)}")
    kernels_text = ",\n".join(lines)
    BUDGET.write_text(f'{{\n  "nvcc": "{nvcc}",\n  "kernels": {{\n{kernels_text}\n  }}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description="Loads under way in the CUDA kernels.")
    parser.add_argument(
        "--library", type=Path, nargs="+", help="of CUDA kernels; default: these sources'"
    )
    parser.add_argument("--write", action="store_true", help="make what was found the budget")
    parser.add_argument("--table", nargs="?", const="", metavar="NAME", help="print a table")
    given = parser.parse_args()

    files = given.library or [find_library(CUDA, cuda_architectures()).path]
    code = {symbol: each for file in files for symbol, each in parse(disassembled(file)).items()}
    names = demangled(code)
    found = {names[symbol]: code[symbol].kernel() for symbol in sorted(code)}
    if not found:
        raise SystemExit(f"{files[0]} holds no CUDA kernels for {ARCHITECTURE}")
    budgeted_nvcc, budget = read_budget()
    nvcc = nvcc_release()
    if given.table is not None:
        print(table({name: each for name, each in found.items() if given.table in name}))
    if given.write:
        write_budget(nvcc, found)
        budget = found
    for line in notes(found, budget):
        print(f"note: {line}", file=sys.stderr)
    errors = worse(found, budget, nvcc == budgeted_nvcc)
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(found)} kernels, {len(errors)} errors (nvcc {nvcc})", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
