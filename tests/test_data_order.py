"""The order of training windows: permutations, epochs, mixtures, and the batches made of them."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.data import DataModule
from gpt2fast.data.order import EpochOrder, Permutation, Turns
from gpt2fast.errors import DataError
from gpt2fast.training.checkpoints.position import Position


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 4097])
def test_a_permutation_takes_each_place_once(size):
    order = Permutation(size, "key")
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_a_permutation_of_billions_is_random_access():
    size = 9_035_582_198
    order = Permutation(size, "7")
    places = [order[i] for i in range(20_000)]
    assert len(set(places)) == len(places) and min(places) >= 0 and max(places) < size
    # The mean of n uniform draws lies within four standard errors of the middle.
    assert abs(sum(places) / len(places) / size - 0.5) < 4 / (12 * len(places)) ** 0.5
    assert all(order[i] != Permutation(size, "8")[i] for i in range(100))
    for index in (-1, size):
        with pytest.raises(IndexError):
            order[index]


def test_permutations_of_a_few_places_are_about_equally_likely():
    counts = Counter(
        tuple(Permutation(4, str(key))[i] for i in range(4)) for key in range(24 * 200)
    )
    assert len(counts) == 24
    # chi-squared with 23 degrees of freedom; 65 is beyond the 99.999 % quantile
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 65


@given(block_size=st.integers(1, 9), extra=st.integers(1, 60), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_window_once(block_size, extra, seed):
    tokens = block_size + extra
    order = EpochOrder(tokens, block_size, str(seed))
    place, offsets = 0, []
    for _ in range(block_size):
        whole = {o: (tokens - 1 - o) // block_size for o in range(block_size)}
        first = order[place] % block_size if place < tokens - block_size else None
        if first is None:  # the offsets that are left have no room for a window
            break
        starts = [order[place + i] for i in range(whole[first])]
        assert sorted(starts) == list(range(first, tokens - block_size, block_size))
        offsets.append(first)
        place += len(starts)
    assert offsets[0] == 0 and len(set(offsets)) == len(offsets)
    # over all offsets: every start that has a target, each once
    assert place == tokens - block_size
    assert sorted(order[i] for i in range(place)) == list(range(tokens - block_size))
    # and again, in another order of windows
    assert sorted(order[i] for i in range(place, 2 * place)) == list(range(tokens - block_size))


def test_the_order_of_an_epoch_depends_on_the_seed_and_the_epoch():
    def epoch(seed, number, windows=100):
        order = EpochOrder(1010, 10, seed)  # 100 windows at every offset
        return [order[number * windows + i] // 10 for i in range(50)]

    assert epoch("1", 0) == epoch("1", 0)
    assert epoch("1", 0) != epoch("2", 0)
    assert epoch("1", 0) != epoch("1", 1) != epoch("1", 2)
    assert epoch("1", 0) != sorted(epoch("1", 0))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (5, 0.01), (2, 3, 5, 1e-9), (1,)])
def test_turns_keep_the_proportion_at_every_moment(weights):
    turns = Turns(weights)
    counts = [0] * len(weights)
    for index in range(3000):
        corpus, before = turns[index]
        assert before == counts[corpus]  # random access agrees with counting
        counts[corpus] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (index + 1) * weight / sum(weights)) < len(weights)
    far = 10**15
    assert turns[far][1] == pytest.approx(far * weights[turns[far][0]] / sum(weights), rel=1e-6)


# -- batches -------------------------------------------------------------------------------------


def put(folder, train, val=range(100), code="H"):
    folder.mkdir()
    (folder / "train.bin").write_bytes(array(code, train).tobytes())
    (folder / "val.bin").write_bytes(array(code, val).tobytes())
    return folder


def module(data, *arguments, **more):
    with pytest.warns(UserWarning, match=r"no meta\.json"):
        return DataModule(data, *arguments, **more)


def test_random_batches_of_an_older_run_are_those_of_the_first_version(tmp_path):
    data = module(put(tmp_path / "a", range(5000)), 16, 4, seed=11)
    for step in (0, 1, 999):
        key = hashlib.sha256(f"11:{step}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        starts = torch.randint(5000 - 16, (4,), generator=generator)
        x, y = data.train_dataloader(order=1)[step]
        assert torch.equal(x, starts[:, None] + torch.arange(16))
        assert torch.equal(y, x + 1)
    assert data.train_dataloader(order=1)[0][0][:, 0].tolist() == [225, 3537, 4528, 906]


def splitmix64(state):
    """The next number, as in Steele, Lea and Flood's paper, in plain integers."""
    mask = (1 << 64) - 1
    state = state + 0x9E3779B97F4A7C15 & mask
    mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
    return mixed ^ mixed >> 31, state


def test_random_windows_are_numbers_of_splitmix64(tmp_path):
    data = module(put(tmp_path / "a", range(5000)), 16, 4, seed=11)
    state = int.from_bytes(hashlib.sha256(b"11:0").digest()[:8], "little") - 0x9E3779B97F4A7C15
    for step in range(5):
        x, y = data.train_dataloader()[step]
        for row in x:
            number, state = splitmix64(state)
            assert torch.equal(row, number % (5000 - 16) + torch.arange(16))
        assert torch.equal(y, x + 1)


