"""Continue a text: `python -m gpt2fast.generate "Once upon a time"`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .._system.output import complain, drop_output, held, note, takes_unicode
from .arguments import OneLineParser, ParagraphFormatter, text_argument, usable_device
from .command import command, output_is_closed

if TYPE_CHECKING:
    from ..inference.continuation import Generation
    from ..inference.decoding import Timing
    from ..inference.generator import Generator
    from .prompt_progress import PromptProgress
    from .prompts import Prompt

_DESCRIPTION = """\
Continue a text with GPT-2. The text is an argument, --prompt, a file of prompts, or standard input;
without --model the small model that comes with the package writes.
"""
_EPILOG = """\
examples:
  python -m gpt2fast.generate "Once upon a time"
  python -m gpt2fast.generate --model gpt2 --greedy --max-new-tokens 20 "The capital of France is"
  python -m gpt2fast.generate --model out/run --num-samples 3 --json < prompt.txt
  python -m gpt2fast.generate --model gpt2 --quantize int8 --save gpt2-int8
  python -m gpt2fast.generate --interactive

Options may be spelled with underscores; --max-tokens means --max-new-tokens, and --model-path,
--model-name and --from-pretrained mean --model. --model-type names an architecture: it is --preset
where a model is given, and --model otherwise.
"""
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size",
    "seed", "num_beams", "length_penalty",
)  # fmt: skip
_DRAWS_ONLY = ("temperature", "top_k", "top_p", "min_p", "seed")
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "storage size calculation")
"""What torch says, on a GPU and on a CPU."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        if output_is_closed() and (_has_prompt(args) or args.interactive):
            return _fail("standard output is closed: there is nowhere to write the text")
        return _report(args)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            complain("")  # the terminal shows ^C in the middle of the text
        return 130
    except BrokenPipeError:
        drop_output()  # whoever read it has enough
        return 0
    except OSError as error:
        drop_output()
        return _fail(f"reading or writing failed: {error}")


def _report(args: argparse.Namespace) -> int:
    """Run, and say in one line what went wrong."""
    from ..errors import Error

    try:
        return _run(args)
    except Error as error:
        return _fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # within the definition of a class
            raise KeyboardInterrupt from None
        message = str(error).lower()
        if not isinstance(error, MemoryError) and all(words not in message for words in _NO_MEMORY):
            raise
        return _fail("out of memory: take fewer beams, samples or prompts, or a smaller model")


def _run(args: argparse.Namespace) -> int:
    import time

    from ..errors import GenerationError
    from ..inference.sampling import SamplingOptions
    from .prompt_progress import PromptProgress
    from .prompts import PromptFileError

    options = _options(args)
    if args.num_samples > 1 and args.num_beams == 1 and not _draws(options):
        return _fail(
            f"--num-samples is {args.num_samples}, and greedy decoding has one continuation only: "
            "leave out --greedy and --temperature 0, or raise --num-beams too",
            code=2,
        )
    try:
        SamplingOptions(**options)
    except GenerationError as error:
        return _fail(_with_flags(str(error)), code=2)
    if args.save is not None:
        _check_new(args.save)
    try:
        prompts = _prompts(args, options) if _has_prompt(args) else None
    except PromptFileError as error:
        return _fail(error, code=2)
    start = time.perf_counter()
    generator = _load(args)
    load_seconds = time.perf_counter() - start
    if args.save is not None:
        _save(generator, args)
        if prompts is None and not args.interactive:
            return 0

    shared = {"stop": args.stop, **options}
    if args.logprobs is not None:
        most = generator.model.config.vocab_size
        if args.logprobs > most:
            return _fail(f"--logprobs is {args.logprobs}, and the model has {most} tokens", code=2)
        shared.update(logprobs=True, top_logprobs=args.logprobs)
    if "eos_token_id" in args:
        shared["eos_token_id"] = args.eos_token_id
    if args.interactive:
        from .chat import Conversation

        return Conversation(generator, shared).run(prompts[0].text if prompts else None)
    assert prompts is not None
    from ..inference.decoding import Timing

    timing = _progress(args, prompts) if args.progress else Timing()
    if any(prompt.options for prompt in prompts):
        for prompt in prompts:
            generator.check(prompt.text, _place(args, prompt), **{**shared, **prompt.options})
    if args.json or args.progress:
        write = _write_json if args.json else _write_all
        write(generator, prompts, {**shared, "timing": timing})
    elif len(prompts) == 1 and _can_stream(args, prompts[0]):
        (only,) = prompts
        _stream(generator, only.text, {**shared, **only.options, "timing": timing})
    else:
        _write_all(generator, prompts, {**shared, "timing": timing})
    if isinstance(timing, PromptProgress):
        timing.end()
    if args.stats:
        complain(_stats(timing, load_seconds))
    return 0


