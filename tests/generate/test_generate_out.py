"""`--prompts-file` with `--out`: every prompt has its line, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from generate_command import ENVIRONMENT, PROMPT, Terminal, assert_one_error, command
from gpt2fast.cli import results_file
from time_limits import deadline, patience

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "so",
    "it",
    "goes",
    "on",
    "dog",
    "too",
    "there",
    "once",
    "upon",
]


def prompts(count, seed=0):
    """Texts, some of them repeated, and some with options of their own."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        line = {"prompt": " ".join(draw.choices(WORDS, k=draw.randrange(1, 4))), "id": len(lines)}
        if draw.random() < 0.3:
            line |= {
                "temperature": draw.choice([0.2, 0.7, 1.3]),
                "max_new_tokens": draw.randrange(9),
            }
        if draw.random() < 0.2:
            line["prompt"] = PROMPT
        lines.append(line)
    return lines


def written(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def results(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    """A file of prompts, and a place for results."""
    return written(tmp_path / "prompts.jsonl", prompts(40)), tmp_path / "results.jsonl"


FLAGS = ["--seed", 3, "--max-new-tokens", 12]


def test_the_results_are_those_of_standard_output_in_their_order(run, files):
    prompts_file, out = files
    for flags in (FLAGS, [*FLAGS, "--num-samples", 3], ["--num-beams", 2, "--max-new-tokens", 4]):
        code, said, err = run("--prompts-file", prompts_file, "--out", out, *flags)
        assert (code, said) == (0, "")
        assert not [line for line in err.splitlines() if "error" in line]
        code, expected, _ = run("--prompts-file", prompts_file, "--json", *flags)
        assert code == 0
        assert results(out) == [json.loads(line) for line in expected.splitlines()]
        out.unlink()


def test_a_bad_line_has_an_error_in_its_place_and_the_others_their_results(run, tmp_path):
    bad = {
        2: b"{",
        4: b'{"prompt": 3}',
        5: b'{"prompt": "a", "id": "five", "top_k": -1}',
        7: b'"the c\xe4t"',
        8: json.dumps({"prompt": "cat " * 500, "id": 8}).encode(),
        9: b'"\\ud800"',
    }
    lines = [bad.get(number, b'"the cat"') for number in range(11)]
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\n".join([*lines[:6], b"", *lines[6:]]))  # a blank line is none
    out = tmp_path / "out.jsonl"
    flags = ["--out", out, *FLAGS, "--window", "error"]
    code, said, err = run("--prompts-file", file, *flags)
    assert (code, said) == (1, "")
    assert err.splitlines()[-1].startswith("error: 6 of 11 prompts have no result")
    found = results(out)
    indices = [*range(6), *range(7, 12)]
    assert [one["index"] for one in found] == indices
    errors = {one["index"]: one for one in found if "error" in one}
    assert sorted(errors) == [2, 4, 5, 8, 9, 10]
    for index, one in errors.items():
        assert f"prompts.jsonl, line {index + 1}" in one["error"] or index == 10
    assert errors[5]["id"] == "five" and "top_k is -1" in errors[5]["error"]
    assert errors[9]["id"] == 8 and "64" in errors[9]["error"]
    assert "0xE4" in errors[8]["error"]
    assert "surrogate" in errors[10]["error"]
    # Nothing is done again, and the failure is still one.
    before = out.read_bytes()
    code, _, err = run("--prompts-file", file, *flags)
    assert code == 1 and out.read_bytes() == before
    assert "has the results of 11 prompts, which are all" in err


def test_wherever_it_was_cut_off_it_goes_on_as_if_nothing_had_happened(run, files):
    prompts_file, out = files
    flags = ["--prompts-file", prompts_file, "--out", out, *FLAGS, "--num-samples", 2]
    run(*flags)
    whole = out.read_bytes()
    draw = random.Random(0)
    for cut in (0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(5))):
        out.write_bytes(whole[:cut])
        assert run(*flags)[0] == 0
        assert out.read_bytes() == whole
    # As a file system may leave it after a loss of power.
    out.write_bytes(whole[:900] + b"\0" * 300)
    assert run(*flags)[0] == 0
    assert out.read_bytes() == whole


def test_seeds_that_were_drawn_stay_and_the_rest_is_written(run, files):
    prompts_file, out = files
    flags = ["--prompts-file", prompts_file, "--out", out, "--max-new-tokens", 5]
    run(*flags)
    first = out.read_text().splitlines(keepends=True)
    out.write_text("".join(first[:20]))
    assert run(*flags)[0] == 0
    assert out.read_text().startswith("".join(first[:20]))
    assert [one["index"] for one in results(out)] == list(range(40))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"flags": ["--seed", 3, "--max-new-tokens", 13]}, "max_new_tokens was 12, and now 13"),
        ({"flags": [*FLAGS, "--top-k", 5]}, "top_k was 50, and now 5"),
        ({"flags": [*FLAGS, "--dtype", "bfloat16"]}, "dtype was None, and now 'bfloat16'"),
        ({"prompts": 41}, "results of other prompts"),
    ],
)
def test_results_of_another_job_are_not_mixed_in(run, files, change, part):
    prompts_file, out = files
    assert run("--prompts-file", prompts_file, "--out", out, *FLAGS)[0] == 0
    before = out.read_bytes()
    if "prompts" in change:
        written(prompts_file, prompts(change["prompts"]))
    flags = change.get("flags", FLAGS)
    result = run("--prompts-file", prompts_file, "--out", out, *flags)
    assert_one_error(result, 1, part, "name another file")
    assert out.read_bytes() == before


