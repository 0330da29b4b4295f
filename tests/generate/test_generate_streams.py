"""`gpt2fast generate` as a process: notes, signals, closed streams, terminals."""

from __future__ import annotations

import itertools
import logging
import signal
import subprocess
import sys
import time

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from generate_command import ENDLESS, ENVIRONMENT, PROMPT, Terminal, command
from gpt2fast import GPT2
from gpt2fast.cli.generate import main
from time_limits import patience


def test_notes_come_before_or_after_a_streamed_text(model_dir):
    arguments = command(model_dir, PROMPT, "--max-new-tokens", "150", "--eos-token-id", "none")
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, check=True
    )
    text, note, rest = done.stdout.partition(b"\nnote: ")
    assert text.startswith(PROMPT.encode())
    assert note
    assert rest.startswith(b"the text is longer than the model's 64 positions")
    assert rest.count(b"\n") == 1


def test_notes_of_the_library_come_before_a_streamed_text(model_dir, monkeypatch, capfd, request):
    """Kernels that are looked for at the first step, say."""
    said = itertools.count()

    def noisy(module, args):
        if isinstance(module, GPT2) and next(said) == 0:
            logging.getLogger("gpt2fast.kernels.library").warning("something about kernels")

    monkeypatch.setattr(sys, "stderr", sys.stdout)
    handle = register_module_forward_pre_hook(noisy)
    request.addfinalizer(handle.remove)
    assert main(["--model", str(model_dir), PROMPT, "--max-new-tokens", "5"]) == 0
    assert capfd.readouterr().out.startswith(f"gpt2fast: something about kernels\n{PROMPT}")


def test_as_a_library_nothing_is_printed(model_dir):
    script = (
        "from gpt2fast import Generator\n"
        f"generator = Generator.from_pretrained({str(model_dir)!r}, window='slide')\n"
        "generator('The cat', max_new_tokens=10)\n"
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    generator('The cat', max_new_tokens=100, eos_token_id=None)\n"
        "assert 'newest 32 tokens' in str(told[0].message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=ENVIRONMENT, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_reader_that_has_enough_ends_it_quietly(model_dir):
    process = subprocess.Popen(
        command(model_dir, PROMPT, *ENDLESS),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout.read(40).startswith(PROMPT.encode())
    process.stdout.close()
    assert process.wait(patience()) == 0
    # The window's note may come before the reader leaves.
    assert all(line.startswith(b"note: ") for line in process.stderr.read().splitlines())


def test_interrupting_ends_it_with_code_130_and_no_traceback(model_dir):
    process = subprocess.Popen(
        command(model_dir, PROMPT, *ENDLESS),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=patience())
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_generating_imports_no_heavy_module(model_dir):
    script = (
        "import sys; from gpt2fast.generate import main; "
        f"main(['--model', {str(model_dir)!r}, 'The cat', '--max-new-tokens', '3']); "
        "print(*sys.modules, file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=ENVIRONMENT, check=True
    )
    loaded = process.stderr.decode().split()
    for name in (
        "transformers", "tokenizers", "huggingface_hub", "jsonargparse", "rich", "yaml",
        "torch._dynamo", "torch._inductor", "sympy",
    ):  # fmt: skip
        assert name not in loaded


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and /dev/full")
@pytest.mark.parametrize(
    ("redirection", "flags", "code", "out", "err"),
    [
        (">&-", [], 1, b"", b"error: standard output is closed"),
        (">/dev/full", [], 1, b"", b"error: reading or writing failed: [Errno 28]"),
        (">/dev/full <&-", ["--interactive"], 1, b"", b"error: reading or writing failed"),
        ("<&-", ["--interactive"], 0, PROMPT.encode(), b""),
        ("2>&-", ["--window", "slide", "--eos-token-id", "none"], 0, PROMPT.encode(), b""),
    ],
)
def test_closed_descriptors_and_full_disks(model_dir, redirection, flags, code, out, err):
    arguments = command(model_dir, PROMPT, "--max-new-tokens", "100", *flags)
    process = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *arguments],
        capture_output=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.returncode == code, process.stderr
    assert process.stdout.startswith(out)
    assert bool(process.stdout) == bool(out)
    assert b"note:" not in process.stdout
    lines = [x for x in process.stderr.splitlines() if not x.startswith(b"note: ")]
    assert len(lines) == bool(err)
    assert all(line.startswith(err) for line in lines)


def test_interrupting_an_import_leaves_no_traceback(model_dir):
    for module in (b" torch.version\n", b" torch._ops\n"):
        process = subprocess.Popen(
            command(model_dir, PROMPT, *ENDLESS), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**ENVIRONMENT, "PYTHONPROFILEIMPORTTIME": "1"},
        )  # fmt: skip
        # It reports each import as it ends.
        assert any(line.endswith(module) for line in process.stderr), module
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.communicate(timeout=patience())[1]
        assert process.returncode == 130


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_conversation_survives_ctrl_c(model_dir):
    terminal = Terminal(command(model_dir, "--interactive", *ENDLESS))
    terminal.wait_for(b"> ")
    terminal.type(b"The cat\n")
    terminal.wait_for(b"The cat\r\n")
    terminal.wait_for_more(1000)  # the window has slid, so the answer is on its way
    terminal.interrupt()
    # What there is to say comes after the answer, on a line of its own.
    assert b"note: " not in terminal.wait_for(b"\r\nnote: ")[:-8]
    terminal.wait_for(b"\r\n> ")
    # Just after it has written the prompt, readline overlooks a signal until the next key.
    time.sleep(0.5)
    terminal.interrupt()
    terminal.wait_for(b"/quit leaves)")
    terminal.wait_for(b"\r\n> ")
    terminal.type(b"/set max_new_tokens 3\n")
    terminal.wait_for(b"> ")
    terminal.type(b"\x1b[A")  # the arrow up brings the line back
    terminal.wait_for(b"/set max_new_tokens 3")
    terminal.type(b"\n")
    terminal.wait_for(b"> ")
    terminal.type(b"\x04")
    assert terminal.process.wait(patience()) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_text_streams_on_a_terminal(model_dir):
    terminal = Terminal(command(model_dir, PROMPT, *ENDLESS))
    terminal.wait_for(PROMPT.encode())
    terminal.wait_for_more(1000)  # the window slides after 60 tokens
    assert terminal.process.poll() is None
    terminal.interrupt()
    assert b"note: " not in terminal.wait_for(b"\r\nnote: ")[:-8]
    assert terminal.process.wait(patience()) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_without_a_prompt_a_terminal_gets_a_hint(model_dir):
    terminal = Terminal(command(model_dir))
    assert b"error: there is no prompt" in terminal.wait_for(b"--help")
    assert terminal.process.wait(patience()) == 2
