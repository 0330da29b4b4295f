"""`python -m gpt2fast.benchmark`: what it prints, and what it says where something is missing."""

from __future__ import annotations

import json

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.cli import benchmark, regime
from gpt2fast.errors import ArgumentError
from gpt2fast.ops import native
from gpt2fast.ops.packed import MatrixFormat
from without_kernels import printed_without_kernels


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A small random model without a tokenizer."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("model")
    GPT2(
        GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model_dir, capsys, monkeypatch):
    """Run the command line on the small model; returns exit code, output and errors."""
    # No setting: what is read to measure the memory is many megabytes, and takes its time.
    monkeypatch.setattr(regime, "_READ_BYTES", 8 << 20)

    def run(*flags: str) -> tuple[int, str, str]:
        code = benchmark.main(["--model", model_dir, "--rounds", "1", *flags])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_every_format_has_a_line(run):
    formats = ("float32", "bfloat16", "float16")
    code, out, _ = run("--weights", *formats)
    assert code == 0
    starts = tuple(f"{name} " for name in formats)
    rows = [line.split() for line in out.splitlines() if line.startswith(starts)]
    assert [row[0] for row in rows] == list(formats)
    assert all(row[2] == "tokens/s" and float(row[1].replace(",", "")) > 0 for row in rows)


def test_the_share_is_what_was_reached_of_what_the_memory_allows(run):
    if native.loaded() is None:
        pytest.skip(f"no compiled kernels: {native.unavailable()}")
    code, out, _ = run("--weights", "float32", "--json")
    speed = json.loads(out)["speeds"][0]
    assert code == 0
    assert speed["allowed"] == pytest.approx(speed["bandwidth"] / speed["step_bytes"])
    assert speed["share"] == pytest.approx(speed["decode"] / speed["allowed"])
    out = run("--weights", "float32", "bfloat16")[1]
    (words,) = (line for line in out.splitlines() if line.startswith("your memory reads "))
    assert "; float32 decoding reaches " in words
    assert words.endswith(" % of what that allows") and ", bfloat16 " in words


def test_what_bounds_each_format_is_said_with_its_figures(run, monkeypatch):
    if native.loaded() is None:
        pytest.skip(f"no compiled kernels: {native.unavailable()}")
    # No figure of a busy machine may decide whether there is something to test.
    monkeypatch.setattr(benchmark, "computing_speed", lambda form, rows: 20e9)
    result = json.loads(run("--weights", "int8", "int4", "--json", "--threads", "1")[1])
    memory = result["memory"]
    assert memory["threads"] == 1 and memory["one"] == memory["together"] > 0
    for speed in result["speeds"]:
        reached = speed["decode"] * speed["step_bytes"]
        measured = speed["bandwidth"], regime.MemorySpeed(**memory), speed["computing"]
        assert speed["computing"] == 20e9
        assert speed["bound"] == regime.bound(reached, *measured)
    out = run("--weights", "int8", "int4")[1].splitlines()
    said = [line.partition(":")[0] for line in out if ": bound by " in line]
    assert said == ["int8", "int4"]


TWO_OF_FOUR = regime.MemorySpeed(threads=2, cores=4, one=10e9, together=20e9, every_core=36e9)
FULL = regime.MemorySpeed(threads=4, cores=4, one=12e9, together=30e9, every_core=30e9)
ENOUGH = regime.MemorySpeed(threads=2, cores=4, one=12e9, together=24e9, every_core=25e9)
SCALES = regime.MemorySpeed(threads=4, cores=4, one=10e9, together=39e9, every_core=39e9)
ONE_CORE = regime.MemorySpeed(threads=1, cores=1, one=10e9, together=10e9, every_core=10e9)


