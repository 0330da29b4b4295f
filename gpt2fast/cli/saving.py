"""--save: the model as it was loaded, in a new folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .._system.output import note
from ..errors import GenerationError

if TYPE_CHECKING:
    from ..inference.generator import Generator


def check_new(folder: str) -> None:
    """Refuse a place where something would be replaced, before a model is loaded."""
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


def save(generator: Generator, args: argparse.Namespace) -> None:
    """Write the model and its tokenizer to `args.save`, all or nothing."""
    from .._system.files import new_directory
    from ..errors import WeightsError

    folder = args.save
    try:
        with new_directory(folder) as written:
            generator.model.save_pretrained(written, generator.tokenizer)
    except (OSError, WeightsError) as error:
        raise GenerationError(
            f"--save {folder}: the model cannot be saved there: {error}"
        ) from error
    # On a CPU, 16 bits are read as 32 unless they are asked for, or are float16 and packed.
    halves = args.dtype in ("bfloat16", "float16") and args.quantize is None
    note(f"the model is saved in {folder}" + f"; it was read with --dtype {args.dtype}" * halves)
