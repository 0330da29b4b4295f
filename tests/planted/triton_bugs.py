"""Bugs of the Triton kernels (gpt2fast/ops/triton), each in a copy of its module."""

from __future__ import annotations

import shutil
from pathlib import Path

from bugs import ROOT, Bug, planted

FOLDER = "gpt2fast/ops/triton/"
BORDERS = "test_borders.py::test_"
FORMS = "test_attention_forms.py::test_"
INT8 = f"{BORDERS}attention_with_an_int8_cache[3-17-triton]"
NORM = "test_layer_norm.py::test_matches_torch_at_odd_shapes[(3, 17, 33)-torch.float32-triton]"
GELU = "test_mlp.py::test_bias_gelu_matches_torch_at_odd_shapes[(3, 17, 33)-torch.float32-triton]"
MLP = "test_mlp.py::test_gelu_mlp_matches_torch_at_odd_shapes[(3, 17, 9)-torch.float32-triton]"
LOSS = "test_cross_entropy.py::test_matches_torch_at_odd_shapes[51-24-33-torch.float32-triton]"
EXACT = f"{BORDERS}what_lies_exactly_at_a_threshold"
DROPOUT = "test_attention.py::test_dropout_goes_on_in_the_next_head_row_and_block[triton]"


def attention(case: str) -> tuple[str]:
    """The test of one of the small cases of attention."""
    return (f"{BORDERS}attention_of_several_rows_and_heads[{case}-triton]",)


def cached(case: str) -> tuple[str]:
    """The same against a cache."""
    return (f"{BORDERS}cached_attention_of_several_rows_and_heads[{case}-triton]",)


