"""One peer in a process of its own: its environments differ, and threads of two in one process
would get in each other's way.

    python serve.py PEER --model DIRECTORY --weights float32 --converted FOLDER

converts the model if FOLDER does not have it yet, loads it, and answers each line of standard input
with a line on standard output, both JSON. The first line it writes describes the engine. Commands:

    {"op": "generate", "prompts": [[464, 3139], ...], "new": 128}
        -> {"prefill_seconds": ..., "decode_seconds": ..., "tokens": [[...], ...], ...}
    {"op": "prefill", "prompts": [[464, 3139], ...]}         the same as one new token

A command that fails is answered with {"error": "..."}; the end of standard input ends the process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint, PeerError

PEERS = (
    "gpt2fast",
    "transformers",
    "ctranslate2",
    "onnxruntime",
    "openvino",
    "llama_cpp",
    "xllamacpp",
)


def main() -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument(
        "--model", required=True, type=Path, help="as GPT2.save_pretrained wrote it"
    )
    parser.add_argument("--weights", default="float32", help="float32, bfloat16, int8, int4, ...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--converted", type=Path, help="where converted models are kept, for peers that need one"
    )
    options = parser.parse_args()
    # Libraries print on standard output what does not belong into the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        engine = _load(options)
    except (PeerError, ImportError, OSError, RuntimeError, ValueError) as error:
        return _answer(answers, {"error": f"{type(error).__name__}: {error}"})
    _answer(answers, {"version": engine.version})
    for line in sys.stdin:
        try:
            command = json.loads(line)
            new = 1 if command["op"] == "prefill" else command["new"]
            _answer(answers, asdict(engine.generate(command["prompts"], new)))
        except Exception as error:  # whatever a peer throws belongs into its answer
            _answer(answers, {"error": f"{type(error).__name__}: {error}"})
    return 0


def _load(options: argparse.Namespace) -> Any:
    module = importlib.import_module(f"{options.peer}_peer")
    if options.weights not in module.WEIGHTS:
        raise PeerError(f"{options.peer} has no {options.weights} weights here")
    target = options.model
    if hasattr(module, "convert"):
        if options.converted is None:
            raise PeerError(f"{options.peer} needs --converted, a folder for its models")
        target = _converted(module, options)
    return module.Engine(target, options.weights, options.threads)


def _converted(module: Any, options: argparse.Namespace) -> Path:
    """The model in the peer's own format, made now if it is not there."""
    checkpoint = Checkpoint(options.model)
    options.converted.mkdir(parents=True, exist_ok=True)
    name = f"{options.peer}-{options.weights}-{checkpoint.fingerprint()}"
    target = options.converted / name
    if not target.exists():
        partial = options.converted / f"{name}.partial-{os.getpid()}"
        try:
            module.convert(checkpoint, options.weights, partial)
            partial.rename(target)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
    return target


def _answer(stream: Any, answer: dict[str, Any]) -> int:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
