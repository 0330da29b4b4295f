"""One whole GPT-2 step: tokens in, the next tokens' logits out (Radford et al., 2019).

A step is stateless: it takes the weights and writes into caches that the caller owns. There are
three forms. `packed_step` takes packed weights and any number of new tokens a row; its native
implementation is one call from token ids to logits. `packed_next` takes one token a row and chooses
the next one as well: what a loop of generation calls. `decode_step` takes the weights as a list and
one token a row, and is made of the other ops.
`BLOCK_PARAMETERS` names what each layer contributes, in order; the list is

    wte, wpe, *(BLOCK_PARAMETERS of layer 0), ..., ln_f.weight, ln_f.bias, output projection
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import BLOCK_PARAMETERS, block_shapes
from ..errors import ArgumentError
from ..sampling import SCHEMA, processor_arguments
from .activations import ACTIVATIONS
from .attention import attention_with_cache
from .backend import Arguments, Implementation, Op
from .cache import append_to_cache
from .cuda import by_device
from .cuda import decode as on_cuda
from .embedding import embedding
from .int8_cache import check_caches, check_scales, dequantize, stored
from .layer_norm import residual_layer_norm
from .mlp import bias_gelu
from .native import CACHE_DTYPES, native
from .packed import Matrix, PackedWeights, QuantizedMatrix
from .requirements import (
    check_at_least,
    check_dim,
    check_finite,
    check_floating,
    check_indices,
    check_integers,
    check_room,
    check_shape,
)
from .sampling import (
    check_choice,
    check_choice_values,
    choice,
    names_processors,
    refuses_uniform,
    sample_reference,
)
from .support import GPU_CACHE_DTYPES, MAX_HEAD_SIZE, Tensors
from .triton import triton


def decode_step(
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    n_head: int,
    attention_scales: Sequence[float],
    activation: str,
    eps: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Logits of the token after `tokens`, whose keys and values are stored in the caches.

    Args:
        weights: as listed in this module's docstring; projections are (in, out).
        k_cache, v_cache: (L, B, T_max, H, D), written in place at entry lengths[b] of row b.
        tokens: (B,) int64.
        positions: (B,) int64, each token's position.
        lengths: (B,) int64, entries stored before; not changed.
        n_head: H.
        attention_scales: factor on the attention scores of each layer.
        activation: a key of `ACTIVATIONS`.
        eps: epsilon of the layer normalizations.
        k_scales, v_scales: (L, B, T_max, H) float32 factors of int8 caches, written in place.

    Returns:
        (B, V) logits. Not differentiable.

    Raises:
        ArgumentError: an int8 cache without factors, or factors that don't fit.
    """
    return _decode.call(
        list(weights), k_cache, v_cache, tokens, positions, lengths,
        n_head, list(attention_scales), activation, eps, k_scales, v_scales,
    )  # fmt: skip


def _check(call: Arguments) -> None:
    weights, scales, tokens, n_head = call.weights, call.attention_scales, call.tokens, call.n_head
    if len(weights) != 5 + len(scales) * len(BLOCK_PARAMETERS):
        raise ArgumentError(
            f"{len(weights)} weights do not fit {len(scales)} attention_scales, one a layer: it "
            f"takes {5 + len(scales) * len(BLOCK_PARAMETERS)}"
        )
    check_integers(tokens=tokens, positions=call.positions, lengths=call.lengths)
    check_dim("tokens", tokens, 1, says="(B,)")
    batch = len(tokens)
    check_shape("positions", call.positions, batch, says="(B,)")
    check_shape("lengths", call.lengths, batch, says="(B,)")
    check_caches(call, 5, "(L, B, T_max, H, D)")
    wte = weights[0]
    check_dim("wte", wte, 2, says="(V, C)")
    width = wte.shape[1]
    if n_head < 1 or width % n_head:
        raise ArgumentError(f"n_head={n_head} does not divide the width {width}")
    check_shape(
        "k_cache", call.k_cache, len(scales), batch, call.k_cache.shape[2], n_head, width // n_head,
        says="(L, B, T_max, H, D)",
    )  # fmt: skip
    check_scales(call)
    inner = weights[2 + BLOCK_PARAMETERS.index("mlp.c_fc.weight")].shape[-1] if scales else 0
    shapes = block_shapes(width, inner)
    for index, weight in enumerate(weights[2:-3]):
        layer, place = divmod(index, len(BLOCK_PARAMETERS))
        name = BLOCK_PARAMETERS[place]
        check_shape(f"h.{layer}.{name}", weight, *shapes[name], says="it")
    _, wpe, *_, ln_f_weight, ln_f_bias, projection = weights
    for name, table in (("wpe", wpe), ("the output projection", projection)):
        check_shape(name, table, *table.shape[:1], width, says="as wide as wte")
    check_shape("ln_f.weight", ln_f_weight, width, says="(C,)")
    check_shape("ln_f.bias", ln_f_bias, width, says="(C,)")
    for weight in weights:
        check_floating(weights=weight)
    for scale in scales:
        check_finite(attention_scales=scale)
    check_at_least(0, eps=call.eps)
    if call.activation not in ACTIVATIONS:
        raise ArgumentError(f"activation={call.activation!r} is none of {', '.join(ACTIVATIONS)}")


