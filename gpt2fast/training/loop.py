"""The training loop: forward, backward, clip, step; evaluate, log, save; continue where it was."""

from __future__ import annotations

import copy
import dataclasses
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import GPT2Config
from ..data import DataModule
from ..data.meta import DataMeta
from ..errors import ConfigError, Error
from ..files import atomic_write_text
from ..lock import only_process
from ..model import GPT2
from ..ops.backend import backend
from ..tokenizer import Tokenizer
from . import checkpoint as ckpt
from .config import DEFAULT_SHAPE, TrainConfig
from .interrupt import Interrupted, SignalWatch
from .log import RunLog
from .optimizer import AdamW
from .progress import format_row, format_val, open_display
from .schedule import learning_rate
from .source import locate, prepared_data


class TrainingError(Error):
    """The run cannot go on: the loss is no longer finite, the disk or the memory is full, …"""


@dataclass
class Position:
    """How far a run is; saved in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    batches: int = 0
    """Batches drawn from the training data."""
    tokens: int = 0
    """Tokens trained on."""
    evaluated: int = -1
    """Step of the last validation."""
    logged: int = -1
    """Step of the last row of log.csv."""
    loss_sum: float = 0.0
    """Sum of the training losses of the steps since that row."""
    grad_norm: float = math.nan
    """Gradient norm of the last step, before clipping."""
    best_val_loss: float = math.inf
    """Lowest validation loss so far, nats per token."""
    best_step: int = -1
    """Step at which it was reached."""
    elapsed: float = 0.0
    """Seconds of training, over all resumptions."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports; losses in nats."""

    out: Path
    steps: int
    tokens: int
    val_loss: float
    val_loss_per_char: float | None
    """None where the data do not say how many characters they hold."""
    best_val_loss: float
    best_step: int


