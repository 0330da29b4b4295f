"""The report on a study: pictures, and one HTML file that needs nothing else."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.files import atomic_write, atomic_write_text
from .._system.tables import setting
from ..reporting.page import html_image, html_page, html_table
from .space import Space
from .study import best_of
from .trials import DIGITS, ranked, trial_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial

FEWEST_TRIALS = 10
"""Completed trials that meaningful importances need."""

_BLUE, _GRAY, _ORANGE = "#3b7dd8", "#9a9aa4", "#e07b39"


def write_report(study: Study, space: Space, out: Path) -> list[Path]:
    """Write report.html, history.png and, from enough trials, importances.png; their paths."""
    trials = study.get_trials(deepcopy=False)
    scored = [trial for trial in trials if trial.value is not None]
    pictures: dict[str, bytes] = {}
    if scored:
        pictures["history"] = _picture(_history(scored))
        pictures["settings"] = _picture(_slices(scored, space))
    found = importances(study)
    if found:
        pictures["importances"] = _picture(_bars(found))
    written = [out / "report.html"]
    atomic_write_text(written[0], _page(study.study_name, trials, space, pictures))
    for name in ("history", "importances"):
        if name in pictures:
            written.append(out / f"{name}.png")
            with atomic_write(written[-1]) as file:
                file.write(pictures[name])
    return written


def importances(study: Study) -> dict[str, float]:
    """Each setting's share in what makes the best tenth of the trials (PED-ANOVA; Watanabe et al.,
    2023), largest first; empty where too few trials are complete, or only one setting is tried."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    names = {name for trial in complete for name in trial.params}
    if len(complete) < FEWEST_TRIALS or len(names) < 2:
        return {}
    with warnings.catch_warnings():
        # Few trials for a setting that seldom applies: its bar is short, and the table says it all.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


# -- pictures ------------------------------------------------------------------------------------


def _history(trials: Sequence[FrozenTrial]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = _figure(8, 3.6)
    axes = figure.add_subplot()
    _losses(axes, trials, [trial.number for trial in trials])
    best: list[float] = []
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    for trial in complete:
        best.append(min([trial.value or 0.0, *best[-1:]]))
    numbers = [trial.number for trial in complete]
    axes.step(numbers, best, where="post", color=_ORANGE, label="lowest so far")
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def _slices(trials: Sequence[FrozenTrial], space: Space) -> Figure:
    """The losses over each setting."""
    columns = min(3, len(space.parameters))
    lines = -(-len(space.parameters) // columns)
    figure = _figure(3.6 * columns, 2.8 * lines)
    for place, parameter in enumerate(space.parameters):
        axes = figure.add_subplot(lines, columns, place + 1)
        tried = [trial for trial in trials if parameter.name in trial.params]
        values: list[Any] = [trial.params[parameter.name] for trial in tried]
        if parameter.kind == "categorical":
            names = [setting(choice) for choice in parameter.choices]
            values = [names.index(setting(value)) for value in values]
            axes.set_xticks(range(len(names)), names)
        _losses(axes, tried, values)
        if parameter.log:
            axes.set_xscale("log")
        axes.set_xlabel(parameter.name)
    return figure


def _bars(found: dict[str, float]) -> Figure:
    figure = _figure(8, 1 + 0.35 * len(found))
    axes = figure.add_subplot()
    names = list(found)[::-1]
    bars = axes.barh(names, [found[name] for name in names], color=_BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("importance")
    return figure


def _losses(axes: Any, trials: Sequence[FrozenTrial], xs: Sequence[Any]) -> None:
    for state, label, color, marker in (
        ("COMPLETE", "complete", _BLUE, "o"),
        ("PRUNED", "pruned", _GRAY, "x"),
    ):
        chosen = [i for i, trial in enumerate(trials) if trial.state.name == state]
        if chosen:
            ys = [trials[i].value for i in chosen]
            axes.scatter([xs[i] for i in chosen], ys, s=22, c=color, marker=marker, label=label)
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _picture(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


# -- page ----------------------------------------------------------------------------------------


def _page(
    name: str, trials: Sequence[FrozenTrial], space: Space, pictures: dict[str, bytes]
) -> str:
    best = best_of(list(trials))
    if best is None:
        verdict = "<p>No trial has completed yet.</p>"
    else:
        values = ", ".join(
            f"{name} {setting(value, DIGITS)}" for name, value in best.params.items()
        )
        verdict = (
            f"<p>Lowest validation loss: <b>{best.value:.4f}</b> in trial {best.number} "
            f"({escape(values)}). <code>best.yaml</code> holds all its settings.</p>"
        )
    missing = f"<p>Importances need at least two settings and {FEWEST_TRIALS} completed trials.</p>"
    shown = "".join(
        f"<h2>{title}</h2>\n{html_image(pictures[key], title) if key in pictures else otherwise}\n"
        for key, title, otherwise in (
            ("history", "Losses, trial by trial", "<p>Nothing yet.</p>"),
            ("importances", "What matters", missing),
            ("settings", "Losses over each setting", "<p>Nothing yet.</p>"),
        )
    )
    table = html_table(*trial_table(ranked(trials), [p.name for p in space.parameters]))
    return html_page(f"Study: {name}", f"{verdict}\n{shown}\n<h2>Trials</h2>\n{table}")
