"""Drafters: what they propose, how much of it, and what they keep."""

from __future__ import annotations

import gc
import itertools
import random
import weakref

import pytest
import torch

from gpt2fast.errors import GenerationError
from gpt2fast.inference.speculation import (
    DraftLengths,
    DraftRow,
    LookupDrafter,
    ModelDrafter,
    NgramPool,
)
from gpt2fast.inference.speculation.draft_model import check_same_vocabulary
from gpt2fast.inference.speculation.lengths import Chance, StepCosts
from gpt2fast.inference.speculation.lookup import SIZES, TextIndex
from gpt2fast.sampling import SamplingOptions
from gpt2fast.tokenizer import CharTokenizer
from small_generators import small_model

GREEDY = SamplingOptions(max_new_tokens=100)


class Always(DraftLengths):
    """Proposes as much as there is."""

    def choose(self, chances, rows):
        return [min(chance.most, self.most) for chance in chances]


def row(tokens, id=0, most=8, options=GREEDY, uniforms=None):
    return DraftRow(id, tokens, most, options, uniforms)


# -- lookup ---------------------------------------------------------------------------------------


def longest_match(tokens):
    """The latest place after the longest known size of match, by looking everywhere."""
    for size in SIZES:
        end = tokens[-size:]
        for place in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[place - size : place] == end:
                return place, size
    return None


def test_the_longest_match_is_found_and_of_equals_the_latest():
    draw = random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(4) for _ in range(draw.randrange(60))]
        index = TextIndex()
        grown = 0
        while grown < len(tokens):
            grown = min(len(tokens), grown + draw.randrange(1, 5))
            index.extend(tokens[:grown])
            assert index.find() == longest_match(tokens[:grown])


def test_what_repeats_is_taken_to_go_on_repeating():
    drafter = LookupDrafter(lengths=Always())
    assert drafter.propose([row([5, 1, 2, 3, 1, 2, 3])]) == [[1, 2, 3, 1, 2, 3, 1, 2]]
    assert drafter.propose([row([9, 9, 9], id=1, most=5)]) == [[9] * 5]


def test_nothing_is_proposed_where_nothing_repeats_and_never_more_than_asked_for():
    drafter = LookupDrafter(lengths=Always())
    repeated = [1, 2, 3, 4, 1, 2]
    rows = [row([1, 2, 3, 4], 0), row(repeated, 1, most=1), row(repeated, 2, most=0), row([7], 3)]
    assert drafter.propose(rows) == [[], [3], [], []]


def test_texts_that_have_ended_are_looked_up_by_others():
    drafter = LookupDrafter(NgramPool(), Always())
    first = list(range(20))
    drafter.propose([row(first)])
    assert drafter.propose([row([30, *first[3:8]], id=1, most=4)]) == [[]]
    drafter.forget(0)
    assert drafter.propose([row([30, *first[3:9]], id=1, most=4)]) == [[9, 10, 11, 12]]
    assert drafter.propose([row([30, *first[3:9]], id=2, most=4)]) == [[9, 10, 11, 12]]
    without = LookupDrafter(None, Always())
    without.propose([row(first)])
    without.forget(0)
    assert without.propose([row([30, *first[3:9]], id=2, most=4)]) == [[]]


def test_a_pool_stays_within_its_capacity_and_drops_the_oldest_first():
    pool = NgramPool(100)
    texts = [list(range(100 * number, 100 * number + 40)) for number in range(6)]
    for text in texts:
        pool.add(text)
        assert pool.size <= 100
    assert [bool(pool.find(text[:10], 3)) for text in texts] == [False] * 4 + [True] * 2
    assert len(pool._places) == 2 * (40 - 5)
    pool.add(list(range(1000, 1300)))  # longer than the pool: its end is kept
    assert pool.size == 100
    assert pool.find(list(range(1250, 1260)), 2) == [1260, 1261]
    # The same text many times takes no more places than once.
    for _ in range(10):
        pool.add(texts[0])
    assert len(pool._places) == 35


def test_a_row_that_is_forgotten_leaves_nothing():
    drafter = LookupDrafter(None, Always())
    drafter.propose([row([1, 2, 3, 1, 2], id=7)])
    text = weakref.ref(drafter._texts[7])
    drafter.observe(7, 1, 1, [3])
    drafter.forget(7)
    drafter.forget(7)  # an unknown one is passed over
    gc.collect()
    assert text() is None
    assert not drafter._lengths._rows


