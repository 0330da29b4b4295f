"""GPT-2 (Radford et al., 2019): embeddings, pre-norm blocks, a tied output projection."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .config import GPT2Config, as_config
from .errors import ArgumentError
from .inference.graph_pool import forget_moved
from .inference.packed import PackedGPT2, pack
from .lora.adapters import is_adapted, without_adapters
from .nn import Block, LayerNorm, LinearCrossEntropy
from .nn.inputs import (
    check_cache,
    check_inputs,
    check_positions,
    check_tokens,
    check_wanted,
    is_known_full,
)
from .nn.kv_cache import KVCache
from .nn.modules import Embedding, OutputProjection, TiedOutputProjection, add_and_normalize, drop
from .nn.plain import is_plain, is_unwatched
from .nn.structure import check_held, layer_weights, why_not_read
from .ops.backend import requested_backend
from .ops.native import CACHE_DTYPES as KERNEL_CACHE_DTYPES
from .ops.native import DTYPES as KERNEL_DTYPES
from .ops.native import fingerprint, unavailable


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
            device = "cpu" if hidden.is_meta else hidden.device.type  # meta has no autocast
            self._hidden, self._projection = hidden, projection
            self._grad, self._device = torch.is_grad_enabled(), device
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
                torch.autocast(self._device, dtype, enabled=enabled),
            ):
                self._logits = F.linear(self._hidden, self._projection)
        return self._logits

    @logits.setter
    def logits(self, logits: Tensor) -> None:
        self._logits = logits


class GPT2(nn.Module):
    """GPT-2 with a language-model head.

    Its modules have the names of transformers' `GPT2LMHeadModel` and see what they see there:
    hooks, parametrizations, and modules or a `forward` put in their place act in every pass and in
    every step of decoding. Weights are read without calling modules only where nothing can tell.

    Args:
        config: the shape; transformers' own is taken as well.
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
        config = as_config(config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.gradient_checkpointing = False
        self.generation_config: dict[str, Any] = {}
        """What generation_config.json says, where the model was loaded from one."""
        self._packed: tuple[list[tuple[int, int]], int, PackedGPT2] | None = None
        std = config.initializer_range
        self.wte = Embedding(config.vocab_size, config.n_embd, std, **factory)
        self.wpe = Embedding(config.n_positions, config.n_embd, std, **factory)
        self.drop = nn.Dropout(config.embd_pdrop)
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
        for block in self.blocks:
            block.attn.c_attn.std = block.mlp.c_fc.std = std
            # What is added to the residual stream (Radford et al., 2019, section 2.3).
            block.attn.c_proj.std = block.mlp.c_proj.std = std / (2 * config.n_layer) ** 0.5
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, **factory)
        self.lm_head: OutputProjection | TiedOutputProjection
        if config.tie_word_embeddings:
            self.lm_head = TiedOutputProjection(self)
        else:
            self.lm_head = OutputProjection(config.n_embd, config.vocab_size, std, **factory)
        self.loss = LinearCrossEntropy()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: N(0, initializer_range^2), biases zero; what is added to the residual
        stream is scaled by 1 / sqrt(2 * n_layer) (Radford et al., 2019, section 2.3)."""
        parts: list[nn.Module] = [self.wte, self.wpe]
        for block in self.blocks:
            parts += [block.attn.c_attn, block.mlp.c_fc, block.attn.c_proj, block.mlp.c_proj]
            parts += [block.ln_1, block.ln_2]
        parts.append(self.ln_f)
        if not self.config.tie_word_embeddings:
            parts.append(self.lm_head)
        for part in parts:
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # type: ignore[operator]

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, first to last."""
        return cast("list[Block]", list(self.h))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.parameters()).dtype

    @property
    def projection(self) -> Tensor:
        """(vocab, width) output projection: the token embedding where they are tied.

        Raises:
            ArgumentError: what stands in the embedding's place holds not one such table.
        """
        if not self.config.tie_word_embeddings:
            return self.lm_head.weight
        if "weight" in self.wte._parameters:
            return self.wte.weight
        # What wraps the embedding, parametrizes or prunes it leaves the head with the table itself,
        # as in transformers.
        if isinstance(self.wte, nn.Embedding):
            changes: Any = getattr(self.wte, "parametrizations", {})
            table = self.wte._parameters.get("weight_orig")
            if "weight" in changes:
                table = changes["weight"]._parameters.get("original")
            return self.wte.weight if table is None else table
        shape = (self.config.vocab_size, self.config.n_embd)
        tables = [weight for weight in self.wte.parameters() if weight.shape == shape]
        if len(tables) != 1:
            # No AttributeError, of which nn.Module would make another one.
            raise ArgumentError(
                f"wte is a {type(self.wte).__name__} with {len(tables)} parameters of the shape "
                f"{shape}, and the output projection is tied to one: give the configuration "
                "tie_word_embeddings=False, or keep the embedding's weight inside"
            )
        return tables[0]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step for one token reads."""
        looked_up = list(self.wpe.parameters())
        if not self.config.tie_word_embeddings:
            looked_up += self.wte.parameters()
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
        wanted = targets if labels is None else labels[:, 1:]
        predicting = hidden if labels is None else hidden[:, :-1]
        kept: Any = logits_to_keep
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep if logits_to_keep else None, None)
        if self._reads_projection():
            loss = None if wanted is None else self.loss(predicting, self.projection, wanted)
            return GPT2Output(loss, hidden[:, kept], self.projection)
        if wanted is None:
            return GPT2Output.computed(None, self.lm_head(hidden[:, kept]))
        logits = self.lm_head(hidden)
        loss = self._loss_of_logits(logits if labels is None else logits[:, :-1], wanted)
        return GPT2Output.computed(loss, logits[:, kept])

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, width) output of the last layer normalisation; arguments as in `forward`."""
        check_inputs(self.config, input_ids, attention_mask)
        check_held(self)
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
            if self.why_not_read() is None:
                hidden = self._blocks(
                    input_ids.gather(1, front), positions.gather(1, front), None, cache, counts
                )
                hidden = hidden.gather(1, front.argsort(1)[..., None].expand(hidden.shape))
            else:  # who looks at a module sees the tokens where they are
                hidden = self._blocks(input_ids, positions, None, cache, counts, front)
        cache.advance(input_ids.shape[1], counts, following)
        return hidden

    def _blocks(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        counts: Tensor | None,
        front: Tensor | None = None,
    ) -> Tensor:
        x, residual = self._embed(input_ids, positions), None
        for layer, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layer(layer, counts, front)
            fused = is_plain(block, Block)
            run: Callable[..., Any] = block.branch if fused else block
            stream = (x, residual) if fused else (_stream(x, residual),)
            if self.gradient_checkpointing and self.training and cache is None:
                added = checkpoint(run, *stream, mask, use_reentrant=False)
            else:
                added = run(*stream, mask, layer_cache)
            x, residual = added if fused else (added, None)
        return add_and_normalize(self.ln_f, x, residual)[0]

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        wte, wpe = self.wte, self.wpe
        if is_plain(wte, Embedding) and is_plain(wpe, Embedding):
            x = ops.embedding(input_ids, positions, wte.weight, wpe.weight)
        else:
            x = wte(input_ids) + wpe(positions if positions.dim() == 2 else positions[None])
        return drop(self.drop, x)

    def project(self, hidden: Tensor) -> Tensor:
        """(..., width) hidden states -> (..., vocab) logits."""
        if self._reads_projection():
            return F.linear(hidden, self.projection)
        return self.lm_head(hidden)

    def _reads_projection(self) -> bool:
        """Whether logits are a product with `projection`, and no module that is to be called."""
        if isinstance(self.lm_head, TiedOutputProjection) and self.lm_head.model is not self:
            return False
        return is_plain(self.lm_head, OutputProjection, TiedOutputProjection)

    def _loss_of_logits(self, logits: Tensor, wanted: Tensor) -> Tensor:
        if not isinstance(self.loss, LinearCrossEntropy):
            raise ArgumentError(
                f"loss is a {type(self.loss).__name__}, which takes the head's weight, and lm_head "
                "is watched or replaced: remove one of them, or compute the loss from the logits"
            )
        return self.loss(logits, None, wanted)

    def why_not_read(self) -> str | None:
        """Why decoding has to call the modules, where it would read their weights; or None."""
        return why_not_read(self, GPT2)

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
        changed; a change in place through `parameter.data`, which torch does not count, goes
        unnoticed until `for_decoding` or `generate` is called: to look for it takes as long as a
        step.
        """
        check_held(self)
        if self.why_not_read() is not None:
            places = None if position_ids is None else position_ids[:, None]
            return self._called(tokens[:, None], None, places, cache)
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
            activation=self.config.activation,
            eps=self.config.layer_norm_epsilon,
            k_scales=cache.k_scales,
            v_scales=cache.v_scales,
        )
        cache.advance(1, None, positions + 1)
        return logits

    def decode_weights(self) -> list[Tensor]:
        """The weights as `ops.decode_step` takes them, adapters merged.

        Raises:
            ArgumentError: weights alone do not say what the model computes; see `why_not_read`.
        """
        if reason := self.why_not_read():
            raise ArgumentError(f"weights cannot be read past the modules: {reason}")
        if is_adapted(self):
            return without_adapters(self).decode_weights()
        layers = [weight for block in self.blocks for weight in layer_weights(block)]
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
        return self._called(tokens[:, -longest:].clamp(min=0), mask, positions, cache)

    def _called(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Logits (B, V) after the last column, by calling what there is to call."""
        if is_unwatched(self, GPT2):
            hidden = self.hidden_states(tokens, mask, positions, cache)
            return self.project(hidden[:, -1:])[:, -1]  # (B, 1, C), as hooks see it in transformers
        return self(tokens, mask, positions, cache=cache, logits_to_keep=1).logits[:, -1]

    def for_decoding(self) -> GPT2 | PackedGPT2:
        """The form of this model that decodes fastest here.

        Where the native kernels run, that is a packed copy of the weights. It is made when it is
        first asked for and again after the weights have changed; `pack(release=True)` keeps no
        second copy. Adapters are merged.
        """
        check_held(self)
        if self.why_not_read() is not None:
            return self
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
        check_held(self)
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
        check_held(self)
        if reason := self.why_not_read():
            raise ArgumentError(f"this model cannot be quantized: {reason}")
        quantized = quantize_weights(self, scheme, **options)
        self._packed = None
        return pack(self, quantized, release=release)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Embedding:
        """Another number of tokens, in place; see `nn.vocabulary.resize_token_embeddings`."""
        from .nn.vocabulary import resize_token_embeddings

        resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        return self.wte

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue each row; see `gpt2fast.inference.generation.generate` for the options."""
        from .inference.generation import generate

        return generate(self, input_ids, attention_mask, **options)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Load a checkpoint; see `gpt2fast.checkpoints.gpt2.from_pretrained` for the options."""
        from .checkpoints.gpt2 import from_pretrained

        return from_pretrained(name_or_path, **options)

    def save_pretrained(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Write a directory that transformers loads; see `checkpoints.saving.save_pretrained`."""
        from .checkpoints.saving import save_pretrained

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
        return self.why_not_read()

    def _apply(self, fn: Any, recurse: bool = True) -> GPT2:
        super()._apply(fn, recurse)  # what .to(), .cuda(), .half() and the like do
        forget_moved(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for module in self.modules():
            if isinstance(module, TiedOutputProjection) and module.model is None:
                module.tie(self)


def _stream(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else residual + x
