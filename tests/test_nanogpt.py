"""Loss curves are nanoGPT's: the same weights, batches and schedule through both.

GPT2FAST_NANOGPT names a checkout of https://github.com/karpathy/nanoGPT; its model.py is imported.
GPT2FAST_NANOGPT_STEPS shortens the longer recipe.
"""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch

from gpt2fast.cli.train import parse
from gpt2fast.data import DataModule, prepare_data
from gpt2fast.model import GPT2
from gpt2fast.training import loop, train
from gpt2fast.training.logs.log import read_rows
from gpt2fast.training.schedule import learning_rate
from run_hooks import before_updates

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ("shakespeare_cpu", 2000),
        ("shakespeare_char", int(os.environ.get("GPT2FAST_NANOGPT_STEPS", "500"))),
    ],
)
def test_loss_curve_is_nanogpts(recipe, steps, nanogpt, data_dir, tmp_path, monkeypatch):
    prepare_data([data_dir / "tinyshakespeare.txt"], tmp_path / "data", tokenizer="char")
    # The two draw dropout's random numbers in another order; everything else is the same.
    config, _ = parse(
        [
            f"--config={recipe}", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'run'}",
            "--tokenizer=null", "--dropout=0", "--log-interval=20", f"--eval-interval={steps}",
            "--eval-batches=40",
        ]
    )  # fmt: skip
    data = DataModule(config.data, config.block_size, config.batch_size, seed=config.seed)
    shape = {
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "block_size": config.block_size, "bias": True, "vocab_size": data.meta.vocab_size,
        "dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(config.seed)
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**shape))
    torch.save({"model": theirs.state_dict(), "model_args": shape}, tmp_path / "ckpt.pt")
    # A run from --init-from would take its shape from there, and refuse the recipe's.
    monkeypatch.setattr(
        loop, "starting_model", lambda *_: GPT2.from_pretrained(tmp_path / "ckpt.pt")
    )
    # The schedule follows the recipe's length; the run ends earlier, after a validation.
    with before_updates(_end_after(steps)), suppress(_Ended):
        train(config)
    rows = read_rows(tmp_path / "run" / "log.csv")

    optimizer = theirs.configure_optimizers(
        config.weight_decay, config.lr, (config.beta1, config.beta2), "cpu"
    )
    length = config.steps(data.meta.train_tokens)
    losses = []
    for step, (inputs, targets) in zip(range(steps), data.train_dataloader(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, lr=config.lr, min_lr=config.final_lr, warmup_steps=config.warmup_steps,
                steps=length,
            )  # fmt: skip
        _, loss = theirs(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    apart = 0.0
    for row in rows[1:]:
        mean = sum(losses[row["step"] - 20 : row["step"]]) / 20
        apart = max(apart, abs(row["train_loss"] - mean))
    theirs.eval()
    batches = data.val_dataloader()
    with torch.no_grad():
        measured = [
            (theirs(inputs, targets)[1].item(), targets.numel())
            for inputs, targets in map(batches.__getitem__, range(min(40, len(batches))))
        ]
    val = sum(loss * count for loss, count in measured) / sum(count for _, count in measured)
    print(f"{recipe}: {steps} steps, training losses at most {apart:.5f} apart, validation "
          f"{rows[-1]['val_loss']:.4f} and {val:.4f}")  # fmt: skip
    assert apart < 0.02
    assert rows[-1]["val_loss"] == pytest.approx(val, abs=0.02)


class _Ended(Exception):
    pass


def _end_after(steps: int):
    def end(updates: int) -> None:
        if updates == steps:
            raise _Ended

    return end