def train(config: TrainConfig, resume: str | Path | None = None) -> TrainResult:
    """Run `config`, from the start or from the checkpoint (or run folder) `resume`.

    Writes config.yaml, log.csv and checkpoints/ into `config.out`, and at the end the model and
    its tokenizer, ready for `GPT2.from_pretrained(config.out)`.

    Raises ConfigError or DataError before the first step for a mistake in settings or data,
    TrainingError when the loss stops being finite, memory runs out or a file cannot be written,
    and Interrupted after SIGINT or SIGTERM, when a checkpoint has been saved.
    """
    checkpoint = None if resume is None else ckpt.find_checkpoint(Path(resume))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with _failures_explained(config), _own_folder(Path(config.out)), backend(config.backend):
            run = _Run(config, checkpoint)
            try:
                with SignalWatch() as signals:
                    return run.finish(signals)
            finally:
                run.close()
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """Make the run folder and keep a second run out of it; an empty one goes when it fails."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out is {str(out)!r}, which is a file; name a folder with --out")
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    busy = ConfigError(
        f"another process is training in {out}; wait for it, or name another folder with --out"
    )
    try:
        with only_process(out / ".lock", busy):
            yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextmanager
def _failures_explained(config: TrainConfig) -> Iterator[None]:
    """Turn what the disk and the memory raise into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        reason = f"{where}{error.strerror or error}"
        raise TrainingError(
            f"cannot train in {config.out}: {reason}; {_standing(Path(config.out))}. Make room, "
            "or name another folder with --out"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory; {_standing(Path(config.out))}. Lower --batch-size (now "
            f"{config.batch_size}; --grad-accumulation keeps the tokens of a step), --block-size "
            f"(now {config.block_size}), or train a smaller model"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in text  # torch on a CPU
        or "bad_alloc" in text
    )


def _standing(out: Path) -> str:
    newest = ckpt.newest_checkpoint(out / "checkpoints")
    if newest is None:
        return "no checkpoint was made"
    return f"the last checkpoint stands: {newest} (--resume {shlex.quote(str(out))})"


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is 'cuda', but torch {torch.__version__} finds no CUDA device; use "
            "--device cpu or auto"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class _Run:
    def __init__(self, config: TrainConfig, resume: Path | None) -> None:
        self.config = config
        self.device = _device(config.device)
        self.out = Path(config.out)
        self.checkpoints = self.out / "checkpoints"
        if resume is None:
            _require_no_run(self.out)
        ckpt.clean_up(self.checkpoints)
        state = None if resume is None else ckpt.load_state(resume)

        self.data = DataModule(
            prepared_data(config, resuming=resume is not None),
            config.block_size,
            config.batch_size,
            seed=config.seed,
        )
        self.meta = self.data.meta
        self.tokenizer = self._tokenizer(resume)
        self.steps = config.steps(self.meta.train_tokens)

        torch.manual_seed(config.seed)
        self.model = self._build_model(resume).to(self.device)
        self.data.check_model(self.model.config)
        self.model.train()
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = AdamW(
            self.model,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=config.weight_decay,
        )
        self.position = Position()
        if state is not None:
            assert resume is not None
            self._take_over(state, resume)
        self.started = time.perf_counter() - self.position.elapsed
        self.row_started, self.row_tokens = time.perf_counter(), self.position.tokens
        self.val: tuple[float, float | None] | None = None

        replaced = [] if state is None else ckpt.set_aside(self.checkpoints, self.position.step)
        self._write_config()
        self.log = RunLog(self.out / "log.csv", None if resume is None else self.position.step)
        self.display = open_display(self.steps, self.position.step)
        self._introduce(resume)
        if replaced:
            names = ", ".join(path.name for path in replaced)
            self.display.message(
                f"set aside the checkpoints of later steps, as {names} in {self.checkpoints}"
            )

    def close(self) -> None:
        self.display.close()
        self.log.close()

    # -- setting up --------------------------------------------------------------------------

    def _tokenizer(self, resume: Path | None) -> Tokenizer | None:
        """That of the data; the model that is trained on must have the same, if it has one."""
        if self.config.init_from is None or resume is not None:
            return self.data.tokenizer
        tokenizer = Tokenizer.from_pretrained(self.config.init_from)
        self.data.check_tokenizer(tokenizer)
        return tokenizer

    def _build_model(self, resume: Path | None) -> GPT2:
        config = self.config
        if resume is not None:
            model = GPT2.from_pretrained(resume, dtype=torch.float32)
            return _with_dropout(model, config.dropout)
        if config.init_from is not None:
            model = GPT2.from_pretrained(config.init_from, dtype=torch.float32)
            return _with_dropout(model, config.dropout)
        vocab_size = self.meta.vocab_size or config.vocab_size
        if vocab_size is None:
            raise ConfigError(
                f"{self.data.directory} does not say how many tokens its vocabulary has; give "
                "--vocab-size (50257 for GPT-2's)"
            )
        return GPT2(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=config.block_size,
                bos_token_id=self.meta.eos_token_id,
                eos_token_id=self.meta.eos_token_id,
                dropout=config.dropout,
                n_layer=config.n_layer or DEFAULT_SHAPE["n_layer"],
                n_head=config.n_head or DEFAULT_SHAPE["n_head"],
                n_embd=config.n_embd or DEFAULT_SHAPE["n_embd"],
            )
        )

    def _take_over(self, state: dict[str, Any], resume: Path) -> None:
        before = TrainConfig.from_dict(state["config"], source=str(resume / ckpt.STATE_FILE))
        for name in ("n_layer", "n_head", "n_embd", "block_size", "init_from"):
            self._require_same(name, getattr(before, name), getattr(self.config, name), resume)
        for name, value in state["data"].items():
            self._require_same(f"the data's {name}", value, _identity(self.meta).get(name), resume)
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        if self.position.step > self.steps:
            raise ConfigError(
                f"{resume} is at step {self.position.step}, past the end of this run "
                f"({self.steps} steps); raise --max-steps to train on"
            )
        if ckpt.best_step(self.checkpoints) != self.position.best_step:
            # The best one so far has been overwritten since, or is in another folder.
            self.position.best_val_loss, self.position.best_step = math.inf, -1
        ckpt.restore_random_states(state["random"])

    def _require_same(self, name: str, saved: Any, asked: Any, resume: Path) -> None:
        if saved != asked:
            raise ConfigError(
                f"cannot resume from {resume}: {name} was {saved!r} there and is {asked!r} now; "
                f"resume with the old value, or start a new run with another --out"
            )

    def _write_config(self) -> None:
        import yaml

        values = self.config.to_dict()
        # A resumed run must find the data from any folder.
        with suppress(Error):
            values["data"] = str(locate(self.config.data))
        atomic_write_text(self.out / "config.yaml", yaml.safe_dump(values, sort_keys=False))

    def _introduce(self, resume: Path | None) -> None:
        shape, meta = self.model.config, self.meta
        self.display.message(
            f"model: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
            f"{shape.vocab_size} tokens in the vocabulary, {shape.parameter_count:,} parameters; "
            f"{self.config.dtype} on {self.device}"
        )
        self.display.message(
            f"data: {meta.train_tokens:,} tokens to train on, {meta.val_tokens:,} held out; "
            f"{self.tokens_per_step:,} tokens a step, {self.steps:,} steps"
        )
        if resume is not None:
            self.display.message(f"resumed from {resume} at step {self.position.step}")

    # -- running -----------------------------------------------------------------------------

    @property
    def tokens_per_step(self) -> int:
        config = self.config
        return config.batch_size * config.block_size * config.grad_accumulation

    def finish(self, signals: SignalWatch) -> TrainResult:
        """Train to the last step and leave the model in the run folder."""
        batches = self._batches()
        position, config = self.position, self.config
        saved = position.step if position.step else -1
        while True:
            step, last = position.step, position.step == self.steps
            if (step % config.eval_interval == 0 or last) and position.evaluated != step:
                self._evaluate()
            due = step > 0 and step % config.log_interval == 0
            if (due or last or position.evaluated == step) and position.logged != step:
                self._write_row()
            if step > 0 and (step % config.checkpoint_interval == 0 or last) and saved != step:
                self._save(ckpt.step_directory(self.checkpoints, step))
                ckpt.drop_old(self.checkpoints, config.keep_checkpoints)
                saved = step
            if last:
                break
            if signals.received is not None:
                self._stop(signals.received, saved)
            self._step(batches)
        return self._deliver()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.data.train_dataloader(start_step=self.position.batches))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"
        )

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = (x.to(self.device, non_blocking=True) for x in batch)
        with self._autocast():
            return self.forward(inputs, targets=targets).loss

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        config, position = self.config, self.position
        rate = self._rate(position.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for _ in range(config.grad_accumulation):
            loss = self._loss(next(batches))
            # Every batch has as many targets, so the mean of the means is the exact mean.
            (loss / config.grad_accumulation).backward()
            total += loss.detach() / config.grad_accumulation
        limit = math.inf if config.grad_clip is None else config.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        train_loss, position.grad_norm = torch.stack([total, norm.float()]).tolist()
        if not (math.isfinite(train_loss) and math.isfinite(position.grad_norm)):
            self._fail(train_loss, rate)
        self.optimizer.step(rate)
        position.step += 1
        position.batches += config.grad_accumulation
        position.tokens += self.tokens_per_step
        position.loss_sum += train_loss
        self.display.step(position.step, train_loss, self._speed())

    def _rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step,
            lr=config.lr,
            min_lr=config.final_lr,
            warmup_steps=config.warmup_steps,
            steps=self.steps,
        )

    def _speed(self) -> float:
        """Tokens per second since the last row, validation not counted."""
        seconds = time.perf_counter() - self.row_started
        return (self.position.tokens - self.row_tokens) / max(seconds, 1e-9)

    def _fail(self, loss: float, rate: float) -> None:
        raise TrainingError(
            f"at step {self.position.step + 1} the loss is {loss} and the gradient norm "
            f"{self.position.grad_norm} (learning rate {rate:.3g}); {_standing(self.out)}. "
            "Lower --lr, lengthen --warmup-steps, or set --grad-clip 1.0"
        )

    # -- evaluating and reporting ------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss over the validation split, or its first `eval_batches` batches."""
        began = time.perf_counter()
        self.model.eval()
        total, tokens = 0.0, 0
        for i, batch in enumerate(self.data.val_dataloader()):
            if i == self.config.eval_batches:
                break
            count = int((batch[1] != -100).sum())
            total += self._loss(batch).item() * count
            tokens += count
        self.model.train()
        position, loss = self.position, total / tokens
        characters_per_token = self.meta.characters_per_token("val")
        self.val = loss, loss / characters_per_token if characters_per_token else None
        position.evaluated = position.step
        self.row_started += time.perf_counter() - began
        if position.step > 0 and loss < position.best_val_loss:
            position.best_val_loss, position.best_step = loss, position.step
            self._write_row()
            self._save(self.checkpoints / ckpt.BEST)

    def _write_row(self) -> None:
        position = self.position
        now = time.perf_counter()
        steps = position.step - max(position.logged, 0)
        row: dict[str, Any] = {"step": position.step, "tokens": position.tokens}
        if position.evaluated == position.step and self.val is not None:
            row["val_loss"], row["val_loss_per_char"] = self.val
        if steps:
            row["train_loss"] = position.loss_sum / steps
            row["lr"] = self._rate(position.step - 1)
            row["grad_norm"] = self.position.grad_norm
            row["tokens_per_second"] = self._speed()
        position.elapsed = now - self.started
        row["elapsed_seconds"] = position.elapsed
        position.logged, position.loss_sum = position.step, 0.0
        self.row_started, self.row_tokens = now, position.tokens
        self.log.write(row)
        self.display.message(format_row(row, self.steps))

    # -- saving ------------------------------------------------------------------------------

    def _save(self, directory: Path) -> None:
        began = time.perf_counter()
        self.position.elapsed = began - self.started
        state = {
            "config": self.config.to_dict(),
            "data": _identity(self.meta),
            "position": dataclasses.asdict(self.position),
            "optimizer": self.optimizer.state_dict(),
            "random": ckpt.random_states(),
        }
        ckpt.save_checkpoint(directory, self.model, self.tokenizer, state)
        self.row_started += time.perf_counter() - began

    def _stop(self, signum: int, saved: int) -> None:
        step = self.position.step
        if step == 0:
            raise Interrupted(signum, "stopped before the first step; nothing to resume")
        directory = ckpt.step_directory(self.checkpoints, step)
        if saved != step:
            self._save(directory)
            ckpt.drop_old(self.checkpoints, self.config.keep_checkpoints)
        raise Interrupted(
            signum,
            f"stopped at step {step}; checkpoint in {directory}. Continue with:\n"
            f"  python -m gpt2fast.train --resume {shlex.quote(str(self.out))}",
        )

    def _deliver(self) -> TrainResult:
        self.model.eval()
        finished = copy.deepcopy(self.model).to(getattr(torch, self.config.save_dtype))
        ckpt.save_model(finished, self.out, self.tokenizer)
        position = self.position
        if self.val is None:
            self._evaluate()
        assert self.val is not None
        loss, per_char = self.val
        self.display.message(
            f"done: {position.step} steps, {position.tokens:,} tokens, {position.elapsed:,.0f} s; "
            f"validation loss in nats per token {format_val(loss, per_char)}"
        )
        if position.best_step not in (-1, position.step):
            self.display.message(
                f"the best validation loss was {position.best_val_loss:.4f}, at step "
                f"{position.best_step}: {self.checkpoints / ckpt.BEST}"
            )
        model = shlex.quote(str(self.out))
        self.display.message(f"try it:\n  python -m gpt2fast.generate --model {model}")
        return TrainResult(
            out=self.out,
            steps=position.step,
            tokens=position.tokens,
            val_loss=loss,
            val_loss_per_char=per_char,
            best_val_loss=position.best_val_loss,
            best_step=position.best_step,
        )


def _require_no_run(out: Path) -> None:
    standing = ckpt.newest_checkpoint(out / "checkpoints")
    if standing or (out / "model.safetensors").exists():
        found = standing or out / "model.safetensors"
        raise ConfigError(
            f"out is {str(out)!r}, which already holds a run ({found}): continue it with "
            f"--resume {shlex.quote(str(out))}, name another --out, or delete the folder"
        )


def _identity(meta: DataMeta) -> dict[str, Any]:
    """What tells one prepared data set from another."""
    names = ("tokenizer_fingerprint", "vocab_size", "train_tokens", "val_tokens")
    return {name: getattr(meta, name) for name in names}


def _with_dropout(model: GPT2, dropout: float) -> GPT2:
    """The same weights in a model whose three dropout rates are `dropout`.

    The weights are copied: loaded ones may lie in a mapped file, and where a tensor lies in memory
    may change the order in which kernels add.
    """
    changed = GPT2(dataclasses.replace(model.config, dropout=dropout), device="meta")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    changed.load_state_dict(weights, assign=True)
    return changed
