"""Speed of GPT-2 on this machine, also as a share of the memory's speed:

gpt2fast benchmark

Decoding reads every weight once a token, so the memory's speed bounds it. Both are measured in
turns, for each format of the weights, and so is what else could be the limit: what one core loads,
and how fast the cores multiply weights that lie in their caches. Without --model the weights are
random, which changes no speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .. import __version__
from .._system.output import deliver
from ..config import PRESETS, GPT2Config
from ..errors import Error
from ..inference.decoding import Timing, decode
from ..inference.generation import check_length
from ..inference.packed import PackedGPT2
from ..inference.stopping import StopCriteria
from ..model import GPT2
from ..ops import native
from ..ops.packed import MatrixFormat
from ..sampling import SamplingOptions
from .arguments import CommandParser, count
from .command import command, memory_advice
from .regime import MemorySpeed, advice, bound, computing_speed, memory_speed, read_bandwidth

WEIGHTS = ("float32", "bfloat16", "float16", "int8", "int4")


@dataclass(frozen=True)
class Speed:
    """Measurements of one format of the weights; medians over the rounds."""

    weights: str
    prefill: float
    """Tokens of the prompts read per second."""
    decode: float
    """Tokens written per second."""
    step_bytes: float
    """Bytes of weights, keys and values that a decoding step reads."""
    bandwidth: float | None
    """Bytes that the memory gives per second; None where it could not be measured."""
    allowed: float | None
    """Tokens per second that this bandwidth allows."""
    share: float | None
    """decode / allowed, of runs next to each other."""
    computing: float | None
    """Bytes of weights per second that the cores multiply from their own caches, if known."""
    bound: str | None
    """What holds decoding up: memory, loading, computing or other (`regime.bound`), if known."""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("benchmark", description=__doc__)
    parser.add_argument("--model", help="bundled model, path, or name on the hub")
    parser.add_argument(
        "--preset", default="gpt2", choices=PRESETS, metavar="NAME",
        help=f"shape without --model: {', '.join(PRESETS)} (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS, metavar="FORMAT",
        help=f"{', '.join(WEIGHTS)} (all)",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=count, help="length of each prompt (128)")
    parser.add_argument("--new-tokens", type=count, help="tokens to add to each prompt (128)")
    parser.add_argument("--batch", type=count, default=1, help="prompts at a time (%(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--threads", type=count, help="torch's own choice if not given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.new_tokens == 1:
        parser.error("--new-tokens is 1, and the first token belongs to the prompt: take 2 or more")
    return options


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parse(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with memory_advice("take a smaller model, a smaller --batch, or fewer --weights"):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    model = _load(options, "float32")
    # A quantized checkpoint has no other formats.
    formats = [model.format] if isinstance(model, PackedGPT2) else options.weights
    half = model.config.n_positions // 2
    prompt = options.prompt_tokens or min(128, half)
    new = options.new_tokens or min(128, half)
    check_length(model, prompt, new, "a prompt")  # type: ignore[arg-type]
    del model  # one in memory at a time
    library = native.loaded()
    about = {
        "version": __version__,
        "kernels": library.isa if library else None,
        "threads": torch.get_num_threads(),
        "model": options.model or f"{options.preset} with random weights",
        "batch": options.batch,
        "prompt_tokens": prompt,
        "new_tokens": new,
    }
    if not options.json:
        kernels = f"{library.isa} kernels" if library else "torch's operations"
        deliver(f"gpt2fast {__version__}, {kernels}, {about['threads']} threads: {about['model']}")
        deliver(f"{options.batch} x ({prompt} tokens read + {new} written)\n")
        deliver(f"{'weights':<10}{'decoding':>16}{'memory':>16}{'allows':>18}{'share':>8}  reading")
    memory = memory_speed()
    found: list[Speed] = []
    missing: dict[str, str] = {}
    for weights in formats:
        try:
            model = _converted(options, weights)
            found.append(_measure(model, weights, options, prompt, new, memory))
        except Error as error:
            missing[weights] = str(error)
            if not options.json:
                deliver(f"{weights:<10}missing: {error}")
        else:
            if not options.json:
                deliver(_row(found[-1]))
    if options.json:
        rows = [asdict(speed) for speed in found]
        machine = asdict(memory) if memory else None
        deliver(json.dumps({**about, "memory": machine, "speeds": rows, "missing": missing}))
    else:
        deliver(_summary(found, memory))
    return 0


def _load(options: argparse.Namespace, dtype: str) -> GPT2 | PackedGPT2:
    if options.model is None:
        return GPT2(GPT2Config.preset(options.preset), dtype=getattr(torch, dtype)).eval()
    return GPT2.from_pretrained(options.model, dtype=dtype)


def _converted(options: argparse.Namespace, weights: str) -> GPT2 | PackedGPT2:
    """The model with its weights in this format; fresh, so that two never share the memory."""
    model = _load(options, "float32" if weights.startswith("int") else weights)
    if isinstance(model, PackedGPT2) or not weights.startswith("int"):
        return model
    # Speed does not depend on how well the weights are rounded: round them the quick way.
    return model.quantize(weights, method="nearest", release=True)


def _measure(
    model: GPT2 | PackedGPT2,
    weights: str,
    options: argparse.Namespace,
    prompt: int,
    new: int,
    memory: MemorySpeed | None,
) -> Speed:
    prompts = torch.randint(model.config.vocab_size, (options.batch, prompt)).tolist()
    _time(model, prompts, 2)
    timings, bandwidths = [], []
    for _ in range(options.rounds):
        bandwidths.append(read_bandwidth())
        timings.append(_time(model, prompts, new))
    decode = [timing.decode_tokens / timing.decode_seconds for timing in timings]
    step_bytes = timings[0].decode_bytes / (new - 1)
    known = [speed for speed in bandwidths if speed is not None]
    allowed = [options.batch * speed / step_bytes for speed in known]
    shares = [mine / most for mine, most in zip(decode, allowed, strict=False)]
    speed = statistics.median(decode)
    bandwidth = statistics.median(known) if known else None
    computing, limit = None, None
    if memory is not None and bandwidth is not None:
        computing = computing_speed(_format(model, weights), options.batch)
        if computing is not None:
            reached = speed * step_bytes / options.batch
            limit = bound(reached, bandwidth, memory, computing)
    return Speed(
        weights=weights,
        prefill=statistics.median(t.prefill_tokens / t.prefill_seconds for t in timings),
        decode=speed,
        step_bytes=step_bytes,
        bandwidth=bandwidth,
        allowed=statistics.median(allowed) if known else None,
        share=statistics.median(shares) if known else None,
        computing=computing,
        bound=limit,
    )


def _format(model: GPT2 | PackedGPT2, weights: str) -> MatrixFormat:
    """The format of most matrices."""
    if isinstance(model, PackedGPT2):
        return model.weights.formats["h.0.attn.c_attn.weight"]
    return MatrixFormat(weights)


def _time(model: GPT2 | PackedGPT2, prompts: Sequence[Sequence[int]], new: int) -> Timing:
    timing = Timing()
    options, limits = SamplingOptions(max_new_tokens=new), [new] * len(prompts)
    criteria = StopCriteria([])
    for _ in decode(model, prompts, limits, options, criteria, timing=timing):  # type: ignore[arg-type]
        pass
    return timing


def _row(speed: Speed) -> str:
    memory, allows, share = "unknown", "–", "–"
    if speed.bandwidth is not None and speed.allowed is not None and speed.share is not None:
        memory = f"{speed.bandwidth / 1e9:.1f} GB/s"
        allows = f"{speed.allowed:,.1f} tokens/s"
        share = f"{100 * speed.share:.0f} %"
    return (
        f"{speed.weights:<10}{speed.decode:>7,.1f} tokens/s{memory:>16}{allows:>18}{share:>8}  "
        f"{speed.prefill:,.0f} tokens/s"
    )


def _summary(speeds: Sequence[Speed], memory: MemorySpeed | None) -> str:
    known = [speed for speed in speeds if speed.share is not None]
    if not known:
        return f"\nthe memory's speed is unknown: {native.unavailable() or 'nothing was measured'}"
    bandwidth = statistics.median(speed.bandwidth or 0.0 for speed in known)
    first, *others = (f"{speed.weights} {100 * (speed.share or 0.0):.0f} %" for speed in known)
    reached = ", ".join([first.replace(" ", " decoding reaches ", 1), *others])
    line = f"\nyour memory reads {bandwidth / 1e9:.0f} GB/s; {reached} of what that allows"
    if any((speed.share or 0.0) > 1 for speed in known):
        line += (
            " (more than all of it: the memory changed its speed meanwhile, or the model fits the "
            "processor's caches)"
        )
    return "\n".join([line, *_bounds(known, memory)])


def _bounds(speeds: Sequence[Speed], memory: MemorySpeed | None) -> list[str]:
    """A line for each format: what holds it up, and what would help."""
    lines = []
    for speed in speeds:
        if memory and speed.bound and speed.bandwidth and speed.computing:
            reached = (speed.share or 0.0) * speed.bandwidth
            words = advice(speed.bound, reached, speed.bandwidth, memory, speed.computing)
            lines.append(f"{speed.weights}: {words}")
    return lines
