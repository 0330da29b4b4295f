"""GPT-2's weights: out of any checkpoint that people have, into one that transformers reads.

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

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor

from .._system.files import atomic_write_text, read_file
from .._system.parsing import read_json
from ..config import PRESETS, GPT2Config
from ..errors import ArgumentError, ConfigError, WeightsError, shown
from ..inference.generation_config import first_end_token, read_generation_config
from ..inference.packed import PackedGPT2, model_shape
from ..inference.structure import why_not_configured
from ..model import GPT2
from ..nn.inputs import check_held
from ..nn.projection import merged
from ..ops.packed import MatrixFormat, PackedWeights, QuantizedMatrix
from ..quantization.storage import from_tensors, is_quantized, to_tensors
from .foreign_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, what_adapter_is, what_folder_is
from .hub import resolve
from .tensor_files import describes_itself, file_kind, read_tensors, write_safetensors
from .tensor_names import NamedTensors, find_model, listed, same, with_shape

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "ckpt.pt")
# An adapter's, to say what a model on the hub is that has no weights of its own.
_DESCRIPTIONS = ("config.json", "generation_config.json", ADAPTER_CONFIG)
# Two rounds, so that a model on the hub that has both is not downloaded twice.
_DOWNLOADS = (
    (*_DESCRIPTIONS, *_SAFETENSORS, "model-*.safetensors"),
    (*_DESCRIPTIONS, *_PICKLES, "pytorch_model-*.bin"),
)

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

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

    Quantised weights, as `PackedGPT2.save_pretrained` writes them, give a `PackedGPT2`.

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
        WeightsError: nothing found, unreadable, or tensors missing, unexpected or misshapen.
        ConfigError: config.json, the preset, or nanoGPT's model_args cannot be used.
    """
    target = _device(device)
    wanted = _dtype(dtype, "dtype") if dtype is not None else None
    config = GPT2Config.preset(preset) if preset is not None else None
    file = find_weights(name_or_path, revision=revision, local_files_only=local_files_only)

    described = file.parent / "config.json"
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
            raise ConfigError(f"{file} holds quantised weights; its config.json must lie beside it")
        if target.type != "cpu" or dtype is not None:
            raise WeightsError(
                f"{file} holds quantised weights, which run on the CPU as they are: "
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
            config = _nanogpt_config(extra["model_args"], file)
        else:
            config = _recognised(named, file)
    config = _tie(named, config)
    if _is_biasless_nanogpt(extra):
        _add_zero_biases(named, config)
    _check_fit(found, config, file)
    widest = _widest(named, file)
    if found.left_out:
        _log.warning(
            "%s: left out what is not GPT-2's: %s",
            file,
            listed([with_shape(*item) for item in found.left_out.items()]),
        )
    model = _build(named, config, target, wanted or widest)
    model.generation_config = settings
    return model


def save_pretrained(model: GPT2, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write what `from_pretrained` here and in transformers read, weights bit for bit.

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
    """Raise ArgumentError for a model that what is saved of it would not be."""
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

    Float weights are written as `save_pretrained` does, for transformers as well. Quantised ones
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
    from ..tokenizer.foreign import save_tokenizer, tokenizer_of

    if tokenizer is not None:
        tokenizer_of(tokenizer)  # nothing is written beside what is none
    config = model.config
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    special.update(model.generation_config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", tensors, metadata)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        atomic_write_text(folder / "generation_config.json", _json(special))
        atomic_write_text(folder / "config.json", _json(described))
    except OSError as error:
        raise WeightsError(f"the model cannot be saved to {folder}: {error}") from error


def find_weights(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file that holds the weights, or the index of the files that do; downloaded if need be.

    Args:
        name_or_path, revision, local_files_only: as of `from_pretrained`.

    Raises:
        WeightsError: nothing found, or in a format that is not read.
    """
    file = _find(name_or_path, revision, local_files_only)
    file_kind(file)
    return file


def _find(
    name_or_path: str | os.PathLike[str], revision: str | None, local_files_only: bool
) -> Path:
    for patterns in _DOWNLOADS:
        path = resolve(
            name_or_path,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=patterns,
        )
        if not path.is_dir():
            if path.name in ADAPTER_WEIGHTS and (path.parent / ADAPTER_CONFIG).is_file():
                raise WeightsError(f"{path} is {what_adapter_is(path.parent)}")
            return path
        for name in patterns:
            if name not in _DESCRIPTIONS and (path / name).is_file():
                return path / name
    checkpoint = _tensorflow_index(path)
    if checkpoint is not None:
        return checkpoint
    held = sorted(entry.name for entry in path.iterdir())
    what = what_folder_is(path, held)
    if what is not None:
        raise WeightsError(f"{path} is {what}")
    raise WeightsError(
        f"{path} has no weights: none of {', '.join(_SAFETENSORS + _PICKLES)} is there, "
        f"only {listed(held) or 'nothing'}; give the path of the file that holds the weights"
    )


def _refuse_quantized(described: Any, file: Path) -> None:
    """Raise WeightsError for weights that another program has quantised."""
    method = described.get("quant_method") if isinstance(described, dict) else None
    if described and method != "gpt2fast":
        raise WeightsError(
            f"{file}: the weights are quantised ({shown(method)}), which cannot be loaded; use the "
            "checkpoint that they were made from, or save what transformers' model.dequantize() "
            "makes of them"
        )


def _tensorflow_index(folder: Path) -> Path | None:
    """The index of the TensorFlow checkpoint in a folder, the newest if it has several."""
    found = sorted(folder.glob("*.index"))
    if len(found) < 2:
        return found[0] if found else None
    # TensorFlow writes down which it wrote last: model_checkpoint_path: "model-1000"
    latest = ""
    with suppress(OSError):
        content = read_file(folder / "checkpoint", 1 << 20).decode("utf-8", "replace")
        match = re.search(r'^model_checkpoint_path: "([^"]*)"', content, re.MULTILINE)
        latest = os.path.basename(match[1]) + ".index" if match else ""
    for index in found:
        if index.name == latest:
            return index
    raise WeightsError(
        f"{folder} has several TensorFlow checkpoints ({listed([index.name for index in found])}); "
        "give the path of one of these files"
    )


def _nanogpt_config(arguments: Mapping[str, Any], file: Path) -> GPT2Config:
    """What nanoGPT's `model_args` say; see GPTConfig in its model.py."""
    source = f"{file}: model_args"
    fields = {
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "block_size": "n_positions",
        "vocab_size": "vocab_size",
        "dropout": "dropout",
    }
    for name, value in arguments.items():
        if not isinstance(value, (int, float, NoneType)):
            raise ConfigError(f"{source}: {name!r:.80} is no number: {type(value).__name__}")
        if name not in fields and name != "bias" and value:
            raise WeightsError(
                f"{source}: {name!r:.80}={value!r:.80} is not nanoGPT's; "
                "a variant of the architecture cannot be loaded"
            )
    for name in fields:
        if name not in arguments and name != "dropout":
            raise WeightsError(f"{source} does not say {name}; give preset= if it is a GPT-2")
    values = {ours: arguments[name] for name, ours in fields.items() if name in arguments}
    values["activation_function"] = "gelu"
    vocabulary = values["vocab_size"]
    # 50304 is GPT-2's vocabulary, padded; a smaller one has ids of its own.
    if not isinstance(vocabulary, int) or vocabulary <= PRESETS["gpt2"].vocab_size - 1:
        values["bos_token_id"] = values["eos_token_id"] = None
    dropout = values.pop("dropout", 0.0)
    values.update(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    return GPT2Config.from_dict(values, source=source)


def _is_biasless_nanogpt(extra: Mapping[str, Any]) -> bool:
    arguments = extra.get("model_args")
    return isinstance(arguments, dict) and arguments.get("bias") is False


def _add_zero_biases(named: dict[str, Tensor], config: GPT2Config) -> None:
    for name, shape in config.parameter_shapes().items():
        weight = named.get(name.removesuffix("bias") + "weight")
        if name.endswith(".bias") and name not in named and weight is not None:
            named[name] = torch.zeros(shape, dtype=weight.dtype)


def _recognised(named: Mapping[str, Tensor], file: Path) -> GPT2Config:
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
    """Settle what a stored lm_head means; see `from_pretrained`."""
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
    """What to do about tensors that do not fit."""
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
    named: dict[str, Tensor], config: GPT2Config, device: torch.device, dtype: torch.dtype
) -> GPT2:
    storages: set[int] = set()
    state: dict[str, Tensor] = {}
    for name in list(named):
        tensor = named.pop(name).to(device=device, dtype=dtype).contiguous()
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
                f"{file} stores {name} as {tensor.dtype}: quantised weights cannot be loaded; "
                "use the checkpoint that they were made from"
            )
        widest = torch.promote_types(widest, tensor.dtype)
    return widest


def _shape(shape: torch.Size | tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
