"""Docstrings below the fields of a class, which Python itself forgets: the help of flags."""

from __future__ import annotations

import ast
import inspect
import textwrap


def field_docstrings(cls: type) -> dict[str, str]:
    """The docstring below each field, on one line, out of the source of the class."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name) and isinstance(following.value, ast.Constant)
            texts[node.target.id] = " ".join(str(following.value.value).split())
    return texts