def _has_prompt(args: argparse.Namespace) -> bool:
    """Whether there is a text to read; beside --interactive and --save it has to be named."""
    named = args.words or args.prompt is not None or args.prompts_file is not None
    return bool(named) or not (args.interactive or args.save is not None)


def _can_stream(args: argparse.Namespace, prompt: Prompt) -> bool:
    """Whether the text comes token by token."""
    new_tokens = prompt.options.get("max_new_tokens", args.max_new_tokens)
    return args.num_samples == 1 and args.num_beams == 1 and new_tokens > 0


def _check_new(folder: str) -> None:
    """Refuse a place where --save would replace something, before a model is loaded."""
    from ..errors import GenerationError

    path = Path(folder)
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise GenerationError(f"--save {folder}: that is no folder; name a new one")
    held = sorted(entry.name for entry in path.iterdir())
    if held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise GenerationError(
            f"--save {folder}: that folder holds {held[0]}{more}, and nothing is overwritten: name "
            "a new folder, or empty this one"
        )
    if path.samefile(os.curdir):
        raise GenerationError(f"--save {folder}: that is the current folder; name a new one")


def _save(generator: Generator, args: argparse.Namespace) -> None:
    from .._system.files import new_directory
    from ..errors import GenerationError, WeightsError

    folder = args.save
    try:
        with new_directory(folder) as written:
            generator.model.save_pretrained(written, generator.tokenizer)
    except (OSError, WeightsError) as error:
        raise GenerationError(
            f"--save {folder}: the model cannot be saved there: {error}"
        ) from error
    # On a CPU, 16 bits are read as 32 unless they are asked for.
    halves = args.dtype in ("bfloat16", "float16") and args.quantize is None
    note(f"the model is saved in {folder}" + f"; it was read with --dtype {args.dtype}" * halves)


def _load(args: argparse.Namespace) -> Generator:
    from ..checkpoints.hub import BUNDLED
    from ..inference.generator import Generator
    from ..ops.backend import backend

    backend(args.backend)
    device = usable_device(args.device)
    if args.model is None:
        complain(
            f"writing with the bundled model {BUNDLED!r}, which is small and knows old adventure "
            "books only; --model gpt2 gets OpenAI's GPT-2"
        )
    return Generator.from_pretrained(
        BUNDLED if args.model is None else args.model,
        tokenizer=args.tokenizer,
        preset=args.preset,
        device=device,
        dtype=args.dtype,
        adapter=args.adapter,
        quantize=args.quantize,
        pack=True,
        window=args.window,
        notify=note,
    )


def _draws(options: dict[str, Any]) -> bool:
    return options["do_sample"] and options["temperature"] != 0