def test_random_windows_cover_the_text_evenly(tmp_path):
    data = module(put(tmp_path / "a", range(1016)), 16, 50, seed=2)
    batches = data.train_dataloader()
    starts = torch.cat([batches[step][0][:, 0] for step in range(800)])
    found = torch.bincount(starts // 100, minlength=10).double()
    # chi-squared with 9 degrees of freedom: 27.9 is passed once in a thousand
    assert found.numel() == 10 and ((found - 4000) ** 2 / 4000).sum() < 27.9
    # neighbors in time are not neighbors in the text
    pairs = torch.corrcoef(torch.stack([starts[:-1], starts[1:]]).double())
    assert abs(pairs[0, 1]) < 4 / 40_000**0.5


def test_epoch_batches_visit_every_window_once(tmp_path):
    data = module(put(tmp_path / "a", range(1001)), 10, 4, seed=3, sampling="epoch")
    batches = data.train_dataloader()
    seen = torch.cat([batches[step][0] for step in range(25)])
    assert sorted(seen.flatten().tolist()) == list(range(1000))
    second = torch.cat([batches[step][0] for step in range(25, 50)])
    assert second[:, 0].tolist() != seen[:, 0].tolist()
    later = data.train_dataloader(start_step=7)
    assert torch.equal(next(iter(later))[0], batches[7][0])


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_a_mixture_draws_in_proportion(tmp_path, sampling):
    one = put(tmp_path / "one", range(0, 1000))
    two = put(tmp_path / "two", range(10_000, 10_300))
    weights = {str(one): 3, str(two): 1}
    data = module(weights, 8, 6, seed=5, sampling=sampling)
    batches = data.train_dataloader()
    rows = torch.cat([batches[step][0] for step in range(40)])
    assert int((rows[:, 0] >= 10_000).sum()) == pytest.approx(60, abs=2)
    assert torch.equal(rows, rows[:, :1] + torch.arange(8))  # no window runs across
    assert torch.equal(batches[17][1], batches[17][0] + 1)
    again = module(weights, 8, 6, seed=5, sampling=sampling).train_dataloader()
    assert all(torch.equal(again[i][0], batches[i][0]) for i in range(40))
    other = module(weights, 8, 6, seed=6, sampling=sampling).train_dataloader()
    assert not all(torch.equal(other[i][0], batches[i][0]) for i in range(5))
    if sampling == "epoch":
        from_two = [row for row in rows[:, 0].tolist() if row >= 10_000]
        assert len(set(from_two[:37])) == 37  # all windows of the smaller corpus before one returns


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_the_windows_of_a_run_do_not_depend_on_the_size_of_batches(tmp_path, sampling):
    weights = {str(put(tmp_path / str(n), range(900 * n, 900 * n + 800))): n + 1 for n in range(3)}

    def rows(batch_size):
        batches = module(weights, 8, batch_size, sampling=sampling).train_dataloader()
        return torch.cat([batches[step][0] for step in range(60 // batch_size)])

    assert torch.equal(rows(6), rows(1))
    assert torch.equal(rows(20), rows(1))


def test_validation_of_a_mixture_takes_every_corpus_and_spreads_them(tmp_path):
    one = put(tmp_path / "one", range(50), val=range(0, 400))
    two = put(tmp_path / "two", range(50), val=range(1000, 1101))
    data = module({str(one): 1, str(two): 9}, 10, 2)
    loader = data.val_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 20 + 1 + 5
    targets = sorted(t for _, y in batches for t in y.flatten().tolist())
    assert targets == [*range(1, 400), *range(1001, 1101)]
    assert torch.equal(loader[3][0], batches[3][0]) and torch.equal(loader[-1][0], batches[-1][0])
    owners = [bool(x[0, 0] >= 1000) for x, _ in batches]
    assert owners[:13].count(True) in (2, 3)
    with pytest.raises(IndexError):
        loader[26]
    assert data.meta.val_tokens == 501 and data.meta.train_tokens == 100


def test_validation_batches_can_be_asked_for_by_number(tmp_path):
    data = module(put(tmp_path / "a", range(50), val=range(46)), 10, 2)
    loader = data.val_dataloader()
    assert [x.shape for x, _ in loader] == [(2, 10), (2, 10), (1, 5)]
    assert loader[2][1].tolist() == [[41, 42, 43, 44, 45]]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "much"])
def test_a_weight_that_is_none_is_refused(tmp_path, weight):
    folder = put(tmp_path / "a", range(50))
    with pytest.raises(DataError, match=rf"the weight of .*a is {weight!r}; it must be a"):
        module({str(folder): weight}, 8, 2)


def test_impossible_sampling_is_refused(tmp_path):
    with pytest.raises(DataError, match="sampling is 'shuffled'; choose random or epoch"):
        DataModule(tmp_path, 8, 2, sampling="shuffled")
    with pytest.raises(DataError, match="the mixture is empty"):
        DataModule({}, 8, 2)


def test_checkpoints_of_older_versions_keep_their_order_of_windows():
    older = dataclasses.asdict(Position(step=3, batches=3))
    del older["order"]
    assert Position.of(older).order == 1
    assert Position.of(dataclasses.asdict(Position(step=3))).order == 2
