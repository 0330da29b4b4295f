"""The layout of a training run's folder.

config.yaml                  the settings
log.csv, log.jsonl           a row for each logged step
samples.jsonl, tensorboard/, wandb-id.txt    where they are asked for
data/                        tokens that the run has prepared from text
checkpoints/                 step-00001000/, …, and best/: a model's files with
                             training_state.safetensors and optimizer/
config.json, model.safetensors, tokenizer.json, …    the finished model
adapter/                     its adapters, where only those were trained
"""

from __future__ import annotations

from pathlib import Path

SETTINGS = "config.yaml"
LOG, JSON_LOG = "log.csv", "log.jsonl"
SAMPLES = "samples.jsonl"
TENSORBOARD, WANDB_ID = "tensorboard", "wandb-id.txt"
DATA = "data"
MODEL = "model.safetensors"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
BEST, STEP = "best", "step-"
STATE = "training_state.safetensors"
OLD_STATE = "training_state.pt"
OPTIMIZER = "optimizer"

WEIGHTS = (CHECKPOINTS, ADAPTER, MODEL)
"""All that holds weights."""


def is_run(folder: Path) -> bool:
    """True for the folder of a run that has begun to log."""
    return (folder / SETTINGS).is_file() and (folder / LOG).is_file()
