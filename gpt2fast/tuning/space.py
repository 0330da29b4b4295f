"""The search space: a YAML file with the settings of a training run to try, and their ranges.

lr: {low: 1e-4, high: 1e-2, log: true}
n_layer: {low: 2, high: 6, step: 2}
optimizer: [adamw, muon]
momentum: {low: 0.8, high: 0.99, when: {optimizer: muon}}
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from .._system.parsing import read_yaml
from ..errors import ConfigError, shown
from ..training.config import DATA_SETTINGS, TrainConfig

Kind = Literal["float", "int", "categorical"]
Value = None | bool | int | float | str

MACHINE = ("device", "backend", "compile", "compile_mode", "threads", "parallel")
"""Settings about how the machine works."""
REPORTING = (
    *("out", "eval_interval", "eval_batches", "log_interval", "tensorboard", "wandb"),
    *("log_histograms", "sample_interval", "sample_prompt", "sample_tokens"),
    *("checkpoint_interval", "keep_checkpoints", "save_dtype"),
)
"""Settings about measuring, logging and saving."""

_REFUSED = {
    **dict.fromkeys(DATA_SETTINGS, "all trials train on the same data, prepared once"),
    **dict.fromkeys(MACHINE, "it says how the machine works, not what is learned"),
    **dict.fromkeys(REPORTING, "it says what is measured or kept, not what is learned"),
}
_KEYS = ("type", "low", "high", "log", "step", "choices", "when")
_DRAWS = 200
_MOST_CHOICES = 1000
_MOST_STEPS = 10**9
# Differences and quotients of two such numbers are still finite.
_LARGEST = {"float": 1e150, "int": 1 << 53}


class Suggesting(Protocol):
    """The part of an `optuna.Trial` that a space needs."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """A number of [low, high]."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """An integer of [low, high]."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of `choices`."""


