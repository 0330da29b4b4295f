"""What one training run is told: a frozen dataclass; its attribute docstrings are the help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. A bad value raises ConfigError when the object is made."""

    data: str | None = None
    """Prepared folder (from gpt2fast.prepare), text file, or folder of text files. Text is
    prepared into OUT/data first. A name that is not found here is looked for in $GPT2FAST_DATA."""
    out: str = "out"
    """Folder of the run: log.csv, checkpoints/, and at the end the model itself."""
    tokenizer: str | None = None
    """For text: char, bpe, gpt2, or a folder or hub name. Default: the tokenizer of init_from,
    else char."""
    vocab_size: int | None = None
    """For text and tokenizer bpe: size of the vocabulary to train (default 2048)."""
    split: Literal["position", "documents"] | None = None
    """For text: hold out the end of the text, or whole documents (default position)."""
    val_fraction: float | None = None
    """For text: share that is held out for validation, in (0, 1) (default 0.1)."""

    init_from: str | None = None
    """Start from these weights (folder, hub name or bundled name) instead of random ones."""
    n_layer: int | None = None
    """Layers (default 6; with init_from, the checkpoint's)."""
    n_head: int | None = None
    """Attention heads (default 6; with init_from, the checkpoint's)."""
    n_embd: int | None = None
    """Width (default 384; with init_from, the checkpoint's)."""
    block_size: int = 256
    """Tokens of context in training; without init_from also the model's n_positions."""
    dropout: float = 0.0
    """Dropout after embeddings, attention and each residual branch, in [0, 1)."""

    max_steps: int | None = None
    """Optimizer steps to train for (this or max_epochs; default 5000)."""
    max_epochs: float | None = None
    """Length in epochs (train tokens / tokens of a step) instead of max_steps."""
    batch_size: int = 32
    """Windows in one forward pass."""
    grad_accumulation: int = 1
    """Forward passes whose gradients are averaged into one step."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine (default lr / 10)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average, in [0, 1)."""
    beta2: float = 0.95
    """AdamW's decay of the squared-gradient average, in [0, 1)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings (biases and layer norms have none)."""
    grad_clip: float | None = 1.0
    """Largest gradient norm; null: no clipping."""

    eval_interval: int = 250
    """Steps between validations (there is one at the start and one at the end as well)."""
    eval_batches: int | None = None
    """Validation batches; null: the whole validation split."""
    log_interval: int = 10
    """Steps between rows of log.csv."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints (there is one at the end as well)."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the one with the best validation loss always is."""

    seed: int = 1337
    """Seed of initial weights, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision (autocast over float32 weights)."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the finished model's weights; checkpoints hold float32."""
    backend: Literal["auto", "native", "triton", "torch", "reference"] = "auto"
    """Implementation of the ops; auto: the fastest that is there."""
    compile: bool = False
    """Compile the model with torch.compile (needs a C++ compiler; the first step takes longer)."""
    threads: int | None = None
    """CPU threads (default: torch's choice). Runs repeat exactly only with the same number."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _checked_type(name, getattr(self, name), hint))
        for name in _POSITIVE_INTEGERS:
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("dropout", "beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "in [0, 1)")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            _require(value >= 0, name, value, "0 or more")
        if self.val_fraction is not None:
            _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "in (0, 1)")
        if self.threads is not None:
            _require(self.threads <= 1024, "threads", self.threads, "at most 1024")
        _require(self.lr > 0, "lr", self.lr, "above 0; 1e-3 is usual for a small model")
        if self.min_lr is not None:
            _require(
                0 <= self.min_lr <= self.lr,
                "min_lr",
                self.min_lr,
                f"between 0 and lr ({self.lr:g}); equal to lr keeps the rate constant",
            )
        if self.grad_clip is not None:
            _require(
                self.grad_clip > 0, "grad_clip", self.grad_clip, "above 0; null switches it off"
            )
        if self.max_epochs is not None:
            _require(self.max_epochs > 0, "max_epochs", self.max_epochs, "above 0")
            _require(
                self.max_steps is None,
                "max_epochs",
                self.max_epochs,
                f"given without max_steps (now {self.max_steps}); set one of the two to null",
            )
        _require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 - 1")
        _require(self.out != "", "out", self.out, "the name of a folder")
        if self.init_from is not None:
            for name in ("n_layer", "n_head", "n_embd"):
                _require(
                    getattr(self, name) is None,
                    name,
                    getattr(self, name),
                    f"null with init_from={self.init_from!r}, which brings its own architecture; "
                    "drop one of the two",
                )
        else:
            heads = self.n_head or DEFAULT_SHAPE["n_head"]
            width = self.n_embd or DEFAULT_SHAPE["n_embd"]
            _require(
                width % heads == 0,
                "n_embd",
                width,
                f"a multiple of n_head ({heads}); {max(1, round(width / heads)) * heads} is",
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain values for YAML or a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> TrainConfig:
        """The inverse of `to_dict`. Unknown names raise ConfigError naming `source`."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ConfigError(
                f"{source}: unknown field {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    @property
    def final_lr(self) -> float:
        """Learning rate at the end of the schedule."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def steps(self, train_tokens: int) -> int:
        """Length of the run in optimizer steps, for a training split of that many tokens."""
        if self.max_epochs is None:
            return 5000 if self.max_steps is None else self.max_steps
        tokens_per_step = self.batch_size * self.block_size * self.grad_accumulation
        return max(1, math.ceil(self.max_epochs * train_tokens / tokens_per_step))


DEFAULT_SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384}

_POSITIVE_INTEGERS = (
    "vocab_size",
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "max_steps",
    "batch_size",
    "grad_accumulation",
    "eval_interval",
    "eval_batches",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "threads",
)


def field_help() -> dict[str, str]:
    """Help text of each field of TrainConfig: the docstring below it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(TrainConfig))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name)
            assert isinstance(following.value, ast.Constant)
            texts[node.target.id] = " ".join(str(following.value.value).split())
    return texts


def _require(holds: bool, name: str, value: Any, limit: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {limit}")


def _checked_type(name: str, value: Any, hint: Any) -> Any:
    """`value` if it has the annotated type (an int passes for a float), else ConfigError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return value
    kind = options[0]
    if get_origin(kind) is Literal:
        _require(
            value in get_args(kind), name, value, "one of " + ", ".join(map(str, get_args(kind)))
        )
        return value
    if kind is float and type(value) in (int, float):
        _require(math.isfinite(value), name, value, "a finite number")
        return float(value)
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    or_null = " or null" if type(None) in options else ""
    _require(type(value) is kind, name, value, words[kind] + or_null)
    return value
