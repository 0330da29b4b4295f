"""Text to the bytes of token files, in this process or in several others.

The other processes are plain `python -m gpt2fast.data.encoders` commands that are spoken to
through pipes: unlike multiprocessing's they do not run the user's script again, and unlike forked
ones they inherit no threads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, NamedTuple

from ..errors import DataError
from ..tokenizer import Tokenizer
from .split import Part
from .text import END_OF_TEXT


class Encoded(NamedTuple):
    """The tokens of some parts; each field has an entry for training and one for validation."""

    data: list[bytes]
    tokens: list[int]
    characters: list[int]


def available_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def typecode(vocab_size: int) -> str:
    """`array`'s code for tokens of a vocabulary: 16 bits where they suffice, else 32."""
    return "H" if vocab_size <= 1 << 16 else "I"


def encode(tokenizer: Tokenizer, parts: Sequence[Part]) -> Encoded:
    """Tokens of the parts, in order, as little-endian bytes."""
    code = typecode(tokenizer.vocab_size)
    ids = [array(code), array(code)]
    characters = [0, 0]
    for part, text, end in parts:
        ids[part].extend(tokenizer.encode(text, add_special_tokens=False))
        if end:
            ids[part].append(_end_token(tokenizer))
        characters[part] += len(text) + end
    if sys.byteorder == "big":
        for tokens in ids:
            tokens.byteswap()
    return Encoded([tokens.tobytes() for tokens in ids], [len(t) for t in ids], characters)


class Encoders:
    """Encodes parts in `workers` other processes; with one, in this process.

    directory: where the tokenizer's files are.
    """

    def __init__(self, tokenizer: Tokenizer, directory: Path, workers: int) -> None:
        self._tokenizer = tokenizer
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self.waiting = 0
        """The number of requests that may usefully be open."""
        if workers > 1:
            self._threads = ThreadPoolExecutor(workers)
            self.waiting = 2 * workers
            for _ in range(workers):
                process = _start(directory)
                self._processes.append(process)
                self._idle.put(process)

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()  # it keeps nothing, and may be in the middle of what nobody wants now
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()

    def submit(self, parts: Sequence[Part]) -> Future[Encoded]:
        """Begin to encode; the future raises what `encode` would."""
        if self._threads is not None:
            return self._threads.submit(self._ask, parts)
        future: Future[Encoded] = Future()
        future.set_result(encode(self._tokenizer, parts))
        return future

    def _ask(self, parts: Sequence[Part]) -> Encoded:
        process = self._idle.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            try:
                pickle.dump(list(parts), process.stdin)
                process.stdin.flush()
                answer = pickle.load(process.stdout)
            except (OSError, EOFError, pickle.UnpicklingError):
                process.kill()  # if it has not gone yet
                raise DataError(
                    f"a process that encoded text ended with code {process.wait()}; it may have "
                    "run out of memory: try fewer --workers"
                ) from None
        finally:
            self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return Encoded(*answer)


def _start(directory: Path) -> subprocess.Popen[bytes]:
    # The package is found where this process found it, installed or not.
    home = str(Path(__file__).parents[2])
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{known}" if known else home}
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(directory.resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _end_token(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"documents end with {END_OF_TEXT}, but the tokenizer has no end token; use a "
            "tokenizer that has one, or --split position on a text without such lines"
        )
    return tokenizer.eos_token_id


def _serve(directory: str, requests: IO[Any], answers: IO[Any]) -> None:
    """Answer requests until there are no more."""
    tokenizer = Tokenizer.from_pretrained(directory, local_files_only=True)
    while True:
        try:
            parts = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: Any = tuple(encode(tokenizer, parts))
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # Ctrl-C reaches the whole group; the process that asks says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.argv[1], sys.stdin.buffer, answers.buffer)
