"""Optuna's samplers, which propose settings, and its pruners, which end trials early.

TPE: Bergstra et al., 2011. Hyperband: Li et al., 2018; its median rule: Golovin et al., 2017.
"""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


def make_sampler(kind: Literal["tpe", "random"], seed: int) -> BaseSampler:
    """A sampler whose random state depends on the seed and the trial's number alone.

    So a resumed study goes on as it would have, and workers with the same seed do not try the same
    settings.
    """
    import optuna
    from optuna.samplers import BaseSampler, RandomSampler, TPESampler

    class ByTrial(BaseSampler):
        def __init__(self) -> None:
            self.inner: BaseSampler = RandomSampler()

        def before_trial(self, study: Any, trial: Any) -> None:
            # Not seed + number: neighboring seeds of numpy's generator begin alike.
            of_trial = random.Random(f"{seed} {trial.number}").getrandbits(32)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.inner = (
                    TPESampler(seed=of_trial, multivariate=True, group=True, constant_liar=True)
                    if kind == "tpe"
                    else RandomSampler(seed=of_trial)
                )
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return self.inner.sample_independent(study, trial, name, distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self.inner.after_trial(study, trial, state, values)

    return ByTrial()


def make_pruner(
    kind: Literal["hyperband", "median", "none"], interval: int, steps: int
) -> BasePruner:
    """A pruner for runs of at most `steps` steps, with a validation every `interval` steps."""
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    if kind == "hyperband":
        return HyperbandPruner(min_resource=min(interval, steps), max_resource=steps)
    return MedianPruner() if kind == "median" else NopPruner()