@dataclass(frozen=True)
class Parameter:
    """One setting to try: a range or choices, perhaps only for certain values of others."""

    name: str
    kind: Kind
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()
    when: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    """Settings before this one, and the values of each with which it is tried."""

    def applies(self, values: Mapping[str, Value]) -> bool:
        """True if it is tried together with `values`."""
        return all(name in values and values[name] in wanted for name, wanted in self.when)

    def suggest(self, trial: Suggesting) -> Value:
        """A value that the sampler chooses."""
        if self.kind == "categorical":
            return trial.suggest_categorical(self.name, self.choices)
        if self.kind == "float":
            return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        return trial.suggest_int(
            self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log
        )

    def draw(self, chance: random.Random) -> Value:
        """A random value, without a study."""
        if self.kind == "categorical":
            return chance.choice(self.choices)
        step = self.step or (1 if self.kind == "int" else None)
        if self.log:
            value = math.exp(chance.uniform(math.log(self.low), math.log(self.high)))
            return round(value) if self.kind == "int" else min(max(value, self.low), self.high)
        if step is None:
            return chance.uniform(self.low, self.high)
        return self._after(chance.randint(0, self._steps()))

    def extremes(self) -> tuple[Value, ...]:
        """Its choices, or the ends of its range."""
        return self.choices if self.kind == "categorical" else (self.low, self.high_reached())

    def high_reached(self) -> float:
        """The largest value: the last one that steps from `low` reach."""
        return self.high if self.step is None else self._after(self._steps())

    def holds(self, value: Value) -> bool:
        """True if it can have this value."""
        if self.kind == "categorical":
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if type(value) is not int or not self.low <= value <= self.high:
            return False
        return (value - self.low) % (self.step or 1) == 0

    # In decimal arithmetic, as Optuna counts: 3 steps of 0.1 are 0.3.

    def _after(self, steps: int) -> float:
        value = Decimal(str(self.low)) + Decimal(str(self.step or 1)) * steps
        return int(value) if self.kind == "int" else float(value)

    def _steps(self) -> int:
        size = Decimal(str(self.high)) - Decimal(str(self.low))
        return int(size // Decimal(str(self.step or 1)))

    def to_dict(self) -> dict[str, Any]:
        """The content of its file, with all defaults written out."""
        found: dict[str, Any] = {"type": self.kind}
        if self.kind == "categorical":
            found["choices"] = list(self.choices)
        else:
            found.update(low=self.low, high=self.high)
            found.update({"log": True} if self.log else {})
            found.update({} if self.step is None else {"step": self.step})
        if self.when:
            found["when"] = {name: list(values) for name, values in self.when}
        return found


@dataclass(frozen=True)
class Space:
    """All parameters, in the order of the file: a condition refers to earlier ones."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: Suggesting) -> dict[str, Value]:
        """Settings for `trial`: those that apply."""
        values: dict[str, Value] = {}
        for parameter in self.parameters:
            if parameter.applies(values):
                values[parameter.name] = parameter.suggest(trial)
        return values

    def draw(self, chance: random.Random, **fixed: Value) -> dict[str, Value]:
        """Random settings, except for the `fixed` ones."""
        values: dict[str, Value] = {}
        for parameter in self.parameters:
            if parameter.applies(values):
                known = parameter.name in fixed
                values[parameter.name] = fixed[parameter.name] if known else parameter.draw(chance)
        return values

    def possible(self, base: TrainConfig) -> list[TrainConfig]:
        """Some of the configurations that trials will have, the same ones at every call.

        Raises ConfigError if there is none, or if a value of the space can be in none.
        """
        found = self._valid(base, "")
        for parameter in self.parameters:
            for value in parameter.extremes():
                found += self._valid(base, f"{parameter.name}: ", **{parameter.name: value})
        return found

    def _valid(self, base: TrainConfig, where: str, **fixed: Value) -> list[TrainConfig]:
        chance = random.Random(0)
        found, reason = [], ""
        for _ in range(_DRAWS):
            values = self.draw(chance, **fixed)
            if not fixed.keys() <= values.keys():
                continue  # it does not apply here
            try:
                found.append(dataclasses.replace(base, **values))  # type: ignore[arg-type]
            except ConfigError as error:
                reason = str(error)
            if len(found) == 3:
                break
        if not found and reason:
            raise ConfigError(f"the space cannot be tried: {where}{reason}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The content of its file, with all defaults written out."""
        return {parameter.name: parameter.to_dict() for parameter in self.parameters}


def spaces() -> dict[str, Path]:
    """Shipped search spaces by name."""
    folder = Path(str(files("gpt2fast") / "configs" / "spaces"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_space(name: str) -> Space:
    """The space in a YAML file, or a shipped one. Raises ConfigError for mistakes in it."""
    path = Path(name) if Path(name).is_file() else spaces().get(name)
    if path is None:
        raise ConfigError(
            f"--space {shown(name)} is neither a file nor a shipped space ({', '.join(spaces())})"
        )
    try:
        return parse_space(read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_space(content: Any) -> Space:
    """The space that a file's content describes. Raises ConfigError for mistakes in it."""
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            "a space is a setting a line, such as lr: {low: 1e-4, high: 1e-2, log: true}"
        )
    hints = get_type_hints(TrainConfig)
    parameters: dict[str, Parameter] = {}
    for name, asked in content.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{shown(name)} is no setting{meant} (python -m gpt2fast.train --help lists them)"
            )
        if name in _REFUSED:
            raise ConfigError(f"{name} cannot be tuned: {_REFUSED[name]}")
        parameters[name] = _parameter(name, asked, hints[name], parameters, list(content))
    return Space(tuple(parameters.values()))


def _parameter(
    name: str, asked: Any, hint: Any, before: dict[str, Parameter], names: list[str]
) -> Parameter:
    if isinstance(asked, list):
        asked = {"choices": asked}
    if not isinstance(asked, dict):
        raise ConfigError(
            f"{name} is {shown(asked)}; give a range, {{low: …, high: …}}, or choices, [a, b]"
        )
    for key in asked:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; it may have {', '.join(_KEYS)}"
            raise ConfigError(f"{name} has {shown(key)}{meant}")
    field = _field_type(hint)
    allowed = {float: ("float", "int", "categorical"), int: ("int", "categorical")}.get(
        field, ("categorical",)
    )
    kind = asked.get("type", "categorical" if "choices" in asked else allowed[0])
    if kind not in allowed:
        raise ConfigError(f"{name}: type is {shown(kind)}, but must be {' or '.join(allowed)}")
    when = _conditions(name, asked.get("when", {}), before, names)
    if kind == "categorical":
        return Parameter(name, kind, choices=_choices(name, asked, field), when=when)
    return _range(name, kind, asked, when)


def _choices(name: str, asked: dict[str, Any], field: type) -> tuple[Value, ...]:
    given = asked.get("choices")
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{name}: choices is {shown(given)}, but must be a list, such as [a, b]")
    if len(given) > _MOST_CHOICES:
        raise ConfigError(f"{name} has {len(given)} choices; at most {_MOST_CHOICES} can be tried")
    for key in ("low", "high", "log", "step"):
        if key in asked:
            raise ConfigError(f"{name} has choices and {key}; drop one of the two")
    choices = tuple(_number(value) if field in (int, float) else value for value in given)
    for place, value in enumerate(choices):
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise ConfigError(f"{name}: {shown(value)} among the choices is no plain value")
        if any(value == other and type(value) is type(other) for other in choices[:place]):
            raise ConfigError(f"{name}: {shown(value)} is twice among the choices; drop one")
    if field is float:
        return tuple(float(v) if type(v) is int else v for v in choices)
    return choices


def _range(name: str, kind: Kind, asked: dict[str, Any], when: Any) -> Parameter:
    if "choices" in asked:
        raise ConfigError(f"{name} has choices and the type {kind}; drop one of the two")
    numbers: dict[str, float] = {}
    for key in ("low", "high", "step"):
        if key not in asked:
            if key == "step":
                continue
            raise ConfigError(f"{name} has no {key}; a range needs low and high")
        value = _number(asked[key])
        right = type(value) is int or (kind == "float" and type(value) is float)
        if not right or not abs(value) <= _LARGEST[kind]:
            what = "a number" if kind == "float" else "a whole number"
            raise ConfigError(
                f"{name}: {key} is {shown(asked[key])}, but must be {what} of at most "
                f"{_LARGEST[kind]:g}"
            )
        numbers[key] = float(value) if kind == "float" else value
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    log = asked.get("log", False)
    if type(log) is not bool:
        raise ConfigError(f"{name}: log is {shown(log)}, but must be true or false")
    if low > high:
        raise ConfigError(f"{name}: low is {low:g}, above high, {high:g}; exchange them")
    if step is not None and step <= 0:
        raise ConfigError(f"{name}: step is {step:g}, but must be above 0")
    if log and low <= 0:
        raise ConfigError(f"{name}: low is {low:g}, but must be above 0 with log: true")
    if log and step is not None:
        raise ConfigError(f"{name} has log and step; drop one of the two, or give choices")
    if step is not None and (high - low) / step > _MOST_STEPS:
        raise ConfigError(
            f"{name}: step is {step:g}, which divides the range from {low:g} to {high:g} into more "
            f"than {_MOST_STEPS} parts; make it larger, or leave it out"
        )
    found = Parameter(name, kind, low, high, step, log, when=when)
    return dataclasses.replace(found, high=found.high_reached())


def _conditions(
    name: str, asked: Any, before: dict[str, Parameter], names: list[str]
) -> tuple[tuple[str, tuple[Value, ...]], ...]:
    if not isinstance(asked, dict):
        raise ConfigError(
            f"{name}: when is {shown(asked)}, but must name settings and their values, such as "
            "{optimizer: muon}"
        )
    found = []
    for other, wanted in asked.items():
        if other not in before:
            if other == name:
                reason = f"{name} cannot depend on itself"
            elif other in names:
                reason = f"{other} comes after it; put it before {name}"
            else:
                reason = f"{other} is not in the space"
            raise ConfigError(f"{name} has a condition on {other}, but {reason}")
        if before[other].kind == "float":
            raise ConfigError(
                f"{name} has a condition on {other}, which is any number of a range; a condition "
                "needs choices or an int"
            )
        values = tuple(wanted) if isinstance(wanted, list) else (wanted,)
        for value in values or (None,):
            if not before[other].holds(value):
                raise ConfigError(
                    f"{name} has a condition on {other}: {shown(value)}, which {other} never is"
                )
        found.append((other, values))
    return tuple(found)


def _field_type(hint: Any) -> type:
    """The type of a field's values, None aside."""
    options = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    plain = next((option for option in options if option is not type(None)), hint)
    if get_origin(plain) is Literal or not isinstance(plain, type):
        return str
    return plain


def _number(value: Any) -> Any:
    """A number that YAML took for text, as it does 1e-4, which has no decimal point."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
