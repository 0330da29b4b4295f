"""Which tensors of a checkpoint are a GPT-2's, and which of its parameters each one is.

Frameworks wrap models, and put names of theirs before and between a model's own. None of them is
known here by name: a module with a single child that GPT-2 does not have (`_orig_mod`, `module`,
`lm_head.decoder`) is a wrapper, and the model is where the blocks are (`h.0.ln_1`, or OpenAI's
`h0/ln_1`).

    module.policy.transformer.h.0._orig_mod.attn.c_attn.weight    h.0.attn.c_attn.weight
    module.policy.lm_head.weight                                  lm_head.weight
    module.v_head.summary.weight                                  left out, by name

What lies outside the model's own module is another head, or something else, and is left out. What
lies within it and is not GPT-2's is kept under its name, for whoever compares names and shapes to
refuse: it may change what the model computes. Beside `wte` in a model without a module of its own,
only what is called a head is taken for one.

OpenAI's own spelling (`model/h0/ln_1/g`, `.g`, `.b`, `.w`) is read as well. Projections may be
stored as nn.Linear does, (out, in): `c_attn`, the one that is never square, decides for all of
them. Causal masks that were stored as buffers are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import BLOCK_MATRICES, BLOCK_PARAMETERS
from ..errors import WeightsError, shown

Path = tuple[str, ...]

_OUTER = ("wte", "wpe", "ln_f", "lm_head")
_BLOCK = {name.split(".")[0] for name in BLOCK_PARAMETERS}
_OWN = {"h", *_OUTER, *(part for name in BLOCK_PARAMETERS for part in name.split(".")[:-1])}
_LEAVES = {"g": "weight", "gamma": "weight", "w": "weight", "b": "bias", "beta": "bias"}
_MASKS = ("bias", "masked_bias")
# What a head is called in a model that has no module of its own to keep it out of.
_HEADS = re.compile(
    "(?!.*emb).*(head|score|classif|qa_outputs|reward|critic|value|logit|summary)", re.IGNORECASE
)
_CHANGES_HEAD = re.compile(r"lora|base_layer|parametrizations|weight_(?:g|v|orig|mask)$|scale|gain")
_BLOCK_NAME = re.compile(r"(?:^|[./])h[./]?\d+[./]")
_DEEPEST = 24  # parts of a name; real ones have fewer than 15
_MOST_COPIES = 16
_LONGEST_LIST = 8


@dataclass
class NamedTensors:
    """A GPT-2's tensors by its own names, and the names of those that were left out."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, Tensor] = field(default_factory=dict)
    """By the names in the file: what belongs to other heads and modules."""


def names_blocks(names: Iterable[str]) -> bool:
    """Whether one of the names looks like that of a tensor in a GPT-2's blocks."""
    return any(_BLOCK_NAME.search(name) for name in names)


def find_model(stored: Mapping[str, Tensor], source: str) -> NamedTensors:
    """The one GPT-2 among stored tensors, projections as (in, out).

    Args:
        stored: tensors by the names in the file.
        source: the file, for messages.

    Raises:
        WeightsError: there is no GPT-2, or there are two that differ; two tensors mean the same
            parameter and differ; the output projection has a bias; or what was left out may be an
            output projection.
    """
    paths = _paths(stored)
    roots = _roots(stored, paths, source)
    found = NamedTensors()
    spelled: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    heads: dict[Path, dict[Path, str]] = {}
    for key, tensor in stored.items():
        path = paths.get(key, ())
        root = next((root for root in roots if path[: len(root)] == root), None)
        within = () if root is None else path[len(root) :]
        if within[:1] == ("h",):
            if not _is_mask(within, tensor):
                _put(found, spelled, _name(within), key, tensor, source)
        elif _is_head(path, roots):
            end = path.index("lm_head") + 1
            heads.setdefault(path[:end], {})[path[end:]] = key
        elif within and within[0] in _OUTER:
            _put(found, spelled, _name(within), key, tensor, source)
        elif path[-2:-1] and path[-2] in ("wte", "wpe", "ln_f"):
            elsewhere[key] = _name(path[-2:])
        elif within and not _HEADS.match(within[0]):
            _put(found, spelled, _name(within), key, tensor, source)
        else:
            found.left_out[key] = tensor
    for key, name in elsewhere.items():  # wrapped otherwise than the blocks, or another model's
        if name.startswith("ln_f") and name in found.tensors:
            found.left_out[key] = stored[key]
        else:
            _put(found, spelled, name, key, stored[key], source)
    for head in heads.values():
        _put_head(found, spelled, head, stored, source)
    _check_left_out(found, source)
    _turn(found.tensors)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and content."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Tied weights in a pickle are one memory; that need not be read to be equal.
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)


