"""Targets of fuzzing: functions that read bytes as a file of one kind.

A target gets the bytes and an empty folder to write them to. It may raise the package's errors; any
other exception is a finding.
Several files are one input in sections, `=== NAME` on a line before each.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

import op_arguments
from gpt2fast import GPT2, GPT2Config, Tokenizer
from gpt2fast._system.parsing import read_json
from gpt2fast.checkpoints.generation_config import first_end_token, read_generation_config
from gpt2fast.checkpoints.tensor_files import read_tensors
from gpt2fast.checkpoints.tensorflow_files import read_bundle
from gpt2fast.cli import train as train_command
from gpt2fast.cli.prompts import parse_prompts
from gpt2fast.data.detection import file_source
from gpt2fast.data.module import DataModule
from gpt2fast.data.opening import TextInput
from gpt2fast.data.text import Cuts, read_blocks
from gpt2fast.data.tokens import TokenFile
from gpt2fast.errors import Error
from gpt2fast.reporting.comparison import all_settings, results
from gpt2fast.training.checkpoints import shards
from gpt2fast.training.checkpoints.position import Position
from gpt2fast.training.checkpoints.state import load_state
from gpt2fast.training.logs.runs import read_runs
from gpt2fast.tuning.space import read_space

Target = Callable[[bytes, Path], None]
TARGETS: dict[str, Target] = {}

CONFIG = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, dropout=0.0)
SECTION = re.compile(rb"(?:\A|\n)=== ([A-Za-z0-9_.-]{1,60})\n")


def target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


def sections(data: bytes) -> dict[str, bytes]:
    """The files in an input."""
    parts = SECTION.split(data)
    names = [name.decode() for name in parts[1::2]]
    return {n: c for n, c in zip(names, parts[2::2], strict=True) if n.strip(".")}


def joined(files: dict[str, bytes]) -> bytes:
    return b"\n".join(b"=== " + name.encode() + b"\n" + content for name, content in files.items())


def write(data: bytes, folder: Path) -> dict[str, bytes]:
    files = sections(data)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


@target
def safetensors(data: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    for tensor in read_tensors(path)[0].values():
        tensor.sum()  # every byte is there


@target
def pickle(data: bytes, folder: Path) -> None:
    path = folder / "model.pt"
    path.write_bytes(data)
    for tensor in read_tensors(path)[0].values():
        tensor.sum()


@target
def config(data: bytes, folder: Path) -> None:
    files = write(data, folder)
    if "config.json" not in files:
        (folder / "config.json").write_bytes(data)
    path = folder / "config.json"
    values = read_json(path)
    read_generation_config(folder, values)
    made = GPT2Config.from_dict(first_end_token(values), source=str(path))
    assert made.parameter_count > 0 and made.attention_scale(0) > 0
    repr(made)


@target
def tokenizer(data: bytes, folder: Path) -> None:
    if not write(data, folder):
        (folder / "tokenizer.json").write_bytes(data)
    made = Tokenizer.from_pretrained(str(folder), local_files_only=True)
    ids = made.encode("ab the Cat's\n 12\té<|endoftext|>")
    made.decode(ids)
    made.fingerprint()


@target
def folder(data: bytes, folder: Path) -> None:
    write(data, folder)
    model = GPT2.from_pretrained(folder, local_files_only=True)
    if isinstance(model, GPT2) and model.config.vocab_size > 2 and model.config.n_positions > 2:
        model(torch.tensor([[1, 2]]))


@target
def adapter(data: bytes, folder: Path) -> None:
    from gpt2fast.lora import load_adapter

    write(data, folder)
    torch.manual_seed(0)
    load_adapter(GPT2(CONFIG), folder, local_files_only=True)


@target
def recipe(data: bytes, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    with suppress(Error):
        train_command.parse(["--config", str(path)])
    read_space(str(path))


@target
def resume(data: bytes, folder: Path) -> None:
    write(data, folder)
    with suppress(Error, KeyError, TypeError):  # which the loop explains
        state = load_state(folder)
        Position.of(state["position"])
    if (folder / ".metadata").exists():
        shards._index(shards._reader(folder), folder)


@target
def tokens(data: bytes, folder: Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(data)
    for dtype in (None, "uint16", "uint32"):
        try:
            made = TokenFile(path, dtype)
        except Error:
            continue
        assert made.slice(0, made.count).shape == (made.count,)
        made.find_at_least(1 << 20)


@target
def prepared(data: bytes, folder: Path) -> None:
    files = write(data, folder)
    for name in ("train.bin", "val.bin"):
        if name not in files:
            (folder / name).write_bytes(bytes(200))
    module = DataModule(folder, 4, 2, notify=lambda text: None)
    next(iter(module.val_dataloader()))


@target
def prompts(data: bytes, folder: Path) -> None:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return
    for name in ("prompts.jsonl", "prompts.txt"):
        with suppress(Error):
            parse_prompts(name, text, {"max_new_tokens": 5})


@target
def text(data: bytes, folder: Path) -> None:
    for suffix in ("txt", "jsonl", "json", "csv", "tsv", "data"):
        path = folder / f"text.{suffix}"
        path.write_bytes(data)
        for lines in (False, True):
            with suppress(Error):
                source = file_source(path, "text", lines, notify=lambda line: None)
                for block in source.blocks(Cuts(), 0):
                    "".join(segment.text for segment in block.segments).encode()


@target
def encoded(data: bytes, folder: Path) -> None:
    path = folder / "text.txt"
    path.write_bytes(data)
    for encoding in ("cp1252", "cp932", "gb18030", "iso2022_jp", "utf-16-le", "utf-7"):
        with suppress(Error):
            for block in read_blocks(TextInput(path, encoding), Cuts(block_size=64)):
                "".join(segment.text for segment in block.segments).encode()


@target
def llm_c(data: bytes, folder: Path) -> None:
    path = folder / "model.bin"
    path.write_bytes(data)
    model = GPT2.from_pretrained(path, local_files_only=True)
    assert sum(int(parameter.isnan().sum()) for parameter in model.parameters()) >= 0


@target
def tensorflow(data: bytes, folder: Path) -> None:
    write(data, folder)
    for tensor in read_bundle(folder / "model.ckpt.index").values():
        tensor.double().sum()
    GPT2.from_pretrained(folder, local_files_only=True)


@target
def logs(data: bytes, folder: Path) -> None:
    write(data, folder)
    runs = read_runs([folder])
    results(runs)
    all_settings(runs)


@target
def ops(data: bytes, folder: Path) -> None:
    """A public op, on its own arguments with some of them changed as the bytes say."""
    from gpt2fast import backend
    from gpt2fast import ops as public

    take = Bytes(data)
    torch.manual_seed(take.below(256))
    given = op_arguments.arguments()
    name = list(given)[take.below(len(given))]
    arguments = given[name]
    for _ in range(1 + take.below(3)):
        key = list(arguments)[take.below(len(arguments))]
        with suppress(RuntimeError):  # no view of a storage that was resized before
            arguments[key] = _strange(arguments[key], take)
    # Packed weights have native kernels alone, and the plain list none.
    chosen = ("auto", "native", "torch", "reference")[take.below(4)]
    try:
        with torch.no_grad(), backend(chosen):
            getattr(public, name)(**arguments)
    except RuntimeError as error:  # torch's own, of dtypes and devices that don't fit
        if "INTERNAL ASSERT" in str(error):
            raise


class Bytes:
    """Small numbers out of bytes; zeros when these are used up."""

    def __init__(self, data: bytes) -> None:
        self.left = iter(data)

    def below(self, limit: int) -> int:
        return next(self.left, 0) % limit


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
          torch.int8, torch.bool, torch.complex64)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 7, 1 << 31, -(1 << 31), 1 << 62, 0.0, -0.5, 0.999, 1.0, 1e30, 1e-40,
           float("nan"), float("inf"), float("-inf"))  # fmt: skip


def _strange(value: object, take: Bytes) -> object:
    if isinstance(value, list) and value:
        place = take.below(len(value))
        changed = _strange(value[place], take)
        return [*value[:place], *([] if take.below(8) == 0 else [changed]), *value[place + 1 :]]
    if not isinstance(value, torch.Tensor):
        alike = [number for number in NUMBERS if type(number) is type(value)]
        return alike[take.below(len(alike))] if alike else value
    held = value.untyped_storage().nbytes() // value.element_size()
    steps = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    # Operations on the one would import half of torch, on the other read what is not there.
    if value.is_meta or (value.numel() and value.storage_offset() + steps >= held):
        return value
    what, axis = take.below(14), take.below(max(1, value.dim()))
    if what == 0:
        return value.to(DTYPES[take.below(len(DTYPES))])
    if what == 1 and value.dim():
        return value.narrow(axis, 0, take.below(value.shape[axis] + 1))
    if what == 2 and value.dim():
        return torch.cat([value, value], axis)
    if what == 3 and value.dim() > 1:
        return value.transpose(axis, take.below(value.dim()))
    if what == 4 and value.dim():
        return value.narrow(axis, 0, min(1, value.shape[axis])).expand_as(value)
    if what == 5 and value.dim():
        return torch.cat([value, value], axis).unflatten(axis, (-1, 2)).select(axis + 1, 1)
    if what == 6:
        value = value.clone()
        value.untyped_storage().resize_(take.below(2) * (value.untyped_storage().nbytes() // 2))
        return value
    if what == 7:
        return value.unsqueeze(0)
    if what == 8 and value.dim():
        return value.select(axis, 0) if value.shape[axis] else value.flatten()
    if what == 9 and value.numel() and not value.is_complex():
        changed = value.clone().flatten()
        number = NUMBERS[take.below(len(NUMBERS))]
        plain = value.is_floating_point() or (isinstance(number, int) and value.element_size() == 8)
        changed[take.below(changed.numel())] = number if plain else 1
        return changed.view(value.shape)
    if what == 10 and value.dim() == 2:
        # Rows at a distance that is a multiple of nothing, from an odd place on.
        rows, columns = value.shape
        wide = value.new_zeros(rows, columns + 3)
        wide[:, 1 : 1 + columns] = value
        return wide[:, 1 : 1 + columns]
    if what == 11:
        return value.new_zeros([take.below(9) for _ in value.shape])
    if what == 12:
        return value.to("meta")
    return value.flip(0) if value.dim() else value
