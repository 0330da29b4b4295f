"""The columns of a run's logs."""

COLUMNS = (
    "step",
    "tokens",
    "train_loss",
    "val_loss",
    "val_loss_per_char",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "elapsed_seconds",
    "epoch",
    "mfu",
    "memory_gib",
    "loss_scale",
)
"""Losses in nats; grad_norm before clipping; epoch: passes over the training tokens; mfu: model
FLOPs utilization, a share of 1; memory_gib: the most that was held so far, in GiB."""

OLD_NAMES = {"utilisation": "mfu"}
"""Names of columns in logs of older versions."""

SCALARS = {
    "train_loss": "loss/train",
    "val_loss": "loss/validation",
    "val_loss_per_char": "loss/validation_per_character",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "loss_scale": "loss_scale",
    "tokens_per_second": "machine/tokens_per_second",
    "mfu": "machine/mfu",
    "memory_gib": "machine/memory_gib",
    "tokens": "progress/tokens",
    "epoch": "progress/epoch",
    "elapsed_seconds": "progress/elapsed_seconds",
}
"""Names of the columns in TensorBoard and Weights & Biases."""
