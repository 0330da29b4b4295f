"""`fuse` and `unfuse`: GPT-2 and ImageGPT of transformers on fused ops, in place."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

from torch import nn
from transformers import pytorch_utils
from transformers.activations import NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gpt2 import modeling_gpt2 as theirs
from transformers.models.imagegpt import modeling_imagegpt as images

from .._system.output import warn
from ..errors import ArgumentError
from . import attention, generation, gpt2, imagegpt
from .plain import why_called
from .versions import check_version

_LOG = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    pytorch_utils.Conv1D: gpt2.Conv1D,
    nn.LayerNorm: gpt2.LayerNorm,
    theirs.GPT2MLP: gpt2.GPT2MLP,
    theirs.GPT2Block: gpt2.GPT2Block,
    theirs.GPT2LMHeadModel: gpt2.GPT2LMHeadModel,
    images.ImageGPTMLP: imagegpt.ImageGPTMLP,
    images.ImageGPTAttention: imagegpt.ImageGPTAttention,
}
_PLAIN = {fused: kind for kind, fused in _FUSED.items()}
_PLAIN[generation.GPT2LMHeadModel] = theirs.GPT2LMHeadModel
_NEVER: dict[type[nn.Module], str] = {
    images.ImageGPTLayerNorm: "it does not subtract the mean, as the fused normalization does"
}
"""Parts that no kernel computes, and why."""
_STACKS = (theirs.GPT2Model, images.ImageGPTModel)
_HEADS = (theirs.GPT2LMHeadModel, gpt2.GPT2LMHeadModel, generation.GPT2LMHeadModel)
_FROM = "sdpa"
"""The attention that `fuse` replaces; others were asked for."""
_OF_ONE_MODEL = 3
"""References to a config that are no sign of another model: a variable here, one of a caller, and
that of a head. Another stack has two at least."""
_asked: WeakSet[nn.Module] = WeakSet()
"""Stacks that had our attention before they were fused, and keep it afterward."""


def fuse(model: _Model, *, generate: bool = False) -> _Model:
    """Run the GPT-2 or ImageGPT within `model` on fused ops; all else about it stays as it is.

    Its blocks, MLPs, projections and layer norms get the classes of `gpt2fast.hf.gpt2`, and
    attention becomes `attn_implementation="gpt2fast"` where it was SDPA. A language model computes
    its loss without holding all logits, and those when they are first read. A part that has hooks
    or adapters, or was replaced, runs as before: `doctor` says which.

    Args:
        model: a GPT-2 or ImageGPT of transformers with any head, or a model with one inside (an
            encoder-decoder, PEFT's); a model that is fused already stays so.
        generate: `model.generate` reads a packed copy of the weights, made when it is first called
            and again after they have changed, wherever tokens are the same (float32 on a CPU); for
            language models.

    Returns:
        `model` itself.

    Raises:
        ArgumentError: there is no GPT-2 or ImageGPT of transformers within `model`, or none that
            could generate; it is unchanged.
        VersionError: this version of transformers was not tried, and computes something else.
    """
    check_version(_fuse)
    return _fuse(model, generate)


def _fuse(model: _Model, generate: bool = False) -> _Model:
    stacks = _stacks(model)
    if not stacks:
        raise ArgumentError(
            f"{type(model).__name__} has no GPT-2 of transformers inside: fuse takes GPT2Model, "
            "GPT2LMHeadModel, GPT2DoubleHeadsModel, GPT2ForSequenceClassification, "
            "GPT2ForTokenClassification, GPT2ForQuestionAnswering, those of ImageGPT, and models "
            "that contain one; "
            f"for other causal models import gpt2fast.hf and load them with "
            f'attn_implementation="{attention.NAME}"'
        )
    heads = [head for head in model.modules() if type(head) in _HEADS]
    if generate and not heads:
        raise ArgumentError(
            f"{type(model).__name__} has no GPT2LMHeadModel that could generate (classes of your "
            "own keep their loops); leave generate=True out"
        )
    attention.register()
    for stack in stacks:
        if stack.config._attn_implementation == _FROM:
            _asked.discard(stack)
            _set_attention(stack, attention.NAME)
        elif not any(type(module) in _PLAIN for module in stack.modules()):
            _asked.add(stack)
    for module in _parts(model, stacks):
        kind = _FUSED.get(type(module))
        if kind is not None and _why_not(module) is None:
            module.__class__ = kind
    for head in heads if generate else []:
        head.__class__ = generation.GPT2LMHeadModel
    hooked = sum(_is_placed(module) for module in model.modules())
    if hooked:
        warn(
            _LOG,
            f"accelerate's hooks run around {hooked} modules, for weights that it moves: these run "
            "as before; doctor(model) says which",
        )
    return model


def _set_attention(stack: Any, name: str) -> None:
    """Choose the attention of a stack of blocks, and warn of others that share its config."""
    stack.set_attn_implementation(name)
    if _sharing(stack):
        gc.collect()  # what nobody can reach any more shares nothing
    others = _sharing(stack)
    if others:
        warn(
            _LOG,
            f"{others} other model(s) share this one's config and attend with {name!r} now, too: "
            "build each with a config of its own, as copy.deepcopy(config) makes one",
        )


def _sharing(stack: Any) -> int:
    """The number of other stacks that have a stack's very config."""
    config = stack.config
    own = sum(vars(module).get("config") is config for module in stack.modules())
    if sys.getrefcount(config) - own <= _OF_ONE_MODEL:
        return 0
    # Only the garbage collector knows who else has it: modules, or their dicts.
    holders = gc.get_referrers(config)
    dicts = [x for x in holders if type(x) is dict and x.get("config") is config]
    found = [x for x in (*holders, *gc.get_referrers(*dicts)) if issubclass(type(x), _STACKS)]
    return len({id(x) for x in found if x is not stack and x.config is config})


def _is_placed(module: nn.Module) -> bool:
    """True if accelerate has replaced the module's `forward`, to bring weights or inputs."""
    return hasattr(module, "_hf_hook")


def unfuse(model: _Model) -> _Model:
    """Undo `fuse`; returns `model` itself.

    Attention is SDPA again where `fuse` replaced it. A copy of a fused model that had
    `attn_implementation="gpt2fast"` before gets SDPA, too.
    """
    stacks = _stacks(model)
    for module in _parts(model, stacks):
        module.__class__ = _PLAIN.get(type(module), type(module))
    for stack in stacks:
        if stack.config._attn_implementation == attention.NAME and stack not in _asked:
            _set_attention(stack, _FROM)
    return model


class Part(NamedTuple):
    """How a module of a model runs."""

    name: str
    """Its name within the model."""
    kind: str
    """Its class."""
    fused: bool
    """True if it runs on fused ops."""
    reason: str | None
    """Why it does not."""


def doctor(model: nn.Module) -> list[Part]:
    """Say for each part of the GPT-2 or ImageGPT within `model` if it runs fused, or why not."""
    found, stacks = [], _stacks(model)
    names = {id(module): name for name, module in model.named_modules()}
    for module in _parts(model, stacks):
        kind = type(module)
        reason: str | None
        if kind in _FUSED:
            reason = _why_not(module) or "it has not been fused"
        elif kind in _PLAIN or isinstance(module, theirs.GPT2Attention):
            reason = _why_not_now(module)
        elif kind in _NEVER:
            reason = _NEVER[kind]
        elif isinstance(module, tuple(_FUSED)) and not kind.__module__.startswith("torch."):
            reason = "its class is not transformers' own"
        else:
            continue
        found.append(Part(names[id(module)], kind.__name__, reason is None, reason))
    return found


def _stacks(model: nn.Module) -> list[Any]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{model!r:.80} is no model: load one with from_pretrained first")
    return [module for module in model.modules() if isinstance(module, _STACKS)]


def _parts(model: nn.Module, stacks: list[Any]) -> Iterator[nn.Module]:
    """The modules that `fuse` knows: language models, and all within the stacks of blocks."""
    for module in model.modules():
        if isinstance(module, theirs.GPT2LMHeadModel):
            yield module
    for stack in stacks:
        yield from stack.modules()


def _why_not(module: nn.Module) -> str | None:
    """A reason to leave a module of a known class as it is; None if there is none."""
    if _is_placed(module):
        return "accelerate's hook runs around it"
    if "forward" in module.__dict__:
        return "it has another forward"
    if isinstance(module, nn.LayerNorm) and (
        module.weight is None or module.bias is None or len(module.normalized_shape) != 1
    ):
        return "it has no weight or no bias, or normalizes several dimensions"
    if isinstance(module, pytorch_utils.Conv1D) and module.bias is None:
        return "it has no bias"
    return None


def _why_not_now(module: nn.Module) -> str | None:
    """Why a fused module calls what it would fuse; None if it does not."""
    if isinstance(module, theirs.GPT2Attention):
        return _why_attention_is_plain(module)
    if isinstance(module, images.ImageGPTAttention):
        return imagegpt.why_attention_is_plain(module, module.c_proj.weight)
    parts: dict[str, type[nn.Module]]
    if isinstance(module, gpt2.FusedMLP):
        if not isinstance(module.act, NewGELUActivation):
            return f"its activation is {type(module.act).__name__}, and fused is gelu_new"
        parts = {"c_fc": gpt2.Conv1D, "act": NewGELUActivation, "c_proj": gpt2.Conv1D}
    elif isinstance(module, theirs.GPT2Block):
        parts = {"ln_2": gpt2.LayerNorm}
    elif isinstance(module, theirs.GPT2LMHeadModel):
        if module.loss_function is not ForCausalLMLoss:
            return "its loss function is another one"
        if module.lm_head.bias is not None:
            return "lm_head has a bias"
        if len(module.lm_head.weight) != module.config.vocab_size:
            return f"lm_head has not vocab_size={module.config.vocab_size} rows"
        parts = {"lm_head": nn.Linear}
    else:
        return None
    reasons = ((name, why_called(getattr(module, name), kind)) for name, kind in parts.items())
    return next((f"{name} {reason}" for name, reason in reasons if reason is not None), None)


def _why_attention_is_plain(module: theirs.GPT2Attention) -> str | None:
    chosen = module.config._attn_implementation
    if chosen != attention.NAME:
        return f"the model attends with {chosen!r}"
    if not module.is_causal:
        return "it is cross-attention, which SDPA computes"
    weight = module.c_proj.weight if hasattr(module.c_proj, "weight") else None
    reason = None if weight is None else attention.why_not_on(weight, module.head_dim)
    return None if reason is None else f"SDPA attends, since {reason}"
