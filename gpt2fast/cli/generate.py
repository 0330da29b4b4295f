"""Continue a text: `gpt2fast generate "Once upon a time"`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._system.output import complain, note
from ..errors import GenerationError
from ..sampling import SamplingOptions, overridden
from .arguments import CommandParser, optional, text_argument
from .command import UsageError, command, fail, memory_advice, output_is_closed
from .constraint import add_constraint_flags, constraint_of
from .model_flags import add_model_flags, load_generator
from .prompts import OPTIONS, PromptFileError, has_prompt, read_lines, read_prompts
from .sampling_flags import (
    add_length_flags,
    add_sampling_flags,
    flag,
    sampling_options,
    with_flags,
)

if TYPE_CHECKING:
    from ..inference.generator import Generator
    from .prompts import Prompt

_DESCRIPTION = """\
Continue a text with GPT-2. The text is an argument, --prompt, a file of prompts, or standard input;
without --model the small model that comes with the package writes.
"""
_EPILOG = """\
examples:
  gpt2fast generate "Once upon a time"
  gpt2fast generate --model gpt2 --greedy --max-new-tokens 20 "The capital of France is"
  gpt2fast generate --model out/run --num-samples 3 --json < prompt.txt
  gpt2fast generate --model gpt2 --quantize int8 --save gpt2-int8
    for name in (
        *("model", "adapter", "tokenizer", "prompts_file", "out", "save"),
        *("json_schema", "grammar", "regex"),
    ):
  gpt2fast generate --interactive

Options may be spelled with underscores; --max-tokens means --max-new-tokens, and --model-path,
--model-name and --from-pretrained mean --model. --model-type names an architecture: it is --preset
where a model is given, and --model otherwise.
"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("generate", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    unset: Any = argparse.SUPPRESS  # what is not given stays out of the namespace

    text = parser.add_argument_group("text")
    text.add_argument(
        "words", nargs="*", type=text_argument, metavar="PROMPT", help="the text to continue"
    )
    text.add_argument("--prompt", type=text_argument, metavar="TEXT", help="the same, as an option")
    text.add_argument(
        "--prompts-file", metavar="FILE",
        help='a prompt on each line, which may be empty; of a .jsonl file, texts or objects with a '
        '"prompt", an "id" and options of their own ('
        + ", ".join(OPTIONS) + "); - is standard input",
    )  # fmt: skip
    text.add_argument(
        "--out", metavar="FILE",
        help="with --prompts-file: append the results to this file, a JSON object on each line, in "
        "the order of the prompts; given again after an interruption, the same command goes on "
        "where it was. A prompt that cannot be continued has a line with an error, and the exit "
        "code is 1 then. FILE.job.json says whose results they are",
    )  # fmt: skip
    text.add_argument("-i", "--interactive", action="store_true", help="a conversation at a prompt")

    model = parser.add_argument_group("model")
    add_model_flags(model)
    model.add_argument("--model-type", help=unset)
    model.add_argument(
        "--speculate", default="off", type=text_argument, metavar="lookup|MODEL|off",
        help="guess tokens and verify several in one step, which gives the same text sooner: "
        "lookup guesses what followed the same tokens before, in this text or an earlier one "
        "(code, JSON, quotations); MODEL, a smaller model with the same vocabulary, what that "
        "would write. As many are guessed as pay; off guesses none (default). For packed models on "
        "a CPU",
    )  # fmt: skip
    model.add_argument(
        "--save", metavar="DIR",
        help="write the model as it was loaded, quantized or with its adapters merged, and its "
        "tokenizer into a new folder, for --model DIR; without a prompt that is all (standard "
        "input is not read)",
    )  # fmt: skip

    length = parser.add_argument_group("length")
    add_length_flags(length)
    length.add_argument(
        "--stop", action="append", type=_unescape, metavar="TEXT",
        help=r"end where this text comes up; \n is a newline; may be repeated",
    )  # fmt: skip
    length.add_argument(
        "--eos-token-id", type=optional(int), default=unset, metavar="ID",
        help="the token that ends a text, or none (default: the model's)",
    )  # fmt: skip
    length.add_argument(
        "--window", choices=("error", "slide", "stop"), default="slide",
        help="text longer than the model can see: refuse it before it begins (as Generator and "
        "GPT2.generate do by default), go on with the newest half (slide, the default here), or "
        "stop there",
    )  # fmt: skip

    choice = parser.add_argument_group("choice of tokens (none switches an option off)")
    add_sampling_flags(choice)

    add_constraint_flags(parser)

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


@command(mistakes=(PromptFileError,))
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parse(argv)
    if output_is_closed() and args.out is None and (has_prompt(args) or args.interactive):
        return fail("standard output is closed: there is nowhere to write the text")
    with memory_advice("take fewer beams, samples or prompts, or a smaller model"):
        return _run(args)


