"""What people do with fused models: random configurations, Trainer, pipeline, PEFT's training."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GPT2Config

from gpt2fast.hf import fuse
from gpt2fast.ops.backend import record_calls
from tolerance import assert_close

BASE: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def random_model(draw: random.Random) -> Any:
    """A model of any head, sizes and options, in float64."""
    heads = draw.choice([1, 2, 3, 4])
    kind = draw.choice(
        ["GPT2Model", "GPT2LMHeadModel", "GPT2LMHeadModel", "GPT2ForTokenClassification"]
    )
    config = GPT2Config(
        vocab_size=draw.choice([13, 50, 97]),
        n_embd=heads * draw.choice([4, 8, 20, 32]),
        n_layer=draw.choice([1, 2, 3]),
        n_head=heads,
        n_inner=draw.choice([None, 24, 60]),
        n_positions=32,
        activation_function=draw.choice(["gelu_new", "gelu_new", "gelu", "relu", "silu"]),
        layer_norm_epsilon=draw.choice([1e-5, 1e-3]),
        scale_attn_weights=draw.random() < 0.8,
        scale_attn_by_inverse_layer_idx=draw.random() < 0.3,
        tie_word_embeddings=draw.random() < 0.7,
        initializer_range=0.2,
        **NO_DROPOUT,
        **BASE,
    )
    torch.manual_seed(draw.randrange(1 << 30))
    model = getattr(transformers, kind)(config).double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def random_mask(draw: random.Random, rows: int, time: int) -> Tensor | None:
    """None, padding on one side, or holes; the last token of a row is real unless right-padded."""
    kind = draw.choice(["none", "left", "right", "holes"])
    if kind == "none":
        return None
    mask = torch.ones(rows, time).long()
    for row in range(rows):
        hidden = draw.randrange(time)
        if kind == "left":
            mask[row, :hidden] = 0
        elif kind == "right":
            mask[row, time - hidden :] = 0
        else:
            mask[row, [draw.randrange(time) for _ in range(3)]] = 0
            mask[row, -1] = 1
    return mask


def run(model: Any, way: str, tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What a model computes, zeros at padding, and in training its gradients."""
    real = torch.ones_like(tokens) if mask is None else mask
    if way == "cached":
        cache, pieces, begin = DynamicCache(config=model.config), [], 0
        for end in (max(1, tokens.shape[1] // 2), tokens.shape[1] - 1, tokens.shape[1]):
            if end > begin:
                seen = None if mask is None else mask[:, :end]
                with torch.no_grad():
                    pieces.append(
                        model(
                            tokens[:, begin:end], attention_mask=seen, past_key_values=cache,
                            use_cache=True,
                        )[0]
                    )  # fmt: skip
                begin = end
        return [torch.cat(pieces, 1).masked_fill(real[..., None] == 0, 0.0)]
    options: dict[str, Any] = {"attention_mask": mask}
    if type(model).__name__ == "GPT2LMHeadModel":
        # A position that sees nothing, as before the first token of a row, learns nothing.
        sees = real.cumsum(1) > 0
        wanted = tokens.masked_fill(real == 0, -100)
        wanted[:, 1:] = wanted[:, 1:].masked_fill(~sees[:, :-1], -100)
        options["labels"] = wanted
    output = model(tokens, **options)
    first = output.logits if "logits" in output else output[0]
    found = [first.masked_fill(real[..., None] == 0, 0.0)]
    if way == "train":
        loss = output.loss if "loss" in output and output.loss.isfinite() else found[0].sin().sum()
        loss.backward()
        found += [p.grad for p in model.parameters() if p.grad is not None]
    return [x.detach() for x in found]


@pytest.mark.parametrize("part", range(10))
def test_random_models_and_inputs(part):
    draw = random.Random(part)
    fused_ops = 0
    for _ in range(20):
        exact, way = random_model(draw), draw.choice(["eval", "train", "cached"])
        exact.train(way == "train")
        rows, time = draw.randint(1, 4), draw.randint(1, 32)
        tokens = torch.randint(3, exact.config.vocab_size, (rows, time))
        mask = random_mask(draw, rows, time)
        other = copy.deepcopy(exact).float()
        ours = fuse(copy.deepcopy(other))
        with record_calls() as calls:
            mine = run(ours, way, tokens, mask)
        fused_ops += bool(calls)
        found = [run(model, way, tokens, mask) for model in (other, exact)]
        # Of a few numbers one error may be several times another's by chance: torch's is the larger
        # one of its two ways to attend.
        other.set_attn_implementation("eager")
        openly = run(other, way, tokens, mask)
        theirs = [
            max(pair, key=lambda x: float((x.double() - right).norm()))
            for *pair, right in zip(found[0], openly, found[1], strict=True)
        ]
        assert_close(mine, theirs, found[1], times=3.0)
    assert fused_ops >= 17  # not in steps of few rows that SDPA attends


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_trainer(options, tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    tokens = torch.randint(3, 97, (64, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    plain = transformers.GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_embd=48, n_layer=2, n_head=3, n_positions=16, **NO_DROPOUT, **BASE
        )
    )
    losses, accuracies = [], []
    for model in (fuse(copy.deepcopy(plain)), plain):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(len(losses))), max_steps=50, logging_steps=1, seed=0,
            per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", eval_strategy="steps", eval_steps=25, **options,
        )  # fmt: skip

        def accuracy(predicted: Any) -> dict[str, float]:
            hits = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
            return {"accuracy": float(hits.mean())}

        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data[:16],
            compute_metrics=accuracy,
        )  # fmt: skip
        trainer.train()
        log = trainer.state.log_history
        losses.append(torch.tensor([x["loss"] for x in log if "loss" in x]))
        accuracies.append([(x["eval_loss"], x["eval_accuracy"]) for x in log if "eval_loss" in x])
    bound = 1e-4 if "bf16" not in options else 2e-3
    assert len(losses[0]) == 50 and losses[0][-1] < losses[0][0]
    assert (losses[0] - losses[1]).abs().max() < bound
    assert torch.tensor(accuracies[0]).sub(torch.tensor(accuracies[1])).abs().max() < 10 * bound
