"""Commands whatever the locale calls bytes, and whatever their standard streams are."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.checkpoints.tensor_files import read_tensors
from gpt2fast.cli.arguments import text_argument
from gpt2fast.cli.command import command
from gpt2fast.data.meta import read_meta
from gpt2fast.errors import ConfigError, why_not_written
from gpt2fast.tokenizer import CharTokenizer
from gpt2fast.training import TrainConfig
from time_limits import patience

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names of files are no bytes")

ROOT = Path(__file__).parents[1]
TEXT = "Café au lait, naïve façade. " * 60
UTF8 = {"LC_ALL": "C.UTF-8"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NARROW = {**UTF8, "PYTHONIOENCODING": "ascii"}
LATIN = b"caf\xe9.txt"
MODEL = b"mod\xe9le"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a model whose names are not UTF-8, and a text whose name is."""
    folder = tmp_path_factory.mktemp("place")
    for name in (LATIN, "café.txt".encode()):
        (folder / os.fsdecode(name)).write_text(TEXT, encoding="utf-8")
    tokenizer = CharTokenizer.train([TEXT])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=32, n_layer=1, n_head=2, n_embd=16,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    GPT2(config).save_pretrained(folder / os.fsdecode(MODEL), tokenizer)
    return folder


def run(place, environment, module, *arguments, redirection=""):
    """One command, in a shell; returns exit code, standard output and standard error."""
    line = [sys.executable, "-m", f"gpt2fast.{module}", *arguments]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *line],
        cwd=place, stdin=subprocess.DEVNULL, capture_output=True, timeout=patience(),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    error = done.stderr.decode()
    assert "Traceback" not in error and "Exception ignored" not in error, error
    return done.returncode, done.stdout, error


@pytest.mark.parametrize("environment", [UTF8, ASCII, NARROW], ids=["UTF-8", "C", "narrow"])
def test_a_prompt_is_the_bytes_that_it_was(place, environment):
    options = ["--model", MODEL, "--greedy", "--max-new-tokens", "5", "--stop", "ï", "Café"]
    code, out, err = run(place, environment, "generate", "--json", *options)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["prompt"] == "Café"
    code, out, err = run(place, environment, "generate", *options)
    text = f"Café{result['text']}\n"
    narrow = environment is NARROW
    assert out == (text.encode("ascii", "backslashreplace") if narrow else text.encode())


def test_text_that_is_not_utf8_is_named_before_a_model_is_loaded(place):
    code, out, err = run(place, ASCII, "generate", "--model", "none", b"caf\xe9")
    assert (code, out) == (2, b"")
    assert r"error: argument PROMPT: 'caf\udce9' is not UTF-8 text (byte 0xe9)" in err


def test_text_arguments():
    assert text_argument("Café") == "Café"
    assert text_argument(os.fsdecode("Café".encode())) == "Café"
    assert text_argument("Caf\udcc3\udca9") == "Café", "as the locale C has it"
    with pytest.raises(argparse.ArgumentTypeError, match="byte 0xe9"):
        text_argument("caf\udce9")


@pytest.mark.parametrize("environment", [UTF8, ASCII], ids=["UTF-8", "C"])
def test_text_of_any_name_is_prepared_and_scored(place, tmp_path, environment):
    out = os.fsencode(tmp_path) + b"/donn\xe9es"
    code, said, err = run(place, environment, "prepare", LATIN, "--out", out)
    assert (code, err) == (0, ""), err
    assert rb"next: python -m gpt2fast.train --data" in said
    assert read_meta(Path(os.fsdecode(out)) / "meta.json").train_tokens > 1000
    options = ["--model", MODEL, "--task", "perplexity", "--data", LATIN, "--json", "-"]
    code, said, err = run(place, environment, "evaluate", *options)
    assert code == 0, err
    assert json.loads(said)["tasks"]


@pytest.mark.parametrize(
    ("environment", "name", "way"),
    [
        (UTF8, LATIN, "rename it"),
        (ASCII, LATIN, "rename it"),
        (ASCII, "café.txt", "LC_ALL=C.UTF-8"),
    ],
)  # fmt: skip
def test_names_that_a_recipe_cannot_hold_are_refused_before_the_work(place, environment, name, way):
    for module, more in (("train", []), ("tune", ["--space", "lr"])):
        code, out, err = run(place, environment, module, "--data", name, "--out", "new", *more)
        assert (code, out) == (2, b"")
        assert err.startswith("error: data goes into config.yaml, but 'caf") and way in err
        assert not (place / "new").exists()


