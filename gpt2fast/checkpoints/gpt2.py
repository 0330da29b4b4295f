"""GPT-2 out of any checkpoint that people have.

What a checkpoint may look like:

- a directory, or a model on the hub, with `config.json` and `model.safetensors` or
  `pytorch_model.bin`, whole or in shards with an `*.index.json`; or nanoGPT's, with `ckpt.pt`;
- a bare state dict (`.safetensors`, `.pt`, `.pth`, `.bin`) with a `config.json` beside it, or with
  `preset=`, or with exactly the shapes of one of OpenAI's four models;
- nanoGPT's `ckpt.pt`, llm.c's model files (`llm_c`) and OpenAI's TensorFlow checkpoints
  (`tensorflow_files`), which describe their models themselves.

Tensors may have the names of whatever was wrapped around the model (`tensor_names`). Those of other
heads (`score`, `v_head`, …) are left out, which is logged once, by name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._system.parsing import read_json
from ..config import CONFIG_FILE, PRESETS, GPT2Config
from ..errors import ConfigError, WeightsError, shown
from ..inference.packed import PackedGPT2, model_shape
from ..model import GPT2
from ..ops.packed import MatrixFormat, PackedWeights, beyond_float16
from ..quantization.storage import from_tensors, is_quantized
from . import nanogpt
from .folders import find_weights
from .generation_config import first_end_token, read_generation_config
from .tensor_files import describes_itself, read_tensors
from .tensor_names import NamedTensors, find_model, listed, same, with_shape

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}

_log = logging.getLogger(__name__)


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    preset: str | None = None,
) -> GPT2 | PackedGPT2:
    """A GPT2 with the weights of a checkpoint, in evaluation mode, parameters trainable.

    Quantized weights, as `PackedGPT2.save_pretrained` writes them, give a `PackedGPT2`.

    On the CPU, weights that need no conversion stay memory-mapped, copy-on-write: loading takes
    one copy of them at most, and that one is read when it is first used. (A change of dtype,
    layout or device makes a copy, beside pages of the file that the system may drop.) The files may
    be replaced while the model lives, so that `save_pretrained` into the same directory is safe,
    but other programs must not overwrite them in place.

    Args:
        name_or_path: a bundled model, a path, or a model on the hub; see `checkpoints.hub.resolve`.
        device: where the parameters go; None is the CPU.
        dtype: dtype of all parameters (float32, bfloat16, float16 or float64, as torch.dtype or by
            name). None is what transformers takes: the `dtype` of config.json, or else the dtype
            that the file stores (the widest one, should they differ).
        revision: branch, tag or commit of a model on the hub.
        local_files_only: use huggingface_hub's cache alone.
        preset: take the architecture of "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl", whatever
            a config.json says.

    A stored `lm_head` equal to the token embedding is taken for a tied one. One that differs is
    kept, and `tie_word_embeddings` becomes False, as in transformers. nanoGPT's checkpoints get
    the activation of its current code, "gelu"; models trained by its code from before mid-2023 had
    "gelu_new" (save the model, and edit config.json).

    Raises:
        WeightsError: nothing found, unreadable, or tensors missing, unexpected or misshapen; or
            numbers that are too large for float16, which was asked for.
        ConfigError: config.json, the preset, or nanoGPT's model_args cannot be used.
    """
    target = _device(device)
    wanted = _dtype(dtype, "dtype") if dtype is not None else None
    config = GPT2Config.preset(preset) if preset is not None else None
    file = find_weights(name_or_path, revision=revision, local_files_only=local_files_only)

    described = file.parent / CONFIG_FILE
    settings: dict[str, Any] = {}
    if config is None and described.exists() and not describes_itself(file):
        values = read_json(described)
        settings = read_generation_config(file.parent, values)
        config = GPT2Config.from_dict(first_end_token(values), source=str(described))
        _refuse_quantized(values.get("quantization_config"), described)
        stored_dtype = values.get("dtype", values.get("torch_dtype"))
        if wanted is None and stored_dtype is not None:
            wanted = _dtype(stored_dtype, f"{described}: dtype")

    stored, extra = read_tensors(file)
    if is_quantized(extra):
        if config is None:
            raise ConfigError(f"{file} holds quantized weights; its config.json must lie beside it")
        if target.type != "cpu" or dtype is not None:
            raise WeightsError(
                f"{file} holds quantized weights, which run on the CPU as they are: "
                "leave device and dtype out"
            )
        packed = _build_quantized(stored, extra, config, file)
        packed.generation_config = settings
        return packed
    found = find_model(stored, str(file))
    named = found.tensors
    stored.clear()
    if config is None:
        if isinstance(extra.get("config"), GPT2Config):
            config = extra["config"]
        elif isinstance(extra.get("model_args"), dict):
            config = nanogpt.read_model_args(extra["model_args"], file)
        else:
            config = _preset_of(named, file)
    config = _tie(named, config)
    if nanogpt.has_no_biases(extra):
        nanogpt.add_zero_biases(named, config)
    _check_fit(found, config, file)
    widest = _widest(named, file)
    if found.left_out:
        _log.warning(
            "%s: left out what is not GPT-2's: %s",
            file,
            listed([with_shape(*item) for item in found.left_out.items()]),
        )
    model = _build(named, config, target, wanted or widest, file)
    model.generation_config = settings
    return model


def _refuse_quantized(described: Any, file: Path) -> None:
    """Raise WeightsError for weights that another program has quantized."""
    method = described.get("quant_method") if isinstance(described, dict) else None
    if described and method != "gpt2fast":
        raise WeightsError(
            f"{file}: the weights are quantized ({shown(method)}), which cannot be loaded; use the "
            "checkpoint that they were made from, or save what transformers' model.dequantize() "
            "makes of them"
        )


def _preset_of(named: Mapping[str, Tensor], file: Path) -> GPT2Config:
    """The one of OpenAI's models that has exactly these shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    for config in PRESETS.values():
        expected = config.parameter_shapes()
        if {**shapes, "lm_head.weight": None} == {**expected, "lm_head.weight": None}:
            return config
    layers = {name.split(".")[1] for name in shapes if name.startswith("h.")}
    raise WeightsError(
        f"{file} does not say what model it holds: wte.weight is "
        f"{_shape(shapes.get('wte.weight'))}, wpe.weight {_shape(shapes.get('wpe.weight'))}, with "
        f"{len(layers)} layers, and the number of heads cannot be told from shapes; "
        f"give a preset (one of {', '.join(PRESETS)}), or put the model's config.json beside it"
    )