def _with_flags(message: str) -> str:
    """A message about options as the library names them, with their names here."""
    message = message.replace("num_return_sequences", "num_samples")
    for name in (*_SAMPLING, "max_new_tokens", "num_samples"):
        flag = "--" + name.replace("_", "-")
        message = re.sub(rf"(?<![\w-]){name}(?!\w)", flag, message)
    return message


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What `SamplingOptions` takes; what was not given has the defaults of `Generator`."""
    from dataclasses import asdict

    from ..inference.generator import DEFAULTS

    given = {name for name in _SAMPLING if name in args}
    draws = not args.greedy and args.num_beams == 1
    if not draws:
        without_effect = [name for name in _DRAWS_ONLY if name in given]
        if without_effect:
            flags = ", ".join("--" + name.replace("_", "-") for name in without_effect)
            note(f"{flags}: no effect without sampling")
    return {
        **asdict(DEFAULTS),
        **{name: getattr(args, name) for name in given},
        "max_new_tokens": args.max_new_tokens,
        "num_return_sequences": args.num_samples,
        "do_sample": draws or args.do_sample,
    }


def _prompts(args: argparse.Namespace, options: dict[str, Any]) -> list[Prompt]:
    from .prompts import Prompt, parse_prompts

    if args.prompts_file is not None:
        return parse_prompts(args.prompts_file, _read(args.prompts_file), options)
    if args.prompt is not None:
        return [Prompt(args.prompt)]
    if args.words:
        return [Prompt(" ".join(args.words))]
    text = _read("-")
    # What echo and editors add at the end is no part of the text.
    return [Prompt(text.removesuffix("\n").removesuffix("\r"))]


def _place(args: argparse.Namespace, prompt: Prompt) -> str:
    return f"{args.prompts_file}, line {(prompt.index or 0) + 1}"


def _progress(args: argparse.Namespace, prompts: Sequence[Prompt]) -> PromptProgress:
    from .prompt_progress import PromptProgress

    limits = [prompt.options.get("max_new_tokens", args.max_new_tokens) for prompt in prompts]
    return PromptProgress([limit for limit in limits for _ in range(args.num_samples)])


def _results(
    generator: Generator, prompts: Sequence[Prompt], options: dict[str, Any]
) -> Iterator[tuple[Prompt, Generation]]:
    """The continuations in order; prompts with equal options are computed together."""
    from ..inference.sampling import Draws
    from .prompt_progress import PromptProgress

    draws, timing = Draws(), options["timing"]
    for own, together in itertools.groupby(prompts, key=lambda prompt: prompt.options):
        group = list(together)
        found = generator.one_by_one(
            [prompt.text for prompt in group], draws=draws, **{**options, **own}
        )
        for number, result in enumerate(found):
            if isinstance(timing, PromptProgress):
                timing.add_result(result)
                timing.line.clear()
            yield group[number // options["num_return_sequences"]], result


def _read(name: str) -> str:
    from ..errors import GenerationError

    try:
        if name == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        with open(name, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        source = "standard input" if name == "-" else name
        raise GenerationError(f"{source} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise GenerationError(f"{name} cannot be read: {error.strerror}") from error


def _stream(generator: Generator, prompt: str, options: dict[str, Any]) -> None:
    pieces = generator.stream(prompt, **options)
    begin = next(pieces, "")  # what there is to say of kernels and the like comes before the text
    with held():
        _write(prompt + begin)
        for piece in pieces:
            _write(piece)
        _write("\n")
    if pieces.logprobs is not None:
        _write(_table(generator, pieces.tokens, pieces.logprobs, pieces.top_logprobs))


def _write_all(generator: Generator, prompts: Sequence[Prompt], options: dict[str, Any]) -> None:
    for number, (_, result) in enumerate(_results(generator, prompts, options)):
        _write(f"---\n{result}\n" if number else f"{result}\n")
        if result.prompt_logprobs is not None:
            tops = result.prompt_top_logprobs
            _write(_table(generator, result.prompt_token_ids, result.prompt_logprobs, tops))
        elif result.logprobs is not None:
            _write(_table(generator, result.tokens, result.logprobs, result.top_logprobs))


def _table(
    generator: Generator,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[dict[int, float] | None] | None,
) -> str:
    """A line for each token: log-probability, id, text; then the likeliest in its place."""
    lines = ["   logprob     id  token" + ("   likeliest in its place" if tops else "")]
    width = max((len(_quoted(generator, token)) for token in tokens), default=0)
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        value = "none" if logprob is None else f"{logprob:.6f}"
        line = f"{value:>10} {token:>6}  {_quoted(generator, token):<{width}}"
        top = (tops[place] if tops else None) or {}
        likely = ", ".join(f"{_quoted(generator, t)} {x:.6f}" for t, x in top.items())
        lines.append(f"{line}   {likely}".rstrip())
    return "".join(f"{line}\n" for line in lines)


def _quoted(generator: Generator, token: int) -> str:
    """A token's text on one line, in quotes; null for ids that the tokenizer does not have."""
    import json

    from ..errors import printable

    return printable(json.dumps(_token_text(generator, token), ensure_ascii=False))


def _token_text(generator: Generator, token: int) -> str | None:
    """A token's text, in which bytes that are no whole character are U+FFFD."""
    from ..errors import TokenizerError

    try:
        return generator.tokenizer.decode([token])
    except TokenizerError:  # the model's vocabulary is padded
        return None


def _write_json(generator: Generator, prompts: Sequence[Prompt], options: dict[str, Any]) -> None:
    copies = options["num_return_sequences"]
    for number, (prompt, result) in enumerate(_results(generator, prompts, options)):
        _write(_json(generator, prompt, result, number % copies) + "\n")