def _unescape(text: str) -> str:
    return text_argument(text).replace("\\n", "\n").replace("\\t", "\t")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
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
    for name in (
        *("model", "adapter", "tokenizer", "prompts_file", "out", "save"),
        *("json_schema", "grammar", "regex", "speculate"),
    ):
        if getattr(args, name) == "":
            parser.error(f"{flag(name)} is empty; leave it out, or give a name")
    if "" in (args.bad_words or []):
        parser.error("--bad-words is empty; give a text of at least one character")
    if args.logprobs is not None and args.logprobs < 0:
        parser.error(f"--logprobs is {args.logprobs}; it must be 0 or more")
    if args.progress and args.prompts_file is None:
        parser.error("--progress is for --prompts-file; other texts are shown as they are written")
    if args.out is not None and args.prompts_file is None:
        parser.error("--out is for --prompts-file; other texts go to standard output")
    if args.do_sample and (args.greedy or args.num_beams > 1):
        other = "--greedy" if args.greedy else "--num-beams"
        parser.error(f"{other} and --do-sample contradict each other")
    if args.interactive:
        for name in ("prompts_file", "json", "stats", "logprobs"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"{flag(name)} does not go with --interactive")
        if args.num_samples != 1 or args.num_beams != 1:
            parser.error("--num-samples and --num-beams do not go with --interactive")
        if args.prompt is not None:
            args.words = [args.prompt]
    elif not given and args.save is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error('there is no prompt; give one, as in "Once upon a time", or --interactive')
    return args


def _run(args: argparse.Namespace) -> int:
    import time

    from .batch import write_results
    from .prompt_progress import PromptProgress
    from .results import stats, stream, write_all, write_json
    from .results_file import check_out
    from .saving import check_new, save

    options = sampling_options(args)
    constraint = constraint_of(args)
    if args.save is not None:
        check_new(args.save)
    prompts = content = None
    if args.out is not None:
        check_out(args.out, args.prompts_file)
        content, lines = read_lines(args.prompts_file, options)
    elif has_prompt(args):
        prompts = read_prompts(args, options)
    start = time.perf_counter()
    generator = load_generator(
        args,
        "writing with the bundled model {}, which is small and knows old adventure books only",
        pack=not (options.get("penalty_alpha") or any(_compares(p) for p in prompts or [])),
        window=args.window,
        speculate=args.speculate,
    )
    if args.speculate != "off" and (why := _why_no_speculation(generator, args)):
        note(f"--speculate {args.speculate}: no effect {why}")
    load_seconds = time.perf_counter() - start
    if args.save is not None:
        save(generator, args)
        if not has_prompt(args) and not args.interactive:
            return 0

    _check_biases(generator, options)
    shared = {"stop": args.stop, "bad_words": args.bad_words, **options}
    if constraint is not None:
        shared["grammar"] = constraint(generator)
    if args.logprobs is not None:
        most = generator.model.config.vocab_size
        if args.logprobs > most:
            raise UsageError(f"--logprobs is {args.logprobs}, and the model has {most} tokens")
        shared.update(logprobs=True, top_logprobs=args.logprobs)
    if "eos_token_id" in args:
        shared["eos_token_id"] = args.eos_token_id
    if args.interactive:
        from .chat import Conversation

        return Conversation(generator, shared).run(prompts[0].text if prompts else None)
    if content is not None:
        code, times = write_results(generator, content, lines, shared, args)
        if args.stats:
            complain(stats(times, load_seconds))
        return code
    assert prompts is not None
    from ..inference.decoding import Timing

    timing: Timing = Timing()
    if args.progress or any(prompt.options for prompt in prompts):
        limits = []
        for prompt in prompts:
            place = f"{args.prompts_file}, line {(prompt.index or 0) + 1}"
            own = overridden(shared, prompt.options)
            limits += [generator.check(prompt.text, place, **own)] * args.num_samples
        if args.progress:
            timing = PromptProgress(limits)
    shared["timing"] = timing
    if args.json:
        write_json(generator, prompts, shared)
    elif not args.progress and len(prompts) == 1 and _comes_token_by_token(args, prompts[0]):
        stream(generator, prompts[0].text, overridden(shared, prompts[0].options))
    else:
        write_all(generator, prompts, shared)
    if isinstance(timing, PromptProgress):
        timing.end()
    if args.stats:
        complain(stats(timing, load_seconds))
    return 0


def _why_no_speculation(generator: Generator, args: argparse.Namespace) -> str | None:
    """A reason why nothing will be guessed, or None."""
    if args.num_beams > 1:
        return "on beam search"
    return None if generator.can_speculate else "where the weights are not packed"


def _comes_token_by_token(args: argparse.Namespace, prompt: Prompt) -> bool:
    new_tokens = prompt.options.get("max_new_tokens", getattr(args, "max_new_tokens", None))
    return args.num_samples == 1 and args.num_beams == 1 and new_tokens != 0


def _compares(prompt: Prompt) -> bool:
    """True if a prompt asks for contrastive search, which packed weights do not serve."""
    return bool(prompt.options.get("penalty_alpha"))


def _check_biases(generator: Generator, options: dict[str, Any]) -> None:
    from ..inference.processors import check_ids

    biased = SamplingOptions(logit_bias=options["logit_bias"])
    try:
        check_ids(biased, generator.model.config.vocab_size)
    except GenerationError as error:
        raise UsageError(with_flags(str(error))) from None
