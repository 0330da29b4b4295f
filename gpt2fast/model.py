"""GPT-2 (Radford et al., 2019): embeddings, pre-norm blocks, a tied output projection."""

from __future__ import annotations

import os
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .cache import KVCache
from .config import GPT2Config
from .errors import ArgumentError, ConfigError, GenerationError
from .nn import Block, LinearCrossEntropy, ResidualLayerNorm, is_hooked
from .ops.decode import LAYER_WEIGHTS

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_layer_weights = attrgetter(*LAYER_WEIGHTS)


class GPT2Output:
    """What a forward pass returns.

    With labels or targets the logits are computed when they are first read: who wants the loss
    alone never pays for a (B, T, vocab) tensor. They are what the forward pass would have given,
    under its gradient mode and autocast; changing the weights in between is an error.
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
                self._check_wanted(name, wanted, input_ids)
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
        self._check(input_ids, attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and _is_known_full(mask):
            mask = None
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        if cache is None:
            positions = steps if position_ids is None else position_ids
            self._check_positions(positions)
            return self._blocks(input_ids, positions, mask, None, None)
        self._check_cache(cache, len(input_ids))
        positions = cache.positions[:, None] + steps if position_ids is None else position_ids
        self._check_positions(positions)
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
        """
        positions = cache.positions if position_ids is None else position_ids
        self._check_tokens(tokens)
        self._check_positions(positions[:, None])
        self._check_cache(cache, len(tokens))
        cache.reserve(1)
        logits = ops.decode_step(
            self._decode_weights(),
            cache.k,
            cache.v,
            tokens,
            positions,
            cache.lengths,
            n_head=self.config.n_head,
            scales=[block.attn.scale for block in self.blocks],
            activation=self.config.activation_function,
            eps=self.config.layer_norm_epsilon,
        )
        cache.advance(1, None, positions + 1)
        return logits

    def new_cache(
        self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for this model.

        Args:
            batch_size: rows.
            max_length: entries a row; None means `n_positions`.
            dtype: of keys and values; None means the model's.
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

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any):
        """Continue each row; see `gpt2fast.generation.generate` for the options."""
        from .generation import generate

        return generate(self, input_ids, attention_mask, **options)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> GPT2:
        """Load a checkpoint; see `gpt2fast.weights.from_pretrained` for the options."""
        from .weights import from_pretrained

        return from_pretrained(name_or_path, **options)

    def save_pretrained(
        self, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None
    ) -> None:
        """Write a directory that transformers loads; see `gpt2fast.weights.save_pretrained`."""
        from .weights import save_pretrained

        save_pretrained(self, directory, tokenizer)

    def _decode_weights(self) -> list[Tensor]:
        layers = [weight for block in self.blocks for weight in _layer_weights(block)]
        return [
            self.wte.weight,
            self.wpe.weight,
            *layers,
            self.ln_f.weight,
            self.ln_f.bias,
            self.projection,
        ]

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.dim() != 2 or not input_ids.numel():
            raise GenerationError(
                f"input_ids must be (batch, time) with at least one token, "
                f"not {tuple(input_ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise GenerationError(
                f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}"
            )
        self._check_tokens(input_ids)

    def _check_tokens(self, tokens: Tensor) -> None:
        if _is_readable(tokens):
            low, high = (int(bound) for bound in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise GenerationError(
                    f"token id {low if low < 0 else high} is outside the vocabulary "
                    f"0 .. {self.config.vocab_size - 1}; was the text encoded with this model's "
                    "tokenizer?"
                )

    def _check_positions(self, positions: Tensor) -> None:
        limit = self.config.n_positions
        if positions.shape[-1] > limit:
            raise GenerationError(
                f"{positions.shape[-1]} tokens exceed this model's n_positions={limit}; "
                "shorten the input"
            )
        if not _is_readable(positions):
            return
        low, high = (int(bound) for bound in positions.aminmax())
        if low < 0 or high >= limit:
            raise GenerationError(
                f"position {low if low < 0 else high} is outside this model's 0 .. {limit - 1} "
                f"(n_positions={limit}); shorten the input or generate fewer tokens"
            )

    def _check_wanted(self, name: str, wanted: Tensor, input_ids: Tensor) -> None:
        if wanted.shape != input_ids.shape:
            raise ArgumentError(
                f"{name} {tuple(wanted.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}"
            )
        if _is_readable(wanted) and wanted.numel():
            high = int(wanted.max())
            low = int(wanted.where(wanted != -100, 0).min())
            if low < 0 or high >= self.config.vocab_size:
                raise ArgumentError(
                    f"{name} hold {low if low < 0 else high}, which is neither a token id "
                    f"0 .. {self.config.vocab_size - 1} nor -100 (does not count)"
                )

    def _check_cache(self, cache: KVCache, rows: int) -> None:
        config = self.config
        shape = (config.n_layer, rows, cache.max_length, config.n_head, config.head_dim)
        if cache.k.shape != shape:
            raise GenerationError(
                f"the cache has the shape {tuple(cache.k.shape)} and this call needs {shape} "
                "(layers, rows, length, heads, head size); model.new_cache(rows) makes one"
            )


def _is_readable(tensor: Tensor) -> bool:
    """Whether looking at values is free: on the CPU, outside a traced program."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _stream(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else residual + x


def _is_known_full(mask: Tensor) -> bool:
    return _is_readable(mask) and bool(mask.all())
