"""The API reference, out of the docstrings: `make docs`, or `python docs/reference.py [FOLDER]`.

pdoc (`pip install "gpt2fast[docs]"`) writes a page for each of `MODULES`, with the names in its
`__all__`, or without one those defined in it. Anything that pdoc warns of ends the command.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

MODULES = (
    "gpt2fast",
    "gpt2fast.nn",
    "gpt2fast.ops",
    "gpt2fast.sampling",
    "gpt2fast.tokenizer",
    "gpt2fast.quantization",
    "gpt2fast.data",
    "gpt2fast.training",
    "gpt2fast.lora",
    "gpt2fast.evaluation",
    "gpt2fast.tuning",
    "gpt2fast.errors",
)
"""What is public, in the order in which a reader meets it."""

FOLDER = Path(__file__).parents[1] / "build" / "docs"


def load(module_name: str) -> ModuleType:
    """Import a module, and what it imports only when asked for it."""
    module = importlib.import_module(module_name)
    for name in getattr(module, "__all__", ()):
        member = getattr(module, name)
        vars(module)[name] = member
        if hasattr(member, "_fields"):
            # pdoc reads the types of a NamedTuple off its constructor, which knows no module.
            member.__new__.__annotations__ = get_type_hints(member)
    return module


def names(module: ModuleType) -> list[str]:
    """What is public in a module."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, member in vars(module).items()
        if not name.startswith("_") and getattr(member, "__module__", None) == module.__name__
    ]


def families(module: ModuleType) -> str:
    """The docstrings of the files in which a module's functions are: what an op means."""
    homes = dict.fromkeys(getattr(module, name).__module__ for name in names(module))
    parts = [inspect.getdoc(module) or ""]
    for home in homes:
        parts.append(f"## {home}\n\n{inspect.getdoc(sys.modules[home])}")
    return "\n\n".join(parts)


def build(folder: Path) -> list[str]:
    """Write the pages; returns what pdoc has warned of."""
    import pdoc.doc
    import pdoc.render

    pdoc.render.configure(docformat="google", show_source=False)
    pages = {name: pdoc.doc.Module(load(name)) for name in MODULES}
    for name, page in pages.items():
        page.submodules = [other for key, other in pages.items() if key.rpartition(".")[0] == name]
    ops = pages["gpt2fast.ops"]
    ops.docstring = families(ops.obj)

    written = {}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for name, page in pages.items():
            written[f"{name.replace('.', '/')}.html"] = pdoc.render.html_module(page, pages)
        written["index.html"] = pdoc.render.html_index(pages)
        written["search.js"] = pdoc.render.search_index(pages)
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [str(warning.message) for warning in found]


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if len(argv) > 1 or argv[:1] in (["-h"], ["--help"]):
        print(f"usage: python docs/reference.py [FOLDER]   (by default {FOLDER})")
        return 0 if len(argv) == 1 else 2
    folder = Path(argv[0]) if argv else FOLDER
    try:
        problems = build(folder)
    except ModuleNotFoundError as error:
        if error.name not in ("pdoc", "pdoc.doc"):
            raise
        print('error: needs pdoc: pip install "gpt2fast[docs]"', file=sys.stderr)
        return 1
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"wrote {folder / 'index.html'}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
