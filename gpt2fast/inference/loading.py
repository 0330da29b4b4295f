"""A model and its tokenizer, as a `Generator` loads them."""

from __future__ import annotations

import os
from typing import Any

import torch

from .._system.doors import above
from ..errors import ArgumentError, MissingTokenizerError, TokenizerError, WeightsError
from ..model import GPT2
from ..tokenizer import Tokenizer
from .packed import PackedGPT2


def load_pair(
    name_or_path: str | os.PathLike[str],
    *,
    tokenizer: Any,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    revision: str | None,
    local_files_only: bool,
    preset: str | None,
    adapter: str | os.PathLike[str] | None,
    quantize: str | None,
    pack: bool,
) -> tuple[Any, Any]:
    """The implementation of `Generator.from_pretrained`, with its arguments and errors."""
    model = GPT2.from_pretrained(
        name_or_path,
        device=device,
        dtype=dtype,
        revision=revision,
        local_files_only=local_files_only,
        preset=preset,
    )
    packs = pack and quantize is None and isinstance(model, GPT2) and model.can_be_packed()
    # Packed float16 weights are multiplied in float32: nothing is gained by widening them.
    keeps = packs and adapter is None and model.dtype == torch.float16
    if dtype is None and model.device.type == "cpu" and model.dtype.itemsize < 4 and not keeps:
        model = model.float()
    if adapter is not None:
        lora = above("lora")
        lora.load_adapter(model, adapter, local_files_only=local_files_only)
        model = lora.merge(model)
    if quantize is not None:
        if isinstance(model, PackedGPT2):
            raise ArgumentError(
                f"{name_or_path} is quantized already ({model.format}); leave quantize out"
            )
        model = model.quantize(quantize, release=True)
    elif packs:
        model = model.pack(release=True)
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return model, tokenizer
    place = name_or_path if tokenizer is None else tokenizer
    try:
        loaded = Tokenizer.from_pretrained(
            place,
            revision=revision if tokenizer is None else None,
            local_files_only=local_files_only,
        )
    except WeightsError as error:
        raise TokenizerError(f"the tokenizer {str(place)!r} is not found: {error}") from error
    except MissingTokenizerError as error:
        raise TokenizerError(
            f"{error}; or name another with tokenizer= (--tokenizer gpt2, a folder, …)"
        ) from error
    return model, loaded
