"""GPT-2 (Radford et al., 2019): embeddings, pre-norm blocks, a tied output projection."""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .cache import KVCache
from .config import GPT2Config
from .errors import ArgumentError, ConfigError
from .graph_pool import forget_moved
from .inputs import (
    check_cache,
    check_inputs,
    check_positions,
    check_tokens,
    check_wanted,
    is_known_full,
)
from .lora.adapters import is_adapted, without_adapters
from .nn import Block, LinearCrossEntropy, ResidualLayerNorm, is_hooked
from .ops.backend import requested_backend
from .ops.decode import LAYER_WEIGHTS
from .ops.native import CACHE_DTYPES as KERNEL_CACHE_DTYPES
from .ops.native import DTYPES as KERNEL_DTYPES
from .ops.native import fingerprint, unavailable
from .packed import PackedGPT2, pack

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_layer_weights = attrgetter(*LAYER_WEIGHTS)


class GPT2Output:
    """What a forward pass returns.

    With labels or targets the logits are computed when they are first read: who wants the loss
    alone never pays for a (B, T, vocab) tensor. They are what the forward pass would have given,
    under its gradient mode and autocast; changing the weights in between is an error.

    Args:
        loss: scalar, or None.
        hidden: (B, T, width) hidden states.
        projection: (vocab, width), which makes logits of them.
    """

    def __init__(self, loss: Tensor | None, hidden: Tensor, projection: Tensor):
        self.loss = loss
        """Scalar mean loss in nats, or None without labels and targets."""
        self._logits = F.linear(hidden, projection) if loss is None else None
        if loss is not None:
            device = hidden.device.type
            self._hidden, self._projection = hidden, projection
            self._grad = torch.is_grad_enabled()
            self._autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            # Neither a traced program nor a tensor made in inference mode counts its changes.
            counted = not torch.compiler.is_compiling() and not projection.is_inference()
            self._version = projection._version if counted else None

    @classmethod
    def computed(cls, loss: Tensor | None, logits: Tensor) -> GPT2Output:
        """An output with this `loss` whose `logits`, (B, T, vocab), are there already."""
        output = cls.__new__(cls)
        output.loss, output._logits = loss, logits
        return output

    @property
    def logits(self) -> Tensor:
        """(B, T, vocab), or the positions kept by `logits_to_keep`.

        Raises:
            ArgumentError: read for the first time after the weights were changed.
        """
        if self._logits is None:
            if self._version is not None and self._projection._version != self._version:
                raise ArgumentError(
                    "the weights were changed after this forward pass, which did not need its "
                    "logits until now: read .logits before the optimizer's step"
                )
            enabled, dtype = self._autocast
            with (
                torch.inference_mode(self._hidden.is_inference()),
                torch.set_grad_enabled(self._grad),
                torch.autocast(self._hidden.device.type, dtype, enabled=enabled),
            ):
                self._logits = F.linear(self._hidden, self._projection)
        return self._logits


