"""From a model to its quantized weights, layer by layer.

A layer is calibrated on what it will really get: the activations that come out of the layers
before it as they are after quantization. One layer at a time is copied to float32; the model that
was given is not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..config import BLOCK_MATRICES
from ..errors import ArgumentError
from ..model import GPT2
from ..nn import Block, Projection
from ..nn.projection import merged
from ..ops.packed import QuantizedMatrix
from .calibration import calibration_tokens
from .feedback import round_with_feedback
from .quantized import GROUPS, QuantizedWeights, checked_group, matrix_shapes
from .rounding import round_to_nearest

METHODS = ("feedback", "nearest")

NARROW = 512
"""Below this width int4 keeps the token embedding at 8 bits, if nothing else is asked for. A
token's row is all that the first layer gets of it. Two models were measured: at width 256 the
embedding is two thirds of all that int4 costs; at 768 (trained briefly) int4 everywhere costs 0.1 %
of perplexity. Where between them the line is drawn is a guess."""

Progress = Callable[[str, int, int], None]


def quantize_weights(
    model: GPT2,
    scheme: str,
    *,
    calibration: Tensor | Sequence[int] | None = None,
    group_size: int | None = None,
    method: str | None = None,
    sensitive: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> QuantizedWeights:
    """Quantize every projection, the token embedding and the output projection.

    Args:
        model: in any floating-point dtype, on any device; not changed. Adapters are merged.
        scheme: "int8" or "int4"; symmetric, with a float16 scale for each group of inputs.
        calibration: token ids, (T,) or (B, T), of a text like those to come; None lets the model
            write one. A few thousand tokens are enough.
        group_size: inputs that share a scale: 64 for int8; 32 or 64 for int4. None is the first.
        method: "feedback" minimizes the error of each matrix's outputs on the calibration text;
            "nearest" rounds, without a text and at once. None is "nearest" for int8, whose error is
            small, and "feedback" for int4.
        sensitive: patterns of names ("h.0.*", "wte.weight") that int4 keeps at 8 bits; None is
            the token embedding of a model narrower than `NARROW`, and nothing else.
        seed: of the text that the model writes.
        progress: called after each matrix with its name, how many are done, and how many there are.

    Raises:
        ArgumentError: an argument is out of its range.
        WeightsError: weights or activations are not finite, or beyond float16's range.
    """
    group = checked_group(scheme, group_size)
    if method is None:
        method = "nearest" if scheme == "int8" else "feedback"
    if method not in METHODS:
        raise ArgumentError(f"method={method!r:.80} is not one of {', '.join(METHODS)}")
    if model.device.type == "meta":
        raise ArgumentError("the model is on device 'meta' and has no weights; load some first")
    model = merged(model)
    names = matrix_shapes(model.config)
    if sensitive is None:
        sensitive = ["wte.weight"] if model.config.n_embd < NARROW else []
    _check_patterns(sensitive, names)
    rounding = _Rounding(scheme, group, sensitive, len(names), progress)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if method == "nearest":
                note = "rounded to nearest"
                _round_all(model, rounding)
            else:
                tokens, text = calibration_tokens(model, calibration, seed)
                note = f"rounded with feedback on {text}"
                _calibrate_all(model, tokens, rounding)
    finally:
        model.train(was_training)
    return QuantizedWeights(scheme, group, {name: rounding.done[name] for name in names}, note)


class _Rounding:
    """The matrices quantized so far, and the settings for the next ones."""

    def __init__(
        self,
        scheme: str,
        group: int,
        sensitive: Sequence[str],
        total: int,
        progress: Progress | None,
    ):
        self.done: dict[str, QuantizedMatrix] = {}
        self._scheme, self._group, self._sensitive = scheme, group, sensitive
        self._total, self._progress = total, progress

    def add(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> QuantizedMatrix:
        """Quantize a weight (K, N), with feedback where its inputs' Hessian is known."""
        bits, group = (8, 64) if self._scheme == "int8" else (4, self._group)
        if any(fnmatchcase(name, pattern) for pattern in self._sensitive):
            bits, group = 8, GROUPS["int8"][0]
        weight = weight.cpu()
        if hessian is None:
            matrix = round_to_nearest(weight, bits, group)
        else:
            matrix = round_with_feedback(weight, hessian, bits, group)
        self.done[name] = matrix
        if self._progress is not None:
            self._progress(name, len(self.done), self._total)
        return matrix


def _round_all(model: GPT2, rounding: _Rounding) -> None:
    parameters = dict(model.named_parameters())
    for name in matrix_shapes(model.config):
        weight = parameters[name]
        rounding.add(name, weight if name.startswith("h.") else weight.t())


def _calibrate_all(model: GPT2, tokens: Tensor, rounding: _Rounding) -> None:
    final = torch.zeros(model.config.n_embd, model.config.n_embd)
    for row in tokens:
        final += _hessian(model.hidden_states(row[None].to(model.device)).cpu()) / len(tokens)
    if model.config.tie_word_embeddings:
        embedding = rounding.add("wte.weight", model.wte.weight.t(), final)
    else:
        # Rows are only looked up, so that every error of a row counts the same.
        embedding = rounding.add("wte.weight", model.wte.weight.t(), torch.eye(len(final)))
        rounding.add("lm_head.weight", model.lm_head.weight.t(), final)
    wpe = model.wpe.weight[: tokens.shape[1]].cpu().float()
    x = _looked_up(embedding, tokens) + wpe
    for layer, block in enumerate(model.blocks):
        x = _calibrate_block(_float_copy(block), f"h.{layer}.", x, rounding)


def _calibrate_block(block: Block, prefix: str, x: Tensor, rounding: _Rounding) -> Tensor:
    """Quantize a block's projections as x (B, T, width) reaches them; returns its output."""

    def watch(name: str) -> None:
        def quantize(projection: Projection, inputs: tuple[Tensor, ...]) -> None:
            matrix = rounding.add(prefix + name, projection.weight, _hessian(inputs[0]))
            projection.weight.data = matrix.dequantize()

        block.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(quantize)

    for name in BLOCK_MATRICES:
        watch(name)
    return block(x)


def _hessian(x: Tensor) -> Tensor:
    """(K, K) mean of the outer products of x's rows, (..., K)."""
    rows = x.float().reshape(-1, x.shape[-1])
    return rows.t() @ rows / len(rows)


def _looked_up(embedding: QuantizedMatrix, tokens: Tensor) -> Tensor:
    """(B, T, width) rows of a quantized (width, vocabulary) embedding."""
    flat = tokens.flatten()
    found = QuantizedMatrix(
        embedding.q[:, flat], embedding.scales[:, flat], embedding.bits, embedding.group
    )
    return found.dequantize().t().reshape(*tokens.shape, -1)


def _float_copy(block: Block) -> Block:
    return copy.deepcopy(block).to("cpu", torch.float32)


def _check_patterns(patterns: Sequence[str], names: Iterable[str]) -> None:
    if isinstance(patterns, str):
        raise ArgumentError(
            f"sensitive={patterns!r:.80} must be a list of patterns: [{patterns!r:.80}]"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(
                f"sensitive has {pattern!r:.80}, which matches no matrix of this model; "
                "names look like wte.weight and h.0.attn.c_attn.weight"
            )
