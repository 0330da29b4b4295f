"""LoRA (Hu et al., 2021): beside a frozen projection, one of low rank that is trained.

    y = x @ weight + bias + alpha / rank * dropout(x) @ lora_A^T @ lora_B^T

lora_A is (rank, in) and drawn as nn.Linear's weight is, lora_B is (out, rank) and begins at zero:
names, shapes, scale and initial values are those of PEFT, Hugging Face's library of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError
from ..model import GPT2
from ..nn.plain import readable
from ..nn.projection import Projection
from ..ops.projection import linear

RANK, ALPHA, TARGETS = 8, 8.0, "c_attn"
"""PEFT's defaults for GPT-2."""


@readable
class LoRAProjection(Projection):
    """A frozen `Projection` with a trainable one of low rank beside it.

    Args:
        base: projection whose weight and bias are used, not copied, and frozen.
        rank: columns of the two factors.
        alpha: the adapter's output is multiplied by alpha / rank.
        dropout: probability of dropping an element of the adapter's input while training.
    """

    def __init__(self, base: Projection, rank: int, alpha: float, dropout: float):
        super().__init__(*base.weight.shape, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        inputs, outputs = base.weight.shape
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, inputs))
        self.lora_B = nn.Parameter(base.weight.new_zeros(outputs, rank))
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    @property
    def scale(self) -> float:
        """Factor on what the adapter adds."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return super().forward(x) + linear(low * self.scale, self.lora_B)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """(in, out): the sum of the base's weight and the adapter's, in the base's dtype."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        added = self.lora_A.to(wide).t() @ self.lora_B.to(wide).t()
        return (self.weight.to(wide) + self.scale * added).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def add_adapters(
    model: GPT2,
    *,
    rank: int = RANK,
    alpha: float = ALPHA,
    dropout: float = 0.0,
    targets: str | Sequence[str] = TARGETS,
) -> list[str]:
    """Put adapters beside a model's projections and freeze everything else, in place.

    The model computes what it did: bit for bit where `attn` alone has adapters, within rounding
    where `mlp` has, which runs its projections one by one then and not as one op.

    Args:
        model: whose forward pass, `generate`, `pack`, `quantize` and `save_pretrained` go on
            working, with the adapters in effect.
        rank: of each adapter, at least 1 and less than the sizes of the projections.
        alpha: the adapters' output is multiplied by alpha / rank.
        dropout: probability of dropping an element of an adapter's input while training.
        targets: names or patterns, a sequence or separated by commas. A projection is meant by its
            whole name or by how it ends at a dot: "c_attn", "mlp.c_proj", "h.0.attn.c_proj";
            "c_proj" means two a block. * ? [0-3] match as in names of files: "h.[0-5].*".

    Returns:
        The names of the projections that have an adapter now.

    Raises:
        ArgumentError: a value out of its range, a target that matches nothing, or a model that has
            adapters already.
    """
    require_plain(model)
    if type(rank) is not int or rank < 1:
        raise ArgumentError(f"rank is {rank!r}, but must be an integer of at least 1")
    check_options(alpha, dropout)
    named = projections(model)
    chosen = _chosen(list(named), targets)
    for name in chosen:
        smaller = min(named[name].weight.shape)
        if rank >= smaller:
            raise ArgumentError(
                f"rank is {rank}, but must be below {smaller}, the smaller side of {name}'s "
                "weight: an adapter of more would hold more than the weight itself"
            )
    model.requires_grad_(False)
    for name in chosen:
        insert(model, name, LoRAProjection(named[name], rank, float(alpha), float(dropout)))
    return chosen


def is_adapted(model: nn.Module) -> bool:
    """True if the model has adapters."""
    return any(isinstance(module, LoRAProjection) for module in model.modules())


def adapted(model: nn.Module) -> dict[str, LoRAProjection]:
    """The projections that have an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRAProjection)}


def projections(model: nn.Module) -> dict[str, Projection]:
    """All projections by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Projection)}


def insert(model: nn.Module, name: str, projection: LoRAProjection) -> None:
    """Put `projection` in the place called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, projection)


def require_plain(model: nn.Module) -> None:
    """Raise ArgumentError for a model that no adapters can be added to."""
    if is_adapted(model):
        raise ArgumentError(
            "the model has adapters already; gpt2fast.lora.merge(model) makes them part of it"
        )
    if not projections(model):
        raise ArgumentError(
            f"a {type(model).__name__} has no projections that adapters could stand beside; add "
            "them to a GPT2, before pack() or quantize()"
        )


def check_options(alpha: float, dropout: float) -> None:
    """Raise ArgumentError for options out of their range."""
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
        raise ArgumentError(f"alpha is {alpha!r}, but must be a number above 0; {ALPHA:g} is usual")
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise ArgumentError(f"dropout is {dropout!r}, but must be in [0, 1)")


def _chosen(names: list[str], targets: str | Sequence[str]) -> list[str]:
    """The `names` that match a target, in their order."""
    patterns = targets.split(",") if isinstance(targets, str) else targets
    chosen: set[str] = set()
    for pattern in (pattern.strip() for pattern in patterns):
        meant = {name for name in names if any(fnmatchcase(e, pattern) for e in _endings(name))}
        if not meant:
            endings = sorted({e for name in names for e in _endings(name) if not e[0].isdigit()})
            near = get_close_matches(pattern, endings, 3) or sorted({_kind(n) for n in names})
            raise ArgumentError(
                f"the target {pattern!r:.80} matches no projection of the model; there is "
                f"{', '.join(near)}"
            )
        chosen |= meant
    if not chosen:
        raise ArgumentError(f"targets is {targets!r}, which names no projection; try {TARGETS!r}")
    return [name for name in names if name in chosen]


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _kind(name: str) -> str:
    return ".".join(name.split(".")[-2:])
