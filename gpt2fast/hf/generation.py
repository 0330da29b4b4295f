"""transformers' generation on our engine: its own loops, each step of which reads packed weights.

    model.generate(..., custom_generate=gpt2fast.generate)
    fuse(model, generate=True).generate(...)

transformers prepares a request (processors, stopping criteria, beams) and then runs `_sample` or
`_beam_search`. Both get an object here that is the model but for its steps; so that whatever those
loops do is done by them. A request that a step of ours would not answer exactly as the model does
runs on the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as theirs

from .._system.output import tell
from ..errors import ArgumentError, Error
from ..inference.packed import PackedGPT2
from ..inference.packing import can_be_packed, packed_copy
from ..model import GPT2
from ..nn.kv_cache import KVCache
from . import gpt2
from .conversion import from_hf, parameters_of, why_not_described
from .plain import is_plain

_LOG = logging.getLogger(__name__)

_LOOPS = ("_sample", "_beam_search")
_CACHES = ("past_key_values", "cache")
_UNDERSTOOD = {*_CACHES, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
"""Arguments of the model's forward pass that a step of ours knows."""
_OF_THE_LOOP = {
    "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
}  # fmt: skip
"""Arguments of the loop itself."""
_ROOM = 256
"""Entries of a cache beyond the prompt, before it grows."""
_OF_THE_STEPS = {"prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill"}
"""Methods of a model that steps of ours take the place of; PEFT replaces some."""

_ours: WeakKeyDictionary[nn.Module, GPT2] = WeakKeyDictionary()
"""A GPT2 with the parameters of each model that has generated."""


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Any:
    """The `custom_generate` of `model.generate`: transformers' loops with our steps.

    Tokens, scores and what else is returned are those of `model.generate` without it. Requests that
    our steps do not answer exactly run on the model; the log (`gpt2fast.hf.generation`) says why.
    transformers hands no streamer to a `custom_generate`: `fuse(model, generate=True)` streams.

    Args:
        model: a `GPT2LMHeadModel`, fused or not.
        input_ids: (B, T) int64.
        logits_processor, stopping_criteria, generation_config, options: as transformers gives them.

    Returns:
        What `model.generate` returns.
    """
    if generation_config is None:
        generation_config = model.generation_config
    mode = generation_config.get_generation_mode(options.get("assistant_model"))
    loop = GENERATION_MODES_MAPPING[mode]
    if "/" in loop:  # a repository
        raise ArgumentError(f"transformers has moved {mode.value} to {loop}: pass that instead")
    return run(
        model,
        loop,
        getattr(type(model), loop),
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **options,
    )


def run(model: Any, name: str, loop: Callable[..., Any], input_ids: Tensor, **options: Any) -> Any:
    """Run one of transformers' decoding loops with our steps, or on the model where they differ.

    Args:
        model: what generates.
        name: of the loop.
        loop: the unbound method.
        input_ids: (B, T) int64.
        options: as transformers gives them to the loop.
    """
    packed = _packed(model)
    reason = packed if isinstance(packed, str) else _why_not(model, name, input_ids, options)
    if isinstance(packed, str) or reason is not None:
        _LOG.debug("transformers' steps generate, since %s", reason)
        return loop(model, input_ids, **options)
    config = options["generation_config"]
    given: Any = next((options[each] for each in _CACHES if options.get(each) is not None), None)
    lengths = _lengths(input_ids, options.get("attention_mask"))
    engine = _Engine(model, packed, lengths, options["stopping_criteria"].max_length)
    for each in _CACHES:
        if each in options:
            options[each] = engine.cache
    with engine.alone(_compute_little(options["logits_processor"])):
        found = loop(engine, input_ids, **options)
    if config.return_dict_in_generate or getattr(given, "_is_user_defined", False):
        engine.fill(given)
    if config.return_dict_in_generate:
        for each in _CACHES:
            if each in found:
                found[each] = given
    return found


