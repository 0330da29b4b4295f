"""The settings of a training run: a frozen dataclass whose attribute docstrings are the help."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NoReturn,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from .._system.docstrings import field_docstrings
from ..errors import ConfigError, shown, why_not_written
from .optimizers import OPTIMIZERS
from .optimizers.adamw import NARROW_BETA

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. A bad value raises ConfigError when the object is made."""

    data: str | None = None
    """Prepared folder (from gpt2fast prepare), text, .jsonl or .parquet file, folder of such files,
    or token files (.bin). Text is prepared into OUT/data first. A name that is not found here is
    looked for in $GPT2FAST_DATA. Several with weights, a.txt=0.7 b.jsonl=0.3, are a mixture."""
    mixture: dict[str, float] | None = None
    """Several of these with weights, {a.txt: 0.7, b.jsonl: 0.3}, instead of data: each batch has
    windows of each in that proportion."""
    dataset: str | None = None
    """Hugging Face data set (hub name or folder) instead of data (needs gpt2fast[datasets])."""
    dataset_config: str | None = None
    """Configuration of the data set, such as wikitext-2-raw-v1."""
    text_field: str = "text"
    """Field or column of a record that holds its text."""
    records: Literal["documents", "lines"] | None = None
    """A record is a document that an end token follows, or a line of one text (default: documents;
    lines for wikitext)."""
    sampling: Literal["random", "epoch"] = "random"
    """Windows begin anywhere, drawn by chance, or epoch by epoch: every window once, without
    overlap, before one comes again."""
    out: str = "out"
    """Folder of the run: log.csv, checkpoints/, and at the end the model itself."""
    tokenizer: str | None = None
    """For text: char, bpe, gpt2, or a folder or hub name. Default: the tokenizer of init_from,
    else char."""
    vocab_size: int | None = None
    """For text and tokenizer bpe: size of the vocabulary to train (default 2048)."""
    add_tokens: list[str] | None = None
    """For text: special tokens that the tokenizer gets, such as '<|user|>' '<|assistant|>'; with
    init_from, the model gets embeddings for them, which begin as the mean of the others."""
    split: Literal["position", "documents"] | None = None
    """For text: hold out the end of the text, or whole documents (default: the data set's own
    validation split, else position)."""
    val_fraction: float | None = None
    """For text: share that is held out for validation, in (0, 1) (default 0.1)."""

    init_from: str | None = None
    """Start from these weights (folder, file, hub name or bundled name) instead of random ones."""
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

    lora_rank: int | None = None
    """With init_from: train low-rank adapters of this rank and freeze everything else (LoRA; 8 is
    usual). OUT gets the merged model, OUT/adapter the adapters in PEFT's format."""
    lora_alpha: float = 8.0
    """The adapters' output is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout of what goes into the adapters, in [0, 1)."""
    lora_targets: str = "c_attn"
    """Projections that get one, separated by commas: c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj, or
    patterns such as h.[0-5].*"""
    freeze: str | None = None
    """Leave these parameters as they are: names or patterns, separated by commas, such as
    wte,wpe,h.[0-5]"""

    max_steps: int | None = None
    """Optimizer steps to train for (this, max_epochs or max_tokens; default 5000)."""
    max_epochs: float | None = None
    """Length in passes over the training tokens, instead of max_steps."""
    max_tokens: int | None = None
    """Length in training tokens, instead of max_steps."""
    max_hours: float | None = None
    """Stop cleanly after this much time, validations and resumptions counted."""
    target_loss: float | None = None
    """Stop cleanly once the validation loss (nats per token) is as low as this."""
    early_stopping: int | None = None
    """Stop cleanly after this many validations in a row without a new lowest loss."""
    batch_size: int = 32
    """Windows in one forward pass."""
    grad_accumulation: int = 1
    """Forward passes whose gradients are averaged into one step."""
    batch_warmup_steps: int = 0
    """Steps over which the forward passes of a step grow from 1 to grad_accumulation."""
    optimizer: OptimizerName = "adamw"
    """The rule that updates the weights."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the schedule (default lr / 10; constant has none)."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; wsd stays at the peak and goes down at the end."""
    decay_share: float = 0.2
    """With wsd: share of the run in which the rate goes down, in (0, 1]."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average, in [0, 1)."""
    beta2: float = 0.95
    """AdamW's decay of the squared-gradient average, in [0, 1)."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """AdamW's averages; bfloat16 takes half their memory, with beta1 and beta2 of 0.99 at most."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings (biases and layer norms have none)."""
    momentum: float = 0.95
    """Muon's decay of the gradient average, in [0, 1)."""
    grad_clip: float | None = 1.0
    """Largest gradient norm; null: no clipping."""
    checkpoint_activations: bool = False
    """Keep no activations inside the blocks and compute them again when they are needed: less
    memory, a third more work."""

    eval_interval: int = 250
    """Steps between validations (there is one at the start and one at the end as well)."""
    eval_batches: int | None = None
    """Validation batches; null: the whole validation split."""
    log_interval: int = 10
    """Steps between rows of log.csv and log.jsonl."""
    tensorboard: bool = False
    """Write the log for TensorBoard as well, into OUT/tensorboard (needs gpt2fast[logs])."""
    wandb: str | None = None
    """Send the log to this Weights & Biases project as well (needs the package wandb)."""
    log_histograms: bool = False
    """Show TensorBoard or Weights & Biases the distribution of every weight and gradient, at each
    validation."""
    sample_interval: int | None = None
    """Steps between samples of text, kept in OUT/samples.jsonl; null: none."""
    sample_prompt: str | None = None
    """Text that the samples continue (default: the end-of-text token, or a new line)."""
    sample_tokens: int = 200
    """Length of a sample, in tokens."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints (there is one at the end as well)."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the one with the best validation loss always is."""

    seed: int = 1337
    """Seed of initial weights, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16, float16: mixed precision (autocast over float32 weights and moments); float16 with
    a loss scale that follows its overflows."""
    parallel: Literal["ddp", "zero", "fsdp"] = "ddp"
    """Under torchrun: every process holds everything (ddp), shares of the optimizer's state (zero),
    or shares of the weights and gradients, too (fsdp)."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the finished model's weights; checkpoints hold float32."""
    backend: Literal["auto", "native", "triton", "torch", "reference"] = "auto"
    """Implementation of the ops; auto: the fastest that is there."""
    compile: bool = False
    """Compile the model with torch.compile (needs a C++ compiler; the first step takes longer)."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode; reduce-overhead: CUDA graphs of forward and backward pass."""
    threads: int | None = None
    """CPU threads (default: torch's choice). Runs repeat exactly only with the same number."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, hint in hints.items():
            object.__setattr__(self, name, _checked_type(name, getattr(self, name), hint))
        for name in ("data", "dataset", "out", "tokenizer", "init_from", "mixture"):
            value = getattr(self, name)
            for path in [value] if isinstance(value, str) else value or ():
                if reason := why_not_written(path):
                    raise ConfigError(f"{name} goes into config.yaml, but {reason}")
        self._check_ranges(hints)
        lengths = [name for name in LENGTHS if getattr(self, name) is not None]
        for name in lengths[1:]:
            given = f"{lengths[0]} (now {getattr(self, lengths[0])})"
            self._require(False, name, f"given without {given}; set one of the two to null")
        for name in ("wandb", "sample_prompt"):
            self._require(getattr(self, name) != "", name, "some text; null leaves it out")
        shown_somewhere = self.tensorboard or self.wandb is not None
        self._require(
            not self.log_histograms or shown_somewhere,
            "log_histograms",
            "false, or shown somewhere: add --tensorboard or --wandb PROJECT",
        )
        self._check_data()
        self._require(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1")
        self._require(self.out != "", "out", "the name of a folder")
        self._check_shape()
        self._check_fine_tuning()

    def _require(self, holds: bool, name: str, limit: str) -> None:
        if not holds:
            _refuse(name, getattr(self, name), limit)

    def _check_ranges(self, hints: dict[str, Any]) -> None:
        counts = {name for name, hint in hints.items() if int in (hint, *get_args(hint))}
        counts -= {"seed", *_FROM_ZERO}
        for name in hints:
            value, most = getattr(self, name), _LARGEST.get(name)
            if name in counts and value is not None:
                self._require(value >= 1, name, "at least 1")
                most = most or _LARGEST_COUNT
            if most is not None and value is not None:
                self._require(value <= most, name, f"at most {most}")
        self._require(
            self.batch_size * self.block_size <= _MOST_TOKENS,
            "batch_size",
            f"at most {_MOST_TOKENS} / block_size ({self.block_size}); --grad-accumulation makes "
            "larger steps of several batches",
        )
        for name in ("dropout", "lora_dropout", "beta1", "beta2", "momentum"):
            self._require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        for name in ("beta1", "beta2") if self.moments == "bfloat16" else ():
            limit = f"at most {NARROW_BETA} with moments in bfloat16, which would not follow"
            self._require(getattr(self, name) <= NARROW_BETA, name, limit)
        for name in _FROM_ZERO:
            self._require(getattr(self, name) >= 0, name, "0 or more")
        fraction, clip = self.val_fraction, self.grad_clip
        self._require(fraction is None or 0 < fraction < 1, "val_fraction", "in (0, 1)")
        self._require(self.lr > 0, "lr", "above 0; 1e-3 is usual for a small model")
        limit = f"between 0 and lr ({self.lr:g}); equal to lr keeps the rate constant"
        self._require(self.min_lr is None or 0 <= self.min_lr <= self.lr, "min_lr", limit)
        self._require(clip is None or clip > 0, "grad_clip", "above 0; null switches it off")
        for name in ("max_epochs", "max_hours", "target_loss"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "above 0")
        self._require(0 < self.decay_share <= 1, "decay_share", "in (0, 1]")

    def _check_shape(self) -> None:
        if self.init_from is not None:
            limit = f"null with init_from={self.init_from!r}, which brings its own architecture; "
            for name in DEFAULT_SHAPE:
                self._require(getattr(self, name) is None, name, f"{limit}drop one of the two")
            return
        heads = self.n_head or DEFAULT_SHAPE["n_head"]
        width = self.n_embd or DEFAULT_SHAPE["n_embd"]
        if width % heads:
            near = max(1, round(width / heads)) * heads
            _refuse("n_embd", width, f"a multiple of n_head ({heads}); {near} is")

    def _check_fine_tuning(self) -> None:
        self._require(self.lora_alpha > 0, "lora_alpha", "above 0; 8 is usual")
        for name in ("lora_targets", "freeze"):
            value = getattr(self, name)
            self._require(value is None or value.strip(" ,") != "", name, "names or patterns")
        rank = self.lora_rank
        if rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                default = type(self).__dataclass_fields__[name].default
                limit = f"{default!r} without lora_rank: add --lora-rank 8, or leave it out"
                self._require(getattr(self, name) == default, name, limit)
            return
        self._require(
            self.init_from is not None,
            "lora_rank",
            "null without init_from: adapters change a model that has been trained; name one "
            "with --init-from",
        )
        self._require(
            self.freeze is None,
            "freeze",
            f"null with lora_rank={rank}, which freezes everything but the adapters; "
            "--lora-targets says where they are",
        )
        reason = OPTIMIZERS[self.optimizer].why_no_adapters
        suitable = " or ".join(n for n, entry in OPTIMIZERS.items() if not entry.why_no_adapters)
        self._require(reason is None, "optimizer", f"{suitable} with lora_rank={rank}: {reason}")
        self._require(
            self.parallel != "fsdp",
            "parallel",
            f"ddp or zero with lora_rank={rank}: adapters are too small to be worth sharding",
        )

    def _check_data(self) -> None:
        named = [name for name in DATA_SOURCES if getattr(self, name) is not None]
        for name in named[1:]:
            self._require(False, name, f"null beside {named[0]}; drop one of the two")
        if self.add_tokens is not None:
            texts = [token for token in self.add_tokens if type(token) is str and token]
            all_are = bool(texts) and len(texts) == len(self.add_tokens)
            self._require(all_are, "add_tokens", "texts, one at least; null adds none")
        if self.dataset_config is not None:
            limit = "null without dataset, whose configuration it is"
            self._require(self.dataset is not None, "dataset_config", limit)
        if self.mixture is None:
            return
        fine = bool(self.mixture) and all(
            type(name) is str and name and type(weight) in (int, float)
            and 0 < weight <= _LARGEST_FLOAT
            for name, weight in self.mixture.items()
        )  # fmt: skip
        limit = "names with weights above 0, such as {a.txt: 0.7, b.jsonl: 0.3}"
        self._require(fine, "mixture", limit)
        object.__setattr__(self, "mixture", {n: float(w) for n, w in self.mixture.items()})

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain values for YAML or a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> TrainConfig:
        """The settings in `values`, as `to_dict` gave them.

        Raises:
            ConfigError: one is unknown; it names `source`.
        """
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

    def micro_batches(self, step: int) -> int:
        """Forward passes, of all processes together, in optimizer step `step`, counted from 0."""
        if step >= self.batch_warmup_steps:
            return self.grad_accumulation
        return 1 + (self.grad_accumulation - 1) * step // self.batch_warmup_steps

    def steps(self, train_tokens: int) -> int:
        """Length of the run in optimizer steps, for a training split of that many tokens."""
        if self.max_epochs is None and self.max_tokens is None:
            return 5000 if self.max_steps is None else self.max_steps
        wanted = self.max_tokens or math.ceil((self.max_epochs or 0) * train_tokens)
        left = math.ceil(wanted / (self.batch_size * self.block_size))
        for step in range(self.batch_warmup_steps):
            if left <= 0:
                return max(1, step)
            left -= self.micro_batches(step)
        return max(1, self.batch_warmup_steps + math.ceil(left / self.grad_accumulation))


DEFAULT_SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384}

DATA_SOURCES = ("data", "mixture", "dataset")
"""Settings that name the data; a run has one of them."""

DATA_SETTINGS = (
    *(*DATA_SOURCES, "dataset_config", "text_field", "records"),
    *("tokenizer", "vocab_size", "add_tokens", "split", "val_fraction"),
)
"""Settings that say what the data are and how text is prepared."""

LENGTHS = ("max_steps", "max_epochs", "max_tokens")
"""Settings that give the length of a run; it has one of them."""

_FROM_ZERO = ("warmup_steps", "batch_warmup_steps", "weight_decay")
# Far above what anybody trains with, and so low that products do not overflow.
_LARGEST_COUNT = (1 << 31) - 1
_LARGEST: dict[str, float] = {
    "warmup_steps": _LARGEST_COUNT,
    **{"batch_warmup_steps": 1_000_000, "max_steps": 1 << 40, "max_tokens": 1 << 53},
    **{"max_epochs": 1e9, "max_hours": 1e6, "threads": 1024},
}
_MOST_TOKENS = 1 << 28
"""Most tokens in a batch; their ids alone take two gigabytes."""
_LARGEST_FLOAT = sys.float_info.max


def field_help() -> dict[str, str]:
    """Help text of each field of TrainConfig: the docstring below it in the source."""
    texts = field_docstrings(TrainConfig)
    entries = "; ".join(f"{name}: {entry.help}" for name, entry in OPTIMIZERS.items())
    texts["optimizer"] = f"{texts['optimizer'].removesuffix('.')} ({entries})"
    return texts


def _refuse(name: str, value: Any, limit: str) -> NoReturn:
    raise ConfigError(f"{name} is {shown(value)}, but must be {limit}")


def _checked_type(name: str, value: Any, hint: Any) -> Any:
    """`value` if it has the annotated type (an int passes for a float), else ConfigError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return value
    kind = options[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            _refuse(name, value, "one of " + ", ".join(map(str, get_args(kind))))
        return value
    if kind is float and type(value) in (int, float):
        if not abs(value) <= _LARGEST_FLOAT:
            _refuse(name, value, "a finite number")
        return float(value)
    kind = get_origin(kind) or kind
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    words[dict], words[list] = "names with numbers", "a list of texts"
    if type(value) is not kind:
        _refuse(name, value, words[kind] + (" or null" if type(None) in options else ""))
    if kind is str and "\0" in value:
        _refuse(name, value, "text without NUL characters")
    return value
