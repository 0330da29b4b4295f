"""The words that started this command line, for usage lines and messages that name a command."""

from __future__ import annotations

import re
import sys
from pathlib import PurePath


def command_line(command: str = "") -> str:
    """A command as the user would call it: `gpt2fast train`, if that is how this process began.

    Otherwise `python -m gpt2fast train`, or `python -m gpt2fast.train`, which always works.
    """
    module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    if module == "gpt2fast.__main__":
        return f"python -m gpt2fast {command}".rstrip()
    if module in ("", "__main__") and PurePath(sys.argv[0]).stem == "gpt2fast":
        return f"gpt2fast {command}".rstrip()
    return f"python -m gpt2fast.{command}" if command else "python -m gpt2fast"


def as_called(text: str) -> str:
    """A text in which commands are what the user would type.

    They are `gpt2fast COMMAND` where a command may begin, and `python -m gpt2fast.COMMAND`.
    """
    command = r"(?:(^ *|`|\| )gpt2fast |\bpython -m gpt2fast\.)([a-z]+)\b"
    return re.sub(command, _as_called, text, flags=re.MULTILINE)


def _as_called(found: re.Match[str]) -> str:
    return (found[1] or "") + command_line(found[2])