def test_settings_that_are_names_are_checked():
    for settings in ({"out": "a\udce9"}, {"mixture": {"a\udce9": 1.0, "b": 1.0}}):
        with pytest.raises(ConfigError, match="is not UTF-8: rename it"):
            TrainConfig(**settings)
    assert why_not_written("é") is None


def test_weights_are_read_from_any_folder(place, tmp_path):
    file = place / os.fsdecode(MODEL) / "model.safetensors"
    tensors = read_tensors(file)[0]
    link = tmp_path / "model.safetensors"
    link.symlink_to(file)
    expected = read_tensors(link)[0]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_a_run_in_a_folder_of_any_name_goes_on(tmp_path):
    folder = tmp_path / os.fsdecode(b"dossier\xe9")
    folder.mkdir()
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    tiny = (
        "--batch-size 2 --block-size 16 --eval-batches 1 --threads 1 --n-layer 1 --n-head 1 "
        "--n-embd 16 --device cpu"
    )
    first = run(folder, UTF8, "train", "--data", "book.txt", "--max-steps", "1", *tiny.split())
    assert first[0] == 0, first[2]
    again = run(folder, UTF8, "train", "--resume", "out", "--max-steps", "2")
    assert again[0] == 0, again[2]


@pytest.mark.parametrize(
    ("module", "arguments", "redirection", "code", "part"),
    [
        ("prepare", ["-"], "<&-", 1, "there is no text"),
        ("prepare", ["-"], "<&- >&- 2>&-", 1, ""),
        ("generate", ["--help"], "| head -1", 0, ""),
        ("generate", ["--help"], ">/dev/full", 1, "[Errno 28]"),
        ("generate", ["--model", MODEL, "C"], ">/dev/full", 1, "[Errno 28]"),
        ("generate", ["--model", MODEL, "C"], ">&-", 1, "standard output is closed"),
        ("generate", ["--model", MODEL, "C"], "2>&-", 0, ""),
        ("generate", ["--model", MODEL, "--interactive"], "<&-", 0, ""),
        ("evaluate", ["--model", MODEL, "-t", "perplexity", "--data", LATIN], "| head -1", 0, ""),
        ("evaluate", ["--model", MODEL, "-t", "perplexity", "--data", LATIN], "<&- >&-", 0, ""),
        ("train", ["--help"], "| head -1", 0, ""),
        ("report", ["none"], ">&- 2>&-", 1, ""),
        ("doctor", [], ">/dev/full", 1, "[Errno 28]"),
        ("doctor", [], "| head -1", 0, ""),
        ("doctor", [], "<&- >&- 2>&-", 0, ""),
        ("benchmark", ["--help"], "| head -1", 0, ""),
    ],
)
def test_streams_that_are_closed_full_or_left(place, module, arguments, redirection, code, part):
    if "|" in redirection:
        redirection += "; exit ${PIPESTATUS[0]}"
    found, _out, err = run(place, UTF8, module, *arguments, redirection=redirection)
    assert found == code, err
    assert part in err


def test_files_that_are_opened_do_not_take_the_place_of_closed_streams(tmp_path):
    script = (
        "import sys\n"
        "from gpt2fast.cli.command import command\n"
        "@command()\n"
        "def main(argv):\n"
        f"    file = open({str(tmp_path / 'data')!r}, 'w')\n"
        "    print('to nowhere')\n"
        "    print('nor this', file=sys.stderr)\n"
        "    return file.fileno()\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", script], cwd=ROOT
    )
    assert done.returncode > 2
    assert (tmp_path / "data").read_text() == ""


def test_a_name_out_of_a_file_that_the_locale_has_no_bytes_for(monkeypatch, capsys):
    @command()
    def main(argv):
        raise UnicodeEncodeError("ascii", argv[0], 0, 1, "ordinal not in range(128)")

    assert main(["a\udce9"]) == 1
    assert "is not UTF-8: rename it" in capsys.readouterr().err
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert main(["é"]) == 1
    assert "ascii has no way to name the file 'é': set LC_ALL=C.UTF-8" in capsys.readouterr().err