def _json(generator: Generator, prompt: Prompt, result: Generation, number: int) -> str:
    import json

    def named(tops: Sequence[dict[int, float] | None]) -> list[list[dict[str, Any]] | None]:
        return [
            None
            if top is None
            else [
                {"id": token, "text": _token_text(generator, token), "logprob": logprob}
                for token, logprob in top.items()
            ]
            for top in tops
        ]

    scores: dict[str, Any] = {}
    if result.logprobs is not None:
        scores["logprobs"] = result.logprobs
    if result.top_logprobs is not None:
        scores["top_logprobs"] = named(result.top_logprobs)
    if result.prompt_logprobs is not None:
        scores["prompt_token_ids"] = result.prompt_token_ids
        scores["prompt_logprobs"] = result.prompt_logprobs
    if result.prompt_top_logprobs is not None:
        scores["prompt_top_logprobs"] = named(result.prompt_top_logprobs)

    place = {} if prompt.index is None else {"index": prompt.index}
    return json.dumps(
        {
            **place,
            **prompt.labels,
            "prompt": result.prompt,
            "sample": number,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": result.new_tokens,
            "tokens": result.tokens,
            "seed": result.seed,
            **scores,
        },
        ensure_ascii=not takes_unicode(),
    )


def _stats(timing: Timing, load_seconds: float) -> str:
    def rate(amount: float, seconds: float) -> float:
        return amount / seconds if seconds else 0.0

    speed = rate(timing.decode_tokens, timing.decode_seconds)
    bandwidth = rate(timing.decode_bytes, timing.decode_seconds) / 1e9
    prefill = rate(timing.prefill_tokens, timing.prefill_seconds)
    return (
        f"load {load_seconds:.2f} s | "
        f"prefill {timing.prefill_tokens} tokens, {prefill:.1f} tok/s | "
        f"time to first token {timing.first_token_seconds or 0.0:.3f} s | "
        f"decode {timing.decode_tokens} tokens, {speed:.1f} tok/s, {bandwidth:.2f} GB/s"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _fail(error: object, code: int = 1) -> int:
    complain("error: " + " ".join(str(error).split()))
    return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(_hyphens(argv))
    if args.model_type is not None:
        if args.model is None:
            args.model = args.model_type
        elif args.preset is None:
            args.preset = args.model_type
    sources = {
        "an argument": args.words,
        "--prompt": args.prompt is not None,
        "--prompts-file": args.prompts_file is not None,
    }
    given = [name for name, there in sources.items() if there]
    if len(given) > 1:
        parser.error(f"the prompt is given twice, as {' and as '.join(given)}")
    for flag in ("model", "adapter", "tokenizer", "prompts_file", "save"):
        if getattr(args, flag) == "":
            parser.error(f"--{flag.replace('_', '-')} is empty; leave it out, or give a name")
    if args.logprobs is not None and args.logprobs < 0:
        parser.error(f"--logprobs is {args.logprobs}; it must be 0 or more")
    if args.progress and args.prompts_file is None:
        parser.error("--progress is for --prompts-file; other texts are shown as they are written")
    if args.do_sample and (args.greedy or args.num_beams > 1):
        other = "--greedy" if args.greedy else "--num-beams"
        parser.error(f"{other} and --do-sample contradict each other")
    if args.interactive:
        for flag in ("prompts_file", "json", "stats", "logprobs"):
            if getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag.replace('_', '-')} does not go with --interactive")
        if args.num_samples != 1 or args.num_beams != 1:
            parser.error("--num-samples and --num-beams do not go with --interactive")
        if args.prompt is not None:
            args.words = [args.prompt]
    elif not given and args.save is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error('there is no prompt; give one, as in "Once upon a time", or --interactive')
    return args


