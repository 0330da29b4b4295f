"""Public names are documented, and the API reference builds."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).parents[1] / "docs" / "reference.py"
_spec = importlib.util.spec_from_file_location("reference", _SCRIPT)
assert _spec is not None and _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

FACTORY = {"device", "dtype"}
"""Keywords that every module takes, as torch's do."""

ELSEWHERE = re.compile(r"\b[Aa]s (`|for|of|in)|[Aa]rguments|\bsee\b")
"""Words by which a docstring refers to another one for the arguments."""

SHAPE = re.compile(r"\([^()]*,[^()]*\)")
"""(B, T, vocab), (N,)."""


def _public() -> Iterator[tuple[str, Any]]:
    for module_name in reference.MODULES:
        module = reference.load(module_name)
        for name in reference.names(module):
            thing = getattr(module, name)
            if not callable(thing):
                continue
            yield f"{module_name}.{name}", thing
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                value = getattr(value, "__func__", value)  # of a class method
                if not member.startswith("_") and isinstance(value, property | Callable):
                    yield f"{module_name}.{name}.{member}", value


PUBLIC = dict(_public())
"""Public functions and classes, and the functions and properties of the classes."""

FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}


def taken(thing: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def unnamed(thing: Callable[..., Any], text: str) -> list[str]:
    """The parameters that a text does not name."""
    return [name for name in taken(thing) if not re.search(rf"\b{name}\b", text)]


def test_the_reference_has_what_a_reader_looks_for():
    for name in ("GPT2", "Generator", "nn.Block", "ops.causal_attention", "training.TrainConfig"):
        assert f"gpt2fast.{name}" in PUBLIC
    assert "gpt2fast.Generator.stream" in FUNCTIONS
    assert len(PUBLIC) > 150


def test_everything_has_a_docstring():
    without = []
    for name, thing in PUBLIC.items():
        text = thing.__doc__ or ""
        # What dataclass and NamedTuple write by themselves says nothing.
        made_up = (f"{name.rpartition('.')[2]}(", "Alias for field")
        if not text or text.startswith(made_up):
            without.append(name)
    assert not without


def test_functions_say_what_they_take():
    wrong = {}
    for name, function in FUNCTIONS.items():
        text = inspect.getdoc(function) or ""
        listed = text.partition("Args:")[2] if "Args:" in text else text
        missing = unnamed(function, listed)
        referred = "Args:" not in text and ELSEWHERE.search(text)
        # Of one alone the summary speaks.
        if missing and len(taken(function)) > 1 and not referred:
            wrong[name] = missing
    assert not wrong


def test_classes_say_what_they_take():
    wrong = {}
    for name, thing in CLASSES.items():
        if "__init__" not in vars(thing) or hasattr(thing, "__dataclass_fields__"):
            continue  # fields have docstrings of their own
        missing = set(unnamed(thing.__init__, inspect.getdoc(thing) or "")) - FACTORY
        if missing:
            wrong[name] = missing
    assert not wrong


def test_functions_say_the_shape_of_tensors_that_they_return():
    wrong = []
    for name, function in FUNCTIONS.items():
        if "Tensor" in str(inspect.signature(function).return_annotation):
            text = inspect.getdoc(function) or ""
            summary = text.partition("Args:")[0]
            if "Returns:" not in text and not SHAPE.search(summary) and not ELSEWHERE.search(text):
                wrong.append(name)
    assert not wrong


def test_the_reference_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("pdoc", reason='needs pdoc: pip install "gpt2fast[docs]"')
    assert reference.build(tmp_path) == []
    for module in reference.MODULES:
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
        for name in reference.names(reference.load(module)):
            assert f'id="{name}"' in page, f"the page of {module} leaves out {name}"
    ops = (tmp_path / "gpt2fast" / "ops.html").read_text(encoding="utf-8")
    assert "softmax_s(scores[b, h, t, :])" in ops  # the formula of attention
