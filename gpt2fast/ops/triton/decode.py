"""One GPT-2 step for a token a row in Triton: six launches a layer, no token visits the host.

    x = wte[token] + wpe[position]                                               embed_kernel
    q, k, v = layer_norm(x) W + b, k and v straight into the caches              qkv_kernel
    attended = attention of q to the caches                                cached_attention.py (2)
    x += attended W + b                                                          add_kernel
    inner = activation(layer_norm(x) W + b)                                      project_kernel
    x += inner W + b                                                             add_kernel
    logits = layer_norm(x) projection^T                                          project_kernel

Floor: every weight is read once, 2 bytes a weight in bfloat16, and so is the used part of the
caches. Each program reads its columns of a matrix for all rows of the batch up to BLOCK_B; it
normalizes x itself, a few kB that all programs find in the L2, which costs less than one more
launch. x stays in float32 between the layers. One row is multiplied without tensor cores: a block
of products is summed over the inputs once, at the end.

An int8 cache takes its entries from one launch more: a factor needs all elements of a head.

Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import OPS, Arguments
from .cache import append
from .cached_attention import with_cache
from .language import cast, dot
from .tuning import settings


@triton.jit
def embed_kernel(
    x, wte, wpe, tokens, positions, wte_stride, wpe_stride, tokens_stride, positions_stride,
    vocab_size, n_positions, width, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + b * tokens_stride)
    position = tl.load(positions + b * positions_stride)
    known = (token >= 0) & (token < vocab_size) & (position >= 0) & (position < n_positions)
    inside = (column < width) & known
    first = tl.load(wte + token * wte_stride + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(wpe + position * wpe_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + b * width + column, first + second, mask=column < width)


@triton.jit
def _statistics(x, row, batch, width, eps, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and reciprocal standard deviation of rows of x, each in a pass of its own."""
    sum = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (row < batch)[:, None] & (k < width)[None, :]
        values = tl.load(x + row[:, None] * width + k[None, :], mask=inside, other=0.0)
        sum += tl.sum(values, 1)
    mean = sum / width
    squares = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (row < batch)[:, None] & (k < width)[None, :]
        values = tl.load(x + row[:, None] * width + k[None, :], mask=inside, other=0.0)
        centered = tl.where(inside, values - mean[:, None], 0.0)
        squares += tl.sum(centered * centered, 1)
    return mean, tl.rsqrt(squares / width + eps)


@triton.jit
def _product(
    x, weight, bias, norm_weight, norm_bias, eps, row, column, batch, inputs, outputs,
    weight_stride_k, weight_stride_n,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_N): rows of x, normalized where a norm is given, times columns of weight."""
    if norm_weight is not None:
        mean, rstd = _statistics(x, row, batch, inputs, eps, BLOCK_B, BLOCK_K)
    if BLOCK_B == 1:
        sum = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    else:
        sum = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (row < batch)[:, None] & (k < inputs)[None, :]
        values = tl.load(x + row[:, None] * inputs + k[None, :], mask=inside, other=0.0)
        values = values.to(tl.float32)
        if norm_weight is not None:
            gain = tl.load(norm_weight + k, mask=k < inputs, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias + k, mask=k < inputs, other=0.0).to(tl.float32)
            values = (values - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
        at = weight + k.to(tl.int64)[:, None] * weight_stride_k
        at += column.to(tl.int64)[None, :] * weight_stride_n
        inside = (k < inputs)[:, None] & (column < outputs)[None, :]
        block = tl.load(at, mask=inside, other=0.0)
        if BLOCK_B == 1:
            sum += tl.reshape(values, (BLOCK_K, 1)) * block.to(tl.float32)
        else:
            sum = dot(cast(values, block.dtype), block, sum)
    if BLOCK_B == 1:
        sum = tl.sum(sum, 0)[None, :]
    if bias is not None:
        sum += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    return sum


@triton.jit
def qkv_kernel(
    x, weight, bias, norm_weight, norm_bias, eps, q, k_cache, v_cache, lengths,
    weight_stride_k, weight_stride_n, k_stride_b, k_stride_t, k_stride_h, k_stride_d,
    v_stride_b, v_stride_t, v_stride_h, v_stride_d, lengths_stride, batch, width, entries,
    HEAD_DIM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    found = _product(
        x, weight, bias, norm_weight, norm_bias, eps, row, column, batch, width, 3 * width,
        weight_stride_k, weight_stride_n, BLOCK_B, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    part = column // width
    h, d = column % width // HEAD_DIM, column % HEAD_DIM
    inside = (row < batch)[:, None]
    at = q + row[:, None] * width + column[None, :]
    tl.store(at, cast(found, q.dtype.element_ty), mask=inside & (part == 0)[None, :])
    place = tl.load(lengths + row * lengths_stride, mask=row < batch, other=-1)
    inside = inside & ((place >= 0) & (place < entries))[:, None]
    at = k_cache + (row * k_stride_b + place * k_stride_t)[:, None]
    at += (h * k_stride_h + d * k_stride_d)[None, :]
    tl.store(at, cast(found, k_cache.dtype.element_ty), mask=inside & (part == 1)[None, :])
    at = v_cache + (row * v_stride_b + place * v_stride_t)[:, None]
    at += (h * v_stride_h + d * v_stride_d)[None, :]
    tl.store(at, cast(found, v_cache.dtype.element_ty), mask=inside & (part == 2)[None, :])


@triton.jit
def add_kernel(
    x, given, weight, bias, weight_stride_k, weight_stride_n, batch, inputs, outputs,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x += given @ weight + bias; no other program touches these columns of x."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    found = _product(
        given, weight, bias, None, None, 0.0, row, column, batch, inputs, outputs,
        weight_stride_k, weight_stride_n, BLOCK_B, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    at = x + row[:, None] * outputs + column[None, :]
    inside = (row < batch)[:, None] & (column < outputs)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + found, mask=inside)


@triton.jit
def project_kernel(
    x, weight, bias, norm_weight, norm_bias, eps, out, weight_stride_k, weight_stride_n,
    batch, inputs, outputs,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = activation(layer_norm(x) @ weight + bias)"""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    found = _product(
        x, weight, bias, norm_weight, norm_bias, eps, row, column, batch, inputs, outputs,
        weight_stride_k, weight_stride_n, BLOCK_B, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    found = _activate(found, ACTIVATION)
    at = out + row[:, None] * outputs + column[None, :]
    inside = (row < batch)[:, None] & (column < outputs)[None, :]
    tl.store(at, cast(found, out.dtype.element_ty), mask=inside)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_new":  # (1 + tanh(u)) / 2 is the logistic function of 2u
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "tanh":
        square = x * x
        series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315)))
        far = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0  # loses digits near 0
        return tl.where(square < 0.01, x * series, far)
    else:
        tl.static_assert(ACTIVATION == "none")
        return x


