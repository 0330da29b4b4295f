"""The shape and constants of a GPT-2 (Radford et al., 2019), under Hugging Face's field names."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from typing import Any

from .errors import ConfigError, shown

CONFIG_FILE = "config.json"
"""The file of a model's folder that holds its configuration."""

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")
"""The supported activations, by the names that ops give them."""

_SAME_ACTIVATION = {
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}

ACTIVATION_NAMES = (*ACTIVATIONS, *_SAME_ACTIVATION)
"""All names that a configuration may give activations, which are transformers'."""

_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Names that transformers' models have in common, and GPT-2's own for the same sizes."""

# Far above any GPT-2, far below what overflows an index: a corrupted size fails here, by name.
_LARGEST = {"n_layer": 1 << 12}
_LARGEST_SIZE = 1 << 24


@dataclass(frozen=True)
class GPT2Config:
    """Configuration of a GPT-2; names and defaults are those of `transformers.GPT2Config`.

    `GPT2Config(dropout=0.1)` is shorthand for setting `resid_pdrop`, `embd_pdrop` and
    `attn_pdrop` together.

    Raises:
        ConfigError: a field has a wrong type or lies outside its range.
    """

    vocab_size: int = 50257
    """Number of token ids."""
    n_positions: int = 1024
    """Longest sequence, in tokens."""
    n_embd: int = 768
    """Width of the residual stream."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention heads; divides `n_embd`."""
    n_inner: int | None = None
    """Width of the MLP's hidden layer; None means `4 * n_embd`."""
    activation_function: str = "gelu_new"
    """The MLP's activation: gelu_new (tanh form), gelu (erf), relu, silu, tanh, or one of
    transformers' other names for them (gelu_pytorch_tanh, gelu_fast, gelu_python, swish, …)."""
    resid_pdrop: float = 0.1
    """Dropout probability on what each attention and MLP adds to the residual stream."""
    embd_pdrop: float = 0.1
    """Dropout probability on the sum of token and position embeddings."""
    attn_pdrop: float = 0.1
    """Dropout probability on the attention weights."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every layer normalization."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    scale_attn_weights: bool = True
    """Divide attention scores by `sqrt(head_dim)`."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Divide attention scores of layer i by `i + 1` as well."""
    reorder_and_upcast_attn: bool = False
    """Compute attention scores in float32 whatever the weights' dtype (ours always do)."""
    tie_word_embeddings: bool = True
    """Use the token embedding as the output projection."""
    bos_token_id: int | None = 50256
    """Token that begins a text."""
    eos_token_id: int | None = 50256
    """Token that ends a text."""
    output_hidden_states: bool | int | Sequence[int] = False
    """What a call of the model that does not say it returns: no hidden states, all, or some of them
    by index."""
    output_attentions: bool = False
    """Return attention weights from a call of the model that does not say it."""
    dropout: InitVar[float | None] = None

    def __post_init__(self, dropout: float | None) -> None:
        if dropout is not None:
            for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
                object.__setattr__(self, name, dropout)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            self._check_size(name)
        if self.n_inner is not None:
            self._check_size("n_inner")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: "
                "each head has n_embd / n_head dimensions; change one of them"
            )
        if self.activation_function not in ACTIVATION_NAMES:
            raise ConfigError(
                f"activation_function={shown(self.activation_function)} is not supported; "
                f"choose one of {', '.join(ACTIVATION_NAMES)}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            value = self._check_number(name)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{name}={value} is not a probability in [0, 1)")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = self._check_number(name)
            if not 0.0 < value < math.inf:
                raise ConfigError(f"{name}={value} must be a positive finite number")
        for name in (
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "reorder_and_upcast_attn",
            "tie_word_embeddings",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be true or false")
        self._check_outputs()
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                raise ConfigError(f"{name}={shown(token)} must be a token id (an integer) or null")
            if token is not None and abs(token) >= 1 << 63:
                raise ConfigError(f"{name}={shown(token)} must be a token id below 2^63")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def activation(self) -> str:
        """The activation under the name that ops give it, one of `ACTIVATIONS`."""
        return plain_activation(self.activation_function)

    @property
    def hidden_size(self) -> int:
        """`n_embd`, under the name that transformers' models have in common."""
        return self.n_embd

    @property
    def max_position_embeddings(self) -> int:
        """`n_positions`, under the name that transformers' models have in common."""
        return self.n_positions

    @property
    def num_attention_heads(self) -> int:
        """`n_head`, under the name that transformers' models have in common."""
        return self.n_head

    @property
    def num_hidden_layers(self) -> int:
        """`n_layer`, under the name that transformers' models have in common."""
        return self.n_layer

    @property
    def parameter_count(self) -> int:
        """Number of parameters; a tied output projection counts once."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of a GPT-2 by name; projections are (in, out)."""
        width, block = self.n_embd, block_shapes(self.n_embd, self.inner_width)
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, width),
            "wpe.weight": (self.n_positions, width),
        }
        for layer in range(self.n_layer):
            shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, width)
        return shapes

    def attention_scale(self, layer: int) -> float:
        """Factor on the attention scores of layer `layer` (0-based)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPT2Config:
        """One of OpenAI's four shapes: gpt2, gpt2-medium, gpt2-large, gpt2-xl.

        Args:
            name: the preset's name.
            changes: fields to replace, for example `n_positions=256`.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}")
        return replace(PRESETS[name], dropout=None, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> GPT2Config:
        """Build a configuration from the content of a `config.json`.

        Args:
            values: field names and values; names that GPT-2 does not use are ignored.
            source: the file's name, for the error message.

        Raises:
            ConfigError: a field has a wrong type or value, or the file describes another model.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: expected a JSON object, found {type(values).__name__}")
        model_type, classes = values.get("model_type", "gpt2"), values.get("architectures")
        other = model_type != "gpt2" and f"model_type={shown(model_type)}"
        if "model_type" not in values and isinstance(classes, list) and classes:
            # Old files do not say it. Other models may have all of the sizes that GPT-2 has.
            other = "gpt" not in str(classes[0]).lower() and f"architectures={shown(classes)}"
        if other:
            raise ConfigError(
                f"{source}: {other} is not a GPT-2, and gpt2fast runs GPT-2 only ('gpt2'); "
                "transformers loads other models"
            )
        if values.get("add_cross_attention", False) is not False:
            raise ConfigError(
                f"{source}: add_cross_attention={shown(values['add_cross_attention'])}: "
                "cross-attention is not part of GPT-2's language model"
            )
        names = {field.name for field in fields(cls)} | set(_OTHER_NAMES)
        known = {name: value for name, value in values.items() if name in names}
        # Checkpoints of transformers before 2.x call the context length n_ctx.
        if not known.keys() & {"n_positions", "max_position_embeddings"} and "n_ctx" in values:
            known["n_positions"] = values["n_ctx"]
        try:
            return cls(**known)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers and `from_dict` read."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("output_hidden_states", "output_attentions"):
            if values[name] is False:
                del values[name]
        if isinstance(values.get("output_hidden_states"), tuple):
            values["output_hidden_states"] = list(values["output_hidden_states"])
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **values}

    def _check_outputs(self) -> None:
        states, attentions = self.output_hidden_states, self.output_attentions
        if isinstance(states, (list, tuple)):
            states = tuple(states)
        object.__setattr__(self, "output_hidden_states", False if states is None else states)
        object.__setattr__(self, "output_attentions", False if attentions is None else attentions)
        indices = states if isinstance(states, tuple) else (states,)
        if states is not None and not all(type(x) in (bool, int) for x in indices):
            raise ConfigError(
                f"output_hidden_states={shown(states)} must be true, false, or numbers of layers"
            )
        if attentions not in (True, False, None):
            raise ConfigError(f"output_attentions={shown(attentions)} must be true or false")

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(
                f"{name}={shown(value)} must be an integer, not {type(value).__name__}"
            )
        largest = _LARGEST.get(name, _LARGEST_SIZE)
        if not 1 <= value <= largest:
            raise ConfigError(f"{name}={shown(value)} must lie between 1 and {largest}")

    def _check_number(self, name: str) -> float:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name}={shown(value)} must be a number, not {type(value).__name__}")
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name}={shown(value)} is beyond the largest float") from None


def block_shapes(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a block by name, in the order in which a step reads them.

    Args:
        width: of the residual stream.
        inner: width of the MLP's hidden layer.
    """
    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width),
        "mlp.c_proj.bias": (width,),
    }


