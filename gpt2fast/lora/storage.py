"""Adapters in files, in the format of PEFT (https://github.com/huggingface/peft).

    adapter_config.json         what they are: rank `r`, `lora_alpha`, `target_modules`, …
    adapter_model.safetensors   base_model.model.transformer.h.0.attn.c_attn.lora_A.weight (r, in)
                                base_model.model.transformer.h.0.attn.c_attn.lora_B.weight (out, r)

An older `adapter_model.bin` is read as well. What this package cannot do is refused, never left
out: other methods than LoRA, DoRA, biases or whole modules trained beside the adapters, adapters of
embeddings, ranks that differ from one projection to the next.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._system.files import atomic_write_text
from .._system.parsing import read_json
from ..checkpoints.foreign_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..checkpoints.hub import resolve
from ..checkpoints.run_folder import ADAPTER
from ..checkpoints.tensor_files import read_tensors, write_safetensors
from ..errors import ArgumentError, WeightsError
from ..model import GPT2
from .adapters import (
    LoRAProjection,
    adapted,
    check_options,
    insert,
    projections,
    require_plain,
)

_PREFIX = "base_model.model.transformer."

_HARMLESS = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
        "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
        "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules",
        "task_type", "use_rslora",
    )
)  # fmt: skip
"""Entries of adapter_config.json that are understood here, or do not change what tensors mean."""
# Beside true and false. Others, such as PiSSA, change the base model's weights too.
_INITIAL_VALUES = ("gaussian", "eva", "orthogonal")


def save_adapter(
    model: GPT2, directory: str | os.PathLike[str], base_model: str | None = None
) -> None:
    """Write the model's adapters, and nothing else, into a directory that PEFT loads.

    Args:
        model: with adapters.
        directory: made if need be; each file appears whole or not at all, the weights first.
        base_model: name or path of the model that the adapters belong to, written down for those
            who load them.

    Raises:
        ArgumentError: the model has no adapters, or other parameters that are trained with them.
        WeightsError: the directory cannot be written.
    """
    found = adapted(model)
    if not found:
        raise ArgumentError("the model has no adapters to save; save_pretrained saves it whole")
    beside = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    ]
    if beside:
        raise ArgumentError(
            f"{', '.join(beside[:3])} is trained beside the adapters, and their files hold nothing "
            "else: save_pretrained saves the whole model; or freeze it (requires_grad_(False)), if "
            "it is as it was loaded"
        )
    first = next(iter(found.values()))
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": int(first.alpha) if first.alpha.is_integer() else first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": _targets(list(found), len(model.blocks)),
        "fan_in_fan_out": True,  # the base's weights are (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for name, projection in found.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = projection.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = projection.lora_B
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / ADAPTER_WEIGHTS[0], tensors)
        atomic_write_text(folder / ADAPTER_CONFIG, json.dumps(described, indent=2) + "\n")
    except OSError as error:
        raise WeightsError(f"the adapter cannot be saved to {folder}: {error}") from error


def load_adapter(
    model: GPT2,
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> list[str]:
    """Put stored adapters beside a model's projections and freeze everything else, in place.

    Args:
        model: the one that the adapters were trained on; its dtype becomes theirs.
        name_or_path: a directory, or an adapter on the hub, in PEFT's format.
        revision, local_files_only: as of `gpt2fast.checkpoints.gpt2.from_pretrained`.

    Returns:
        The names of the projections that have an adapter now.

    Raises:
        ArgumentError: the model has adapters already, or can have none.
        WeightsError: nothing found, unreadable, of another kind, or made for another model.
    """
    require_plain(model)
    folder = resolve(
        name_or_path,
        revision=revision,
        local_files_only=local_files_only,
        allow_patterns=(ADAPTER_CONFIG, *ADAPTER_WEIGHTS),
    )
    described = folder / ADAPTER_CONFIG
    weights = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if not described.is_file() or weights is None:
        missing = ADAPTER_CONFIG if not described.is_file() else ADAPTER_WEIGHTS[0]
        hint = f"; did you mean {folder / ADAPTER}?" if (folder / ADAPTER).is_dir() else ""
        raise WeightsError(f"{folder} holds no adapter in PEFT's format: no {missing}{hint}")
    values = read_json(described, WeightsError)
    rank, alpha, dropout = _options(values, described)
    pairs = _pairs(read_tensors(weights)[0], weights)
    named = projections(model)
    base = values.get("base_model_name_or_path")
    origin = f"; it was made for {base!r:.100}" if isinstance(base, str) and base else ""
    for name, pair in pairs.items():
        if name not in named:
            raise WeightsError(
                f"{weights}: {name:.80} has an adapter, and is no projection of this model of "
                f"{model.config.n_layer} layers{origin}"
            )
        inputs, outputs = named[name].weight.shape
        for part, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            if tuple(pair[part].shape) != shape:
                raise WeightsError(
                    f"{weights}: {name}.{part} is {tuple(pair[part].shape)}, but must be {shape}: "
                    f"the rank r is {rank} in {ADAPTER_CONFIG}, and this model's {name} takes "
                    f"{inputs} and gives {outputs}{origin}"
                )
    model.requires_grad_(False)
    for name, pair in pairs.items():
        projection = LoRAProjection(named[name], rank, alpha, dropout)
        with torch.no_grad():
            projection.lora_A.copy_(pair["lora_A"])
            projection.lora_B.copy_(pair["lora_B"])
        insert(model, name, projection)
    return list(pairs)


def _options(values: Mapping[str, Any], file: Path) -> tuple[int, float, float]:
    """Rank, alpha and dropout, if the file asks for nothing that is not done here."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise WeightsError(f"{file}: peft_type is {kind!r:.80}; only 'LORA' is read")
    for name, value in values.items():
        if name not in _HARMLESS and value:
            raise WeightsError(
                f"{file}: {name:.80} is {value!r:.80}, which is not done here; merge the adapter "
                "with PEFT (merge_and_unload) and load the result"
            )
    if values.get("bias", "none") != "none":
        raise WeightsError(f"{file}: bias is {values['bias']!r:.80}; only 'none' is read")
    initial = values.get("init_lora_weights")
    if not (initial is None or isinstance(initial, bool) or initial in _INITIAL_VALUES):
        raise WeightsError(
            f"{file}: init_lora_weights is {initial!r:.80}, which changes the base model too; save "
            "the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    dropout = values.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise WeightsError(f"{file}: r is {rank!r:.80}, but must be an integer of at least 1")
    try:
        check_options(alpha, dropout)
        # PEFT's other scale, alpha / sqrt(r) (Kalajdzievski, 2023), as one that is divided by r.
        alpha = float(alpha) * (math.sqrt(rank) if values.get("use_rslora") else 1.0)
    except (ArgumentError, OverflowError) as error:
        raise WeightsError(f"{file}: {error!s:.200}") from error
    return rank, alpha, float(dropout)


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """lora_A and lora_B of each projection."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(?:transformer\.)?(h\.\d+\.\w+\.\w+)\.(lora_[AB])\.weight",
            key,
        )
        if match is None or not tensor.is_floating_point():
            raise WeightsError(
                f"{file}: {key!r:.120} of {tensor.dtype} is no adapter of a projection: only "
                "….lora_A.weight and ….lora_B.weight of the blocks are read"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise WeightsError(f"{file}: {name:.80} has {next(iter(pair))} alone, not both factors")
    if not pairs:
        raise WeightsError(f"{file} holds no tensors")
    return pairs


def _targets(names: list[str], layers: int) -> list[str]:
    """The `target_modules` by which PEFT means these projections and no others."""
    kinds = sorted({name.split(".", 2)[2] for name in names})
    targets = []
    for kind in kinds:
        of_kind = [name for name in names if name.endswith(f".{kind}")]
        targets += [kind] if len(of_kind) == layers else of_kind
    return targets
