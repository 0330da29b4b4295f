"""What csrc/tests/sass.py finds in machine code, of which each case is some lines."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "csrc" / "tests"


@pytest.fixture(scope="module")
def sass() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("sass", FOLDER / "sass.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["sass"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def listing(source: str, symbol: str = "kernel") -> str:
    """As cuobjdump prints it, of lines such as "name: @P0 LDG.E R1, [R2] | sets 3, waits 0 1".

    A name in place of a branch's target is that of a line.
    """
    lines = [line.strip() for line in source.strip().splitlines()]
    names: dict[str, int] = {}
    for place, line in enumerate(lines):
        name, colon, _ = line.partition(": ")
        if colon:
            names[name] = 16 * place
    text = [f"\t\tFunction : {symbol}"]
    for place, line in enumerate(lines):
        instruction, _, notes = line.rpartition(": ")[2].partition(" | ")
        sets, waits = 7, 0
        for note in notes.split(", ") if notes else []:
            kind, *numbers = note.split()
            if kind == "sets":
                sets = int(numbers[0])
            else:
                waits = sum(1 << int(number) for number in numbers)
        for name, address in names.items():
            instruction = instruction.replace(f" {name}", f" {address:#x}")
        control = waits << 11 | sets << 5 | 1
        text += [
            f"        /*{16 * place:04x}*/   {instruction} ;   /* 0x0000000000000000 */",
            f"                               /* {control << 41:#018x} */",
        ]
    return "\n".join(text) + "\n"


def found(sass: ModuleType, source: str) -> str:
    """What is under way: "straight; loops; barrier"."""
    kernel = sass.parse(listing(source))["kernel"].kernel()
    return f"{kernel.straight}; {', '.join(map(str, kernel.loops))}; {kernel.barrier}"


def test_loads_are_under_way_until_somebody_waits(sass):
    together = """
        LDG.E.128 R4, desc[UR8][R2.64] | sets 2
        LDG.E.128 R8, desc[UR8][R2.64+0x10] | sets 3
        FADD R1, R4, R8 | waits 2 3
        EXIT
    """
    assert found(sass, together) == "2x16; ; "
    one_by_one = together.replace("LDG.E.128 R8", "FADD R1, R4, R4 | waits 2\n LDG.E.128 R8")
    assert found(sass, one_by_one) == "1x16; ; "
    shared = together.replace("sets 3", "sets 2").replace("waits 2 3", "waits 2")
    assert found(sass, shared) == "2x16; ; "


def test_the_width_is_the_instructions_own(sass):
    code = """
        LDG.E.U8 R4, [R2] | sets 0
        LDG.E.U16.CONSTANT R4, [R2] | sets 0
        LDG.E R4, [R2] | sets 0
        LDG.E.64.STRONG.GPU R4, [R2] | sets 0
        LDS.128 R4, [R2] | sets 0
        LDC.64 R4, c[0x0][0x28] | sets 0
        EXIT
    """
    assert found(sass, code) == "1x8+1x4+1x2+1x1; ; "


LOOP = """
    LDG.E R9, [R2] | sets 5
    top: LDG.E.128 R4, [R2] | sets 1
    LDG.E.128 R8, [R2] | sets 2
    FADD R1, R1, R4 | waits 1 2
    @P0 BRA top
    EXIT