def test_other_weights_under_the_same_name_are_another_job(generator, model_dir):
    import torch

    from gpt2fast import GPT2, Generator

    def digest(generator):
        return results_file.job_of(generator, b"", {}, {})["model"]["weights"]

    model = GPT2.from_pretrained(model_dir)
    again = GPT2.from_pretrained(model_dir)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1e-3)
    for form in (lambda model: model, lambda model: model.pack()):
        one, same, other = (
            Generator(form(each), generator.tokenizer, notify=lambda _: None)
            for each in (model, GPT2.from_pretrained(model_dir), again)
        )
        assert digest(one) == digest(same) != digest(other)


def test_files_that_are_no_results_are_left_alone(run, files):
    prompts_file, out = files
    flags = ["--prompts-file", prompts_file, "--out"]
    out.write_text("a diary\n")
    assert_one_error(run(*flags, out, *FLAGS), 1, "results.jsonl exists", "results.jsonl.job.json")
    assert out.read_text() == "a diary\n"
    assert_one_error(run(*flags, prompts_file, *FLAGS), 1, "that is the file of the prompts")
    assert_one_error(run(*flags, out.parent, *FLAGS), 1, "is no file")
    assert_one_error(run(*flags, "/dev/null", *FLAGS), 1, "is no file")
    assert_one_error(run(*flags, out.parent / "no" / "out", *FLAGS), 1, "there is no folder")
    assert_one_error(run(PROMPT, "--out", out), 2, "--out is for --prompts-file")
    assert_one_error(run(*flags, ""), 2, "--out is empty")


def test_a_line_that_was_changed_is_noticed(run, files):
    prompts_file, out = files
    flags = ["--prompts-file", prompts_file, "--out", out, *FLAGS]
    run(*flags)
    lines = out.read_text().splitlines(keepends=True)
    for changed in ([*lines[:5], *lines[6:]], [*lines, lines[0]], ["{\n", *lines]):
        text = "".join(changed)
        out.write_text(text)
        assert_one_error(run(*flags), 1, "is not the result that belongs there")
        assert out.read_text() == text


def test_a_kill_in_the_middle_loses_nothing_that_was_written(model_dir, tmp_path):
    """SIGKILL at random moments, until it is done: the same as at one go."""
    prompts_file = written(tmp_path / "prompts.jsonl", prompts(120))
    out, straight = tmp_path / "out.jsonl", tmp_path / "straight.jsonl"
    flags = ["--prompts-file", str(prompts_file), *map(str, FLAGS), "--max-new-tokens", "30"]
    ended = subprocess.run(
        command(model_dir, *flags, "--out", str(straight)), env=ENVIRONMENT, check=False,
        capture_output=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    draw = random.Random(0)
    kills, size = 0, 0
    for _ in range(30):
        process = subprocess.Popen(
            command(model_dir, *flags, "--out", str(out)), env=ENVIRONMENT, stderr=subprocess.PIPE
        )
        target = size + draw.randrange(1, 9000)
        end = deadline()
        while process.poll() is None and time.monotonic() < end:
            if kills < 3 and out.exists() and out.stat().st_size >= target:
                process.kill()
                kills += 1
                break
            time.sleep(0.001)
        _, said = process.communicate(timeout=patience())
        assert process.returncode in (0, -signal.SIGKILL), said
        assert out.read_bytes()[:size] == straight.read_bytes()[:size]
        size = out.read_bytes().rfind(b"\n") + 1
        if process.returncode == 0:
            break
    assert kills >= 1
    assert out.read_bytes() == straight.read_bytes()


def test_two_processes_do_not_write_to_one_file(run, files):
    from gpt2fast._system.lock import only_process

    prompts_file, out = files
    with only_process(out.with_name(f".{out.name}.lock")):
        result = run("--prompts-file", prompts_file, "--out", out, *FLAGS)
    assert_one_error(result, 1, "another process is writing there")
    assert not out.exists()


def test_a_full_disk_is_said_and_the_rest_comes_later(run, files, monkeypatch):
    prompts_file, out = files
    flags = ["--prompts-file", prompts_file, "--out", out, *FLAGS]
    run(*flags)
    whole = out.read_bytes()
    out.unlink()
    real = results_file.ResultsFile.add

    def add(self, lines):
        if self.done == 10:
            self._file.close()
            self._file = FullDisk(self.path)
        real(self, lines)

    monkeypatch.setattr(results_file.ResultsFile, "add", add)
    code, said, err = run(*flags)
    assert (code, said) == (1, "")
    assert err.splitlines()[-1].startswith(f"error: --out {out}: No space left on device")
    assert "10 prompts are done" in err
    assert whole.startswith(out.read_bytes()[:-7])
    monkeypatch.undo()
    assert run(*flags)[0] == 0
    assert out.read_bytes() == whole


class FullDisk:
    """A file that takes seven more bytes."""

    def __init__(self, path):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._room = 7

    def write(self, data):
        import errno

        if not self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._file.write(data[: self._room])
        self._room -= written
        return written

    def fileno(self):
        return self._file.fileno()

    def close(self):
        self._file.close()


def test_progress_is_shown_on_a_terminal(model_dir, files):
    prompts_file, out = files
    terminal = Terminal(
        command(model_dir, "--prompts-file", str(prompts_file), "--out", str(out), "--greedy")
    )
    assert b"0/40 done" in terminal.wait_for(b"40/40 done")
    assert terminal.process.wait(patience()) == 0


def test_statistics_count_all_steps(run, files):
    prompts_file, out = files
    code, _, err = run("--prompts-file", prompts_file, "--out", out, *FLAGS, "--stats")
    assert code == 0
    assert "decode" in err.splitlines()[-1] and "prefill" in err.splitlines()[-1]