BUGS = (
    Bug(
        "causal mask off by one",
        FOLDER + "attention_heads.py",
        "return «rows >= keys»",
        "rows + 1 >= keys",
        attention("values laid out unlike keys"),
    ),
    Bug(
        "causal mask off by one, gradients of the keys",
        FOLDER + "attention_backward.py",
        "weights = tl.where(«rows[None, :] >= keys[:, None]», weights, 0.0)",
        "rows[None, :] > keys[:, None]",
        attention("values laid out unlike keys"),
    ),
    Bug(
        "a tile in which nothing is visible: -inf minus itself",
        FOLDER + "attention.py",
        'shift = tl.where(«new == -float("inf")», 0.0, new)\n'
        "    weights = tl.exp2(scores - shift[:, None])\n    decay",
        'new == float("inf")',
        attention("a first tile that is hidden"),
    ),
    Bug(
        "values read with the stride of the keys",
        FOLDER + "attention.py",
        "v = head_of(v, «v_stride_b», v_stride_h, b, h // group)\n    if mask is not None:\n"
        "        mask += b.to(tl.int64) * time\n    scale *= LOG2_E",
        "k_stride_b",
        attention("keys laid out unlike queries"),
    ),
    Bug(
        "scores scaled after masking: -inf times a scale of 0",
        FOLDER + "attention.py",
        "    scores = «dot(q, tl.trans(block)) * scale\n    if not WHOLE:\n"
        "        seen = visible_places(rows[:, None], keys[None, :], time, CAUSAL)\n"
        '        scores = tl.where(seen, scores, -float("inf"))\n»',
        "dot(q, tl.trans(block))\n    if not WHOLE:\n"
        "        seen = visible_places(rows[:, None], keys[None, :], time, CAUSAL)\n"
        '        scores = tl.where(seen, scores, -float("inf"))\n'
        "    scores = scores * scale\n",
        attention("a scale of 0"),
    ),
    Bug(
        "all rows of a batch take the first one's mask, gradients of the keys",
        FOLDER + "attention_backward.py",
        "visible = tl.load(mask + «b.to(tl.int64) * time» + places",
        "0",
        attention("a mask for each row"),
    ),
    Bug(
        "dropout: Philox counters used again for every head and row",
        FOLDER + "attention.py",
        "kept = keep_mask(tl.load(seed), rows, first, «head», threshold, BLOCK_M, BLOCK_N)\n"
        "        weights",
        "0",
        (DROPOUT,),
    ),
    Bug(
        "dropout: counters begin again at every block of keys",
        FOLDER + "dropout.py",
        "counters = «first // 8» + tl.arange(0, BLOCK_N // 8)",
        "0",
        (DROPOUT,),
    ),
    Bug(
        "not causal: a key past the end is seen",
        FOLDER + "attention_heads.py",
        "return «keys < time»",
        "keys <= time",
        (f"{FORMS}matches_torch_in_every_form[(3, 17, 32)-(2, 2, False)-torch.float32-triton]",),
    ),
    Bug(
        "query heads take turns at the key heads",
        FOLDER + "attention.py",
        "k = head_of(k, k_stride_b, k_stride_h, b, h« // group»)",
        " % (heads // group)",
        (f"{FORMS}causal_attention_takes_fewer_key_heads[triton]",),
    ),
    Bug(
        "gradients of the keys count the first query head of a group for all",
        FOLDER + "attention_backward.py",
        "h = key_head * group + «member»",
        "0",
        (f"{FORMS}causal_attention_takes_fewer_key_heads[triton]",),
    ),
    Bug(
        "several queries and shares: the rows of a batch meet in one place",
        FOLDER + "cached_attention.py",
        "place = («b.to(tl.int64) * time» + rows) * heads + h",
        "b.to(tl.int64)",
        cached("several queries and shares"),
    ),
    Bug(
        "shares of the entries are added without their distance from the largest score",
        FOLDER + "cached_attention.py",
        "found = tl.load(sums + part[:, None] * HEAD_DIM + columns[None, :], "
        "mask=inside, other=0.0)\n    sum = tl.sum(found« * decay[:, None]», 0)",
        "",
        cached("several queries and shares"),
    ),
    Bug(
        "an entry past the end counts for a single query",
        FOLDER + "cached_attention.py",
        'scores = tl.where(«keys < end», scores, -float("inf"))',
        "keys <= end",
        cached("one query of an odd head"),
    ),
    Bug(
        "int8 cache: factors of the values read with the strides of the keys'",
        FOLDER + "cached_attention.py",
        "at = head_of(v_scales, v_scales_stride_b, «v_scales_stride_h», b, h)\n            values",
        "k_scales_stride_h",
        (INT8,),
    ),
    Bug(
        "epsilon outside the square root",
        FOLDER + "layer_norm.py",
        "scale = «tl.rsqrt(variance + eps)»",
        "1.0 / (tl.sqrt(variance) + eps)",
        (NORM,),
    ),
    Bug(
        "lanes past the last column count for the variance",
        FOLDER + "layer_norm.py",
        "deviation = «tl.where(mask, total - average, 0.0)»",
        "total - average",
        (NORM,),
    ),
    Bug(
        "bias added twice",
        FOLDER + "layer_norm.py",
        "out = cast(deviation * scale * gain + «shift», normed.dtype.element_ty)",
        "shift + shift",
        (NORM,),
    ),
    Bug(
        "wide rows: the blocks' averages differ, and nobody minds",
        FOLDER + "layer_norm.py",
        "tl.sum(deviation * deviation, 0)« + difference * difference * share * start»",
        "",
        ("test_layer_norm.py::test_rows_wider_than_a_program_holds[triton]",),
    ),
    Bug(
        "gradient of the bias summed in 16 bits",
        FOLDER + "mlp.py",
        "«total += grad_z\n»",
        "total = cast(total + grad_z, tl.bfloat16).to(tl.float32)\n",
        (GELU,),
    ),
    Bug(
        "product: the last inputs of a partial block are left out",
        FOLDER + "mlp.py",
        "mask_a &= depth[None, :] < «rest - start»",
        "(rest - start) // 2 * 2",
        (MLP,),
    ),
    Bug(
        "sum not scaled down at the second block of classes",
        FOLDER + "cross_entropy.py",
        "total = total« * tl.exp(greatest - base)» + tl.sum(",
        "",
        ("test_cross_entropy.py::test_classes_in_several_blocks[triton]",),
    ),
    Bug(
        "the room between two rows of logits counts for the loss",
        FOLDER + "cross_entropy.py",
        "logit = tl.where(counted & (column < «columns»), logit,",
        "room",
        (LOSS,),
    ),
    Bug(
        "embedding: a token's look-ups that begin in one block and end in the next are not added",
        FOLDER + "embedding.py",
        "crossing = begun« | (key == after)»",
        "",
        ("test_embedding.py::test_matches_torch[False-1023-torch.float32-triton]",),
    ),
    Bug(
        "AdamW: epsilon inside the square root",
        FOLDER + "optimizer.py",
        "(«tl.sqrt(v * correction2) + eps»)",
        "tl.sqrt(v * correction2 + eps)",
        (f"{BORDERS}fused_adamw[0.01-False-torch.float32-triton]",),
    ),
    Bug(
        "AdamW: a tensor's second chunk begins where its first one does",
        FOLDER + "optimizer.py",
        "at = «(program - first) * CHUNK» + start + tl.arange(0, BLOCK)",
        "(program - program) * CHUNK",
        (f"{BORDERS}fused_adamw[1e-08-False-torch.float32-triton]",),
    ),
    Bug(
        "appending one entry more than counted",
        FOLDER + "cache.py",
        "stored = (element < elements) & («t < count») & (place >= 0)",
        "t <= count",
        ("test_cache.py::test_appending_to_views",),
    ),
    Bug(
        "top-p: of equal scores at the edge one too many stays",
        FOLDER + "sampling.py",
        "last = tl.max(tl.where((at == 1) & («rank <= left_out»), tokens + 1, 0), 0)",
        "rank < left_out",
        (EXACT + "[None-64-{'top_p': 0.5}-triton]",),
    ),
    Bug(
        "min-p: a weight that equals the limit is left out",
        FOLDER + "sampling.py",
        "return tl.where(kept & typical & («weights >= min_p»), weights, 0.0)",
        "weights > min_p",
        (EXACT + "[None-64-{'min_p': 1.0}-triton]",),
    ),
    Bug(
        "mask of tokens: each bit stands for the next token",
        FOLDER + "sampling.py",
        "banned = within & (((words >> («tokens % 32»)) & 1) == 0)",
        "(tokens + 1) % 32",
        ("test_token_mask.py::test_a_masked_token_has_no_score[0.5-33-triton]",),
    ),
)


def copy_with(bug: Bug | None, folder: Path) -> None:
    """The package in `folder`, with the bug in it; what is not Python stays where it is."""
    package = folder / "gpt2fast"
    shutil.copytree(
        ROOT / "gpt2fast", package, ignore=shutil.ignore_patterns("assets", "__pycache__", "*.so")
    )
    if bug is not None:
        path = folder / bug.file
        path.write_text(planted(path.read_text(), [bug], lambda bug, right: bug.wrong))
