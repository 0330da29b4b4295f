"""Attention of transformers' models on our kernels: `attn_implementation="gpt2fast"`.

transformers calls two functions: one makes the masks of a step, the other attends in each layer.
Masks are SDPA's, (B, 1, T, S) bool. Where one says no more than "causal, without these keys" or
"all but these keys", a note beside it says so to the kernels. A mask that was changed on the way is
another tensor, without a note, and SDPA takes it as it is; so does it take whatever the kernels do
not.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from .. import ops
from ..ops.native import DTYPES
from ..ops.support import GPU_DTYPES, MAX_HEAD_SIZE

NAME = "gpt2fast"
"""The value of `attn_implementation`."""

_NOTE = "_gpt2fast_seen"
_told: set[str] = set()


class Seen(NamedTuple):
    """What a mask says: the keys that a query sees, but for those that are hidden."""

    offset: int = 0
    """Keys before the first query: query t sees the keys 0 .. offset + t."""
    keys: Tensor | None = None
    """(B, S) bool, false at hidden keys; None hides none."""
    version: int = 0
    """The mask's count of changes when this was noted."""
    causal: bool = True
    """False: every query sees all keys, and the offset is 0."""


def register() -> None:
    """Make `attn_implementation="gpt2fast"` known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask of a step, as transformers' `sdpa_mask` makes it, with a note of what it says.

    Args:
        batch_size: B.
        q_length: T, the number of new positions.
        kv_length: S, the number of keys, those of a static cache that are not filled yet included.
        q_offset: the keys before the first new position.
        kv_offset: the keys that a sliding cache has dropped.
        mask_function: what is visible.
        attention_mask: (B, S) bool, false at padding.
        options: as of `sdpa_mask`.

    Returns:
        (B, 1, T, S) bool; None if SDPA needs none.
    """
    given: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length,
        "q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function,
        "attention_mask": attention_mask, **options,
    }  # fmt: skip
    config: Any = type(options.get("config"))
    if _attends_itself(config):
        _tell("its modules know no other", "the model")
        return eager_mask(**given)
    with torch.inference_mode(False):  # so that torch counts the mask's changes
        mask = sdpa_mask(**given)
    if mask is None or kv_offset or _is_traced(mask):
        return mask
    if mask_function is bidirectional_mask_function:
        keys = _keys(attention_mask, kv_length)
        setattr(mask, _NOTE, Seen(0, keys, mask._version, causal=False))
        return mask
    if mask_function is not causal_mask_function:
        return mask
    if isinstance(q_offset, Tensor):
        if q_offset.device.type != "cpu":  # reading it would be a wait
            return mask
        q_offset = int(q_offset)
    keys = _keys(attention_mask, q_offset + q_length)
    setattr(mask, _NOTE, Seen(q_offset, keys, mask._version))
    return mask


def _keys(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The first `length` keys, false at padding and where no mask says anything; None: all seen."""
    if attention_mask is None:
        return None
    keys = attention_mask.bool()
    keys = F.pad(keys, (0, max(0, length - keys.shape[1])))[:, :length]
    return None if bool(keys.all()) else keys


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a layer, as transformers calls it.

    Args:
        module: the layer.
        query: (B, heads, T, D).
        key, value: (B, key heads, S, D); each serves as many heads of the query as one another.
        attention_mask: (B, 1, T, S), true or 0 where a key is seen; None: all that `is_causal` lets
            be seen.
        dropout: probability of dropping a weight.
        scaling: factor on the scores; None means 1 / sqrt(D).
        is_causal: hide later keys where there is no mask; None means the layer's own `is_causal`.
        options: `softcap` and `s_aux` (a score of each head that takes part in the softmax alone);
            what else a model may give.

    Returns:
        (B, T, heads, D), and the weights, which are None.
    """
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if softcap is not None or sinks is not None:
        _tell("its scores are capped" if sinks is None else "its softmax has sinks", "torch")
        mask = _explicit_mask(query, key, attention_mask, is_causal)
        return _attend_explicitly(query, key, value, mask, dropout, scaling, softcap, sinks), None
    seen = _visible(query, key, attention_mask, is_causal)
    if query.shape[2] == 1 and query.device.type == "cpu":
        # A step of one token reads keys head by head, which SDPA does faster than an op is called.
        if isinstance(seen, Seen) and seen.causal and options.get("position_bias") is None:
            last = seen.offset + 1
            key, value = key[:, :, :last], value[:, :, :last]
            attention_mask = None if seen.keys is None else attention_mask[..., :last]  # type: ignore[index]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    reason = seen if isinstance(seen, str) else _refusal(query, key, value, seen, dropout, options)
    if isinstance(seen, str) or reason is not None:
        _tell(str(reason), "SDPA")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    last = seen.offset + query.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key[:, :, :last], value[:, :, :last]))
    if seen.offset:
        lengths = torch.full((len(q),), seen.offset, dtype=torch.int64, device=q.device)
        return ops.attention_with_cache(q, k, v, lengths, scaling), None
    seed = torch.randint(1 << 62, (1,), device=q.device) if dropout else None
    return ops.attention(q, k, v, scaling, seen.keys, dropout, seed, seen.causal), None