@pytest.mark.parametrize(
    ("memory", "computing", "share", "expected", "remedy"),
    [
        # Two threads read what two threads can, and four read more.
        (TWO_OF_FOUR, 80e9, 0.9, "loading", "and more threads (4 read 36 GB/s)"),
        # Four threads stand in each other's way.
        (FULL, 80e9, 0.9, "memory", "more threads do not"),
        # More threads than these two would read no more.
        (ENOUGH, 80e9, 0.9, "memory", "more threads do not"),
        (SCALES, 80e9, 0.9, "loading", "fewer bits per weight help"),
        (ONE_CORE, 80e9, 0.9, "memory", "fewer bits per weight help"),
        (TWO_OF_FOUR, 12e9, 0.9, "computing", "more threads do (2 cores are idle)"),
        (FULL, 12e9, 0.9, "computing", "faster cores would"),
        (FULL, 80e9, 0.5, "other", "50 % of what memory (30 GB/s) and computing (80 GB/s)"),
        (FULL, 12e9, 0.5, "other", "50 % of what memory (30 GB/s) and computing (12 GB/s)"),
    ],
)
def test_the_lowest_of_the_measured_limits_is_the_bound(memory, computing, share, expected, remedy):
    reached = share * min(memory.together, computing)
    arguments = (reached, memory.together, memory, computing)
    assert regime.bound(*arguments) == expected
    assert remedy in regime.advice(expected, *arguments)


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        (MatrixFormat("float32"), 1),
        (MatrixFormat("bfloat16"), 1),
        (MatrixFormat("int8", 64), 3),
        (MatrixFormat("int4", 32), 1),
    ],
)
def test_the_speed_of_computing_is_weights_over_the_time_that_they_add(form, rows, monkeypatch):
    if native.loaded() is None:
        pytest.skip(f"no compiled kernels: {native.unavailable()}")
    seconds = iter([(5e-5, 7e-5), (7e-5, 5e-5)])
    steps = []

    def fastest(given):
        steps.extend(step() for step in given)  # they run, whatever they take
        return next(seconds)

    monkeypatch.setattr(regime, "_fastest", fastest)
    speed = regime.computing_speed(form, rows)
    most = torch.get_num_threads() * regime._PROBE_BYTES
    assert min(steps) > 0
    # Scales and whole panels of 32 columns come on top.
    assert 0.95 * most < speed * 2e-5 < 1.2 * most
    assert regime.computing_speed(form, rows) is None


def test_json_says_what_was_run(run):
    code, out, _ = run(
        "--weights", "bfloat16", "--json", "--batch", "3", "--prompt-tokens", "5", "--new-tokens",
        "4", "--threads", "1",
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (result["batch"], result["prompt_tokens"], result["new_tokens"]) == (3, 5, 4)
    assert result["threads"] == 1 and result["missing"] == {}
    assert [speed["weights"] for speed in result["speeds"]] == ["bfloat16"]


def test_a_step_reads_every_weight_once_and_the_cache(run, model_dir):
    model = GPT2.from_pretrained(model_dir)
    result = json.loads(run("--weights", "float32", "--json", "--new-tokens", "3")[1])
    assert result["speeds"][0]["step_bytes"] > 4 * model.wte.weight.numel()
    entry = 2 * 2 * 64 * 4
    most = 4 * sum(p.numel() for p in model.parameters()) + entry * 64
    assert result["speeds"][0]["step_bytes"] < 1.1 * most


def test_a_format_that_is_not_there_is_said_to_be_missing(run, monkeypatch):
    def refuse(self, scheme, **options):
        raise ArgumentError(f"no {scheme} in this version")

    # Stands for a version or a machine without one of the formats; here there are all.
    monkeypatch.setattr(GPT2, "quantize", refuse)
    code, out, _ = run("--weights", "float32", "int4")
    assert code == 0 and "int4      missing: no int4 in this version" in out
    code, out, _ = run("--weights", "int4", "--json")
    assert json.loads(out)["missing"] == {"int4": "no int4 in this version"}
    assert code == 0 and json.loads(out)["speeds"] == []


def test_without_kernels_the_speed_is_there_and_the_share_is_not(model_dir):
    command = ["gpt2fast.benchmark", "--model", model_dir, "--rounds", "1", "--weights", "float32"]
    out = printed_without_kernels(*command)
    assert "the memory's speed is unknown: switched off" in out and "bound by" not in out
    out = printed_without_kernels(*command, "--json")
    speed = json.loads(out)["speeds"][0]
    assert speed["decode"] > 0 and speed["bandwidth"] is None and speed["share"] is None
    assert speed["computing"] is None and speed["bound"] is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--weights", "int3"],
        ["--threads", "0"],
        ["--rounds", "some"],
        ["--new-tokens", "1"],
        ["--preset", "gpt3"],
    ],
)
def test_wrong_arguments_cost_one_line_and_exit_code_2(run, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == "" and printed.err.startswith("error:") and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--prompt-tokens", "64"], "n_positions=64"), (["--model", "/nowhere"], "/nowhere")],
)
def test_what_does_not_fit_costs_one_line_and_exit_code_1(run, flags, word):
    code, out, err = run(*flags)
    assert code == 1 and out == ""
    assert err.startswith("error:") and err.count("\n") == 1 and word in err
