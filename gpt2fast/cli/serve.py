"""Serve a model over HTTP: `gpt2fast serve --model gpt2`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .._system.docstrings import field_docstrings
from .._system.output import complain, say
from ..errors import Error, reason_of
from ..serving.limits import Limits
from .arguments import CommandParser, count, text_argument
from .command import UsageError, command, memory_advice
from .model_flags import add_model_flags, load_generator

if TYPE_CHECKING:
    from ..inference.generator import Generator

KEY = "GPT2FAST_API_KEY"
"""Environment variable of the API key."""
_LARGEST_KEYS = 1 << 20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_DESCRIPTION = """\
Serve a model over HTTP, in OpenAI's protocol, with a page to try it at /. Programs of this computer
reach it, and no others, unless --host and an API key say otherwise.
"""
_EPILOG = f"""\
examples:
  gpt2fast serve
  gpt2fast serve --model gpt2 --quantize int8 --port 9000
  gpt2fast serve --model out/run --host 0.0.0.0 --api-key-file keys.txt

The API key is best named in a file, or in the environment variable {KEY}: other users
of a computer can see the arguments of programs. There is one process for one model, which uses all
processors; for several models, or more memory than one process has, start several servers at
different ports, behind nginx for example. SIGTERM ends the server after what it has begun.
"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("serve", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)

    model = parser.add_argument_group("model")
    add_model_flags(model)
    model.add_argument(
        "--served-name", metavar="NAME", help="of the model, for clients (default: as --model)"
    )
    model.add_argument(
        "--no-embeddings", action="store_true",
        help="no /v1/embeddings, which takes the memory of the weights a second time (quantized "
        "models have none)",
    )  # fmt: skip

    place = parser.add_argument_group("address")
    place.add_argument("--host", default="127.0.0.1", help="to listen at (default: %(default)s)")
    place.add_argument(
        "--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)"
    )

    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="clients have to send this key; may be repeated",
    )  # fmt: skip
    access.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="a key on each line; lines that begin with # do not count",
    )
    access.add_argument(
        "--allow-anyone", action="store_true",
        help="let every computer in that reaches --host, without a key",
    )  # fmt: skip
    access.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name that clients may have for this server, * for any; without a key and another "
        "--host only this computer's own are taken; may be repeated",
    )  # fmt: skip
    access.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="let pages of https://example.com, say, use the server, * for all; may be repeated",
    )  # fmt: skip

    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-rows", type=count, default=64, metavar="N",
        help="choices that are generated at a time (default: %(default)s)",
    )  # fmt: skip
    engine.add_argument(
        "--cache-tokens", type=count, metavar="N",
        help="tokens whose keys and values fit the cache (default: for --max-rows full texts, or "
        "half of the memory that is free)",
    )  # fmt: skip
    engine.add_argument(
        "--speculate", default="off", type=text_argument, metavar="lookup|MODEL|off",
        help="propose tokens that the model verifies several at a time: those that followed the "
        "same ones before (lookup), or a smaller model's; texts stay as they are, and are written "
        "faster where they repeat themselves (default: %(default)s)",
    )  # fmt: skip

    limits = parser.add_argument_group("limits")
    texts = field_docstrings(Limits)
    for field in fields(Limits):
        kind, shown = (_seconds, "S") if "float" in str(field.type) else (count, "N")
        usual = "" if field.default is None else f" (default: {field.default})"
        limits.add_argument(
            "--" + field.name.replace("_", "-"), type=kind, default=field.default, metavar=shown,
            help=texts[field.name] + usual,
        )  # fmt: skip

    process = parser.add_argument_group("process")
    process.add_argument(
        "--grace", type=_seconds, default=30.0, metavar="S",
        help="seconds for running requests to end after SIGTERM (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="of the log, JSON lines on standard error (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--log-prompts", action="store_true", help="write prompts and answers to the log, too"
    )
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 .. 65535")
    return value


_port.__name__ = "integer"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below a million")
    return value


_seconds.__name__ = "number"


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    keys = _keys(args)
    is_local = args.host in _LOOPBACK
    if not is_local and not keys and not args.allow_anyone:
        raise UsageError(
            f"--host {args.host} lets other computers in: set {KEY}, or give --api-key-file FILE, "
            "so that they need a key (--allow-anyone does without)"
        )
    with memory_advice("take a smaller model or cache (--cache-tokens), or --no-embeddings"):
        return _run(args, keys, is_local)


def _run(args: argparse.Namespace, keys: tuple[bytes, ...], is_local: bool) -> int:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise Error(
            f'serving needs {error.name}, which is not installed: pip install "gpt2fast[serve]"'
        ) from None
    from ..inference.batching import BatchEngine
    from ..inference.speculation.choice import Speculation
    from ..serving import logs
    from ..serving.gateway import Access
    from ..serving.process import bind, serve
    from ..serving.service import Service

    sockets = bind(args.host, args.port)
    generator = _load(args)
    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    name = args.served_name or _name(args)
    port = sockets[0].getsockname()[1]
    place = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{port}"

    def announce() -> None:
        say(f"serving {name} at {place} (a page), {place}/v1 (OpenAI's protocol)")
        logs.record("started", model=name, host=args.host, port=port, keys=len(keys))

    access = Access(keys, tuple(map(str.lower, args.allow_host)), is_local)
    speculation = Speculation(generator.model, generator.tokenizer, args.speculate)
    with speculation.drafting() as drafter:
        if drafter is None and args.speculate != "off":
            complain(f"note: --speculate {args.speculate}: no effect without packed weights")
        engine = BatchEngine(
            generator.model,
            generator.tokenizer,
            cache_tokens=args.cache_tokens,
            max_rows=args.max_rows,
            queue_limit=args.max_queue,
            drafter=drafter,
        )
        logs.configure(args.log_level)
        serve(
            Service(generator, engine, name, limits, args.log_prompts),
            sockets,
            access=access,
            origins=tuple(args.cors_origin),
            grace=args.grace,
            announce=announce,
        )
    logs.record("ended")
    return 0


def _load(args: argparse.Namespace) -> Generator:
    return load_generator(
        args,
        "serving the bundled model {}, which is small and knows old adventure books only",
        pack=args.no_embeddings,
    )


def _name(args: argparse.Namespace) -> str:
    from ..checkpoints.hub import BUNDLED

    if args.model is None:
        return BUNDLED
    path = Path(args.model)
    return path.resolve().name if path.exists() else str(args.model)


def _keys(args: argparse.Namespace) -> tuple[bytes, ...]:
    """The API keys of arguments, file and environment."""
    found = list(args.api_key)
    if KEY in os.environ:
        found.append(os.environ[KEY])
    if args.api_key_file is not None:
        from .._system.files import read_file

        path = Path(args.api_key_file)
        try:
            lines = read_file(path, _LARGEST_KEYS).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"--api-key-file {path} cannot be read: {reason_of(error)}") from None
        listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not listed:
            raise UsageError(f"--api-key-file {path} has no key: write one on a line")
        found += listed
    for key in found:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                "an API key is empty, or has spaces or characters beyond ASCII: take letters and "
                "digits (python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one)"
            )
        if len(key) < 16:
            complain("note: an API key has fewer than 16 characters, which can be guessed")
    return tuple(key.encode() for key in found)