BLOCK_PARAMETERS = tuple(block_shapes(1, 1))
"""The names of a block's parameters."""

BLOCK_MATRICES = tuple(name for name, shape in block_shapes(1, 1).items() if len(shape) == 2)
"""The names of the weights of a block's projections."""


def plain_activation(name: str) -> str:
    """The one of `ACTIVATIONS` that this one of `ACTIVATION_NAMES` stands for."""
    return _SAME_ACTIVATION.get(name, name)


def as_config(config: object) -> GPT2Config:
    """A `GPT2Config` as it is, or made of transformers' one.

    Raises:
        ConfigError: neither, or not a GPT-2's.
    """
    if isinstance(config, GPT2Config):
        return config
    kind = type(config)
    if hasattr(config, "model_type") and hasattr(config, "to_dict"):
        return GPT2Config.from_dict(config.to_dict(), source=f"{kind.__module__}.{kind.__name__}")
    raise ConfigError(
        f"config must be a gpt2fast.GPT2Config or transformers' one, not {kind.__name__}; "
        "GPT2Config.from_dict takes the content of a config.json"
    )


def _under_other_names(construct: Any) -> Any:
    """`GPT2Config.__init__` that knows `_OTHER_NAMES` as well."""

    @functools.wraps(construct)
    def init(self: GPT2Config, *values: Any, **named: Any) -> None:
        for other in _OTHER_NAMES.keys() & named.keys():
            name, value = _OTHER_NAMES[other], named.pop(other)
            if named.setdefault(name, value) != value:
                raise ConfigError(
                    f"{name}={shown(named[name])} and {other}={shown(value)} are two names of one "
                    "size; leave one out"
                )
        construct(self, *values, **named)

    return init


GPT2Config.__init__ = _under_other_names(GPT2Config.__init__)  # type: ignore[method-assign]

PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
"""OpenAI's four sizes by name."""
