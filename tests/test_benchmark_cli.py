"""`python -m gpt2fast.benchmark`: what it prints, and what it says where something is missing."""

from __future__ import annotations

import json

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.cli import benchmark
from gpt2fast.errors import ArgumentError
from gpt2fast.ops import native
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
    monkeypatch.setattr(benchmark, "_READ_BYTES", 8 << 20)

    def run(*flags: str) -> tuple[int, str, str]:
        code = benchmark.main(["--model", model_dir, "--rounds", "1", *flags])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_every_format_has_a_line(run):
    formats = ("float32", "bfloat16", "float16")
    code, out, _ = run("--weights", *formats)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(formats)]
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
    words = run("--weights", "float32", "bfloat16")[1].splitlines()[-1]
    assert words.startswith("your memory reads ") and "; float32 decoding reaches " in words
    assert words.endswith(" % of what that allows") and ", bfloat16 " in words


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
    assert "the memory's speed is unknown: switched off" in out
    out = printed_without_kernels(*command, "--json")
    speed = json.loads(out)["speeds"][0]
    assert speed["decode"] > 0 and speed["bandwidth"] is None and speed["share"] is None


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
