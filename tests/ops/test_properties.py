"""Ops on tensors of random shapes, dtypes and layouts: right as torch is, or refused by all alike.

Every tensor of a call lies in memory in a way of its own. GPT2FAST_EXAMPLES=1000 draws more, and
GPT2FAST_SEED=1 others than in every other run. What fails says how to keep the example, in
kept_examples.json, for every run from then on; the first ones there found planted bugs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from comparison import backend
from gpt2fast import ops
from gpt2fast.errors import ArgumentError, BackendError
from op_arguments import CPU_BACKENDS
from tolerance import assert_close, step_of

EXAMPLES = int(os.environ.get("GPT2FAST_EXAMPLES", "25"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def examples(name: str) -> Callable[[Callable], Callable]:
    """Settings for testing a property on a backend: fewer examples in the slow interpreter."""
    return lambda test: _examples(test, max(1, EXAMPLES // (3 if name == "triton" else 1)))


def _examples(test: Callable, most: int) -> Callable:
    drawn = settings(
        max_examples=most,
        deadline=None,
        derandomize="GPT2FAST_SEED" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )(test)
    number = os.environ.get("GPT2FAST_SEED")
    return seed(int(number))(drawn) if number else drawn


def contiguous(x: Tensor) -> Tensor:
    return x.clone()


def every_other(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 9.0)
    wide[..., ::2] = x
    return wide[..., ::2]


def moved(x: Tensor) -> Tensor:
    """One element past an aligned address."""
    flat = x.new_full((x.numel() + 1,), 9.0)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


def padded(x: Tensor) -> Tensor:
    """Rows of the last dimension apart, in a larger tensor."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), 9.0)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def turned(x: Tensor) -> Tensor:
    """The dimensions from last to first in memory."""
    back = tuple(reversed(range(x.dim())))
    return x.permute(back).contiguous().permute(back)


def swapped(x: Tensor) -> Tensor:
    """Two neighboring dimensions the other way round in memory, as of heads before time."""
    if x.dim() < 3:
        return turned(x)
    return x.transpose(-2, -3).contiguous().transpose(-2, -3)


def expanded(x: Tensor) -> Tensor:
    """One first row for all; its values are those of the row."""
    return x[:1].clone().expand(x.shape) if x.dim() and x.shape[0] else x.clone()


# What kept examples choose by their place: new ones go to the end, of DTYPES as well.
LAYOUTS = [contiguous, every_other, moved, padded, turned, swapped, expanded]


class Draw:
    """Sizes and tensors of one example, from choices of integers.

    Args:
        choose: gives an integer between two, both included.
    """

    def __init__(self, choose: Callable[[int, int], int]):
        self._choose = choose
        self.chosen: list[int] = []
        self.generator = torch.Generator().manual_seed(self._integer(0, 99))

    def _integer(self, low: int, high: int) -> int:
        self.chosen.append(self._choose(low, high))
        return self.chosen[-1]

    def size(self, *usual: int, most: int = 40) -> int:
        """A small number, or one near the sizes of a kernel's blocks."""
        near = [n + d for n in usual for d in (-1, 0, 1)]
        kind = self._integer(0, len(near))
        return near[kind - 1] if kind else self._integer(1, most)

    def one_of(self, values: Any) -> Any:
        return values[self._integer(0, len(values) - 1)]

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator).bfloat16().to(dtype)
        return self.one_of(LAYOUTS)(x)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        x = torch.randint(low, high, shape, generator=self.generator)
        return x if not x.dim() else self.one_of([contiguous, every_other, moved])(x)