# -- lengths --------------------------------------------------------------------------------------


class Machine:
    """A clock on which a step takes as long as `cost` says."""

    def __init__(self, cost):
        self.now, self.cost = 0.0, cost

    def __call__(self):
        return self.now


def simulate(rate, cost, steps, most=15, seed=0):
    """Tokens and seconds of a row whose proposals are right with probability `rate` at each place,
    and the numbers of tokens proposed."""
    machine = Machine(cost)
    lengths = DraftLengths(most, machine)
    draw = random.Random(seed)
    tokens, chosen = 0, []
    for _ in range(steps):
        (proposed,) = lengths.choose([Chance(0, "x", 0.5, most)], 1)
        lengths.start(1 + proposed)
        machine.now += cost(1 + proposed) * draw.uniform(0.95, 1.05)
        accepted = 0
        while accepted < proposed and draw.random() < rate:
            accepted += 1
        lengths.observe(0, proposed, accepted)
        tokens += 1 + accepted
        chosen.append(proposed)
    return tokens, machine.now, chosen


def test_cheap_steps_and_right_proposals_make_long_ones():
    tokens, seconds, chosen = simulate(0.97, lambda n: 1 + 0.02 * (n - 1), 300)
    assert sum(chosen[-100:]) / 100 > 12
    assert tokens / seconds > 4


def test_proposals_that_never_pay_cost_next_to_nothing():
    for rate, slope in ((0.0, 0.04), (0.03, 0.3), (0.3, 1.0)):
        tokens, seconds, chosen = simulate(rate, lambda n, s=slope: 1 + s * (n - 1), 2000)
        assert tokens / seconds > 0.97, (rate, slope)
        assert any(chosen[-200:])  # it is tried again now and then
        assert sum(chosen[-1000:]) < 60


def test_proposals_that_begin_to_pay_are_noticed():
    machine = Machine(None)
    lengths = DraftLengths(clock=machine)
    chosen = []
    for step in range(600):
        (proposed,) = lengths.choose([Chance(0, "x", 0.5, 15)], 1)
        lengths.start(1 + proposed)
        machine.now += 1 + 0.1 * proposed
        lengths.observe(0, proposed, proposed if step >= 300 else 0)
        chosen.append(proposed)
    assert sum(chosen[200:300]) < 20
    assert min(chosen[-50:]) >= 8


def test_a_kind_that_does_not_pay_leaves_the_others_alone():
    lengths = DraftLengths(clock=itertools.count().__next__)
    lengths.costs.add(1, 1.0)
    lengths.costs.add(9, 4.0)
    for _ in range(3):
        assert lengths.choose([Chance(0, "poor", 0.05, 8)], 1) == [0]
        assert lengths.choose([Chance(0, "good", 0.97, 8)], 1)[0] > 4


def test_the_likeliest_places_of_all_rows_are_taken():
    lengths = DraftLengths(clock=lambda: 0.0)
    for tokens in range(1, 40):
        lengths.costs.add(tokens, 1 + 0.15 * (tokens - 1))
    chances = [Chance(0, "a", 0.95, 15), Chance(1, "b", 0.5, 15), Chance(2, "c", 0.05, 15)]
    first, second, third = lengths.choose(chances, 3)
    assert first > second >= third == 0


def test_drafting_that_takes_time_makes_shorter_proposals():
    def chosen(draft_seconds):
        lengths = DraftLengths(clock=lambda: 0.0)
        for tokens in (1, 8, 16):
            lengths.costs.add(tokens, 1 + 0.01 * tokens)
        lengths.start(1, draft_seconds)
        return lengths.choose([Chance(0, "a", 0.8, 15)], 1)[0]

    assert chosen(0.0) > chosen(0.2) > chosen(5.0) == 0


def test_one_slow_step_does_not_count_for_long():
    costs = StepCosts()
    for _ in range(20):
        costs.add(1, 1.0)
        costs.add(8, 1.2)
    costs.add(8, 60.0)
    assert costs.seconds(8) < 1.5
    for _ in range(900):
        costs.add(1, 1.0)
    assert costs.seconds(8) == pytest.approx(1 + 0.03 * 7, abs=0.1)


# -- a draft model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return small_model(n_positions=96).pack()


