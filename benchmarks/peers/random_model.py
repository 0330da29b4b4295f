"""GPT-2 of a true shape with random weights, for measuring speed and for checking conversions:

    python random_model.py FOLDER --preset gpt2

Fresh weights as training starts from would not do: their biases are zero, so that a conversion
which loses them goes unnoticed, and greedy decoding repeats one token.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from gpt2fast import GPT2, GPT2Config, Tokenizer
from gpt2fast.errors import Error

_SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def main() -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="gpt2", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    parser.add_argument(
        "--tokenizer",
        default=os.path.join(os.environ.get("GPT2FAST_DATA", _SHARED), "gpt2"),
        help="saved with the model (llama.cpp's files hold one); default: %(default)s",
    )
    options = parser.parse_args()
    try:
        save_random(options.folder, options.preset, options.tokenizer)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@torch.no_grad()
def save_random(folder: Path, preset: str, tokenizer: str) -> None:
    """Write the model, in float32, and the tokenizer."""
    loaded = Tokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    model = GPT2(GPT2Config.preset(preset))
    # Strong positions and gains, so that the next token depends on the ones before it.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.normal_(1.0, 0.2)
        elif parameter.dim() == 1:
            parameter.normal_(0.0, 0.05)
        elif name.startswith(("wte", "wpe")):
            parameter.normal_(0.0, 0.1 if name.startswith("wte") else 1.0)
        else:
            parameter.normal_(0.0, 1.5 * parameter.shape[0] ** -0.5)
    model.save_pretrained(folder, loaded)


if __name__ == "__main__":
    sys.exit(main())
