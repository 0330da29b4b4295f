"""The simulated machine does what CUDA's documentation says."""

from __future__ import annotations

import math
from types import ModuleType

import pytest

LANES = list(range(32))
SETTINGS = [("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2)]


# ------------------------------------------------------------------------------------------ warps


@pytest.mark.parametrize("width", [32, 8, 1])
@pytest.mark.parametrize("kind", ["index", "up", "down", "xor"])
def test_shuffles_read_the_lane_that_cuda_names(
    simulator: ModuleType, kind: str, width: int
) -> None:
    argument = 3

    def source(lane: int) -> int:
        first = lane // width * width
        named = {
            "index": first + argument % width,
            "up": lane - argument,
            "down": lane + argument,
            "xor": lane ^ argument,
        }[kind]
        if kind == "xor":
            return named if named < first + width else lane
        return named if first <= named < first + width else lane

    values = [100 + lane for lane in LANES]
    assert simulator.shuffle(kind, values, argument, width) == [
        values[source(lane)] for lane in LANES
    ]


def test_a_shuffle_of_some_lanes_leaves_the_others_alone(simulator: ModuleType) -> None:
    mask = 0x0000FF00
    expected = [lane ^ 1 if mask >> lane & 1 else lane for lane in LANES]
    assert simulator.shuffle("xor", LANES, 1, mask=mask) == expected


@pytest.mark.parametrize("holds", [[0] * 32, [1] * 32, [lane % 3 == 0 for lane in LANES]])
def test_votes_count_every_lane(simulator: ModuleType, holds: list[int]) -> None:
    ballot = sum(1 << lane for lane in LANES if holds[lane])
    assert simulator.votes([int(h) for h in holds]) == [ballot, any(holds), all(holds)]


# ------------------------------------------------------------------------------ blocks and launches


@pytest.mark.parametrize(("order", "seed"), SETTINGS)
def test_named_barriers_order_two_warps(simulator: ModuleType, order: str, seed: int) -> None:
    simulator.use_settings(order=order, seed=seed)
    numbers = LANES
    for _ in range(3):
        doubled = [2 * numbers[31 - lane] for lane in LANES]
        numbers = [doubled[31 - lane] + 1 for lane in LANES]
    assert simulator.ping_pong(3) == numbers


def test_atomics_lose_nothing(simulator: ModuleType) -> None:
    count = 4 * 96
    assert simulator.atomics(4, 96) == [count * (count - 1) // 2, count - 1, 96]


@pytest.mark.parametrize(("order", "seed"), SETTINGS)
def test_the_last_block_sees_what_all_others_wrote(
    simulator: ModuleType, order: str, seed: int
) -> None:
    simulator.use_settings(order=order, seed=seed)
    warp_sums = [sum(64 * block + lane for lane in LANES) for block in range(7)]
    assert simulator.last_block_sums(7, 64, 3) == [sum(warp_sums)] * 3


def test_the_settings_choose_the_order(simulator: ModuleType) -> None:
    everyone = list(range(3 * 8))
    assert simulator.order_of_threads(3, 8) == everyone
    simulator.use_settings(order="lifo")
    assert simulator.order_of_threads(3, 8) == everyone[::-1]
    simulator.use_settings(order="random", seed=1)
    first = simulator.order_of_threads(3, 8)
    assert sorted(first) == everyone
    assert first != everyone
    assert simulator.order_of_threads(3, 8) == first
    simulator.use_settings(order="random", seed=2)
    assert simulator.order_of_threads(3, 8) != first


def test_the_environment_chooses_the_order(
    simulator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator.use_environment()
    monkeypatch.setenv("GPT2FAST_SIM_ORDER", "lifo")
    assert simulator.order_of_threads(1, 4) == [3, 2, 1, 0]
    monkeypatch.setenv("GPT2FAST_SIM_ORDER", "sideways")
    with pytest.raises(simulator.Error, match="fifo, lifo or random, not sideways"):
        simulator.order_of_threads(1, 4)


def test_an_error_names_the_line_and_the_thread(simulator: ModuleType) -> None:
    place = f"probes.cpp:{simulator.line_of_failure()}: cp_async"
    with pytest.raises(simulator.Error, match=place) as caught:
        simulator.fail_in_thread(2, 37)
    assert "[block (2,0,0) thread (37,0,0)]" in str(caught.value)


def test_a_deadlock_is_reported_with_those_who_wait(simulator: ModuleType) -> None:
    with pytest.raises(simulator.Error, match="deadlock in block") as caught:
        simulator.deadlock()
    assert "64 threads wait in named_barrier_sync at" in str(caught.value)
    assert simulator.atomics(1, 32)[1] == 31  # and the next launch is none the worse


def test_launches_from_several_os_threads_do_not_meet(simulator: ModuleType) -> None:
    assert simulator.concurrent_sums(4, 20) == 4


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix_gives_each_lane_its_pair(
    simulator: ModuleType, matrices: int, transposed: bool
) -> None:
    starts = [(5 * row % 32) * 8 for row in range(8 * matrices)]
    registers = simulator.ldmatrix(starts, matrices, transposed)
    for lane in LANES:
        for matrix in range(matrices):
            rows = starts[8 * matrix : 8 * matrix + 8]
            major, minor = lane // 4, lane % 4 * 2
            low, high = (
                (rows[minor] + major, rows[minor + 1] + major)
                if transposed
                else (rows[major] + minor, rows[major] + minor + 1)
            )
            assert registers[lane * matrices + matrix] == low | high << 16


@pytest.mark.parametrize(
    ("row_bytes", "passes"), [(16, 1), (32, 2), (64, 4), (128, 8), (256, 8), (144, 1), (0, 1)]
)
def test_bank_conflicts_are_counted(simulator: ModuleType, row_bytes: int, passes: int) -> None:
    simulator.ldmatrix([row * row_bytes // 2 for row in range(8)] * 2, 2)
    counted = simulator.statistics()
    assert counted["ldmatrix_matrices"] == 2
    assert counted["ldmatrix_passes"] == 2 * passes


@pytest.mark.parametrize("arrival", ["deferred", "immediate"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies_arrive_when_they_are_waited_for(
    simulator: ModuleType, size: int, arrival: str
) -> None:
    simulator.use_settings(async_copies=arrival)
    words = list(range(1, 17))
    valid = [i % 3 != 1 for i in range(64 // size)]
    kept = [w if valid[4 * i // size] else 0 for i, w in enumerate(words)]
    nan = [0xFFFFFFFF if valid[4 * i // size] else 0 for i in range(16)]
    before, after = simulator.copy_async(words, size, valid)
    assert before == (nan if arrival == "deferred" else kept)
    assert after == kept


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 16), (-2, -8), (6, 80)])
def test_a_tma_box_is_swizzled_and_zero_beyond_the_matrix(
    simulator: ModuleType, row: int, column: int
) -> None:
    rows, columns, box_rows = 10, 88, 8
    box = simulator.tma_box(
        [1 + i for i in range(rows * columns)], rows, columns, row, column, box_rows
    )
    for r in range(box_rows):
        for c in range(64):
            y, x = row + r, column + c
            inside = 0 <= y < rows and 0 <= x < columns
            place = r * 64 + (c // 8 ^ r % 8) * 8 + c % 8
            assert box[place] == (1 + y * columns + x if inside else 0)


# -------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("x", [0.0, 0.3, -4.7, 9.25, -150.0, -math.inf])
def test_approximations_are_as_coarse_as_documented(simulator: ModuleType, x: float) -> None:
    power, tangent = simulator.approximations(x)
    exact = 2.0**x
    assert power == pytest.approx(exact, rel=2**-21) if exact >= 2.0**-126 else power == 0
    assert tangent == pytest.approx(math.tanh(x), rel=2**-10)
