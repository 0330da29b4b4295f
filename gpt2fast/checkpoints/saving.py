"""Models into folders that `from_pretrained` here and in transformers read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .._system.files import atomic_write_text
from ..config import CONFIG_FILE
from ..errors import ArgumentError, WeightsError, shown
from ..inference.packed import PackedGPT2
from ..inference.structure import why_not_configured
from ..model import GPT2
from ..nn.inputs import check_held
from ..nn.projection import merged
from ..ops.packed import QuantizedMatrix, beyond_float16
from ..quantization.storage import to_tensors
from ..tokenizer.foreign import save_tokenizer, tokenizer_of
from .folders import WEIGHTS
from .generation_config import NAME as GENERATION_CONFIG
from .tensor_files import write_safetensors


def save_pretrained(model: GPT2, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write a folder that `from_pretrained` here and in transformers read, weights bit for bit.

    The directory is made if need be, and gets config.json, generation_config.json,
    model.safetensors, and the tokenizer's files if one is given; transformers' tokenizers write
    their own. Each file appears whole or not at all, config.json last. Saving over the files that
    the model was loaded from is safe.

    Adapters are merged into the weights; `gpt2fast.lora.save_adapter` writes them by themselves.

    Raises:
        ArgumentError: a configuration and weights cannot say what the model computes, since a
            module was replaced or parametrized; or the weights were released.
        TokenizerError: `tokenizer` is none; nothing is written then.
        WeightsError: the directory cannot be written.
    """
    check_held(model.wte)
    _check_described(model)
    tensors = {
        name if name == "lm_head.weight" else f"transformer.{name}": tensor
        for name, tensor in merged(model).state_dict().items()
    }
    _save(model, tensors, model.config.to_dict(), {}, Path(directory), tokenizer)


def _check_described(model: GPT2) -> None:
    """Raise ArgumentError for a model that configuration and weights do not describe."""
    reason = why_not_configured(model)
    if reason is None:
        state = model.state_dict()
        shapes = {n: tuple(tensor.shape) for n, tensor in state.items() if ".lora_" not in n}
        expected = model.config.parameter_shapes()
        if shapes != expected:
            strange = [n for n in {**expected, **shapes} if shapes.get(n) != expected.get(n)]
            reason = f"{', '.join(map(shown, strange[:3]))} are not as the configuration has them"
    if reason is not None:
        raise ArgumentError(
            f"a checkpoint cannot say what this model computes: {reason}. Put the module's effect "
            "into its weight (parametrize.remove_parametrizations, prune.remove), or keep "
            "model.state_dict() with your own code"
        )


def save_packed(
    model: PackedGPT2, directory: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Write packed weights into a directory that `from_pretrained` loads.

    Float weights are written as `save_pretrained` does, for transformers as well. Quantized ones
    become integers and scales (`gpt2fast.quantization.storage`), which no other program reads;
    config.json says so under `quantization_config`.

    Raises:
        TokenizerError: `tokenizer` is none; nothing is written then.
        WeightsError: the directory cannot be written.
    """
    packed = model.weights
    matrices = {name: packed.get(name) for name in packed.matrix_names}
    tensors = {name: cast("Tensor", packed.get(name)) for name in packed.shape.vectors()}
    described = model.config.to_dict()
    metadata: dict[str, str] = {}
    quantized = {name: m for name, m in matrices.items() if isinstance(m, QuantizedMatrix)}
    if model.quantization is not None:
        stored, metadata = to_tensors(replace(model.quantization, matrices=quantized), model.config)
        tensors.update(stored)
        described["quantization_config"] = {
            "quant_method": "gpt2fast",
            "scheme": model.quantization.scheme,
            "group_size": model.quantization.group,
        }
    else:
        for name, matrix in matrices.items():
            tensor = cast("Tensor", matrix)
            tensors[name] = tensor if name.startswith("h.") else tensor.t()
        dtype = tensors["h.0.attn.c_attn.weight"].dtype
        if dtype == torch.float16 and any(
            beyond_float16(tensor) is not None for tensor in tensors.values()
        ):
            dtype = torch.float32  # a bias or norm that was wider than the matrices
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    _save(
        model,
        {n if n.startswith("lm_head.") else f"transformer.{n}": t for n, t in tensors.items()},
        described,
        metadata,
        Path(directory),
        tokenizer,
    )


def _save(
    model: GPT2 | PackedGPT2,
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
    metadata: Mapping[str, str],
    folder: Path,
    tokenizer: Any,
) -> None:
    if tokenizer is not None:
        tokenizer_of(tokenizer)  # raises before anything is written
    config = model.config
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    special.update(model.generation_config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / WEIGHTS, tensors, metadata)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        atomic_write_text(folder / GENERATION_CONFIG, _json(special))
        atomic_write_text(folder / CONFIG_FILE, _json(described))
    except OSError as error:
        raise WeightsError(f"the model cannot be saved to {folder}: {error}") from error


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