class GPT2LMHeadModel(gpt2.GPT2LMHeadModel):
    """A fused language model that generates with our steps."""

    def _sample(  # type: ignore[override]
        self, input_ids: Tensor, **options: Any
    ) -> Any:
        return run(self, "_sample", theirs.GPT2LMHeadModel._sample, input_ids, **options)

    def _beam_search(  # type: ignore[override]
        self, input_ids: Tensor, **options: Any
    ) -> Any:
        return run(self, "_beam_search", theirs.GPT2LMHeadModel._beam_search, input_ids, **options)


class _RowOrder:
    """The cache of our steps as transformers' loops see it: its rows can be reordered."""

    def __init__(self, entries: KVCache):
        self.entries = entries

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.entries.reorder(rows.long())


class _Engine:
    """A model as transformers' loops see it, whose steps are ours; all else is the model's own."""

    def __init__(self, model: Any, packed: PackedGPT2, lengths: list[int], most: int):
        self._model, self._packed = model, packed
        self._lengths, self._most = lengths, most
        self._threads = torch.get_num_threads()
        self.cache: _RowOrder | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: Tensor, **options: Any) -> CausalLMOutputWithCrossAttentions:
        """The logits after one more token (B,) for each row."""
        assert self.cache is not None
        entries = self.cache.entries
        if int(entries.lengths.max()) == entries.max_length:
            entries.grow(min(2 * entries.max_length, self._most))
        with self._on(self._threads):
            return self._output(self._packed.decode_step(tokens, entries))

    def _prefill(self, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        # Texts may end long before they have to.
        room = min(max(self._lengths) + _ROOM, self._most)
        entries = self._packed.new_cache(len(input_ids), room)
        self.cache = _RowOrder(entries)
        starts = [0] * len(input_ids)
        with self._on(self._threads):
            return self._output(self._packed.prefill(input_ids, self._lengths, starts, entries))

    def _output(self, logits: Tensor) -> CausalLMOutputWithCrossAttentions:
        return CausalLMOutputWithCrossAttentions(logits=logits[:, None])

    def prepare_inputs_for_generation(self, input_ids: Tensor, **options: Any) -> dict[str, Any]:
        """The newest token of each row."""
        return {"tokens": input_ids[:, -1]}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **options: Any
    ) -> dict[str, Any]:
        # The prompt's tokens are in the cache now.
        return {n: self.cache if n in _CACHES else x for n, x in model_kwargs.items()}

    def _valid_auto_compile_criteria(self, *args: Any, **options: Any) -> bool:
        return False

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        return nullcontext()

    def alone(self, little: bool) -> AbstractContextManager[None]:
        """Run torch's operations on one thread while the loop runs, where they compute `little`.

        Those of torch's threads that wait for work would keep ours from their processors.
        """
        return self._on(1 if little else self._threads)

    @contextmanager
    def _on(self, threads: int) -> Iterator[None]:
        before = torch.get_num_threads()
        if before == threads:
            yield
            return
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def fill(self, cache: DynamicCache) -> None:
        """Store all keys and values, of rows of one length, in a cache of transformers."""
        assert self.cache is not None
        entries = self.cache.entries
        length = int(entries.lengths[0])
        for layer, (k, v) in enumerate(zip(entries.k, entries.v, strict=True)):
            new = (x[:, :length].transpose(1, 2).contiguous() for x in (k, v))
            cache.update(*new, layer)