def decode_step(call: Arguments) -> Tensor:
    tokens, positions, lengths, n_head = call.tokens, call.positions, call.lengths, call.n_head
    scales = call.attention_scales
    weights = [weight.contiguous() if weight.dim() == 1 else weight for weight in call.weights]
    wte, wpe, *layers, ln_f_weight, ln_f_bias, projection = weights
    wte, wpe = (table if table.stride(1) == 1 else table.contiguous() for table in (wte, wpe))
    batch, width, entries = len(tokens), wte.shape[1], call.k_cache.shape[2]
    x = wte.new_empty((batch, width), dtype=torch.float32)
    q = wte.new_empty((batch, 1, n_head, width // n_head))
    launch = settings("decode_embed", x.device)
    embed_kernel[(batch, triton.cdiv(width, launch["BLOCK"]))](
        x, wte, wpe, tokens, positions, wte.stride(0), wpe.stride(0),
        tokens.stride(0), positions.stride(0), len(wte), len(wpe), width, **launch,
    )  # fmt: skip

    def plan(outputs: int) -> tuple[dict[str, int], tuple[int, int]]:
        launch = settings(
            "decode_matmul",
            x.device,
            element_size=wte.element_size(),
            batch=batch,
            outputs=outputs,
        )
        programs = triton.cdiv(outputs, launch["BLOCK_N"]), triton.cdiv(batch, launch["BLOCK_B"])
        return launch, programs

    def add(given: Tensor, weight: Tensor, bias: Tensor) -> None:
        launch, programs = plan(width)
        add_kernel[programs](
            x, given, weight, bias, *weight.stride(), batch, len(weight), width, **launch
        )

    def project(
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        name: str,
        dtype: torch.dtype = wte.dtype,
    ) -> Tensor:
        inputs, outputs = weight.shape
        out = weight.new_empty((batch, outputs), dtype=dtype)
        launch, programs = plan(outputs)
        project_kernel[programs](
            x, weight, bias, norm_weight, norm_bias, call.eps, out, *weight.stride(),
            batch, inputs, outputs, ACTIVATION=name, **launch,
        )  # fmt: skip
        return out

    vectors = len(layers) // len(scales) if scales else 0
    for layer, scale in enumerate(scales):
        ln_1_w, ln_1_b, qkv_w, qkv_b, out_w, out_b, ln_2_w, ln_2_b, fc_w, fc_b, proj_w, proj_b = (
            layers[layer * vectors : (layer + 1) * vectors]
        )
        keys, values = call.k_cache[layer], call.v_cache[layer]
        factors: tuple[Tensor, ...] = ()
        if call.k_scales is not None:
            factors = call.k_scales[layer], call.v_scales[layer]
            qkv = project(qkv_w, qkv_b, ln_1_w, ln_1_b, "none", torch.float32)
            q, new_keys, new_values = qkv.view(batch, 1, 3, n_head, -1).unbind(2)
            bound = OPS["append_to_cache"].bind
            append(bound(new_keys, new_values, keys, values, lengths, None, *factors))
        else:
            launch, programs = plan(3 * width)
            qkv_kernel[programs](
                x, qkv_w, qkv_b, ln_1_w, ln_1_b, call.eps, q, keys, values, lengths,
                *qkv_w.stride(), *keys.stride(), *values.stride(), lengths.stride(0),
                batch, width, entries, HEAD_DIM=width // n_head, **launch,
            )  # fmt: skip
        attention = OPS["attention_with_cache"].bind(q, keys, values, lengths, scale, *factors)
        add(with_cache(attention), out_w, out_b)
        add(project(fc_w, fc_b, ln_2_w, ln_2_b, call.activation), proj_w, proj_b)
    return project(projection.t(), None, ln_f_weight, ln_f_bias, "none")