def _visible(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Seen | str:
    """What the queries see; or why the kernels cannot be told."""
    length, keys = query.shape[2], key.shape[2]
    if mask is None:
        return Seen(keys - 1) if length == 1 else Seen(causal=is_causal)
    note = None if _is_traced(mask) else getattr(mask, _NOTE, None)
    if not isinstance(note, Seen) or note.version != mask._version:
        return "its mask is not just causal or padding, or it is traced"
    if mask.shape[2] != length or mask.shape[3] != keys:
        return "its mask is not that of these keys"
    return note


def _refusal(
    query: Tensor, key: Tensor, value: Tensor, seen: Seen, dropout: float, options: dict[str, Any]
) -> str | None:
    """Why the kernels cannot run this; None if they can."""
    if torch.jit.is_tracing():
        return "it is traced"
    if seen.offset and not _is_traced() and _has_tangent(query, key, value):
        return "its derivative is taken forward, with a cache"
    if options.get("position_bias") is not None:
        return "its scores have a bias"
    if options.get("cache") is not None:
        return "its cache is paged"
    if not query.dtype == key.dtype == value.dtype or key.shape != value.shape:
        return "keys and values differ in dtype or shape"
    if len(query) != len(key) or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        return "queries and keys differ in their batch or head size"
    reason = why_not_on(query, query.shape[3])
    if reason is not None:
        return reason
    if seen.offset + query.shape[2] > key.shape[2]:
        return "it has fewer keys than positions"
    if not seen.causal and query.shape[2] != key.shape[2]:
        return "its keys are those of another sequence"
    if not seen.offset:
        return None
    if seen.keys is not None:
        return "there is padding beside its cache"
    if query.shape[1] != key.shape[1]:
        return "several heads share the keys of its cache"
    if dropout or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))):
        return "it trains with a cache"
    return None


def why_not_on(x: Tensor, head_size: int) -> str | None:
    """Why there are no kernels for x's device and dtype; None if there are."""
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return f"it is on the device {device}"
    if x.dtype not in (DTYPES if device == "cpu" else GPU_DTYPES):
        return f"it computes in {str(x.dtype).removeprefix('torch.')}"
    if device == "cuda" and head_size > MAX_HEAD_SIZE:
        return f"its heads have size {head_size}, above {MAX_HEAD_SIZE}"
    return None


def _explicit_mask(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """The mask (B or 1, 1, T, S) that SDPA would take, causality included."""
    length, keys = query.shape[2], key.shape[2]
    if mask is not None or length == 1 or not is_causal:
        return mask
    return torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()[None, None]


def _attend_explicitly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention (B, T, heads, D) in torch's operations, its weights in at least float32.

    scores = softcap * tanh(scores / softcap)                      (Gemma 2, section 2)
    weights = exp(scores) / (exp(sink) + sum of exp(scores))       (Xiao et al., 2023, section 3.1)
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = query.to(dtype) @ key.to(dtype).transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        # Not -inf: the softmax of a row that sees nothing would be NaN.
        least = torch.finfo(dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.to(dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    out = F.dropout(weights, dropout) @ value
    return out.transpose(1, 2).contiguous()


@cache
def _attends_itself(config: type) -> bool:
    """True if a model of this configuration adds masks to scores by itself, whatever is chosen."""
    name = config.__module__.replace(".configuration_", ".modeling_")
    knows = "_can_set_attn_implementation"
    return any(
        isinstance(kind, type)
        and issubclass(kind, PreTrainedModel)
        and kind.__module__ == name
        and not getattr(kind, knows, lambda: True)()
        for kind in vars(sys.modules.get(name, torch)).values()
    )


def _has_tangent(*tensors: Tensor) -> bool:
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(unpack(x).tangent is not None for x in tensors)


def _is_traced(*tensors: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or any(isinstance(x, FakeTensor) for x in tensors)
    )


def _tell(reason: str, runs: str) -> None:
    """Say once why something does not run on the kernels."""
    if reason in _told or _is_traced():
        return
    _told.add(reason)
    warnings.warn(
        f'attn_implementation="{NAME}": {runs} runs this attention, since {reason}', stacklevel=2
    )
