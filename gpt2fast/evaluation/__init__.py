"""Evaluation: perplexity, and the tasks of the GPT-2 paper (docs/evaluation.md)."""

from __future__ import annotations

from .likelihood import Likelihood, Request, Scorer
from .run import TASKS, Result, evaluate
from .task import Choice, ChoiceTask, Document, Hub, Metric, Settings, Task, TextTask

__all__ = [
    "TASKS",
    "Choice",
    "ChoiceTask",
    "Document",
    "Hub",
    "Likelihood",
    "Metric",
    "Request",
    "Result",
    "Scorer",
    "Settings",
    "Task",
    "TextTask",
    "evaluate",
]
