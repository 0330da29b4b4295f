"""A whole-model step alone, GPT-2 124M with random weights, as a share of what memory allows.

The floor is the bytes of weights, keys and values that a step reads at least, over the read
bandwidth measured before each round.
"""

from __future__ import annotations

import pytest
import torch

import machine
from gpt2fast import GPT2, GPT2Config, backend, ops

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")


@pytest.fixture(scope="module", params=FORMATS)
def packed(request):
    torch.manual_seed(0)
    model = GPT2(GPT2Config()).eval()
    if request.param == "float32":
        return model.pack(release=True)
    if request.param in ("bfloat16", "float16"):
        return model.to(getattr(torch, request.param)).pack(release=True)
    return model.quantize(request.param, method="nearest", release=True)


@pytest.mark.parametrize(("rows", "entries"), [(1, 128), (1, 896), (8, 128), (32, 128)])
def test_decoding_step_against_the_floor(against_floor, packed, rows, entries):
    cache = packed.new_cache(rows, entries + 1)
    numbers = torch.arange(rows + 1)
    tokens, lengths = torch.randint(50257, (rows,)), torch.full((rows,), entries)

    def step():
        with backend("native"):
            ops.packed_step(
                packed.weights, cache.k, cache.v, tokens, lengths, numbers, numbers[:-1], lengths,
                numbers[:-1], k_scales=cache.k_scales, v_scales=cache.v_scales,
            )  # fmt: skip

    against_floor(step, packed.weight_bytes + rows * entries * cache.entry_bytes)


@pytest.mark.parametrize("page", [None, 32], ids=["rows", "pages"])
@pytest.mark.parametrize("entries", [128, 1000])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_decoding_from_rows_and_from_pages(against_floor, packed, rows, entries, page):
    """The same step with its keys and values in rows, and in shuffled pages of a pool."""
    each = 1 if page is None else -(-(entries + 1) // page)
    cache = packed.new_cache(rows * each, entries + 1 if page is None else page)
    pages = None if page is None else torch.randperm(rows * each).view(rows, each)
    numbers = torch.arange(rows + 1)
    tokens, lengths = torch.randint(50257, (rows,)), torch.full((rows,), entries)

    def step():
        with backend("native"):
            ops.packed_step(
                packed.weights, cache.k, cache.v, tokens, lengths, numbers, numbers[:-1], lengths,
                numbers[:-1], k_scales=cache.k_scales, v_scales=cache.v_scales, pages=pages,
            )  # fmt: skip

    against_floor(step, packed.weight_bytes + rows * entries * cache.entry_bytes)


@pytest.mark.parametrize("singly", [False, True], ids=["blocks", "singly"])
@pytest.mark.parametrize("tokens", [2, 5, 9])
def test_tokens_to_be_verified(against_floor, packed, tokens, singly):
    """Several tokens of one text behind 512 entries, with logits after each."""
    cache = packed.new_cache(1, 512 + tokens)
    starts, row = torch.tensor([0, tokens]), torch.tensor([0])
    places = torch.arange(512, 512 + tokens)
    ids, outputs = torch.randint(50257, (tokens,)), torch.arange(tokens)

    def step():
        with backend("native"):
            ops.packed_step(
                packed.weights, cache.k, cache.v, ids, places, starts, row, places[:1], outputs,
                k_scales=cache.k_scales, v_scales=cache.v_scales, singly=torch.tensor([singly]),
            )  # fmt: skip

    against_floor(step, packed.weight_bytes + 512 * cache.entry_bytes)


@pytest.mark.parametrize("entries", [512, 1024])
def test_prompt(benchmark, packed, entries):
    """For float weights also as a share of the rate of torch's own matrix product."""
    prompt = torch.randint(50257, (1, entries))

    def read():
        packed.prefill(prompt, [entries], [0], packed.new_cache(1, entries))

    benchmark.pedantic(read, rounds=7, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = entries / benchmark.stats.stats.median
    if not packed.format.startswith("int"):
        multiplied = torch.bfloat16 if packed.format == "bfloat16" else torch.float32
        config = packed.config
        operations = 24 * config.n_layer * config.n_embd**2 * entries  # of the layers' matrices
        rate = machine.product_rate(multiplied, torch.get_num_threads())
        share = operations / rate / benchmark.stats.stats.median
        benchmark.extra_info.update(product_rate=rate, share=share)