def _tie(named: dict[str, Tensor], config: GPT2Config) -> GPT2Config:
    """Decide whether a stored lm_head is tied; see `from_pretrained`."""
    head, embedding = named.get("lm_head.weight"), named.get("wte.weight")
    if head is None or not config.tie_word_embeddings:
        return config
    if embedding is None:
        named["wte.weight"] = named.pop("lm_head.weight")
    elif same(head, embedding.to(head.dtype)) or same(head.to(embedding.dtype), embedding):
        del named["lm_head.weight"]
    else:
        return replace(config, tie_word_embeddings=False, dropout=None)
    return config


def _check_fit(found: NamedTensors, config: GPT2Config, file: Path) -> None:
    named = found.tensors
    expected = config.parameter_shapes()
    missing = [f"{name} {_shape(shape)}" for name, shape in expected.items() if name not in named]
    unexpected = [
        with_shape(name, tensor) for name, tensor in named.items() if name not in expected
    ]
    misshapen = [
        f"{name} is {_shape(named[name].shape)}, not {_shape(shape)}"
        for name, shape in expected.items()
        if name in named and named[name].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    problems = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        if found.left_out:
            names = [with_shape(*item) for item in found.left_out.items()]
            problems.append(f"{len(names)} left out as not GPT-2's: {listed(names)}")
        raise WeightsError(
            f"{file} does not fit a GPT-2 of {config.n_layer} layers, width {config.n_embd}, "
            f"{config.n_positions} positions and {config.vocab_size} token ids.\n  "
            + "\n  ".join(problems)
            + "\n"
            + _advice(missing, unexpected + misshapen)
        )


def _advice(missing: list[str], problems: list[str]) -> str:
    """The way out where tensors do not fit."""
    if not problems and len(missing) == 1 and missing[0].startswith("lm_head.weight "):
        return (
            "The configuration says that the output projection is not tied to the token embedding. "
            "Set tie_word_embeddings to true if they are to be the same."
        )
    if any(" is (0,), not" in problem for problem in problems):
        return (
            "Tensors are empty, as in a part of a checkpoint that several processes wrote: join "
            "the parts first (DeepSpeed puts a zero_to_fp32.py beside them for that)."
        )
    if any(".lora_" in name or ".base_layer." in name for name in problems):
        return (
            "They have adapters beside them: merge these first (PEFT: merge_and_unload), or load "
            "the base model with adapter=."
        )
    if any(".crossattention." in name for name in problems):
        return (
            "They have cross-attention, as the decoder of an encoder-decoder has: it is not part "
            "of GPT-2's language model."
        )
    return "Check that config.json or preset belongs to these weights."


def _build(
    named: dict[str, Tensor],
    config: GPT2Config,
    device: torch.device,
    dtype: torch.dtype,
    file: Path,
) -> GPT2:
    storages: set[int] = set()
    state: dict[str, Tensor] = {}
    for name in list(named):
        stored = named.pop(name)
        if dtype == torch.float16 and (found := beyond_float16(stored)) is not None:
            raise WeightsError(
                f"{file}: {name} holds {found:g}, and float16 ends at 65504: load it with dtype "
                "float32 or bfloat16"
            )
        tensor = stored.to(device=device, dtype=dtype).contiguous()
        # Two parameters must not share memory, and addresses must suit the dtype.
        start = tensor.untyped_storage().data_ptr()
        if start in storages or tensor.data_ptr() % tensor.element_size():
            tensor = tensor.clone()
        storages.add(start)
        state[name] = tensor
    model = GPT2(config, device="meta", dtype=dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _build_quantized(
    stored: Mapping[str, Tensor], metadata: Mapping[str, str], config: GPT2Config, file: Path
) -> PackedGPT2:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    quantized = from_tensors(tensors, metadata, config, str(file))
    shape = model_shape(config)
    packed = PackedWeights(
        shape, {name: MatrixFormat.of(matrix) for name, matrix in quantized.matrices.items()}
    )
    for name, matrix in quantized.matrices.items():
        packed.put(name, matrix)
    for name, size in shape.vectors().items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != size or not tensor.is_floating_point():
            found = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise WeightsError(f"{file}: {name} must be floats of shape {size}, and is {found}")
        packed.put(name, tensor)
    return PackedGPT2(config, packed, replace(quantized, matrices={}))


def _device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"device {device!r} cannot be used: {reason}; use device='cpu'"
        ) from error


def _dtype(dtype: object, source: str) -> torch.dtype:
    if dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in _DTYPES:
        return _DTYPES[dtype.removeprefix("torch.")]
    raise WeightsError(
        f"{source}={dtype!r:.80} is not supported; choose one of {', '.join(_DTYPES)}"
    )


def _widest(named: Mapping[str, Tensor], file: Path) -> torch.dtype:
    widest = named["wte.weight"].dtype
    for name, tensor in named.items():
        if tensor.dtype not in _DTYPES.values():
            raise WeightsError(
                f"{file} stores {name} as {tensor.dtype}: quantized weights cannot be loaded; "
                "use the checkpoint that they were made from"
            )
        widest = torch.promote_types(widest, tensor.dtype)
    return widest


def _shape(shape: torch.Size | tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
