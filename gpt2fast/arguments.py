"""The argument parser of the command lines."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists all options)\n")


def usable_device(name: str) -> str:
    """The device that --device names, "auto" being a GPU where there is one.

    Raises:
        GenerationError: this computer has no such device.
    """
    import torch

    from .errors import GenerationError

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
