"""Flags that say which model a command works with, and loading it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .._system.output import complain, note
from ..config import PRESETS

if TYPE_CHECKING:
    from ..inference.generator import Generator

DTYPES = ("float32", "bfloat16", "float16", "float64")
QUANTIZED = ("int8", "int4")


def add_model_flags(parser: argparse._ActionsContainer) -> None:
    """Add --model and all that `load_generator` reads beside it."""
    add = parser.add_argument
    add(
        "-m", "--model", metavar="NAME",
        help="a bundled model, a model on the Hugging Face hub (gpt2, gpt2-xl, …), or a path",
    )  # fmt: skip
    for alias in ("--model-path", "--model-name", "--from-pretrained"):
        add(alias, dest="model", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--preset", help=f"architecture of a bare state dict: {', '.join(PRESETS)}")
    add("--adapter", metavar="NAME", help="LoRA adapters of the model, in PEFT's format")
    add("--tokenizer", metavar="NAME", help="where the tokenizer is, if elsewhere")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    add(
        "--dtype", choices=DTYPES,
        help="of the weights; default: as stored, but at least float32 on a CPU, unless they are "
        "float16 and packed (as generate does)",
    )  # fmt: skip
    add(
        "--quantize", choices=QUANTIZED,
        help="weights of 8 or 4 bits, on a CPU: faster and smaller, a little less exact",
    )  # fmt: skip
    add("--backend", default="auto", help="implementation of the ops: auto (default), reference, …")


def load_generator(args: argparse.Namespace, without_model: str, **options: Any) -> Generator:
    """The generator that the flags ask for.

    Args:
        args: with what `add_model_flags` adds.
        without_model: notice where no model was named; {} stands for the bundled model's name.
        options: more keyword arguments of `Generator.from_pretrained`.
    """
    from ..checkpoints.hub import BUNDLED
    from ..inference.generator import Generator
    from ..ops.backend import backend

    backend(args.backend)
    device = usable_device(args.device)
    if args.model is None:
        complain(f"{without_model.format(repr(BUNDLED))}; --model gpt2 gets OpenAI's GPT-2")
    return Generator.from_pretrained(
        BUNDLED if args.model is None else args.model,
        tokenizer=args.tokenizer,
        preset=args.preset,
        device=device,
        dtype=args.dtype,
        adapter=args.adapter,
        quantize=args.quantize,
        notify=note,
        **options,
    )


def usable_device(name: str) -> str:
    """The device that --device names, "auto" being a GPU where there is one.

    Raises:
        GenerationError: this computer has no such device.
    """
    import torch

    from ..errors import GenerationError

    usable = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        usable += [f"{accelerator.type}:{index}" for index in range(count)]
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu:0", *usable) and f"{name}:0" not in usable:
        raise GenerationError(
            f"--device {name}: this computer has {', '.join(usable)}; name one of these, or auto"
        )
    return name