def listed(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - _LONGEST_LIST
    return ", ".join(names[:_LONGEST_LIST]) + (f" and {more} more" if more > 0 else "")


def with_shape(name: str, tensor: Tensor) -> str:
    """A stored tensor's name and shape, for a message."""
    return f"{name:.80} {tuple(tensor.shape)}"


def _paths(stored: Iterable[str]) -> dict[str, Path]:
    """The modules that lead to each tensor, wrappers left out; none for a name that is too deep."""
    whole: dict[str, Path] = {}
    children: dict[Path, set[str]] = {}
    for key in stored:
        parts = re.split(r"[./]", key, maxsplit=_DEEPEST)
        # OpenAI's h0 is h.0, and its wte is wte.weight.
        path = [
            half
            for part in parts
            for half in (("h", part[1:]) if re.fullmatch(r"h[0-9]{1,6}", part) else (part,))
        ]
        if path[-1] in ("wte", "wpe"):
            path.append("weight")
        if len(path) <= _DEEPEST:
            whole[key] = tuple(path)
            for end in range(len(path)):
                children.setdefault(tuple(path[:end]), set()).add(path[end])

    def is_wrapper(path: Path, place: int) -> bool:
        part = path[place]
        known = part in _OWN or (part.isdecimal() and path[place - 1 : place] == ("h",))
        return place < len(path) - 1 and not known and len(children[path[:place]]) == 1

    return {
        key: tuple(part for place, part in enumerate(path) if not is_wrapper(path, place))
        for key, path in whole.items()
    }


def _roots(stored: Mapping[str, Tensor], paths: Mapping[str, Path], source: str) -> list[Path]:
    """The module that has the blocks, or all that have the same ones; outer modules last."""
    roots: dict[Path, dict[Path, str]] = {}
    for key, path in paths.items():
        for place in range(len(path) - 2):
            name, layer, part = path[place : place + 3]
            if name == "h" and layer.isdecimal() and part in _BLOCK:
                roots.setdefault(path[:place], {})[path[place:]] = key
                break
    if not roots:
        raise WeightsError(
            f"{source} holds no GPT-2: no tensor in it is one of a block (such as "
            f"h.0.attn.c_attn.weight); it has {listed([shown(key) for key in stored]) or 'none'}"
        )
    if len(roots) > _MOST_COPIES:
        raise WeightsError(f"{source} holds blocks of {len(roots)} models; save one by itself")
    (first, blocks), *others = roots.items()
    for other, copies in others:
        if blocks.keys() != copies.keys() or not all(
            same(stored[key], stored[copies[path]]) for path, key in blocks.items()
        ):
            one, two = (next(iter(roots[root].values())) for root in (first, other))
            raise WeightsError(
                f"{source} holds {len(roots)} GPT-2s that differ: {shown(one)} is one's, and "
                f"{shown(two)} another's; save the one that is wanted by itself, for example with "
                "torch.save(actor.state_dict(), 'actor.pt')"
            )
    return sorted(roots, key=len, reverse=True)


def _is_head(path: Path, roots: list[Path]) -> bool:
    """Whether a tensor is of a module `lm_head` in the model, or in a module around it."""
    if "lm_head" not in path[:-1]:
        return False
    around = path[: path.index("lm_head")]
    return any(root[: len(around)] == around for root in roots)


def _name(path: Path) -> str:
    return ".".join((*path[:-1], _LEAVES.get(path[-1], path[-1])))


def _put(
    found: NamedTensors,
    spelled: dict[str, str],
    name: str,
    key: str,
    tensor: Tensor,
    source: str,
) -> None:
    if name in found.tensors and not same(found.tensors[name], tensor):
        raise WeightsError(
            f"{source}: {spelled[name]!r:.80} and {key!r:.80} both mean {name:.80}, but differ; "
            "remove one"
        )
    found.tensors[name], spelled[name] = tensor, key


def _put_head(
    found: NamedTensors,
    spelled: dict[str, str],
    head: Mapping[Path, str],
    stored: Mapping[str, Tensor],
    source: str,
) -> None:
    """Take a module `lm_head` for the output projection, or leave it out."""
    tensors = {_name(path): key for path, key in head.items()}
    changed = next((key for name, key in tensors.items() if _CHANGES_HEAD.search(name)), None)
    if changed is not None:
        raise WeightsError(
            f"{source}: {with_shape(changed, stored[changed])} changes the output projection, and "
            "without it the logits would be others; merge it first (PEFT's merge_and_unload, "
            "torch.nn.utils.parametrize.remove_parametrizations), or remove it from the file if "
            "it is not wanted"
        )
    if tensors.keys() not in ({"weight"}, {"weight", "bias"}):
        found.left_out.update((key, stored[key]) for key in tensors.values())
        return
    bias = tensors.get("bias")
    if bias is not None and bool(stored[bias].to(torch.complex128).any()):
        raise WeightsError(
            f"{source}: {with_shape(bias, stored[bias])} is an output projection's bias, which "
            "GPT-2 does not have: without it the logits would be others; remove it from the file "
            "if it is not wanted"
        )
    _put(found, spelled, "lm_head.weight", tensors["weight"], stored[tensors["weight"]], source)


def _is_mask(path: Path, tensor: Tensor) -> bool:
    """Whether a tensor of a block is a causal mask, or the number that masks."""
    if len(path) != 4 or path[2] != "attn" or path[3] not in _MASKS:
        return False
    return tensor.ndim != 1 or len(tensor) == 1


def _check_left_out(found: NamedTensors, source: str) -> None:
    embedding = found.tensors.get("wte.weight")
    if embedding is None or "lm_head.weight" in found.tensors:
        return
    for key, tensor in found.left_out.items():
        if tensor.shape == embedding.shape and not same(tensor, embedding):
            raise WeightsError(
                f"{source}: {with_shape(key, tensor)} has the shape of an output projection; "
                "call it lm_head.weight if it is one, or remove it"
            )


def _turn(named: dict[str, Tensor]) -> None:
    """Turn projections that are stored as (out, in), and take off axes of length one."""
    projections = [name for name in named if name.endswith(BLOCK_MATRICES)]
    for name in projections:
        if named[name].ndim == 3 and len(named[name]) == 1:  # OpenAI's 1-D convolutions
            named[name] = named[name][0]
    first = next((named[name] for name in projections if name.endswith("attn.c_attn.weight")), None)
    if first is not None and first.ndim == 2 and first.shape[0] == 3 * first.shape[1]:
        for name in projections:
            named[name] = named[name].mT if named[name].ndim == 2 else named[name]
