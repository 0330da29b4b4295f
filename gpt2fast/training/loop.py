"""The training loop: forward, backward, clip, step; evaluate, log, save; continue where it was."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._system.files import atomic_write_text
from ..data import DataModule
from ..errors import ConfigError, Error
from ..ops.backend import backend
from .checkpoints import save as ckpt
from .checkpoints.position import Position, TrainResult
from .checkpoints.saving import Saver, data_identity
from .checkpoints.state import state_file
from .config import LENGTHS, TrainConfig
from .diagnosis import ALL_FINITE, broken_weights, first_not_finite
from .distributed import Group
from .failures import (
    TrainingError,
    failures_explained,
    how_to_save_memory,
    lock_run_folder,
    require_no_run,
    resume_hint,
)
from .logs.progress import format_val
from .logs.reporter import Reporter
from .machine import memory
from .machine.precision import LossScale, autocast
from .optimizers import ModelOptimizer
from .schedule import learning_rate
from .start.adapters import describe_training, prepare_model, restore_adapters
from .start.data import located, prepared_data, source_of
from .start.model import check_start, learn_new_tokens, starting_model, starting_tokenizer
from .stopping import Interrupted, SignalWatch, good_enough, out_of_time
from .validation import mean_loss

_SAME_ON_RESUMING = (
    *("n_layer", "n_head", "n_embd", "block_size", "init_from", "optimizer"),
    *("sampling", "lora_rank", "lora_alpha", "lora_targets", "freeze"),
)


def train(
    config: TrainConfig,
    resume: str | Path | None = None,
    on_validation: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Run `config`, from the start or from the checkpoint (or run folder) `resume`.

    Writes config.yaml, log.csv and checkpoints/ into `config.out`, and at the end the model and
    its tokenizer, ready for `GPT2.from_pretrained(config.out)`. Under torchrun, or in an open
    process group, the processes share every step; the main one writes.

    Args:
        config: the settings.
        resume: where to go on. Processes that torchrun has started again go on by themselves.
        on_validation: called with step and validation loss after every validation, in the main
            process; what it raises ends the run and is raised here.

    Raises ConfigError or DataError before the first step for a mistake in settings or data,
    TrainingError when the loss stops being finite, memory runs out or a file cannot be written,
    and Interrupted after a signal of `stopping.STOPPING`, when a checkpoint has been saved.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with ExitStack() as stack:
            stack.enter_context(failures_explained(config))
            group = Group(config.device)
            stack.callback(group.close)
            group.on_main(lambda: stack.enter_context(lock_run_folder(Path(config.out))) and None)
            stack.enter_context(backend(config.backend))
            run = _Run(config, _checkpoint(config, resume, group), group, on_validation)
            stack.callback(run.close)
            with SignalWatch() as signals:
                return run.finish(signals)
    finally:
        torch.set_num_threads(threads)


def _checkpoint(config: TrainConfig, resume: str | Path | None, group: Group) -> Path | None:
    """The checkpoint to go on from, if any, in a folder that is ready for the run."""
    out = Path(config.out)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def find() -> Path | None:
        ckpt.clean_up(out / "checkpoints")
        if restarted and ckpt.newest_checkpoint(out / "checkpoints"):
            return ckpt.find_checkpoint(out)
        if resume is not None:
            return ckpt.find_checkpoint(Path(resume))
        require_no_run(out)
        return None

    return group.on_main(find)


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        resume: Path | None,
        group: Group,
        on_validation: Callable[[int, float], None] | None,
    ) -> None:
        self.config, self.group, self.on_validation = config, group, on_validation
        self.device = group.device
        self.out = Path(config.out)
        self.checkpoints = self.out / "checkpoints"
        group.share_of(config.micro_batches(0), config.batch_size)
        state = None if resume is None else ckpt.load_state(resume)
        if resume is None:
            group.on_main(lambda: check_start(config))

        self.data = DataModule(
            group.on_main(lambda: prepared_data(config, resuming=resume is not None)),
            config.block_size,
            config.batch_size,
            seed=config.seed,
            sampling=config.sampling,
            notify=group.notify,
        )
        self.meta = self.data.meta
        self.batches = self.data.train_dataloader()
        self.tokenizer = starting_tokenizer(config, self.data, resume, group.notify)
        self.steps = config.steps(self.meta.train_tokens)

        torch.manual_seed(config.seed)
        model = starting_model(config, self.data, resume)
        self.learned = None if resume else learn_new_tokens(config, model, self.data)
        self.data.check_model(model.config)
        model = prepare_model(config, model)
        if state is not None:
            restore_adapters(model, state["adapters"])
        self.model = model.to(self.device)
        self.model.gradient_checkpointing = config.checkpoint_activations
        self.model.train()
        self.wrapped = group.wrapped(self.model, config.parallel)
        self.forward = self._compiled()
        self.optimizer = ModelOptimizer(
            self.model.named_parameters(),
            config,
            config.optimizer,
            sharded=config.parallel == "zero" and group.size > 1,
        )
        self.scale = LossScale(config.dtype == "float16")
        self.position = Position()
        self.saved = -1
        """Step of the last checkpoint that has its name from its step."""
        if group.rank:  # dropout must not be alike in all processes
            torch.manual_seed(config.seed + group.rank)
        if state is not None:
            assert resume is not None
            self._resume(state, resume)
        self.started = time.perf_counter() - self.position.elapsed
        self.row_started, self.row_tokens = time.perf_counter(), self.position.tokens
        self.reporter = Reporter(config, self.tokenizer, self.steps, silent=not group.is_main)
        self.saver = Saver(config, self.meta, self.tokenizer, group)
        self.measured = resume is not None
        group.on_main(lambda: self._open_folder(resume))

    def close(self) -> None:
        self.reporter.close()
        # What wraps the model holds the processes' group, which must not outlive `Group.close`.
        del self.forward, self.wrapped

    # -- setting up --------------------------------------------------------------------------

    def _compiled(self) -> Any:
        if not self.config.compile:
            return self.wrapped
        mode = self.config.compile_mode
        return torch.compile(self.wrapped, mode=None if mode == "default" else mode)

    def _resume(self, state: dict[str, Any], resume: Path) -> None:
        try:
            self._restore(state, resume)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, Error):
                raise
            raise ckpt.explain_state(state_file(resume) or resume, error) from error

    def _restore(self, state: dict[str, Any], resume: Path) -> None:
        for name, kind in (("updates", int), ("random", list), ("position", dict), ("data", dict)):
            if type(state[name]) is not kind:
                raise TypeError(f"{name} is a {type(state[name]).__name__}")
        before = TrainConfig.from_dict(state["config"], source=str(state_file(resume)))
        for name in _SAME_ON_RESUMING:
            self._require_same(name, getattr(before, name), getattr(self.config, name), resume)
        if self.data.directory == self.out / "data":  # made of what the settings named
            asked = source_of(self.config)
            for name, value in source_of(before).items():
                self._require_same(name, value, asked[name], resume)
        for name, value in state["data"].items():
            if value is not None:  # unknown, as nanoGPT's characters were to an older version
                now = data_identity(self.meta).get(name)
                self._require_same(f"the data's {name}", value, now, resume)
        ckpt.load_optimizer(resume, self.optimizer.tensors(), self.group)
        self.optimizer.resume_after(state["updates"])
        self.scale.load_state_dict(state["scale"])
        self.position = Position.of(state["position"])
        if self.position.order > 1:  # the windows go on where they were, whatever the batches
            windows = self.position.batches * before.batch_size
            self.position.batches = math.ceil(windows / self.config.batch_size)
        self.batches = self.data.train_dataloader(order=self.position.order)
        if resume.resolve() == ckpt.step_directory(self.checkpoints, self.position.step).resolve():
            self.saved = self.position.step
        if self.position.step > self.steps:
            raise ConfigError(
                f"{resume} is at step {self.position.step}, past the end of this run "
                f"({self.steps} steps); raise {self._length()} to train on"
            )
        if ckpt.best_step(self.checkpoints) != self.position.best_step:
            # The best one so far has been overwritten since, or is in another folder.
            self.position.best_val_loss, self.position.best_step = math.inf, -1
        if len(state["random"]) == self.group.size:
            ckpt.restore_random_states(state["random"][self.group.rank])
        else:  # as many streams as processes: new ones, which differ from those before
            torch.manual_seed(self.config.seed + self.group.rank + (self.position.step << 20))

    def _length(self) -> str:
        given = next(name for name in LENGTHS if getattr(self.config, name) is not None)
        return "--" + given.replace("_", "-")

    def _require_same(self, name: str, saved: Any, asked: Any, resume: Path) -> None:
        if saved != asked:
            raise ConfigError(
                f"cannot resume from {resume}: {name} was {saved!r} there and is {asked!r} now; "
                f"resume with the old value, or start a new run with another --out"
            )

    def _open_folder(self, resume: Path | None) -> None:
        replaced = [] if resume is None else ckpt.set_aside(self.checkpoints, self.position.step)
        ckpt.drop_old(self.checkpoints, self.config.keep_checkpoints)
        self._write_config()
        self.reporter.open(
            self.model,
            self.device,
            self.group.size,
            None if resume is None else self.position.step,
            self.position.elapsed,
        )
        self._introduce(resume)
        if replaced:
            names = ", ".join(path.name for path in replaced)
            self.reporter.message(
                f"set aside the checkpoints of later steps, as {names} in {self.checkpoints}"
            )

    def _write_config(self) -> None:
        import yaml

        # A resumed run must find the data from any folder.
        values = {**self.config.to_dict(), **located(self.config)}
        atomic_write_text(self.out / "config.yaml", yaml.safe_dump(values, sort_keys=False))

    def _introduce(self, resume: Path | None) -> None:
        config, shape, meta = self.config, self.model.config, self.meta
        self.reporter.message(
            f"model: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
            f"{shape.vocab_size} tokens in the vocabulary, {shape.parameter_count:,} parameters; "
            f"{config.dtype} on {self.device}"
        )
        if self.learned is not None:
            self.reporter.message(self.learned)
        if partly := describe_training(self.model):
            self.reporter.message(partly)
        tokens = config.micro_batches(self.steps) * config.batch_size * config.block_size
        self.reporter.message(
            f"data: {meta.train_tokens:,} tokens to train on, {meta.val_tokens:,} held out; "
            f"{tokens:,} tokens a step, {self.steps:,} steps"
        )
        if self.group.size > 1:
            self.reporter.message(f"{self.group.size} processes, {config.parallel}")
        self._predict_memory()
        if self.reporter.yardstick is not None:
            self.reporter.message(f"MFU is a share of {self.reporter.yardstick}")
        if resume is not None:
            self.reporter.message(f"resumed from {resume} at step {self.position.step}")

    def _predict_memory(self) -> None:
        config = self.config
        rows = range(config.batch_size)[self._share(0)[1]]
        need = memory.predict(
            self.model.config,
            len(rows) * config.block_size,
            dtype=config.dtype,
            trained=sum(p.numel() for p in self.optimizer.params),
            optimizer_state=self.optimizer.state_numel(),
            checkpoint_activations=config.checkpoint_activations,
            parallel=config.parallel,
            processes=self.group.size,
        )
        weights = sum(param.nbytes for param in self.model.parameters())
        before = max(memory.held(self.device) - weights, 0)
        there = memory.available(self.device)
        self.reporter.message(
            f"memory: about {memory.gib(before + need.total)} predicted ({memory.gib(need.state)} "
            f"weights, gradients and optimizer, {memory.gib(need.activations)} activations, "
            f"{memory.gib(before)} taken already)"
            + ("" if there is None else f"; {memory.gib(there)} available")
        )
        if there is not None and need.total - weights > there:
            self.reporter.message(f"warning: that may not fit. {how_to_save_memory(config)}")

    def _measure_memory(self) -> None:
        most = self.group.max(float(memory.peak(self.device)))[0]
        self.reporter.message(f"memory: {memory.gib(int(most))} measured in the first step")

    # -- running -----------------------------------------------------------------------------

    def finish(self, signals: SignalWatch) -> TrainResult:
        """Train to the end and leave the model in the run folder."""
        position, config = self.position, self.config
        while True:
            step = position.step
            signum, elapsed = self.group.max(
                float(signals.received or 0), time.perf_counter() - self.started
            )
            ended = out_of_time(config, position, self.steps, elapsed)
            if signum and not ended:  # what is due at this step is made up for on resuming
                self._stop(int(signum))
            if (step % config.eval_interval == 0 or ended) and position.evaluated != step:
                self._evaluate()
            # Not only right after a validation: the run may have been killed before it could end.
            ended = ended or good_enough(config, position)
            due = step > 0 and step % config.log_interval == 0
            if (due or ended or position.evaluated == step) and position.logged != step:
                self._write_row()
            if config.sample_interval and step % config.sample_interval == 0 and step:
                self._sample()
            if (
                step > 0
                and (step % config.checkpoint_interval == 0 or ended)
                and self.saved != step
            ):
                self._save_step()
            if ended:
                return self._finish(ended)
            self._step()

    def _share(self, step: int) -> tuple[list[int], slice]:
        return self.group.share_of(self.config.micro_batches(step), self.config.batch_size)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = (x.to(self.device, non_blocking=True) for x in batch)
        with autocast(self.device, self.config.dtype):
            return self.forward(inputs, targets=targets).loss

    def _step(self) -> None:
        config, position = self.config, self.position
        micro_batches = config.micro_batches(position.step)
        mine, rows = self._share(position.step)
        rate = self._rate(position.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for number in mine:
            batch = self.batches[position.batches + number]
            batch = batch[0][rows], batch[1][rows]
            with (
                self.group.explain_lost_peer(),
                self.group.accumulating(self.wrapped, number == mine[-1]),
            ):
                loss = self._loss(batch)
                # Every batch has as many targets, so the mean of the means is the exact mean.
                self.scale.scaled(loss / len(mine)).backward()
            total += loss.detach() / len(mine)
        norm = self._clip()
        summed, position.grad_norm = torch.stack([total, norm.float()]).tolist()
        train_loss = self.group.sum(summed)[0] / self.group.size
        if not (math.isfinite(train_loss) and math.isfinite(position.grad_norm)):
            if not math.isfinite(train_loss) or not self.scale.overflowed():
                self._fail("loss", train_loss, batch)
        else:
            with self.group.explain_lost_peer():
                self.optimizer.step(rate)
            self.scale.succeeded()
        position.step += 1
        position.batches += micro_batches
        position.tokens += micro_batches * config.batch_size * config.block_size
        position.loss_sum += train_loss
        self.reporter.step(position.step, train_loss, self._speed())
        if not self.measured:
            self.measured = True
            self._measure_memory()

    def _clip(self) -> Tensor:
        """Clip the gradients to `grad_clip`; returns their norm before."""
        limit = math.inf if self.config.grad_clip is None else self.config.grad_clip
        self.scale.unscale([p.grad for p in self.optimizer.params if p.grad is not None])
        with self.group.explain_lost_peer():
            norm = torch.nn.utils.clip_grad_norm_(self.optimizer.params, limit)
            return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step,
            lr=config.lr,
            min_lr=config.final_lr,
            warmup_steps=config.warmup_steps,
            steps=self.steps,
            schedule=config.schedule,
            decay_share=config.decay_share,
        )

    def _speed(self) -> float:
        """Tokens per second since the last row, validation not counted."""
        seconds = time.perf_counter() - self.row_started
        return (self.position.tokens - self.row_tokens) / max(seconds, 1e-9)

    def _fail(self, what: str, loss: float, batch: tuple[Tensor, Tensor] | None = None) -> None:
        """Say which number broke in the step on `batch`, or after the last one."""
        step = self.position.step + (batch is not None)
        # Where the processes share the forward pass, one of them cannot repeat it by itself.
        again = None
        if batch is not None and self.group.size == 1:
            failed = batch
            again = lambda: self._loss(failed)  # noqa: E731
        where = min(self.group.gathered(first_not_finite(self.model, again)), key=ALL_FINITE.__eq__)
        limit = self.config.grad_clip
        clip = "1.0" if limit is None else f"below {limit:g}"
        raise TrainingError(
            f"at step {step} the {what} is {loss} and the gradient norm "
            f"{self.position.grad_norm} (learning rate {self._rate(max(step - 1, 0)):.3g}): "
            f"{where}; {resume_hint(self.out)}. "
            f"Lower --lr, lengthen --warmup-steps, or set --grad-clip {clip}"
        )

    # -- evaluating and reporting ------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss over the validation split, or its first `eval_batches` batches."""
        began = time.perf_counter()
        self.model.eval()
        loss = mean_loss(
            self._loss, self.data.val_dataloader(), self.config.eval_batches, self.group
        )
        self.model.train()
        position = self.position
        if not math.isfinite(loss):
            self._fail("validation loss", loss)
        position.evaluated, position.val_loss = position.step, loss
        position.without_best += position.step > 0
        self.row_started += time.perf_counter() - began
        if position.step > 0 and loss < position.best_val_loss:
            position.best_val_loss, position.best_step = loss, position.step
            position.without_best = 0
            self._write_row()
            self._save(self.checkpoints / ckpt.BEST)
        if position.step:
            self.reporter.histograms(position.step, self.model)
        if self.on_validation is not None:
            report, val_loss = self.on_validation, loss
            self.group.on_main(lambda: report(position.step, val_loss))

    def _val_per_char(self) -> float | None:
        characters_per_token = self.meta.characters_per_token("val")
        return self.position.val_loss / characters_per_token if characters_per_token else None

    def _write_row(self) -> None:
        position = self.position
        now = time.perf_counter()
        steps = position.step - max(position.logged, 0)
        row: dict[str, Any] = {"step": position.step, "tokens": position.tokens}
        if position.evaluated == position.step:
            row["val_loss"], row["val_loss_per_char"] = position.val_loss, self._val_per_char()
        row["epoch"] = position.tokens / self.meta.train_tokens
        if self.scale.enabled:
            row["loss_scale"] = self.scale.value
        if steps:
            row["train_loss"] = position.loss_sum / steps
            row["lr"] = self._rate(position.step - 1)
            row["grad_norm"] = self.position.grad_norm
            row["tokens_per_second"] = self._speed()
        position.elapsed = now - self.started
        row["elapsed_seconds"] = position.elapsed
        position.logged, position.loss_sum = position.step, 0.0
        self.row_started, self.row_tokens = now, position.tokens
        self.reporter.row(row, self.device)

    # -- saving ------------------------------------------------------------------------------

    def _sample(self) -> None:
        began = time.perf_counter()
        weights = self.group.whole_state(self.model)
        self.group.on_main(
            lambda: self.reporter.sample(self.position.step, self.saver.whole(self.model, weights))
        )
        self.row_started += time.perf_counter() - began

    def _save_step(self) -> None:
        self._save(ckpt.step_directory(self.checkpoints, self.position.step))
        self.saved = self.position.step
        self.group.on_main(lambda: ckpt.drop_old(self.checkpoints, self.config.keep_checkpoints))

    def _save(self, directory: Path) -> None:
        began = time.perf_counter()
        self.position.elapsed = began - self.started
        # The last step may have left weights that no later one can mend; those before stand.
        if self.group.max(float(broken_weights(self.model) is not None))[0]:
            self._fail("loss", math.nan)
        self.saver.save(directory, self.model, self.optimizer, self.position, self.scale)
        self.row_started += time.perf_counter() - began

    def _stop(self, signum: int) -> None:
        step = self.position.step
        if step == 0:
            raise Interrupted(signum, "stopped before the first step; nothing to resume")
        directory = ckpt.step_directory(self.checkpoints, step)
        if self.saved != step:
            self._save_step()
        raise Interrupted(
            signum,
            f"stopped at step {step}; checkpoint in {directory}. Continue with:\n"
            f"  python -m gpt2fast.train --resume {shlex.quote(str(self.out))}",
        )

    def _finish(self, ended: str) -> TrainResult:
        self.model.eval()
        self.saver.export_model(self.model)
        position = self.position
        loss, per_char = position.val_loss, self._val_per_char()
        self.reporter.message(
            f"{ended}: {position.step} steps, {position.tokens:,} tokens, {position.elapsed:,.0f} "
            f"s; validation loss in nats per token {format_val(loss, per_char)}"
        )
        if position.best_step not in (-1, position.step):
            self.reporter.message(
                f"the best validation loss was {position.best_val_loss:.4f}, at step "
                f"{position.best_step}: {self.checkpoints / ckpt.BEST}"
            )
        model = shlex.quote(str(self.out))
        tokenizer = "" if self.tokenizer is not None else " --tokenizer NAME"
        self.reporter.message(f"try it:\n  python -m gpt2fast.generate --model {model}{tokenizer}")
        return TrainResult(
            out=self.out,
            steps=position.step,
            tokens=position.tokens,
            val_loss=loss,
            val_loss_per_char=per_char,
            best_val_loss=position.best_val_loss,
            best_step=position.best_step,
        )
