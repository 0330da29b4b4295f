"""Contrastive search against the formula of Su et al. (2022), computed with transformers' model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt2fast import GPT2, Generator
from gpt2fast.errors import GenerationError
from gpt2fast.inference.decoding import Timing
from gpt2fast.nn.kv_cache import KVCache
from small_generators import small_model
from tolerance import assert_equal

END = 7


@pytest.fixture(scope="module")
def pair() -> tuple[GPT2, Any]:
    ours = small_model(seed=4).eval()
    return ours, ours.to_hf().eval()


@torch.no_grad()
def contrastive(
    model: Any, tokens: list[int], alpha: float, k: int, steps: int, banned: int | None = None
) -> list[int]:
    """The continuation by the paper's formula; everything is computed again for each candidate."""
    tokens, new = list(tokens), []
    for _ in range(steps):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        if banned is not None:
            logits[banned] = -torch.inf
        best, chosen = -torch.inf, -1
        for probability, candidate in zip(*logits.softmax(-1).topk(k), strict=True):
            read = torch.tensor([[*tokens, int(candidate)]])
            states = model.transformer(read).last_hidden_state[0]
            likeness = max(
                float(torch.cosine_similarity(states[-1], state, dim=0)) for state in states[:-1]
            )
            score = (1 - alpha) * float(probability) - alpha * likeness
            if score > best:
                best, chosen = score, int(candidate)
        tokens.append(chosen)
        new.append(chosen)
        if chosen == END:
            break
    return new


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.3, 8), (1.0, 3), (0.05, 61)])
def test_tokens_are_those_of_the_formula(pair, alpha, k):
    ours, theirs = pair
    prompts = [[1, 2, 3, 4], [5], [9, 60, 33]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found = ours.generate(ids, mask, max_new_tokens=20, penalty_alpha=alpha, top_k=k)
    for row, prompt in zip(found[:, width:].tolist(), prompts, strict=True):
        expected = contrastive(theirs, prompt, alpha, k, 20)
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {END}


def test_the_text_is_neither_greedy_nor_the_same_for_another_alpha(pair):
    ids = torch.tensor([[1, 2, 3, 4]])
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": None}
    texts = [pair[0].generate(ids, **options).tolist()]
    for alpha in (0.3, 0.9):
        texts.append(pair[0].generate(ids, penalty_alpha=alpha, top_k=6, **options).tolist())
    assert len({str(text) for text in texts}) == 3
    assert_equal(
        pair[0].generate(ids, penalty_alpha=0.0, top_k=6, **options), torch.tensor(texts[0])
    )


def test_processors_apply_before_candidates_are_chosen(pair):
    ours, theirs = pair
    free = contrastive(theirs, [1, 2, 3], 0.6, 4, 12)
    expected = contrastive(theirs, [1, 2, 3], 0.6, 4, 12, banned=free[1])
    assert expected != free
    ids = torch.tensor([[1, 2, 3]])
    options: dict[str, Any] = {"max_new_tokens": 12, "penalty_alpha": 0.6, "top_k": 4}
    found = ours.generate(ids, bad_words_ids=[[free[1]]], **options)
    assert found[0, 3:].tolist() == expected
    # A banned token stays out even where fewer than top_k are left.
    left = {11, 13}
    bans = [[token] for token in range(61) if token not in left]
    found = ours.generate(ids, bad_words_ids=bans, eos_token_id=None, **options)
    assert set(found[0, 3:].tolist()) <= left
    bans = [[token] for token in range(61)]
    with pytest.raises(GenerationError, match="no token is left to choose after 0"):
        ours.generate(ids, bad_words_ids=bans, eos_token_id=None, **options)


def test_hooks_run_and_change_what_is_compared(pair):
    """A hook that shifts the last hidden states changes the text as it does in the formula."""
    ours, theirs = (small_model(seed=4).eval(), pair[1])
    ids = torch.tensor([[1, 2, 3]])
    options: dict[str, Any] = {"max_new_tokens": 12, "penalty_alpha": 0.6, "top_k": 5}
    calls = []
    handle = ours.register_forward_hook(lambda *call: calls.append(call))
    found = ours.generate(ids, **options)
    handle.remove()
    assert len(calls) == 1 + found.shape[1] - 3
    assert found[0, 3:].tolist() == contrastive(theirs, [1, 2, 3], 0.6, 5, 12)

    shift = torch.linspace(-3, 3, 24)
    hooks = [
        each.register_forward_hook(lambda _, __, out: out + shift)
        for each in (ours.ln_f, theirs.transformer.ln_f)
    ]
    try:
        shifted = ours.generate(ids, **options)
        assert shifted[0, 3:].tolist() == contrastive(theirs, [1, 2, 3], 0.6, 5, 12)
    finally:
        for hook in hooks:
            hook.remove()
    assert shifted.tolist() != found.tolist()


def test_a_generator_writes_streams_and_scores_the_same_text():
    generator = Generator.from_pretrained("adventures")
    options: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 12}
    prompts = ["The door was", "A ship"]
    timing = Timing()
    both = generator(prompts, logprobs=True, timing=timing, **options)
    for prompt, result in zip(prompts, both, strict=True):
        assert "".join(generator.stream(prompt, **options)) == result.text
        assert result.seed is None and len(result.logprobs) == result.new_tokens
        ids = torch.tensor([[*result.prompt_token_ids, *result.tokens]])
        logits = generator.model(ids).logits[0, -1 - result.new_tokens : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=1e-4, atol=1e-4)
    assert timing.decode_tokens > 0 and timing.decode_bytes > 0
    assert generator("The door was", stop=both[0].text[4:8], **options).finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"penalty_alpha": 0.6}, ["top_k is None", "at least 2"]),
        ({"penalty_alpha": 0.6, "top_k": 1}, ["top_k is 1", "at least 2"]),
        ({"penalty_alpha": 1.5, "top_k": 4}, ["penalty_alpha is 1.5", "from 0 to 1"]),
        ({"penalty_alpha": 0.6, "top_k": 4, "num_beams": 2}, ["num_beams is 2", "set both to 1"]),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": True}, ["do_sample", "leave one"]),
        ({"penalty_alpha": 0.6, "top_k": 4, "use_cache": False}, ["use_cache"]),
        ({"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 46}, ["n_positions=48"]),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_named(pair, options, parts):
    with pytest.raises(GenerationError) as error:
        pair[0].generate(torch.tensor([[1, 2, 3]]), **options)
    for part in parts:
        assert part in str(error.value)


def test_packed_weights_have_no_states_to_compare(pair):
    packed = pair[0].pack()
    with pytest.raises(GenerationError, match="packed and quantized weights.*GPT2 that they were"):
        packed.generate(torch.tensor([[1]]), penalty_alpha=0.6, top_k=4)
    generator = Generator.from_pretrained("adventures", pack=True)
    with pytest.raises(GenerationError, match="without pack and quantize"):
        generator.check("The door", penalty_alpha=0.6, top_k=4)


def test_a_generator_wants_the_number_of_candidates_and_does_not_slide():
    generator = Generator.from_pretrained("adventures", window="slide")
    with pytest.raises(GenerationError, match="top_k is None.*4 to 8"):
        generator("The door", penalty_alpha=0.6)
    room = generator.model.config.n_positions
    with pytest.raises(GenerationError, match="n_positions"):
        generator("The door", penalty_alpha=0.6, top_k=4, max_new_tokens=room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_repeat_newest_copies_one_entry_of_a_row(dtype):
    cache = KVCache(2, 4, 5, 2, 8, dtype)
    cache.lengths = torch.tensor([3, 3, 2, 2])
    parts = [cache.k, cache.v, cache.k_scales, cache.v_scales]
    kept = [x for x in parts if x is not None]
    for x in kept:
        x.copy_(torch.randint(-100, 100, x.shape))
    before = [x.clone() for x in kept]
    cache.repeat_newest(torch.tensor([1, 1, 2, 2]))
    for x, old in zip(kept, before, strict=True):
        old[:, 0, 2], old[:, 3, 1] = old[:, 1, 2], old[:, 2, 1]
        assert_equal(x, old)
