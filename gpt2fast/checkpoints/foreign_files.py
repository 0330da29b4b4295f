"""Explanations of files and folders without weights that we read, and the way out of each.

A file is told by its first bytes where its format has any of its own, else by its name.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from .._system.parsing import read_json
from ..errors import Error, shown
from . import llm_c, run_folder

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_OLD_TRANSFORMERS = (
    "transformers 5 does not read them; version 4 converts them, in an environment of its own with "
    "Python 3.11: pip install 'transformers[torch,{extra}]<5', then "
    "GPT2LMHeadModel.from_pretrained(FOLDER, {option}=True).save_pretrained(OUT)"
)
_TENSORFLOW = "weights of TensorFlow: " + _OLD_TRANSFORMERS.format(extra="tf", option="from_tf")
_FLAX = "weights of flax (JAX): " + _OLD_TRANSFORMERS.format(extra="flax", option="from_flax")
_GGUF = (
    "a model in GGUF, llama.cpp's format: transformers loads it (pip install transformers gguf "
    "accelerate), then AutoModelForCausalLM.from_pretrained(FOLDER, "
    "gguf_file=FILE).save_pretrained(OUT); better, take the weights that it was made from"
)
_NO_WAY_BACK = "{}, made from other weights, and there is no way back: name those"
_PROGRAM = _NO_WAY_BACK.format("a program in {}")
_OLD_GGML = (
    "a model in ggml's old format, which llama.cpp no longer reads either: take other weights"
)
_COMPRESSED = "a compressed file ({}): unpack it first"

_BY_MAGIC = {
    b"GGUF": _GGUF,
    b"lmgg": _OLD_GGML,
    b"tjgg": _OLD_GGML,
    b"\x89HDF\r\n\x1a\n": _TENSORFLOW,
    b"\x93NUMPY": "one array of NumPy, not a model",
    b"\x1f\x8b": _COMPRESSED.format("gzip"),
    b"\x28\xb5\x2f\xfd": _COMPRESSED.format("zstd"),
    b"7z\xbc\xaf\x27\x1c": _COMPRESSED.format("7z"),
    b"Rar!": _COMPRESSED.format("rar"),
    b"BZh": _COMPRESSED.format("bzip2"),
    b"\xfd7zXZ": _COMPRESSED.format("xz"),
    **{magic: f"{what}, not a model" for magic, what in llm_c.OTHER_FILES.items()},
}
_BY_SUFFIX = {
    ".h5": _TENSORFLOW,
    ".msgpack": _FLAX,
    ".gguf": _GGUF,
    ".onnx": _PROGRAM.format("ONNX"),
    ".tflite": _PROGRAM.format("TensorFlow Lite"),
    **dict.fromkeys((".mlmodel", ".mlpackage"), _PROGRAM.format("Core ML")),
    **dict.fromkeys((".engine", ".plan"), _PROGRAM.format("TensorRT")),
    ".ot": _NO_WAY_BACK.format("rust-bert's copy of a model"),
}
# In this order: the first one found explains the folder.
_BY_MEMBER = {
    "tf_model.h5": _TENSORFLOW,
    "tf_model.h5.index.json": _TENSORFLOW,
    "flax_model.msgpack": _FLAX,
    "flax_model.msgpack.index.json": _FLAX,
    "openvino_model.xml": _PROGRAM.format("OpenVINO's format"),
    "saved_model.pb": _NO_WAY_BACK.format("a SavedModel of TensorFlow"),
    ".metadata": (
        "a checkpoint that several processes wrote: join it with "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt"
    ),
    "zero_to_fp32.py": (
        "a checkpoint of DeepSpeed: join it with its own zero_to_fp32.py (python "
        "zero_to_fp32.py . OUT), or name the …model_states.pt below it that has all weights"
    ),
    "meta.json": "prepared data, not a model: give it to --data",
    run_folder.LOG: "the folder of a training run that has no checkpoint yet",
}


def explain_file(path: Path, head: bytes) -> str | None:
    """The kind of a file with these first 64 bytes and how to go on, for a message, or None."""
    for magic, what in _BY_MAGIC.items():
        if head.startswith(magic):
            return what
    if head[4:8] == b"TFL3":
        return _BY_SUFFIX[".tflite"]
    if path.name == "openvino_model.bin" or path.name == "openvino_model.xml":
        return _BY_MEMBER["openvino_model.xml"]
    if path.suffix in _BY_SUFFIX:
        return _BY_SUFFIX[path.suffix]
    if ".data-0" in path.name or (path.suffix == ".meta" and path.with_suffix(".index").exists()):
        return f"a part of a TensorFlow checkpoint: name its folder, {path.parent}"
    if path.suffix == ".pb":
        return _NO_WAY_BACK.format("a graph of TensorFlow")
    if head.lstrip()[:1] == b"<":
        return (
            "a page of the web, as a wrong address gives it in place of a file: download it again"
        )
    if path.suffix == ".json" and head.lstrip()[:1] == b"{":
        return f"a description, not weights: name its folder, {path.parent}"
    if head and not head.strip(bytes(range(32, 127)) + b"\t\r\n"):
        return f"a text ({shown(head[:30].decode())}…), not a model"
    return None


def explain_folder(folder: Path, held: list[str]) -> str | None:
    """The kind of a folder that holds these names, no weights, and how to go on, or None."""
    if ADAPTER_CONFIG in held:
        return explain_adapter(folder)
    for name, what in _BY_MEMBER.items():
        if name in held:
            return what
    for suffix, what in _BY_SUFFIX.items():
        if any(name.endswith(suffix) for name in held):
            return what
    if "onnx" in held:
        return _BY_SUFFIX[".onnx"]
    if "snapshots" in held:
        snapshots = sorted((folder / "snapshots").glob("*/config.json"))
        if snapshots:
            return f"a folder of the hub's cache: name {snapshots[-1].parent}"
    checkpoints = [path for path in folder.glob("checkpoint-*/config.json") if path.is_file()]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: (len(path.parent.name), path.parent.name))
        return f"the folder of a run that has its checkpoints below: name one, {newest.parent}"
    return None


def explain_adapter(folder: Path) -> str:
    """The message for a folder with an adapter in PEFT's format."""
    base: object = None
    with suppress(Error):  # load_adapter says what is wrong with the file
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    name = shlex.quote(base) if isinstance(base, str) and 0 < len(base) < 200 else "MODEL"
    if folder.name == run_folder.ADAPTER and (folder.parent / run_folder.MODEL).is_file():
        merged = f"the model with the adapter merged into it is {folder.parent}"
    else:
        merged = (
            "for training, or to have one model of both: model = GPT2.from_pretrained(MODEL); "
            "load_adapter(model, FOLDER); merge(model).save_pretrained(OUT), of gpt2fast.lora"
        )
    return (
        "an adapter (LoRA), which goes with the model that it was trained on: "
        f"--model {name} --adapter {shlex.quote(str(folder))} for generate and evaluate; {merged}"
    )