def _hyphens(argv: Sequence[str]) -> list[str]:
    """Spell --top_k=5 as --top-k=5, up to a bare `--`."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    for index, argument in enumerate(argv[:end]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argv[index] = name.replace("_", "-") + equals + value
    return argv


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m gpt2fast.generate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=ParagraphFormatter,
        allow_abbrev=False,
    )
    # What is not given stays out of the namespace, so that `Generator` has the say.
    unset: Any = argparse.SUPPRESS

    text = parser.add_argument_group("text")
    text.add_argument(
        "words", nargs="*", type=text_argument, metavar="PROMPT", help="the text to continue"
    )
    text.add_argument("--prompt", type=text_argument, metavar="TEXT", help="the same, as an option")
    text.add_argument(
        "--prompts-file", metavar="FILE",
        help='a prompt on each line, which may be empty; of a .jsonl file, texts or objects with a '
        '"prompt", an "id" and options of their own (max_new_tokens, temperature, top_k, top_p, '
        "seed, stop); - is standard input",
    )  # fmt: skip
    text.add_argument("-i", "--interactive", action="store_true", help="a conversation at a prompt")

    model = parser.add_argument_group("model")
    model.add_argument(
        "-m", "--model", metavar="NAME",
        help="a bundled model, a model on the Hugging Face hub (gpt2, gpt2-xl, …), or a path",
    )  # fmt: skip
    for alias in ("--model-path", "--model-name", "--from-pretrained"):
        model.add_argument(alias, dest="model", default=unset, help=unset)
    model.add_argument("--model-type", help=unset)
    model.add_argument(
        "--preset", help="architecture of a bare state dict: gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    )
    model.add_argument(
        "--adapter", metavar="NAME", help="LoRA adapters of the model, in PEFT's format"
    )
    model.add_argument("--tokenizer", metavar="NAME", help="where the tokenizer is, if elsewhere")
    model.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"),
        help="of the weights; default: as stored, but at least float32 on a CPU",
    )  # fmt: skip
    model.add_argument(
        "--quantize", choices=("int8", "int4"),
        help="weights of 8 or 4 bits, on a CPU: faster and smaller, a little less exact",
    )  # fmt: skip
    model.add_argument(
        "--backend", default="auto", help="implementation of the ops: auto (default), reference, …"
    )

    model.add_argument(
        "--save", metavar="DIR",
        help="write the model as it was loaded, quantized or with its adapters merged, and its "
        "tokenizer into a new folder, for --model DIR; without a prompt that is all (standard "
        "input is not read)",
    )  # fmt: skip

    length = parser.add_argument_group("length")
    length.add_argument(
        "--max-new-tokens", "--max-tokens", type=int, default=100, metavar="N",
        help="most tokens to add (default 100)",
    )  # fmt: skip
    length.add_argument(
        "--stop", action="append", type=_unescape, metavar="TEXT",
        help=r"end where this text comes up; \n is a newline; may be repeated",
    )  # fmt: skip
    length.add_argument(
        "--eos-token-id", type=_optional(int), default=unset, metavar="ID",
        help="the token that ends a text, or none (default: the model's)",
    )  # fmt: skip
    length.add_argument(
        "--window", choices=("error", "slide", "stop"), default="slide",
        help="text longer than the model can see: refuse it before it begins (as Generator and "
        "GPT2.generate do by default), go on with the newest half (slide, the default here), or "
        "stop there",
    )  # fmt: skip

    choice = parser.add_argument_group("choice of tokens (none switches an option off)")
    choice.add_argument("--greedy", action="store_true", help="always the likeliest token")
    choice.add_argument("--do-sample", action="store_true", help="draw at random (default)")
    for flag, kind, words in (
        ("--temperature", float, "below 1 is more predictable, 0 is greedy (default 0.8)"),
        ("--top-k", int, "draw from the K likeliest tokens (default 50)"),
        ("--top-p", float, "draw from the likeliest tokens with this probability (default 0.95)"),
        ("--min-p", float, "leave out tokens less likely than this times the likeliest"),
        ("--repetition-penalty", float, "above 1 makes repeated tokens less likely"),
        ("--no-repeat-ngram-size", int, "no sequence of N tokens occurs twice"),
        ("--seed", int, "makes the draws repeatable"),
    ):
        metavar = {"--top-k": "K", "--top-p": "P", "--min-p": "P"}.get(
            flag, "N" if kind is int else "X"
        )
        choice.add_argument(flag, type=_optional(kind), default=unset, metavar=metavar, help=words)
    choice.add_argument(
        "--num-samples", "--num-return-sequences", type=int, default=1, metavar="N",
        help="continuations of each prompt",
    )  # fmt: skip
    choice.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="beam search of this width"
    )
    choice.add_argument(
        "--length-penalty", type=float, default=unset, metavar="X",
        help="beam search: above 0 favours long texts, below 0 short ones (default 1)",
    )  # fmt: skip

    output = parser.add_argument_group("output")
    output.add_argument(
        "--logprobs", type=int, metavar="K",
        help="the log-probability of each new token, and of the K likeliest in its place (0: "
        "none), under the model itself: before temperature, top-k and the like; with "
        "--max-new-tokens 0, of each token of the prompt",
    )  # fmt: skip
    output.add_argument("--json", action="store_true", help="a JSON object on each line")
    output.add_argument(
        "--progress", action="store_true",
        help="with --prompts-file: how many results are there, speed and time left, in a line on "
        "standard error",
    )  # fmt: skip
    output.add_argument("--stats", action="store_true", help="speed, on standard error")
    return parser


def _optional(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def _unescape(text: str) -> str:
    return text_argument(text).replace("\\n", "\n").replace("\\t", "\t")


def _leave(code: int) -> NoReturn:
    """Exit; after Ctrl-C without Python's own end of the program.

    Where C code that runs Python (an import of torch) has passed the interrupt on, Python would
    kill the process by SIGINT there, although the interrupt has been handled.
    """
    if code == 130:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