"""


def test_a_loop_counts_its_own_loads(sass):
    assert found(sass, LOOP) == "1x4; 2x16; "


def test_a_load_of_the_next_round_is_under_way_with_this_ones(sass):
    code = """
        LDG.E.128 R4, [R2] | sets 1
        top: LDG.E.128 R8, [R2] | sets 2
        FADD R1, R1, R4 | waits 1
        LDG.E.128 R4, [R2] | sets 1
        FADD R1, R1, R8 | waits 2
        @P0 BRA top
        EXIT
    """
    assert found(sass, code) == "1x16; 2x16; "


def test_of_two_ways_the_one_with_more_under_way_counts_and_never_both(sass):
    code = """
        @P0 BRA other
        LDG.E R4, [R2] | sets 0
        LDG.E R5, [R2] | sets 0
        BRA join
        other: LDG.E.U16 R4, [R2] | sets 0
        join: LDG.E R6, [R2] | sets 1
        FADD R1, R4, R6 | waits 0 1
        EXIT
    """
    assert found(sass, code) == "3x4; ; "


def test_guarded_loads_may_run(sass):
    code = """
        @P0 BRA past
        LDG.E.128 R4, [R2] | sets 0
        past: @P1 BRA end
        LDG.E.128 R8, [R2] | sets 0
        end: FADD R1, R4, R8 | waits 0
        EXIT
    """
    assert found(sass, code) == "2x16; ; "


def test_code_that_lies_elsewhere_is_no_loop(sass):
    code = """
        @P0 BRA rare
        back: LDG.E R4, [R2] | sets 0
        FADD R1, R4, R4 | waits 0
        EXIT
        rare: MOV R2, R3
        BRA back
    """
    assert found(sass, code) == "1x4; ; "


def test_the_inner_of_two_loops_is_the_loop(sass):
    code = """
        outer: LDG.E.64 R4, [R2] | sets 0
        inner: LDG.E R5, [R2] | sets 1
        FADD R1, R5, R5 | waits 1
        @P0 BRA inner
        FADD R1, R4, R4 | waits 0
        @P1 BRA outer
        EXIT
    """
    assert found(sass, code) == "1x8; 1x4; "


def test_loads_that_a_barrier_finds_under_way(sass):
    held = """
        LDG.E.128 R4, [R2] | sets 0
        LDG.E R8, [R2] | sets 1
        FADD R1, R8, R8 | waits 1
        BAR.SYNC.DEFER_BLOCKING 0x0
        FADD R1, R4, R4 | waits 0
        EXIT
    """
    assert found(sass, held) == "1x16+1x4; ; 1x16"
    assert found(sass, held.replace("| waits 1", "| waits 0 1")) == "1x16+1x4; ; "


def test_spills_and_swaps_are_counted(sass):
    code = """
        STL.64 [R1], R2
        top: ATOMS.CAS R4, [R2], R4, R5 | sets 0
        @P0 BRA top
        ATOMS.ADD R4, [R2], R5 | sets 0
        ATOMS.CAS R4, [R2], R4, R5 | sets 0
        spin: ATOMS.CAST.SPIN R4, [R2], R4, R5 | sets 0
        @P0 BRA spin
        LDL R3, [R1]
        EXIT
    """
    kernel = sass.parse(listing(code))["kernel"].kernel()
    assert (kernel.spills, kernel.swaps) == (2, 2)


def test_a_kernel_that_is_there_twice_is_read_once(sass):
    text = listing("LDG.E R4, [R2] | sets 0\n EXIT")
    code = sass.parse(text + listing("EXIT", "other") + text)
    assert list(code) == ["kernel", "other"]
    assert len(code["kernel"].instructions) == 2


def kernel(sass: ModuleType, straight: str, *loops: str, **rest: object) -> object:
    flights = [sass.Flight.parse(loop) for loop in loops]
    return sass.Kernel(sass.Flight.parse(straight), tuple(flights), **rest)


def test_less_under_way_than_in_the_budget_is_an_error(sass):
    budget = {"k": kernel(sass, "2x16", "8x16", "1x4", swaps=1)}
    assert sass.worse(budget, budget, True) == []
    better = {"k": kernel(sass, "4x16", "8x16", "4x4")}
    assert sass.worse(better, budget, True) == []
    assert len(sass.notes(better, budget)) == 2
    worse = {"k": kernel(sass, "1x16", "2x16", "1x4", swaps=2)}
    swaps, straight, loop = sass.worse(worse, budget, True)
    assert "2 compare-and-swap instructions in loops, 1 in the budget" in swaps
    assert "1x16 is under way outside of loops, 2x16 in the budget" in straight
    assert loop.startswith("k: 2x16 is under way in loop 1 by bytes, 8x16 in the budget")
    assert sass.worse(worse, budget, False) == [], "another nvcc arranges code otherwise"
    assert "not in sass.json" in sass.worse({"new": budget["k"]}, budget, True)[0]
    spilled = {"k": kernel(sass, "2x16", "8x16", "1x4", spills=3)}
    assert "3 instructions on local memory" in sass.worse(spilled, budget, False)[0]


def test_the_budget_is_written_as_it_is_read(sass, monkeypatch, tmp_path):
    monkeypatch.setattr(sass, "BUDGET", tmp_path / "sass.json")
    kernels = {"k<1>": kernel(sass, "2x16+1x4", "8x16", "1x2"), "l": kernel(sass, "", swaps=3)}
    sass.write_budget("13.0", kernels)
    assert sass.read_budget() == ("13.0", kernels)


def test_every_kernel_has_a_budget_of_loads_and_one_of_registers(sass):
    registers = json.loads((FOLDER / "resources.json").read_text())["kernels"]
    assert sass.read_budget()[1].keys() == registers.keys()


def of_16_bytes(flight) -> int:
    return dict(flight.widths).get(16, 0)


def test_kernels_of_a_step_keep_what_they_were_written_for(sass):
    """Not to be accepted with --write: what the comments of these kernels say."""
    _, budget = sass.read_budget()
    attention = [name for name in budget if name.startswith("cached_attention<")]
    aligned = [name for name in attention if ", 1, 32, 4" not in name and "int8_t, 8" not in name]
    assert len(aligned) == 20
    for name in aligned:
        assert max(map(of_16_bytes, budget[name].loops)) >= 8, name
    products = [name for name in budget if name.startswith("decode_matmul<")]
    aligned = [name for name in products if ", 1, 32, " not in name]
    assert len(aligned) == 12
    for name in aligned:
        assert of_16_bytes(budget[name].barrier) >= 4, f"{name}: over the layer norm"


def test_kernels_of_training_keep_what_they_were_written_for(sass):
    _, budget = sass.read_budget()
    aligned = [name for name in budget if name.startswith("cross_entropy<") and ", 1, " not in name]
    assert len(aligned) == 6
    for name in aligned:
        differentiated = name.endswith("true>")
        assert list(map(of_16_bytes, budget[name].loops)).count(3) == 1 + differentiated, name
    normed = [name for name in budget if name.startswith("layer_norm_forward<")]
    assert len(normed) == 14
    for name in normed:
        vectors = int(name.rstrip(">").rpartition(" ")[2])
        more = 4 if "<float" in name else vectors  # of the residual, beside those of x
        assert of_16_bytes(budget[name].straight) >= vectors + more, name
