"""The training loop, in the order of things: set up, step, validate, log, save, finish."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .._system.invocation import command_line
from ..checkpoints.run_folder import BEST, CHECKPOINTS, DATA
from ..data import DataModule
from ..model import GPT2
from ..ops.backend import backend
from .checkpoints.folder import (
    clean_up,
    drop_old,
    find_checkpoint,
    newest_checkpoint,
    set_aside,
    step_directory,
)
from .checkpoints.position import Position, TrainResult
from .checkpoints.resume import restore
from .checkpoints.save import Saver
from .checkpoints.state import load_state
from .config import TrainConfig
from .distributed import Group
from .failures import (
    ALL_FINITE,
    TrainingError,
    broken_weights,
    failures_explained,
    first_not_finite,
)
from .folder import lock_run_folder, require_no_run, resume_hint, write_settings
from .logs.reporter import Reporter
from .logs.summary import conclusion, introduction
from .machine import memory
from .schedule import learning_rate
from .start.adapters import prepare_model, restore_adapters
from .start.data import prepared_data
from .start.model import check_start, learn_new_tokens, starting_model, starting_tokenizer
from .step import Batch, TrainStep
from .stopping import Interrupted, SignalWatch, good_enough, out_of_time
from .validation import mean_loss


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
            checkpoint = _checkpoint_to_resume(config, resume, group)
            loop = _TrainingLoop(config, checkpoint, group, on_validation)
            stack.callback(loop.close)
            with SignalWatch() as signals:
                return loop.run(signals)
    finally:
        torch.set_num_threads(threads)


def _checkpoint_to_resume(
    config: TrainConfig, resume: str | Path | None, group: Group
) -> Path | None:
    out = Path(config.out)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def find() -> Path | None:
        clean_up(out / CHECKPOINTS)
        if restarted and newest_checkpoint(out / CHECKPOINTS):
            return find_checkpoint(out)
        if resume is not None:
            return find_checkpoint(Path(resume))
        require_no_run(out)
        return None

    return group.on_main(find)


class _TrainingLoop:
    def __init__(
        self,
        config: TrainConfig,
        checkpoint: Path | None,
        group: Group,
        on_validation: Callable[[int, float], None] | None,
    ) -> None:
        self.config, self.group, self.on_validation = config, group, on_validation
        self.out = Path(config.out)
        self.checkpoints = self.out / CHECKPOINTS
        group.share_of(config.micro_batches(0), config.batch_size)
        state = None if checkpoint is None else load_state(checkpoint)
        if checkpoint is None:
            group.on_main(lambda: check_start(config))

        self.data = self._open_data(resuming=checkpoint is not None)
        self.meta = self.data.meta
        self.tokenizer = starting_tokenizer(config, self.data, checkpoint, group.notify)
        self.steps = config.steps(self.meta.train_tokens)
        self.learned: str | None = None
        self.model = self._starting_model(checkpoint, state)
        self.training = TrainStep(config, self.model, group)
        self.position = Position()
        self.saved = -1
        """Step of the last checkpoint that is named after its step."""
        if group.rank:  # dropout must not be alike in all processes
            torch.manual_seed(config.seed + group.rank)
        if checkpoint is not None:
            self._resume(checkpoint, state)
        self.batches = self.data.train_dataloader(order=self.position.order)
        self.started = time.perf_counter() - self.position.elapsed
        self.row_started, self.row_tokens = time.perf_counter(), self.position.tokens
        self.reporter = Reporter(config, self.tokenizer, self.steps, silent=not group.is_main)
        self.saver = Saver(self.training, self.meta, self.tokenizer)
        self.measured = checkpoint is not None
        group.on_main(lambda: self._open_folder(checkpoint))

    def close(self) -> None:
        self.reporter.close()
        self.training.close()

    # -- setting up --------------------------------------------------------------------------

    def _open_data(self, resuming: bool) -> DataModule:
        config, group = self.config, self.group
        return DataModule(
            group.on_main(lambda: prepared_data(config, resuming=resuming)),
            config.block_size,
            config.batch_size,
            seed=config.seed,
            sampling=config.sampling,
            notify=group.notify,
        )

    def _starting_model(self, checkpoint: Path | None, state: Any) -> GPT2:
        config = self.config
        torch.manual_seed(config.seed)
        model = starting_model(config, self.data, checkpoint)
        if checkpoint is None:
            self.learned = learn_new_tokens(config, model, self.data)
        self.data.check_model(model.config)
        model = prepare_model(config, model)
        if state is not None:
            restore_adapters(model, state["adapters"])
        model = model.to(self.group.device)
        model.gradient_checkpointing = config.checkpoint_activations
        return model.train()

    def _resume(self, checkpoint: Path, state: Any) -> None:
        own_data = self.data.directory == self.out / DATA
        self.position = restore(
            checkpoint, state, self.training, self.meta, own_data=own_data, steps=self.steps
        )
        step = self.position.step
        if checkpoint.resolve() == step_directory(self.checkpoints, step).resolve():
            self.saved = step

    def _open_folder(self, checkpoint: Path | None) -> None:
        step = None if checkpoint is None else self.position.step
        replaced = [] if step is None else set_aside(self.checkpoints, step)
        drop_old(self.checkpoints, self.config.keep_checkpoints)
        write_settings(self.config)
        reporter = self.reporter
        reporter.open(self.model, self.group.device, self.group.size, step, self.position.elapsed)
        for line in introduction(self.training, self.meta, self.steps, self.learned):
            reporter.message(line)
        if reporter.peak_source is not None:
            reporter.message(f"MFU is a share of {reporter.peak_source}")
        if checkpoint is not None:
            reporter.message(f"resumed from {checkpoint} at step {step}")
        if replaced:
            names = ", ".join(path.name for path in replaced)
            reporter.message(
                f"set aside the checkpoints of later steps, as {names} in {self.checkpoints}"
            )

    # -- running -----------------------------------------------------------------------------

    def run(self, signals: SignalWatch) -> TrainResult:
        """Train to the end and leave the model in the run folder."""
        position, config = self.position, self.config
        while True:
            step = position.step
            signum, elapsed = self.group.max(
                float(signals.received or 0), time.perf_counter() - self.started
            )
            ended = out_of_time(config, position, self.steps, elapsed)
            if signum and not ended:  # work that is due at this step is done after resuming
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
            due = step > 0 and (step % config.checkpoint_interval == 0 or ended is not None)
            if due and self.saved != step:
                self._save_step()
            if ended:
                return self._finish(ended)
            self._step()

    def _step(self) -> None:
        config, position = self.config, self.position
        loss, position.grad_norm = self.training.gradients(
            self.batches, position.step, position.batches
        )
        if not self.training.update(loss, position.grad_norm, self._rate(position.step)):
            self._fail("loss", loss, self.training.batch)
        micro_batches = config.micro_batches(position.step)
        position.step += 1
        position.batches += micro_batches
        position.tokens += micro_batches * config.batch_size * config.block_size
        position.loss_sum += loss
        self.reporter.step(position.step, loss, self._speed())
        if not self.measured:
            self.measured = True
            most = self.group.max(float(memory.peak(self.group.device)))[0]
            self.reporter.message(f"memory: {memory.gib(int(most))} measured in the first step")

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

    def _fail(self, what: str, loss: float, batch: Batch | None = None) -> None:
        """Say which number broke in the step on `batch`, or after the last one."""
        step = self.position.step + (batch is not None)
        # Where the processes share the forward pass, one of them cannot repeat it by itself.
        again = None
        if batch is not None and self.group.size == 1:
            failed = batch
            again = lambda: self.training.loss(failed)  # noqa: E731
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

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Work whose time does not count in tokens per second."""
        began = time.perf_counter()
        yield
        self.row_started += time.perf_counter() - began

    def _speed(self) -> float:
        """Tokens per second since the last row."""
        seconds = time.perf_counter() - self.row_started
        return (self.position.tokens - self.row_tokens) / max(seconds, 1e-9)

    def _evaluate(self) -> None:
        """Validate; keep the model if it is the best so far."""
        position = self.position
        with self._not_training(), torch.no_grad():
            self.model.eval()
            batches, limit = self.data.val_dataloader(), self.config.eval_batches
            loss = mean_loss(self.training.loss, batches, limit, self.group)
            self.model.train()
        if not math.isfinite(loss):
            self._fail("validation loss", loss)
        position.evaluated, position.val_loss = position.step, loss
        position.without_best += position.step > 0
        if position.step > 0 and loss < position.best_val_loss:
            position.best_val_loss, position.best_step = loss, position.step
            position.without_best = 0
            self._write_row()
            self._save(self.checkpoints / BEST)
        if position.step:
            self.reporter.histograms(position.step, self.model)
        if self.on_validation is not None:
            report = self.on_validation
            self.group.on_main(lambda: report(position.step, loss))

    def _val_per_char(self) -> float | None:
        characters_per_token = self.meta.characters_per_token("val")
        return self.position.val_loss / characters_per_token if characters_per_token else None

    def _write_row(self) -> None:
        position, scale = self.position, self.training.scale
        now = time.perf_counter()
        steps = position.step - max(position.logged, 0)
        row: dict[str, Any] = {"step": position.step, "tokens": position.tokens}
        if position.evaluated == position.step:
            row["val_loss"], row["val_loss_per_char"] = position.val_loss, self._val_per_char()
        row["epoch"] = position.tokens / self.meta.train_tokens
        if scale.enabled:
            row["loss_scale"] = scale.value
        if steps:
            row["train_loss"] = position.loss_sum / steps
            row["lr"] = self._rate(position.step - 1)
            row["grad_norm"] = position.grad_norm
            row["tokens_per_second"] = self._speed()
        position.elapsed = now - self.started
        row["elapsed_seconds"] = position.elapsed
        position.logged, position.loss_sum = position.step, 0.0
        self.row_started, self.row_tokens = now, position.tokens
        self.reporter.row(row, self.group.device)

    def _sample(self) -> None:
        with self._not_training():
            weights = self.group.whole_state(self.model)
            step, saver = self.position.step, self.saver
            self.group.on_main(lambda: self.reporter.sample(step, saver.whole(weights)))

    # -- saving ------------------------------------------------------------------------------

    def _save_step(self) -> None:
        self._save(step_directory(self.checkpoints, self.position.step))
        self.saved = self.position.step
        self.group.on_main(lambda: drop_old(self.checkpoints, self.config.keep_checkpoints))

    def _save(self, directory: Path) -> None:
        with self._not_training():
            self.position.elapsed = time.perf_counter() - self.started
            # The last step may have left weights that no later one can mend; those before stand.
            if self.group.max(float(broken_weights(self.model) is not None))[0]:
                self._fail("loss", math.nan)
            self.saver.save(directory, self.position)

    def _stop(self, signum: int) -> None:
        step = self.position.step
        if step == 0:
            raise Interrupted(signum, "stopped before the first step; nothing to resume")
        directory = step_directory(self.checkpoints, step)
        if self.saved != step:
            self._save_step()
        raise Interrupted(
            signum,
            f"stopped at step {step}; checkpoint in {directory}. Continue with:\n"
            f"  {command_line('train')} --resume {shlex.quote(str(self.out))}",
        )

    def _finish(self, ended: str) -> TrainResult:
        self.model.eval()
        self.saver.export_model()
        position = self.position
        result = TrainResult(
            out=self.out,
            steps=position.step,
            tokens=position.tokens,
            val_loss=position.val_loss,
            val_loss_per_char=self._val_per_char(),
            best_val_loss=position.best_val_loss,
            best_step=position.best_step,
        )
        for line in conclusion(ended, result, position.elapsed, self.tokenizer is not None):
            self.reporter.message(line)
        return result
