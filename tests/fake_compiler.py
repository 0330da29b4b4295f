"""A C++ compiler for tests that are about builds, not about what is built."""

from __future__ import annotations

from pathlib import Path

COMPILER = """#!/bin/sh
echo "$$ $*" >> "{folder}/calls"
if [ -e "{folder}/broken" ]; then echo "kernels.h:1: error: no such thing" >&2; exit 1; fi
if [ -e "{folder}/slow" ]; then sleep 60; fi
sleep {seconds}
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo compiled > "$2"; fi
    shift
done
"""


class FakeCompiler:
    """A compiler whose libraries are text files."""

    def __init__(self, folder: Path, seconds: float = 0.0):
        folder.mkdir()
        self.folder = folder
        self.path = folder / "c++"
        self.path.write_text(COMPILER.format(folder=folder, seconds=seconds))
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """Its process and arguments, each time it ran."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def links(self) -> int:
        """Number of libraries that it has made."""
        return sum(" -shared " in call for call in self.calls)

    def behave(self, how: str) -> None:
        (self.folder / how).touch()
