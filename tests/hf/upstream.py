"""transformers' own tests of GPT-2, and of what is built of its blocks, on plain and fused models.

    python tests/hf/upstream.py CHECKOUT [pytest's arguments]

CHECKOUT is a clone of transformers at the tag of the installed version; its tests need the packages
`parameterized` and `timeout_decorator`. The files of `TESTS`, most of whose tests are those of all
models and of generation, run twice, each time in a process of its own: as they are, and with every
GPT-2 and ImageGPT that they construct fused (language models with `generate=True`). Printed is what
fails on fused models alone; the exit code is 1 if `EXPECTED` does not name all of it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

TESTS = [
    "tests/models/gpt2/test_modeling_gpt2.py",
    "tests/models/imagegpt/test_modeling_imagegpt.py",
    "tests/models/encoder_decoder/test_modeling_encoder_decoder.py",
]
_ASKS_FOR_SDPA = "it asks that the attention be SDPA, which fuse replaces"
EXPECTED = {
    "GPT2ModelTest.test_sdpa_can_dispatch_non_composite_models": _ASKS_FOR_SDPA,
    "GPT2EncoderDecoderModelTest.test_sdpa_can_dispatch_composite_models": _ASKS_FOR_SDPA,
}
"""Tests that fail on fused models by what fuse promises, and why."""
_PASSED, _SKIPPED = "passed", "skipped"
_fused = 0


def pytest_configure() -> None:
    """As a plugin of pytest (`-p upstream`): let every GPT-2 be fused when it is constructed."""
    from transformers.models.gpt2 import modeling_gpt2 as gpt2
    from transformers.models.imagegpt import modeling_imagegpt as imagegpt

    for theirs, base in (
        (gpt2, gpt2.GPT2PreTrainedModel),
        (imagegpt, imagegpt.ImageGPTPreTrainedModel),
    ):
        for kind in list(vars(theirs).values()):
            if isinstance(kind, type) and issubclass(kind, base) and kind is not base:
                _fuse_when_constructed(kind, kind is gpt2.GPT2LMHeadModel)


def pytest_sessionfinish(session: Any) -> None:
    """Fail if there was nothing to fuse."""
    print(f"\n{_fused} models were fused")
    if not _fused and not session.config.option.collectonly:
        session.exitstatus = 1


def _fuse_when_constructed(kind: Any, generate: bool) -> None:
    from gpt2fast import fuse

    construct = kind.__init__

    @functools.wraps(construct)
    def construct_fused(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **options)
        if type(self) is kind:
            global _fused
            fuse(self, generate=generate)
            _fused += 1

    kind.__init__ = construct_fused


def outcomes(checkout: Path, fused: bool, arguments: list[str]) -> dict[str, str]:
    """What became of each test: "passed", "skipped" or the first line of its failure."""
    here = Path(__file__).parent
    path = [str(here), str(here.parents[1]), str(checkout), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    environment.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider"]
        command += ["--junitxml", str(report), *(["-p", "upstream"] if fused else []), *arguments]
        print(" ".join(command), flush=True)
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        if not report.exists():
            raise SystemExit("pytest left no report")
        found: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
            # A test of several parts is listed once for each that fails, and once as a whole.
            if found.get(name, _PASSED) in (_PASSED, _SKIPPED):
                found[name] = _outcome(case)
        return found


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag == "skipped":
            return _SKIPPED
        if child.tag in ("failure", "error"):
            return (child.get("message") or "failed").splitlines()[0]
    return _PASSED


def main(arguments: list[str]) -> int:
    """Run the tests both ways; returns the exit code."""
    checkout = Path(arguments[0] if arguments else "CHECKOUT").resolve()
    missing = [name for name in TESTS if not (checkout / name).exists()]
    if missing:
        print(f"{__doc__}\n{checkout} has no {missing[0]}")
        return 2
    plain = outcomes(checkout, False, arguments[1:])
    fused = outcomes(checkout, True, arguments[1:])
    good = (_PASSED, _SKIPPED)
    failing = {name: text for name, text in fused.items() if text not in good}
    new = {name: text for name, text in failing.items() if plain.get(name, _PASSED) in good}
    unlike = [
        name
        for name in plain.keys() | fused.keys()
        if (plain.get(name, "") == _PASSED) != (fused.get(name, "") == _PASSED)
        and name not in failing
        and plain.get(name, "") in (*good, "")
    ]
    passed = sum(fused.get(name) == text == _PASSED for name, text in plain.items())
    print(
        f"\n{passed} tests pass both ways, {sum(x == _SKIPPED for x in plain.values())} are "
        f"skipped, {sum(x not in good for x in plain.values())} fail on plain models, "
        f"{len(failing)} on fused ones, {len(new)} on fused ones alone"
    )
    for name, text in sorted(new.items()):
        print(f"{name}: {text}" + (f"\n    expected: {EXPECTED[name]}" if name in EXPECTED else ""))
    for name in sorted(unlike):
        print(f"{name} ran on one kind of model alone")
    return 1 if not passed or unlike or new.keys() - EXPECTED.keys() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
