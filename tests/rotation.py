"""The tests that run: a part of the many combinations a day, all of them when asked.

    GPT2FAST_TEST_DAY=20780    the part of that day, as the header of a run names it
    GPT2FAST_TEST_ALL=1        every combination; so does any -m of one's own, or a test named by ::
    GPT2FAST_TEST_FAST=1       what `make test-fast` runs: fewer combinations, and no long tests

A part goes by a test's name and the day alone: after as many days as there are parts every
combination has run, and a failure is repeated with its day.
"""

from __future__ import annotations

import os
import time
import zlib

import pytest

# Tests with many combinations, and into how many parts they are cut. What is one test in each of
# several backends and dtypes is cut, too: neighboring combinations find most of each other's bugs.
PARTS = {
    "test_embedding.py::test_matches_torch": 3,
    "test_cross_entropy.py::test_matches_torch_at_odd_shapes": 3,
    "test_cross_entropy.py::test_never_holds_all_logits": 2,
    "test_attention.py::test_matches_torch_at_odd_shapes": 3,
    "test_attention.py::test_matches_torch_on_a_long_sequence": 3,
    "test_attention.py::test_against_a_cache_equals_attention_over_the_whole_sequence": 3,
    "test_layer_norm.py::test_matches_torch_at_odd_shapes": 2,
    "test_mlp.py::test_gelu_mlp_matches_torch_at_odd_shapes": 2,
    "test_cache.py::test_appending_to_views": 2,
    "test_triton_decode.py::test_a_step_matches_the_reference": 2,
    "test_triton_compiles.py::test_every_kernel_compiles": 2,
    "test_training_settings.py::test_flag_changes_the_outcome": 2,
    "test_distributed.py::test_a_run_goes_on_with_another_number_of_processes": 3,
    "test_distributed.py::test_two_processes_train_as_one": 3,
    "test_quantization.py::test_the_bundled_model_passes_the_gate": 2,
    "test_packed_borders.py::test_a_step_of_odd_sizes": 3,
    "test_streams.py::test_streams_that_are_closed_full_or_left": 3,
    "test_streams.py::test_names_that_a_recipe_cannot_hold_are_refused_before_the_work": 3,
    "test_streams.py::test_a_prompt_is_the_bytes_that_it_was": 3,
    "test_fork.py::test_a_forked_child_computes_what_its_parent_has_computed": 2,
    "test_model.py::test_the_four_real_sizes_build_and_match": 2,
}
# The same for all tests of a file on a backend that takes its time: what their names begin and end
# with. Those with `several_rows` are small, and run every day.
BACKEND_PARTS = {
    ("tests/ops/test_borders.py::", "simulator]"): 2,
    ("tests/ops/test_borders.py::", "[triton]"): 16,
    ("tests/ops/test_borders.py::", "-triton]"): 16,
    ("tests/ops/test_attention_forms.py::", "simulator]"): 3,
    ("tests/ops/test_attention_forms.py::", "-triton]"): 4,
}
# What test-fast leaves out: processes that start others, compilers, whole models, pictures, and
# Triton's interpreter.
LONG = (
    "test_distributed.py", "test_kills.py", "test_triton_compiles.py", "test_readme.py",
    "test_build.py", "test_native_training.py", "test_bundled_model.py", "test_cuda_build.py",
    "test_instruction_sets.py",
    "test_tuning.py", "test_streams.py", "test_fork.py", "test_fuzz.py", "test_report.py",
    "test_benchmarks.py", "test_gpu_check.py", "test_triton_", "simulator/", "triton]", "-triton-",
    "passes_opcheck", "pass_opcheck",
    "test_killed", "test_a_killed", "test_flag_changes", "test_a_reader_that_goes",
    "test_signal_saves", "test_a_closed_terminal", "test_the_advice_for", "the_reference_builds",
    "test_running_ahead", "test_memory_does_not_grow", "bundled_model_passes",
    "four_real_sizes", "of_real_size", "on_a_long_sequence", "never_holds_all_logits",
    "large_vocabulary", "on_a_terminal", "a_terminal_conversation", "test_notes_come_before",
    "that_has_enough", "test_interrupting", "imports_no_heavy", "as_a_library_nothing",
    "test_closed_descriptors", "test_package.py", "test_rotation.py", "test_without_kernels",
    "that_are_not_there_are_explained", "samples_without_number", "processes_train_examples",
)  # fmt: skip
FAST_PARTS = 8
"""Into how many parts test-fast cuts tests of several cases."""


def _is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def day() -> int:
    """Days since 1970, or the day that GPT2FAST_TEST_DAY names."""
    named = os.environ.get("GPT2FAST_TEST_DAY")
    return int(named) if named else int(time.time()) // 86400


def takes_all(config: pytest.Config) -> bool:
    """True if every combination was asked for."""
    return (
        _is_set("GPT2FAST_TEST_ALL")
        or config.option.markexpr not in ("", "not slow")
        or any("::" in argument for argument in config.args)
    )


def runs_today(name: str, today: int, fast: bool = False) -> bool:
    """True if a test is in the part of that day.

    Args:
        name: its node id.
        today: what `day` gives.
        fast: whether it is to be left out if it is long.
    """
    parts = next((count for test, count in PARTS.items() if test in name), 1)
    for (begin, end), count in BACKEND_PARTS.items():
        if name.startswith(begin) and name.endswith(end) and "several_rows" not in name:
            parts = max(parts, 1 if name.endswith("cuda-triton]") else count)
    if fast:
        if any(test in name for test in LONG):
            return False
        if "[" in name:
            parts = max(parts, FAST_PARTS)
    return (zlib.crc32(name.encode()) + today) % parts == 0


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave those of `items` out that are another day's."""
    fast = _is_set("GPT2FAST_TEST_FAST")
    if not fast and takes_all(config):
        return
    today = day()
    kept = [item for item in items if runs_today(item.nodeid, today, fast)]
    if len(kept) < len(items):
        chosen = {id(item) for item in kept}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
        items[:] = kept


def header(config: pytest.Config) -> str:
    """The line about it in a run's header."""
    if takes_all(config) and not _is_set("GPT2FAST_TEST_FAST"):
        return "combinations: all"
    return f"combinations: the part of GPT2FAST_TEST_DAY={day()} (GPT2FAST_TEST_ALL=1 runs all)"