class GPT2(nn.Module):
    """GPT-2 with a language-model head.

    Args:
        config: the shape.
        device, dtype: of the parameters, which are initialised as transformers does. On device
            "meta" nothing is stored or drawn.

    `model.gradient_checkpointing = True` trades time for memory: each block's activations are
    recomputed in the backward pass (Chen et al., 2016).
    """

    def __init__(
        self,
        config: GPT2Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(config, GPT2Config):
            raise ConfigError(
                f"config must be a GPT2Config, not {type(config).__name__}; "
                "GPT2Config.from_dict takes the content of a config.json"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.gradient_checkpointing = False
        self._packed: tuple[list[tuple[int, int]], int, PackedGPT2] | None = None
        # From empty tables: initial values drawn here would only be replaced below.
        self.wte = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.n_embd, **factory), freeze=False
        )
        self.wpe = nn.Embedding.from_pretrained(
            torch.empty(config.n_positions, config.n_embd, **factory), freeze=False
        )
        self.h = nn.ModuleList(
            Block(
                config.n_embd,
                config.n_head,
                config.inner_width,
                config.activation_function,
                config.resid_pdrop,
                config.attn_pdrop,
                config.attention_scale(layer),
                config.layer_norm_epsilon,
                **factory,
            )
            for layer in range(config.n_layer)
        )
        self.ln_f = ResidualLayerNorm(config.n_embd, config.layer_norm_epsilon, **factory)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, **factory)
        self.loss = LinearCrossEntropy()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: N(0, initializer_range^2), biases zero; what is added to the residual
        stream is scaled by 1 / sqrt(2 * n_layer) (Radford et al., 2019, section 2.3)."""
        if self.wte.weight.is_meta:
            return
        std = self.config.initializer_range
        nn.init.normal_(self.wte.weight, std=std)
        nn.init.normal_(self.wpe.weight, std=std)
        for block in self.blocks:
            block.attn.c_attn.reset_parameters(std)
            block.mlp.c_fc.reset_parameters(std)
            block.attn.c_proj.reset_parameters(std / (2 * self.config.n_layer) ** 0.5)
            block.mlp.c_proj.reset_parameters(std / (2 * self.config.n_layer) ** 0.5)
        if not self.config.tie_word_embeddings:
            nn.init.normal_(self.lm_head.weight, std=std)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, first to last."""
        return cast("list[Block]", list(self.h))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.wte.weight.dtype

    @property
    def projection(self) -> Tensor:
        """(vocab, width) output projection: the token embedding where they are tied."""
        if self.config.tie_word_embeddings:
            return self.wte.weight
        return self.lm_head.weight

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step for one token reads."""
        looked_up = [] if self.config.tie_word_embeddings else [self.wte.weight]
        looked_up.append(self.wpe.weight)
        return sum(p.nbytes for p in self.parameters()) - sum(p.nbytes for p in looked_up)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
    ) -> GPT2Output:
        """Logits and, with labels or targets, the loss.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, T), 1 where a token is real and 0 where it is padding; any pattern.
                What is computed at a masked position is unspecified.
            position_ids: (B, T) or (T,) int64; defaults to 0 .. T - 1, or to what follows the
                tokens seen where a cache is given.
            labels: (B, T) int64; position t is trained to predict labels[:, t + 1]; -100 does not
                count.
            cache: the tokens before these; their keys and values are appended to it.
            logits_to_keep: compute logits for the last so many positions only (0 means all), or
                for the positions of an index tensor.
            targets: (B, T) int64; position t is trained to predict targets[:, t]; -100 does not
                count. Give labels or targets, not both.
        """
        if labels is not None and targets is not None:
            raise ArgumentError(
                "give labels (shifted inside) or targets (already shifted), not both"
            )
        for name, wanted in (("labels", labels), ("targets", targets)):
            if wanted is not None:
                check_wanted(self.config, name, wanted, input_ids)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, cache)
        loss = None
        if labels is not None:
            loss = self.loss(hidden[:, :-1], self.projection, labels[:, 1:])
        elif targets is not None:
            loss = self.loss(hidden, self.projection, targets)
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            hidden = hidden[:, kept]
        return GPT2Output(loss, hidden, self.projection)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, width) output of the last layer normalisation; arguments as in `forward`."""
        check_inputs(self.config, input_ids, attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and is_known_full(mask):
            mask = None
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        if cache is None:
            positions = steps if position_ids is None else position_ids
            check_positions(self.config, positions)
            return self._blocks(input_ids, positions, mask, None, None)
        check_cache(self.config, cache, len(input_ids))
        positions = cache.positions[:, None] + steps if position_ids is None else position_ids
        check_positions(self.config, positions)
        positions = positions.expand(input_ids.shape)
        counts = None if mask is None else mask.sum(1)
        cache.reserve(input_ids.shape[1], counts)
        following = positions[:, -1] + 1
        if mask is None:
            hidden = self._blocks(input_ids, positions, None, cache, None)
        else:
            # Rows of a cache have no holes: bring the real tokens to the front, then back.
            front = torch.argsort(mask, dim=1, descending=True, stable=True)
            hidden = self._blocks(
                input_ids.gather(1, front), positions.gather(1, front), None, cache, counts
            )
            hidden = hidden.gather(1, front.argsort(1)[..., None].expand(hidden.shape))
        cache.advance(input_ids.shape[1], counts, following)
        return hidden

    def _blocks(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        counts: Tensor | None,
    ) -> Tensor:
        x = ops.embedding(input_ids, positions, self.wte.weight, self.wpe.weight)
        if self.training and self.config.embd_pdrop:
            x = F.dropout(x, self.config.embd_pdrop)
        residual = None
        for layer, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layer(layer, counts)
            if self.gradient_checkpointing and self.training and cache is None:
                from torch.utils.checkpoint import checkpoint

                x, residual = checkpoint(block.branch, x, residual, mask, use_reentrant=False)
            elif is_hooked(block):
                x, residual = block(_stream(x, residual), mask, layer_cache), None
            else:
                x, residual = block.branch(x, residual, mask, layer_cache)
        return self.ln_f(x, residual)[0]

    def project(self, hidden: Tensor) -> Tensor:
        """(..., width) hidden states -> (..., vocab) logits."""
        return F.linear(hidden, self.projection)

    @torch.no_grad()
    def decode_step(
        self, tokens: Tensor, cache: KVCache, position_ids: Tensor | None = None
    ) -> Tensor:
        """Append one token to each row of a cache and return the logits of the next.

        Args:
            tokens: (B,) int64.
            cache: with B rows.
            position_ids: (B,) int64; defaults to what follows the tokens seen.

        Returns:
            (B, vocab) logits. Not differentiable.

        Where the native kernels run, the weights are packed first, and again when they have
        changed; a change through `parameter.data` goes unnoticed until `for_decoding` or
        `generate` is called.
        """
        packed = self._packed_form(thorough=False)
        if packed is not None and cache.k.dtype in KERNEL_CACHE_DTYPES:
            return packed.decode_step(tokens, cache, position_ids).to(self.dtype)
        positions = cache.positions if position_ids is None else position_ids
        check_tokens(self.config, tokens)
        check_positions(self.config, positions[:, None])
        check_cache(self.config, cache, len(tokens))
        cache.reserve(1)
        logits = ops.decode_step(
            self.decode_weights(),
            cache.k,
            cache.v,
            tokens,
            positions,
            cache.lengths,
            n_head=self.config.n_head,
            scales=[block.attn.scale for block in self.blocks],
            activation=self.config.activation_function,
            eps=self.config.layer_norm_epsilon,
            k_scales=cache.k_scales,
            v_scales=cache.v_scales,
        )
        cache.advance(1, None, positions + 1)
        return logits

    def decode_weights(self) -> list[Tensor]:
        """The weights as `ops.decode_step` takes them, adapters merged."""
        if is_adapted(self):
            return without_adapters(self).decode_weights()
        layers = [weight for block in self.blocks for weight in _layer_weights(block)]
        return [
            self.wte.weight,
            self.wpe.weight,
            *layers,
            self.ln_f.weight,
            self.ln_f.bias,
            self.projection,
        ]

    def next_tokens(
        self,
        tokens: Tensor,
        cache: KVCache,
        history: Tensor,
        uniform: Tensor | None = None,
        *,
        vocab_size: int | None = None,
        **choice: Any,
    ) -> tuple[Tensor, Tensor]:
        """`decode_step`, then `ops.sample` among the tokens below `vocab_size`.

        Arguments and results as of `PackedGPT2.next_tokens`.
        """
        logits = self.decode_step(tokens, cache)
        return logits, ops.sample(logits[:, :vocab_size], history, uniform, **choice)

    def new_cache(
        self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for this model.

        Args:
            batch_size: rows.
            max_length: entries a row; None means `n_positions`.
            dtype: of keys and values; None means the model's, and `torch.int8` takes half the
                bytes of 16 bits.
        """
        config = self.config
        return KVCache(
            config.n_layer,
            batch_size,
            config.n_positions if max_length is None else max_length,
            config.n_head,
            config.head_dim,
            dtype or self.dtype,
            self.device,
        )

    @torch.no_grad()
    def read(
        self, tokens: Tensor, counts: Sequence[int], offsets: Sequence[int], cache: KVCache | None
    ) -> Tensor:
        """Logits (B, V) after the newest tokens of each row.

        Args:
            tokens: (B, T) int64; row b's newest counts[b] columns are read.
            counts: tokens of each row, at least 1.
            offsets: position of each row's first token.
            cache: with B rows, which keeps what was read; None keeps nothing.
        """
        longest = max(counts)
        mask = positions = None
        if any(offsets) or min(counts) < longest:
            column = torch.arange(longest, device=tokens.device) - longest
            index = column + torch.tensor(counts, device=tokens.device)[:, None]
            mask = (index >= 0).long()
            starts = torch.tensor(offsets, device=tokens.device)[:, None]
            positions = (index + starts).clamp(min=0)
        hidden = self.hidden_states(tokens[:, -longest:].clamp(min=0), mask, positions, cache=cache)
        return self.project(hidden[:, -1])

    def for_decoding(self) -> GPT2 | PackedGPT2:
        """The form of this model that decodes fastest here.

        Where the native kernels run, that is a packed copy of the weights. It is made when it is
        first asked for and again after the weights have changed; `pack(release=True)` keeps no
        second copy. Adapters are merged.
        """
        return self._packed_form(thorough=True) or without_adapters(self)

    def can_be_packed(self) -> bool:
        """Whether there are kernels here that read packed weights of this model."""
        chosen = requested_backend() in ("auto", "native") and unavailable() is None
        return chosen and self._unpackable() is None

    def pack(self, *, release: bool = False) -> PackedGPT2:
        """A copy for inference whose weights, in their own dtype, lie as a step reads them.

        Args:
            release: free this model's parameters on the way, so that there is never more than one
                copy of them; only the result can be used then.

        Raises:
            ArgumentError: the model is not on the CPU, or its weights are of another dtype than
                float32 and bfloat16.
        """
        reason = self._unpackable()
        if reason is not None:
            raise ArgumentError(f"this model cannot be packed: {reason}")
        self._packed = None
        return pack(self, release=release)

    def quantize(self, scheme: str, *, release: bool = False, **options: Any) -> PackedGPT2:
        """A copy for inference with weights of 8 or 4 bits.

        Args:
            scheme: "int8" or "int4".
            release: free this model's parameters on the way; only the result can be used then.
            options: `calibration`, `group_size`, `seed`, ... of
                `gpt2fast.quantization.quantize_weights`.

        Raises:
            ArgumentError, WeightsError: as there.
        """
        from .quantization import quantize_weights

        if self.device.type not in ("cpu", "meta"):
            raise ArgumentError(
                f"quantised weights run on the CPU, and the model is on {self.device}; "
                "move it with .cpu() first"
            )
        quantized = quantize_weights(self, scheme, **options)
        self._packed = None
        return pack(self, quantized, release=release)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any):
        """Continue each row; see `gpt2fast.generation.generate` for the options."""
        from .generation import generate

        return generate(self, input_ids, attention_mask, **options)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Load a checkpoint; see `gpt2fast.weights.from_pretrained` for the options."""
        from .weights import from_pretrained

        return from_pretrained(name_or_path, **options)

    def save_pretrained(
        self, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None
    ) -> None:
        """Write a directory that transformers loads; see `gpt2fast.weights.save_pretrained`."""
        from .weights import save_pretrained

        save_pretrained(self, directory, tokenizer)

    def _packed_form(self, *, thorough: bool) -> PackedGPT2 | None:
        """The packed copy of the weights as they are now, or None where kernels cannot use it.

        Args:
            thorough: look at the weights themselves and not at torch's count of their changes
                alone, which `parameter.data` passes by.
        """
        if torch.compiler.is_compiling() or not self.can_be_packed():
            return None
        parameters = list(self.parameters())
        state = [
            (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for parameter in parameters
        ]
        known = self._packed
        digest = known[1] if known is not None and known[0] == state and not thorough else None
        if digest is None:
            digest = fingerprint(parameters)
        if known is None or known[1] != digest:
            known = (state, digest, pack(self))
        self._packed = (state, *known[1:])
        return known[2]

    def _unpackable(self) -> str | None:
        """Why the weights cannot be packed, or None."""
        if self.device.type != "cpu":
            return f"it is on {self.device}; move it with .cpu()"
        if self.dtype not in KERNEL_DTYPES:
            return f"it is in {self.dtype}; use .float() or .bfloat16()"
        if any(is_hooked(module) for module in self.modules()):
            return "a hook watches one of its modules"
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> GPT2:
        super()._apply(fn, recurse)  # what .to(), .cuda(), .half() and the like do
        forget_moved(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}  # type: ignore[misc]


def _stream(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else residual + x