def continuation(model, tokens, count, **options):
    return model.generate(
        torch.tensor([tokens]), max_new_tokens=count, eos_token_id=None, **options
    )[0, len(tokens) :].tolist()


def test_a_model_drafts_what_it_would_write_itself(model):
    drafter = ModelDrafter(model, lengths=Always())
    prompts = [[1, 2, 3], [4] * 40, [5]]
    found = drafter.propose([row(p, id, most=id + 3) for id, p in enumerate(prompts)])
    assert found == [continuation(model, p, id + 3) for id, p in enumerate(prompts)]


def test_a_model_catches_up_with_tokens_it_had_drafted_and_others(model):
    drafter = ModelDrafter(model, lengths=Always())
    tokens = [1, 2, 3]
    draw = random.Random(3)
    for _ in range(8):
        (draft,) = drafter.propose([row(tokens, most=4)])
        assert draft == continuation(model, tokens, 4)
        accepted = draw.randrange(5)
        tokens = [*tokens, *draft[:accepted], draw.randrange(61)]
        if draw.random() < 0.3:
            tokens += [draw.randrange(61) for _ in range(9)]  # steps without a proposal


def test_rows_come_and_go_at_a_draft_model(model):
    drafter = ModelDrafter(model, lengths=Always())
    draw = random.Random(5)
    texts: dict[int, list[int]] = {}
    for number in range(40):
        if len(texts) < 6 and draw.random() < 0.6:
            texts[number] = [draw.randrange(61) for _ in range(draw.randrange(1, 30))]
        some = draw.sample(sorted(texts), draw.randrange(len(texts) + 1))
        found = drafter.propose([row(texts[id], id, most=3) for id in some])
        for id, draft in zip(some, found, strict=True):
            assert draft == continuation(model, texts[id], 3)
            texts[id] = [*texts[id], draft[0], draw.randrange(61)]
        for id in [id for id in texts if draw.random() < 0.2 or len(texts[id]) > 80]:
            drafter.forget(id)
            del texts[id]
    for id in texts:
        drafter.forget(id)
    assert drafter.cache_rows == 0 and not drafter._rows


def test_drawn_rows_are_drafted_from_their_own_numbers(model):
    """A model that drafts for itself is always right."""
    options = SamplingOptions(
        do_sample=True, temperature=1.3, top_k=40, top_p=0.9, repetition_penalty=1.2
    )
    from gpt2fast.inference.sampling import Draw, RowRandom

    numbers = RowRandom([Draw(11, 0)]).take(20)[0].tolist()
    drafter = ModelDrafter(model, lengths=Always())
    drawn = continuation(
        model, [1, 2, 3], 6, do_sample=True, temperature=1.3, top_k=40, top_p=0.9,
        repetition_penalty=1.2, seed=11,
    )  # fmt: skip
    (draft,) = drafter.propose(
        [row([1, 2, 3], most=6, options=options, uniforms=lambda n: numbers[:n])]
    )
    assert draft == drawn


def test_a_text_longer_than_the_draft_model_gets_no_proposals(model):
    drafter = ModelDrafter(model, lengths=Always())
    found = drafter.propose([row([1] * n, n, most=5) for n in (90, 94, 96, 97, 120)])
    assert list(map(len, found)) == [5, 3, 1, 0, 0]


def test_ids_past_the_vocabulary_are_not_proposed(model):
    drafter = ModelDrafter(model, vocab_size=10, lengths=Always())
    found = drafter.propose([row([n], n) for n in range(9)])
    assert max(map(max, found)) < 10


def alphabet(characters):
    return CharTokenizer({character: id for id, character in enumerate(characters)})


def test_a_draft_model_with_another_vocabulary_is_refused():
    one, more, other = alphabet("abc"), alphabet("abcd"), alphabet("axc")
    check_same_vocabulary(one, alphabet("abc"))
    with pytest.raises(GenerationError, match="the id 1 is 'x' in it, and 'b' in the other"):
        check_same_vocabulary(other, one)
    with pytest.raises(GenerationError, match="not the model's"):
        check_same_vocabulary(more, other)


def test_a_model_that_cannot_be_packed_drafts_nothing():
    model = small_model()
    model.h[0].register_forward_hook(lambda *_: None)
    with pytest.raises(GenerationError, match="without hooks"):
        ModelDrafter(model)