def hold(name: str, draw: Draw, ours: Callable, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """An op of a backend and its gradients against the reference, on contiguous copies."""
    layout = draw.one_of([None, *LAYOUTS[:-1]])  # None: what `sum` gives, one number for all

    def run(given: list[Tensor], chosen: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        generator = torch.Generator().manual_seed(1)
        with backend(chosen):
            outputs = ours(*leaves)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            directions = []
            for out in outputs:
                direction = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
                if layout is None:
                    directions.append(out.new_ones(()).expand(out.shape))
                else:
                    directions.append(layout(direction) if out.dim() else direction)
            gradients = torch.autograd.grad(outputs, leaves, directions)
        return [*(out.detach() for out in outputs), *gradients]

    exact = run([x.double().contiguous() for x in inputs], "reference")
    try:
        found = run(inputs, name)
    except BackendError:  # a dtype or a mixture that the backend leaves to others
        return
    other = run([x.contiguous() for x in inputs], "reference")
    assert_close(found, other, exact, times=3.0, least=step_of(dtype))


def cases(draw: Draw, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Callable, list[Tensor]]]]:
    def norm():
        rows, width = draw.size(16), 7 + draw.size(32, 64, most=70)
        x = draw.one_of([(rows,), (2, rows), ()])
        return ops.residual_layer_norm, [
            draw.tensor(dtype, *x, width), draw.tensor(dtype, *x, width),
            draw.tensor(dtype, width), draw.tensor(dtype, width),
        ]  # fmt: skip

    def gelu():
        width = draw.size(16, 64)
        return ops.bias_gelu, [draw.tensor(dtype, draw.size(), width), draw.tensor(dtype, width)]

    def mlp():
        n, m, k = draw.size(), draw.size(32), draw.size()
        return ops.gelu_mlp, [
            draw.tensor(dtype, draw.size(), n), draw.tensor(dtype, n, m), draw.tensor(dtype, m),
            draw.tensor(dtype, m, k), draw.tensor(dtype, k),
        ]  # fmt: skip

    def projection():
        n, m = draw.size(32), draw.size()
        shape = draw.one_of([(draw.size(), n), (2, 3, n), (n,)])
        return ops.projection, [
            draw.tensor(dtype, *shape), draw.tensor(dtype, n, m), draw.tensor(dtype, m)
        ]  # fmt: skip

    def embedding():
        rows, positions, width = draw.size(), draw.size(), draw.size(32)
        tokens = draw.integers(0, rows, draw.size(most=3), draw.size(32))
        shape = draw.one_of([tokens.shape, tokens.shape[-1:]])
        places = draw.integers(0, positions, *shape)
        if draw.one_of([False, True]):
            tokens, places = tokens.int(), places.int()
        return lambda a, b: ops.embedding(tokens, places, a, b), [
            draw.tensor(dtype, rows, width), draw.tensor(dtype, positions, width)
        ]  # fmt: skip

    def attention():
        shape = (draw.size(most=3), draw.size(32, 64, 128), draw.size(most=3), draw.size(8, 16))
        scale = draw.one_of([None, 0.0, -0.5, 1e-20, 3.0])
        mask = None
        if draw.one_of([False, True]):
            mask = torch.zeros(shape[:2], dtype=torch.bool)
            mask[:, draw.one_of([0, -1])] = True  # one key is seen by some
            mask = draw.one_of([contiguous, turned])(mask)
        return lambda q, k, v: ops.causal_attention(q, k, v, scale, mask), [
            draw.tensor(dtype, *shape) for _ in "qkv"
        ]

    def loss():
        rows, classes, width = draw.size(), draw.size(32, 64), draw.size()
        targets = draw.integers(0, classes, rows)
        if draw.one_of([False, True]):
            targets = targets.clone()
            targets[rows // 2 :] = -100
            targets[0] = classes - 1
        return lambda h, w: ops.linear_cross_entropy(h, w, targets), [
            draw.tensor(dtype, rows, width), draw.tensor(dtype, classes, width)
        ]  # fmt: skip

    return {
        "norm": norm, "gelu": gelu, "mlp": mlp, "projection": projection, "embedding": embedding,
        "attention": attention, "loss": loss,
    }  # fmt: skip


def check_op(op: str) -> Callable[[str, Draw], None]:
    """Any layout gives what float64 gives."""

    def check(name: str, draw: Draw) -> None:
        dtype = draw.one_of(DTYPES)
        run, inputs = cases(draw, dtype)[op]()
        hold(name, draw, run, inputs, dtype)

    return check


def check_caches(name: str, draw: Draw) -> None:
    """Caches of any layout hold what was appended."""
    dtype = draw.one_of(DTYPES[:3])
    batch, time, heads, width = (
        draw.size(most=3),
        draw.size(most=6),
        draw.size(most=3),
        draw.size(8),
    )
    entries = time + draw.size(32, 64)
    lengths = draw.integers(0, entries - time + 1, batch)
    counts = draw.one_of([None, draw.integers(-1, time + 2, batch)])
    written = [contiguous, moved, padded, swapped, turned]
    k, v, q = (draw.tensor(dtype, batch, time, heads, width) for _ in "kvq")
    filled = torch.randn(2, batch, entries, heads, width, generator=draw.generator).to(dtype)
    caches = [draw.one_of(written)(cache) for cache in filled]
    plain = [cache.clone() for cache in filled]
    order = torch.randint(batch, (batch,), generator=draw.generator)
    scale = draw.one_of([None, 0.0, -1.0])
    found = []
    for chosen, (k_cache, v_cache) in ((name, caches), ("reference", plain)):
        with backend(chosen):
            try:
                ops.append_to_cache(k, v, k_cache, v_cache, lengths, counts)
                ops.reorder_cache(k_cache, v_cache, order)
                at = lengths[order]
                found.append(ops.attention_with_cache(q, k_cache, v_cache, at, scale))
            except BackendError:
                return
    assert torch.equal(caches[0], plain[0]) and torch.equal(caches[1], plain[1])
    with backend("reference"):
        k_cache, v_cache = (cache.double() for cache in plain)
        exact = ops.attention_with_cache(q.double(), k_cache, v_cache, lengths[order], scale)
    assert_close(found[:1], found[1:], [exact], times=2.0, least=step_of(dtype))


def check_token(name: str, draw: Draw) -> None:
    """A token is the reference's, or refused by all alike."""
    rows, vocab = draw.size(most=4), draw.size(64, most=70)
    logits = draw.tensor(draw.one_of(DTYPES[:3]), rows, vocab) * 4
    history = draw.integers(-1, vocab, rows, draw.size(most=6))
    uniform = draw.one_of([None, torch.rand(rows, generator=draw.generator)])
    choice = {
        "temperature": draw.one_of([1.0, 0.5, 0.0, -1.0, math.nan, math.inf]),
        "top_k": draw.one_of([0, 1, 5, 10**9, -1]),
        "top_p": draw.one_of([1.0, 0.9, 0.0, 1.5, math.nan]),
        "min_p": draw.one_of([0.0, 0.1, 1.0, -1.0]),
        "typical_p": draw.one_of([1.0, 0.9, 0.2, 0.0, 1.5]),
        "repetition_penalty": draw.one_of([1.0, 1.3, 0.5, 0.0, math.nan]),
        "no_repeat_ngram_size": draw.one_of([0, 1, 2, 50, -2]),
    }
    found: list[Any] = []
    for chosen in ("reference", name):
        with backend(chosen):
            try:
                found.append(ops.sample(logits, history, uniform, **choice))
            except ArgumentError as error:
                found.append(str(error))
            except BackendError:
                return
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        assert torch.equal(*found)


OPS = ["norm", "gelu", "mlp", "projection", "embedding", "attention", "loss"]
PROPERTIES = {op: check_op(op) for op in OPS} | {"caches": check_caches, "token": check_token}
KEPT = json.loads((Path(__file__).parent / "kept_examples.json").read_text())
"""By property, the choices of examples that once found something."""


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("of", PROPERTIES)
def test_property(name, of):
    @examples(name)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        draw = Draw(lambda low, high: data.draw(st.integers(low, high)))
        try:
            PROPERTIES[of](name, draw)
        except AssertionError as error:
            raise AssertionError(f"{error}\nfor kept_examples.json: {draw.chosen}") from None

    check()


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("of", "chosen"), [(of, chosen) for of, all_chosen in KEPT.items() for chosen in all_chosen]
)
def test_kept_example(name, of, chosen):
    left = list(chosen)
    # As many as it had; should there be more to choose by now, the first.
    PROPERTIES[of](name, Draw(lambda low, high: min(left.pop(0), high) if left else low))


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("time", [1, 33, 65, 129])
def test_one_visible_key_in_the_last_tile_is_enough(name, dtype, time):
    """With any scale: what is hidden is hidden after scaling, by zero and by less too."""
    q, k, v = (torch.randn(2, time, 2, 16).to(dtype) for _ in "qkv")
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.zeros(2, time, dtype=torch.bool)
    mask[:, -1] = True
    for scale in (None, 0.0, -0.5, 1e30):
        for visible in (mask, None):
            if visible is None and scale == 1e30:
                continue  # in float32 such scores differ by more than their softmax can tell
            with backend("reference"):
                exact = ops.causal_attention(q.double(), k.double(), v.double(), scale, visible)
                other = ops.causal_attention(q.float(), k.float(), v.float(), scale, visible)
            try:
                with backend(name):
                    found = ops.causal_attention(q, k, v, scale, visible)
            except BackendError:
                continue
            # What is read and written in 16 bits is computed in float32.
            assert_close([found], [other.to(dtype)], [exact], times=2.0, least=2 * step_of(dtype))
