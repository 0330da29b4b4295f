"""A quantized model in float32: the integer kernels' results, except for the order of sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import GPT2
from ..nn.projection import merged
from .quantized import QuantizedWeights
from .rounding import inverse


def simulate(model: GPT2, quantized: QuantizedWeights, activations: bool = False) -> GPT2:
    """A float32 copy of `model`, in evaluation mode, with the quantized weights' values.

    Args:
        model: the model that `quantized` was made from.
        quantized: its matrices.
        activations: round what goes into each matrix as well.
    """
    state = {name: tensor.detach().float() for name, tensor in merged(model).state_dict().items()}
    for name, matrix in quantized.matrices.items():
        values = matrix.dequantize().to(model.device)
        state[name] = values if name.startswith("h.") else values.t().contiguous()
    copy = type(model)(model.config, device="meta", dtype=torch.float32)
    copy.load_state_dict(state, assign=True)
    if activations:
        for name, matrix in quantized.matrices.items():
            if name.startswith("h."):
                module = copy.get_submodule(name.removesuffix(".weight"))
                module.register_forward_pre_hook(_rounding_inputs(matrix.group))
        head = "wte.weight" if model.config.tie_word_embeddings else "lm_head.weight"
        copy.ln_f.register_forward_hook(_rounding_output(quantized.matrices[head].group))
    return copy.eval()


def round_activations(x: Tensor, group: int) -> Tensor:
    """x (..., K) as the kernels see it: int8, each group of a row scaled by its largest / 127."""
    width = x.shape[-1]
    groups = F.pad(x, (0, -width % group)).unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    rounded = (groups * inverse(scales)).round().clamp(-127, 127) * scales
    return rounded.flatten(-2)[..., :width]


def _rounding_inputs(group: int) -> Any:
    return lambda module, inputs: (round_activations(inputs[0], group),)


def _rounding_output(group: int) -> Any:
    return lambda module, inputs, output: round_activations(output, group)