def _check_values(call: Arguments) -> None:
    wte, wpe, *_ = call.weights
    check_indices("tokens", call.tokens, 0, len(wte) - 1, of="the rows of wte")
    check_indices("positions", call.positions, 0, len(wpe) - 1, of="the rows of wpe")
    check_room(call.lengths, None, 1, call.k_cache.shape[2])


def _reference(
    weights: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    n_head: int,
    attention_scales: list[float],
    activation: str,
    eps: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    wte, wpe, *layers, ln_f_weight, ln_f_bias, projection = weights
    x = embedding(tokens[:, None], positions[:, None], wte, wpe)
    batch, _, width = x.shape
    residual = None
    size = len(BLOCK_PARAMETERS)
    for layer, scale in enumerate(attention_scales):
        ln_1_w, ln_1_b, qkv_w, qkv_b, out_w, out_b, ln_2_w, ln_2_b, fc_w, fc_b, proj_w, proj_b = (
            layers[layer * size : (layer + 1) * size]
        )
        normed, residual = residual_layer_norm(x, residual, ln_1_w, ln_1_b, eps)
        qkv = torch.addmm(qkv_b, normed[:, 0], qkv_w)
        q, k, v = qkv.view(batch, 1, 3, n_head, width // n_head).unbind(2)
        caches = k_cache[layer], v_cache[layer]
        factors = [None if x is None else x[layer] for x in (k_scales, v_scales)]
        append_to_cache(k, v, *caches, lengths, None, *factors)
        attended = attention_with_cache(q, *caches, lengths, scale, *factors)
        x = torch.addmm(out_b, attended.view(batch, width), out_w)[:, None]
        normed, residual = residual_layer_norm(x, residual, ln_2_w, ln_2_b, eps)
        if activation == "gelu_new":
            inner = bias_gelu(normed[:, 0] @ fc_w, fc_b)
        else:
            inner = ACTIVATIONS[activation](torch.addmm(fc_b, normed[:, 0], fc_w))
        x = torch.addmm(proj_b, inner, proj_w)[:, None]
    normed, _ = residual_layer_norm(x, residual, ln_f_weight, ln_f_bias, eps)
    return normed[:, 0] @ projection.t()


_decode = Op(
    "decode_step",
    "(Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor tokens, Tensor positions, "
    "Tensor lengths, int n_head, float[] attention_scales, str activation, float eps, "
    "Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> Tensor",
    check=_check,
    values=_check_values,
    native=by_device(
        cpu=Implementation(
            lambda call: _reference(*call), lambda call: "the CPU's kernels take packed weights"
        ),
        cuda=on_cuda.run,
    ),
    triton=triton(
        "decode",
        "decode_step",
        Tensors("weights", one_dtype=True),
        Tensors(
            "k_cache", "v_cache",
            dtypes=GPU_CACHE_DTYPES, contiguous_rows=True, max_head_size=MAX_HEAD_SIZE,
        ),
        Tensors("tokens", "positions", "lengths", "k_scales", "v_scales"),
    ),
    reference=_reference,
)  # fmt: skip


_decode.refuse_gradient("its caches serve generation; train with the ops that it is made of")


@_decode.register_fake
def _(call: Arguments) -> Tensor:
    projection = call.weights[-1]
    return projection.new_empty((len(call.tokens), len(projection)))


def packed_step(
    weights: PackedWeights,
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: Tensor,
    lengths: Tensor,
    outputs: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    pages: Tensor | None = None,
    singly: Tensor | None = None,
) -> Tensor:
    """Logits after some of the new tokens of S sequences, all of which enter the caches.

    The sequences may differ in everything: one brings a prompt of 500 tokens, the others one token
    each. All integers are int64.

    With `pages` (Kwon et al., 2023) the caches are pools: B pages of T_max entries each, from which
    any sequence is put together, and sequences that begin alike can share the pages of what they
    have in common. A page that a step writes belongs to one sequence in that step.

    The native kernels' logits after a token depend on its own text alone, bit for bit: not on the
    sequences beside it, on threads, rows or pages, nor on how its text was cut into steps, as long
    as each token is read in the same one of the two ways that `singly` names. Processors with AMX
    are the exception: tiles, which round otherwise, take over products of several tokens with
    bfloat16 weights, and blocks of bfloat16 and int8 entries.

    Args:
        weights: packed.
        k_cache, v_cache: (L, B, T_max, H, D) float32, bfloat16 or int8, the last two dimensions
            contiguous; written in place. With `pages`, T_max is a multiple of 16.
        tokens: (N,) token ids, sequence after sequence.
        positions: (N,) each token's position.
        starts: (S + 1,) where each sequence begins in `tokens`; the last one is N.
        rows: (S,) the caches' row of each sequence, all different; ignored with `pages`.
        lengths: (S,) entries stored of each sequence before; not changed.
        outputs: (P,) indices into `tokens`: logits are returned after these tokens.
        k_scales, v_scales: (L, B, T_max, H) float32 factors of int8 caches, written in place.
        pages: (S, M): entry t of sequence s is entry t % T_max of the caches' row
            pages[s, t // T_max]; what lies behind a sequence's last page is -1 or any page.
        singly: (S,) bool: True has each of a sequence's tokens attend by itself, in the way of
            steps with one token; False has them attend in blocks. None: blocks where a sequence
            has several tokens.

    Returns:
        (P, V) float32. Not differentiable.

    Raises:
        ArgumentError: sizes or indices that don't fit, a sequence without a page or an entry for
            its tokens, or a page that is written and belongs to two sequences.
    """
    return _packed.call(
        weights.arena, k_cache, v_cache, k_scales, v_scales,
        tokens, positions, starts, rows, lengths, outputs, weights.shape.vocab_size, pages, singly,
    )  # fmt: skip


PAGE_STEP = 16
"""The sizes of pages are multiples of it: kernels read as many keys at a time, of one page."""


def _check_packed(call: Arguments) -> None:
    tokens, rows = call.tokens, call.rows
    check_caches(call, 5, "(L, B, T_max, H, D)")
    check_scales(call)
    check_integers(tokens=tokens, positions=call.positions, starts=call.starts)
    check_integers(rows=rows, lengths=call.lengths, outputs=call.outputs)
    for name in ("tokens", "rows", "outputs"):
        check_dim(name, getattr(call, name), 1, says="a vector")
    check_shape("positions", call.positions, len(tokens), says="(N,)")
    check_shape("starts", call.starts, len(rows) + 1, says="(S + 1,)")
    check_shape("lengths", call.lengths, len(rows), says="(S,)")
    if call.pages is not None:
        check_integers(pages=call.pages)
        check_dim("pages", call.pages, 2, says="(S, M)")
        check_shape("pages", call.pages, len(rows), call.pages.shape[1], says="(S, M)")
        size = call.k_cache.shape[2]
        if size % PAGE_STEP or not size:
            raise ArgumentError(
                f"pages have {size} entries (k_cache is {tuple(call.k_cache.shape)}); their size "
                f"must be a multiple of {PAGE_STEP}"
            )
    if call.singly is not None:
        if call.singly.dtype != torch.bool:
            raise ArgumentError(f"singly must be bool, not {call.singly.dtype}")
        check_shape("singly", call.singly, len(rows), says="(S,)")


def _check_packed_values(call: Arguments) -> None:
    shape = PackedWeights.from_arena(call.arena).shape
    tokens, starts, rows, lengths = call.tokens, call.starts, call.rows, call.lengths
    _, batch, entries, *_ = call.k_cache.shape
    check_shape(
        "k_cache", call.k_cache, len(shape.scales), batch, entries, shape.n_head,
        shape.width // shape.n_head, says="(L, B, T_max, H, D)",
    )  # fmt: skip
    if call.vocab_size != shape.vocab_size:
        raise ArgumentError(
            f"vocab_size={call.vocab_size}, and the weights have {shape.vocab_size}"
        )
    check_indices("starts", starts, 0, len(tokens))
    paged = call.pages is not None
    if paged:
        check_indices("pages", call.pages, -1, batch - 1, of="the pages of the caches")
        entries *= call.pages.shape[1]
    else:
        check_indices("rows", rows, 0, batch - 1)
    check_indices("lengths", lengths, 0, entries - 1)
    check_indices("tokens", tokens, 0, shape.vocab_size - 1)
    check_indices("positions", call.positions, 0, shape.n_positions - 1)
    check_indices("outputs", call.outputs, 0, len(tokens) - 1)
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds[-1] != len(tokens):
        raise ArgumentError(f"starts must lead from 0 to {len(tokens)}")
    taken = set()
    for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        count = bounds[i + 1] - bounds[i]
        if count <= 0:
            raise ArgumentError(f"starts must rise: sequence {i} has {count} tokens")
        if length + count > entries:
            holder = f"sequence {i}" if paged else f"row {row}"
            raise ArgumentError(
                f"{holder} holds {length} of at most {entries} entries; {count} more do not fit"
            )
        if paged:
            continue
        if row in taken:
            raise ArgumentError(f"row {row} is there twice")
        taken.add(row)
    if paged:
        _check_pages(call.pages.tolist(), lengths.tolist(), bounds, call.k_cache.shape[2])


def _check_pages(
    pages: list[list[int]], lengths: list[int], bounds: list[int], page_size: int
) -> None:
    """Check that sequences have their pages, and those that they write for themselves."""
    holders: dict[int, int] = {}  # of each page in use, how often it is there
    for i, (table, length) in enumerate(zip(pages, lengths, strict=True)):
        end = length + bounds[i + 1] - bounds[i]
        for index, page in enumerate(table[: -(-end // page_size)]):
            if page < 0:
                raise ArgumentError(
                    f"pages[{i}, {index}] = {page}, and sequence {i} needs that page for its "
                    f"{end} entries"
                )
            holders[page] = holders.get(page, 0) + 1
    for i, (table, length) in enumerate(zip(pages, lengths, strict=True)):
        end = length + bounds[i + 1] - bounds[i]
        for page in table[length // page_size : -(-end // page_size)]:
            if holders[page] > 1:
                raise ArgumentError(
                    f"sequence {i} writes to page {page}, which is in use at another place, too: "
                    "a page that is written belongs to one sequence; copy it first"
                )


def _place(
    pages: Tensor | None, page_size: int, sequence: int, row: int, begin: int, end: int
) -> tuple[Any, ...]:
    """The index of entries [begin, end) of a sequence in a layer of the caches."""
    if pages is None:
        return row, slice(begin, end)
    entries = torch.arange(begin, end, device=pages.device)
    return pages[sequence, entries // page_size], entries % page_size


def _packed_reference(
    arena: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    tokens: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: Tensor,
    lengths: Tensor,
    outputs: Tensor,
    vocab_size: int,
    pages: Tensor | None = None,
    singly: Tensor | None = None,
) -> Tensor:
    weights = PackedWeights.from_arena(arena)
    shape = weights.shape

    def matrix(name: str) -> Tensor:
        return _as_float(weights.get(name))

    wte = matrix("wte.weight").t()
    x = embedding(tokens[None], positions[None], wte, matrix("wpe.weight"))
    residual = None
    bounds = starts.tolist()
    for layer, scale in enumerate(shape.scales):
        block = f"h.{layer}."
        normed, residual = residual_layer_norm(
            x, residual, matrix(f"{block}ln_1.weight"), matrix(f"{block}ln_1.bias"), shape.eps
        )
        qkv = torch.addmm(
            matrix(f"{block}attn.c_attn.bias"), normed[0], matrix(f"{block}attn.c_attn.weight")
        )
        q, k, v = qkv.view(1, len(tokens), 3, shape.n_head, shape.width // shape.n_head).unbind(2)
        attended = torch.empty_like(q)
        for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            begin, end = bounds[i], bounds[i + 1]
            entries = length + end - begin
            added = _place(pages, k_cache.shape[2], i, row, length, entries)
            used = _place(pages, k_cache.shape[2], i, row, 0, entries)
            caches = []
            for new, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
                if scales is None:
                    cache[layer][added] = new[0, begin:end].to(cache.dtype)
                    factors = None
                else:
                    cache[layer][added], scales[layer][added] = stored(new[0, begin:end])
                    factors = scales[layer][used][None]
                caches.append(dequantize(cache[layer][used][None], factors, torch.float32))
            at = lengths.new_full((1,), length)
            attended[:, begin:end] = attention_with_cache(
                q[:, begin:end], caches[0], caches[1], at, scale
            )
        x = torch.addmm(
            matrix(f"{block}attn.c_proj.bias"),
            attended.view(len(tokens), shape.width),
            matrix(f"{block}attn.c_proj.weight"),
        )[None]
        normed, residual = residual_layer_norm(
            x, residual, matrix(f"{block}ln_2.weight"), matrix(f"{block}ln_2.bias"), shape.eps
        )
        inner = torch.addmm(
            matrix(f"{block}mlp.c_fc.bias"), normed[0], matrix(f"{block}mlp.c_fc.weight")
        )
        x = torch.addmm(
            matrix(f"{block}mlp.c_proj.bias"),
            ACTIVATIONS[shape.activation](inner),
            matrix(f"{block}mlp.c_proj.weight"),
        )[None]
    normed, _ = residual_layer_norm(
        x, residual, matrix("ln_f.weight"), matrix("ln_f.bias"), shape.eps
    )
    projection = wte.t() if shape.tied else matrix("lm_head.weight")
    return normed[0, outputs] @ projection


def _as_float(matrix: Matrix) -> Tensor:
    return matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix.float()


def _packed_refuses(call: Arguments) -> str | None:
    cache = call.k_cache
    if cache.dtype not in CACHE_DTYPES:
        return f"the native step's cache is float32, bfloat16 or int8, not {cache.dtype}"
    if cache.dtype == torch.bfloat16 and cache.shape[-1] % 2:
        return f"bfloat16 entries are read in pairs, and the heads have size {cache.shape[-1]}"
    return None


@native(refuses=_packed_refuses, checks=True)
def _packed_native(call: Arguments) -> Tensor:
    return torch.ops.gpt2fast_native.packed_step(
        call.arena, call.k_cache, call.v_cache, call.k_scales, call.v_scales,
        call.tokens.contiguous(), call.positions.contiguous(), call.starts.contiguous(),
        call.rows.contiguous(), call.lengths.contiguous(), call.outputs.contiguous(),
        None if call.pages is None else call.pages.contiguous(),
        None if call.singly is None else call.singly.contiguous(),
    )  # fmt: skip


_packed = Op(
    "packed_step",
    "(Tensor arena, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scales, "
    "Tensor(d!)? v_scales, Tensor tokens, Tensor positions, Tensor starts, Tensor rows, "
    "Tensor lengths, Tensor outputs, int vocab_size, Tensor? pages=None, Tensor? singly=None) "
    "-> Tensor",
    check=_check_packed,
    values=_check_packed_values,
    native=_packed_native,
    reference=_packed_reference,
)


_packed.refuse_gradient("packed weights serve generation; train the model that was packed")


@_packed.register_fake
def _(call: Arguments) -> Tensor:
    return call.k_cache.new_empty((len(call.outputs), call.vocab_size), dtype=torch.float32)


@names_processors
def packed_next(
    weights: PackedWeights,
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    history: Tensor,
    uniform: Tensor | None = None,
    *,
    token_mask: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    vocab_size: int | None = None,
    **processors: float,
) -> tuple[Tensor, Tensor]:
    """`packed_step` for one token of each row of the caches, then `sample`: in one native call.

    Args:
        weights, k_cache, v_cache, k_scales, v_scales: as for `packed_step`, with B rows.
        tokens, positions, lengths: (B,) int64: each row's token, its position, and the entries
            stored before; not changed.
        history, uniform, token_mask, processors: as for `sample`; the history holds `tokens`
            already, and a row of the mask has ceil(vocab_size / 32) words.
        vocab_size: choose among the token ids below it; None allows all.

    Returns:
        (B, V) float32 logits and (B,) int64 tokens. Not differentiable.
    """
    return _next.call(
        weights.arena, k_cache, v_cache, k_scales, v_scales,
        tokens, positions, lengths, history, uniform, token_mask,
        weights.shape.vocab_size,
        weights.shape.vocab_size if vocab_size is None else vocab_size,
        *processor_arguments(processors),
    )  # fmt: skip


def _check_next(call: Arguments) -> None:
    check_caches(call, 5, "(L, B, T_max, H, D)")
    check_scales(call)
    check_integers(tokens=call.tokens, positions=call.positions, lengths=call.lengths)
    batch = call.k_cache.shape[1]
    for name in ("tokens", "positions", "lengths"):
        check_shape(name, getattr(call, name), batch, says="(B,)")
    if not 0 < call.allowed <= call.vocab_size:
        raise ArgumentError(f"vocab_size={call.allowed} is not in 1 .. {call.vocab_size}")
    check_choice(call, batch, call.allowed)


def _as_packed(call: Arguments) -> Arguments:
    """The call of `packed_step` that a call of `packed_next` begins with: one token a row."""
    each = torch.arange(len(call.tokens) + 1, device=call.tokens.device)
    return _packed.bind(
        call.arena, call.k_cache, call.v_cache, call.k_scales, call.v_scales,
        call.tokens, call.positions, each, each[:-1], call.lengths, each[:-1], call.vocab_size,
    )  # fmt: skip


def _check_next_values(call: Arguments) -> None:
    _check_packed_values(_as_packed(call))
    check_choice_values(call, call.allowed)


def _next_reference(
    arena: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    history: Tensor,
    uniform: Tensor | None,
    token_mask: Tensor | None,
    vocab_size: int,
    allowed: int,
    *choice: Any,
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(tokens) + 1, device=tokens.device)
    logits = _packed_reference(
        arena, k_cache, v_cache, k_scales, v_scales,
        tokens, positions, rows, rows[:-1], lengths, rows[:-1], vocab_size,
    )  # fmt: skip
    return logits, sample_reference(logits[:, :allowed], history, uniform, token_mask, *choice)


@native(refuses=lambda call: refuses_uniform(call) or _packed_refuses(call), checks=True)
def _next_native(call: Arguments) -> tuple[Tensor, Tensor]:
    token_mask = None if call.token_mask is None else call.token_mask.contiguous()
    return torch.ops.gpt2fast_native.packed_next(
        call.arena, call.k_cache, call.v_cache, call.k_scales, call.v_scales,
        call.tokens.contiguous(), call.positions.contiguous(), call.lengths.contiguous(),
        call.history, call.uniform, token_mask, call.allowed, *choice(call),
    )  # fmt: skip


_next = Op(
    "packed_next",
    "(Tensor arena, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scales, "
    "Tensor(d!)? v_scales, Tensor tokens, Tensor positions, Tensor lengths, Tensor history, "
    f"Tensor? uniform, Tensor? token_mask, int vocab_size, int allowed, {SCHEMA}) "
    "-> (Tensor, Tensor)",
    check=_check_next,
    values=_check_next_values,
    native=_next_native,
    reference=_next_reference,
)


_next.refuse_gradient("packed weights serve generation; train the model that was packed")


@_next.register_fake
def _(call: Arguments) -> tuple[Tensor, Tensor]:
    size = len(call.tokens), call.vocab_size
    return call.k_cache.new_empty(size, dtype=torch.float32), torch.empty_like(call.tokens)