def _packed(model: Any) -> PackedGPT2 | str:
    """The packed weights of a model; or why it has none."""
    if not isinstance(model, theirs.GPT2LMHeadModel):
        return f"{type(model).__name__} is not transformers' GPT2LMHeadModel"
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return f"it is in {model.dtype} on {model.device}, and exact are float32 steps on the CPU"
    kind = type(model)
    heads = (theirs.GPT2LMHeadModel, gpt2.GPT2LMHeadModel, GPT2LMHeadModel)
    if kind not in heads or not is_plain(model, kind) or not is_plain(model.lm_head, nn.Linear):
        return "the model or its head is watched, or a class of the user's own"
    odd = sorted(_OF_THE_STEPS & model.__dict__.keys())
    if odd:
        return f"{odd[0]} was replaced"
    if any(module.training for module in model.modules()):
        return "the model or a part of it is in training mode"
    if torch.is_autocast_enabled("cpu"):
        return "it runs under autocast"
    ours = _ours.get(model)
    if ours is None or not _shares(ours, model):
        try:
            ours = from_hf(model)
        except Error as error:
            return str(error)
        if can_be_packed(ours):
            gigabytes = sum(p.nbytes for p in ours.parameters()) / 1e9
            tell(_LOG, f"packing a copy of the weights to generate with: {gigabytes:.1f} GB")
        _ours[model] = ours
    changed = why_not_described(model.transformer)
    if changed is not None:
        return changed
    return packed_copy(ours, thorough=True) or "there are no kernels here that read packed weights"


def _shares(ours: GPT2, model: Any) -> bool:
    """True if `ours` still has the parameters of `model`, and they their sizes."""
    if len(ours.wte.weight) != ours.config.vocab_size:  # resized in place
        return False
    mine, given = dict(ours.named_parameters()), parameters_of(model)
    return mine.keys() == given.keys() and all(mine[name] is given[name] for name in mine)


def _why_not(model: Any, name: str, input_ids: Tensor, options: dict[str, Any]) -> str | None:
    """Why our steps do not answer a request as the model does; None if they do."""
    config, criteria = options["generation_config"], options["stopping_criteria"]
    if name not in _LOOPS:
        return f"{name} is not one of {', '.join(_LOOPS)}"
    if input_ids.dtype != torch.int64:
        return f"its tokens are {input_ids.dtype}"
    odd = [
        each
        for each in options.keys() - _UNDERSTOOD - _OF_THE_LOOP
        if options[each] is not None and options[each] is not False
    ]
    if odd or options.get("synced_gpus"):
        return f"the request has {', '.join(sorted(odd)) or 'synced_gpus'}"
    if config.output_attentions or config.output_hidden_states or config.prefill_chunk_size:
        return "it asks for attentions, hidden states or chunks"
    if not options.get("use_cache") or config.cache_implementation not in (None, "dynamic"):
        return "it asks for another cache"
    if criteria.max_length is None or criteria.max_length > model.config.n_positions:
        return f"the text may grow beyond {model.config.n_positions} tokens"
    caches = [options[each] for each in _CACHES if options.get(each) is not None]
    if len(caches) != 1 or type(caches[0]) is not DynamicCache or caches[0].get_seq_length():
        return "its cache is not an empty DynamicCache"
    mask = options.get("attention_mask")
    mask = None if mask is None else mask.long()
    kept = config.return_dict_in_generate or getattr(caches[0], "_is_user_defined", False)
    if mask is not None and not bool((mask.diff(dim=1) >= 0).all() & (mask[:, -1] == 1).all()):
        return "its padding is not on the left alone"
    if mask is not None and kept and not bool(mask.all()):
        return "it keeps the cache of padded rows"
    if not input_ids.shape[1]:
        return "there is no prompt"
    positions = options.get("position_ids")
    if positions is None:
        return None
    real = torch.ones_like(input_ids) if mask is None else mask.long()
    usual = (real.cumsum(1) - 1)[:, -positions.shape[1] :]
    seen = real[:, -positions.shape[1] :] == 1
    if positions.shape[1] != input_ids.shape[1] or not bool((positions == usual)[seen].all()):
        return "its positions are others than the usual"
    return None


def _compute_little(processors: Any) -> bool:
    """True if all are transformers' own, and none runs a model."""
    return all(
        type(each).__module__.startswith("transformers.") and not hasattr(each, "model")
        for each in processors or []
    )


def _lengths(input_ids: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each row, padding aside."""
    if mask is None:
        return [input_ids.shape[1]] * len(input_ids)
    return [int(count) for count in mask.sum(1)]
