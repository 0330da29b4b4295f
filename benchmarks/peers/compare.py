"""gpt2fast beside other engines, in turns, with the memory's speed measured in every round:

    python compare.py --model MODEL                        everything that is installed
    python compare.py --model MODEL --weights int8 --cases decode-1 prefill-512
    python compare.py --model MODEL --check                do the float32 engines write the same?
    python compare.py --model MODEL --isa avx2             all held to AVX2, where they can be

MODEL is a directory of GPT2.save_pretrained; `random_model.py` makes one with random weights, and
`setup_peers.py` installs the engines. Results go to RESULTS.json, .md and, where matplotlib is
installed, .png; figures of another call with the same names are replaced and the others kept, so
that a long comparison can be made in pieces.

A processor with more than AVX2 stands in for one without only as far as the engines can be held to
it: each that has a switch gets it, llama.cpp is what setup_peers.py --isa avx2 built, and the table
marks those that have neither.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint, PeerError
from setup_peers import DEFAULT_FOLDER, python_of

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))  # machine.py, which the other benchmarks use as well

import machine  # noqa: E402
from gpt2fast._system.files import atomic_write_text  # noqa: E402
from picture import CAN_DRAW, picture  # noqa: E402

OURS = "gpt2fast"


@dataclass(frozen=True)
class Case:
    """A batch of prompts of one length, continued."""

    rows: int
    prompt: int
    new: int
    kind: str
    """The speed that counts: "prefill" or "decode"."""


CASES = {
    "decode-1": Case(1, 128, 128, "decode"),
    "decode-8": Case(8, 128, 64, "decode"),
    "decode-32": Case(32, 128, 32, "decode"),
    "decode-1-at-896": Case(1, 896, 64, "decode"),
    "prefill-512": Case(1, 512, 1, "prefill"),
    "prefill-1024": Case(1, 1024, 1, "prefill"),
}

FORMATS = {
    "float32": [
        (OURS, "float32"),
        ("transformers", "float32"),
        ("ctranslate2", "float32"),
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
        ("llama_cpp", "float32"),
        ("xllamacpp", "float32"),
    ],
    "bfloat16": [
        (OURS, "bfloat16"),
        ("transformers", "bfloat16"),
        ("openvino", "bfloat16"),
        ("llama_cpp", "bfloat16"),
        ("llama_cpp", "float16"),
        ("xllamacpp", "bfloat16"),
        ("xllamacpp", "float16"),
    ],
    "float16": [(OURS, "float16"), ("llama_cpp", "float16")],
    "int8": [
        (OURS, "int8"),
        ("ctranslate2", "int8"),
        ("onnxruntime", "int8"),
        ("onnxruntime", "int8-blocks"),
        ("openvino", "int8"),
        ("llama_cpp", "int8"),
        ("xllamacpp", "int8"),
    ],
    "int4": [
        (OURS, "int4"),
        ("onnxruntime", "int4"),
        ("openvino", "int4"),
        ("llama_cpp", "int4"),
        ("xllamacpp", "int4"),
    ],
}
"""The engines that are compared with each other, ours first, and their formats of the weights."""

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 32}
"""Bytes a weight, for the floor where our engine does not say what it reads."""

_MODULES = {
    OURS: ("gpt2fast",),
    "transformers": ("transformers",),
    "ctranslate2": ("ctranslate2",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "nncf"),
    "llama_cpp": ("gguf",),
    "xllamacpp": ("gguf", "xllamacpp"),
}
"""Modules that this environment needs to run a peer that has none of its own."""

_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SWITCHES = {
    "avx2": {
        OURS: {"GPT2FAST_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", **_AVX2},
        "transformers": {"ATEN_CPU_CAPABILITY": "avx2", **_AVX2},
        "ctranslate2": {"CT2_FORCE_CPU_ISA": "AVX2", **_AVX2},
        "xllamacpp": {},  # a wheel for AVX2
    },
}
"""What holds each peer to an instruction set; one that is not named has no switch.

OpenVINO would obey ONEDNN_MAX_CPU_ISA in a part of its kernels, and then refuse to load 8-bit
weights on a processor that has more. The matrix products of ONNX Runtime know no such variable.
"""

_CALM = 0.15
"""Cores that something else may use in a round that counts."""

_PAUSE = 0.3
"""Seconds between two engines' turns, until the threads of the one before have gone to sleep."""


class Engine:
    """A peer in a process of its own (serve.py).

    Raises:
        PeerError: it is not installed, or lacks the format.
    """

    def __init__(
        self,
        peer: str,
        weights: str,
        model: Path,
        threads: int,
        folder: Path,
        converted: Path,
        isa: str | None = None,
    ):
        self.peer, self.weights = peer, weights
        python, switches = _python(peer, folder, isa)
        self.held = isa is None or switches is not None or not machine.has_more_than(isa)
        """Whether it uses no more than `isa`."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        environment |= switches or {}
        words = [
            python, _HERE / "serve.py", peer, "--model", model, "--weights", weights,
            "--threads", threads, "--converted", converted,
        ]  # fmt: skip
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        try:
            self.version: str = self._read()["version"]
        except BaseException:
            self.close()
            raise

    @property
    def label(self) -> str:
        """Name and, where it is not that of the group, format."""
        return f"{self.peer} {self.weights}"

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """One greedy continuation; see `engine.Run`. `others` is how many cores something else
        used meanwhile, None if unknown."""
        start = time.perf_counter()
        before = _busy_seconds(self._process.pid)
        command = json.dumps({"op": "generate", "prompts": prompts, "new": new})
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer that is missing says so
        answer = self._read()
        after = _busy_seconds(self._process.pid)
        others = None
        if before and after:
            foreign = (after[0] - before[0]) - (after[1] - before[1])
            others = max(0.0, foreign / (time.perf_counter() - start))
        return {**answer, "others": others}

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise PeerError(f"{self.label}: the process ended with code {code}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.label}: {answer['error']}")
        return answer


def _busy_seconds(process: int) -> tuple[float, float] | None:
    """Seconds that all cores together, and those that this process, have computed since they
    started; None where there is no /proc to tell."""
    try:
        machine_wide = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        own = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, soft = (int(ticks) for ticks in machine_wide[1:8])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft) / tick, (int(own[11]) + int(own[12])) / tick


def _python(peer: str, folder: Path, isa: str | None) -> tuple[Path, dict[str, str] | None]:
    """The interpreter to run a peer with, its own environment's or this one's if it has it; and the
    variables that hold it to `isa`, None where nothing does."""
    built = python_of(peer, folder, isa) if isa else None
    if built is not None:
        return built, {}
    switches = SWITCHES[isa].get(peer) if isa else None
    found = python_of(peer, folder)
    if found is not None:
        return found, switches
    if all(importlib.util.find_spec(name) for name in _MODULES[peer]):
        return Path(sys.executable), switches
    raise PeerError(f"{peer} is not installed: see setup_peers.py")


def start(
    weights: str,
    model: Path,
    threads: int,
    folder: Path,
    converted: Path,
    isa: str | None = None,
) -> tuple[list[Engine], list[str]]:
    """The engines of a group that run here, ours first, and why the others do not; held to an
    instruction set, as far as they can be, with `isa`."""
    engines, missing = [], []
    for peer, own in FORMATS[weights]:
        try:
            engines.append(Engine(peer, own, model, threads, folder, converted, isa))
        except PeerError as error:
            missing.append(str(error))
    return engines, missing


def prompts_of(case: Case, vocabulary: int) -> list[list[int]]:
    """The same random tokens at every call."""
    draw = random.Random(0)
    return [[draw.randrange(vocabulary) for _ in range(case.prompt)] for _ in range(case.rows)]


def measure(
    engines: Sequence[Engine], case: Case, rounds: int, threads: int, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Tokens per second of each engine and the memory's speed, round by round; without the peers
    that cannot do the case, which is said."""
    prompts = prompts_of(case, checkpoint.config["vocab_size"])
    engines = [engine for engine in engines if _warm_up(engine, prompts, min(case.new, 4))]
    bandwidths: list[float] = []
    others: list[float | None] = []
    speeds: dict[str, list[float]] = {engine.label: [] for engine in engines}
    step_bytes = None
    for _ in range(rounds):
        time.sleep(_PAUSE)
        bandwidths.append(machine.read_bandwidth(threads))
        foreign = []
        for engine in engines:
            time.sleep(_PAUSE)
            run = engine.generate(prompts, case.new)
            foreign.append(run["others"])
            if case.kind == "prefill":
                tokens, seconds = case.rows * case.prompt, run["prefill_seconds"]
            else:
                tokens, seconds = case.rows * (case.new - 1), run["decode_seconds"]
                if run["decode_bytes"]:
                    step_bytes = run["decode_bytes"] / (case.new - 1)
            speeds[engine.label].append(tokens / seconds)
        others.append(None if None in foreign else max(foreign))
    return {
        "case": asdict(case),
        "bandwidth": bandwidths,
        "others": others,
        "step_bytes": step_bytes,
        "speeds": speeds,
        "free": sorted({engine.peer for engine in engines if not engine.held}),
        "commit": machine.commit(),
    }


def _warm_up(engine: Engine, prompts: list[list[int]], new: int) -> bool:
    """Whether the engine can do it. Ours has to."""
    try:
        engine.generate(prompts, new)
    except PeerError as error:
        if engine.peer == OURS:
            raise
        shape = f"{len(prompts)} x {len(prompts[0])}"
        print(f"left out of prompts of {shape}: {error}", file=sys.stderr)
        return False
    return True


def completed(row: dict[str, Any], weights: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """The row with the bytes of a step, where our engine did not say: what it must read at least,
    every weight once and the cache half-way through."""
    if row["step_bytes"]:
        return row
    case = Case(**row["case"])
    width, inner = checkpoint.width, checkpoint.inner_width
    matrices = checkpoint.layers * width * (4 * width + 2 * inner)
    matrices += checkpoint.config["vocab_size"] * width
    entry = 2 * checkpoint.layers * width * (2 if weights == "bfloat16" else 4)
    entries = case.rows * (case.prompt + case.new / 2)
    return {**row, "step_bytes": matrices * _BYTES[weights] + entry * entries}


def check(engines: Iterable[Engine], checkpoint: Checkpoint) -> dict[str, int]:
    """For each engine, how many of some greedy continuations equal the first engine's."""
    draw = random.Random(1)
    vocabulary = checkpoint.config["vocab_size"]
    prompts = [[draw.randrange(vocabulary) for _ in range(8 + 5 * n)] for n in range(20)]
    same: dict[str, int] = {}
    expected: list[list[int]] | None = None
    for engine in engines:
        found = [engine.generate([prompt], 24)["tokens"][0] for prompt in prompts]
        expected = expected or found
        same[engine.label] = sum(a == b for a, b in zip(found, expected, strict=True))
    return same


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Medians, our speed over each peer's round by round, and the share of the floor; of the
    rounds in which nothing else is known to have run, or of all where there is no such round."""
    case = Case(**row["case"])
    others = row["others"]
    calm = [n for n, cores in enumerate(others) if cores is not None and cores < _CALM]
    kept = calm or range(len(others))
    row = {
        **row,
        "bandwidth": [row["bandwidth"][n] for n in kept],
        "speeds": {label: [values[n] for n in kept] for label, values in row["speeds"].items()},
    }
    speeds = {label: statistics.median(values) for label, values in row["speeds"].items()}
    ours = next((label for label in speeds if label.startswith(OURS)), None)
    ratios = {}
    if ours:
        for label, theirs in row["speeds"].items():
            pairs = zip(row["speeds"][ours], theirs, strict=True)
            ratios[label] = statistics.median(mine / other for mine, other in pairs)
    result = {"speeds": speeds, "ratios": ratios, "bandwidth": statistics.median(row["bandwidth"])}
    result["calm_rounds"] = len(calm)
    if case.kind == "decode":
        floors = [case.rows * speed / row["step_bytes"] for speed in row["bandwidth"]]
        result["floor"] = statistics.median(floors)
        if ours:
            mine = zip(row["speeds"][ours], floors, strict=True)
            result["share"] = statistics.median(speed / floor for speed, floor in mine)
    return result


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = results["rows"].values()
    memory = [speed / 1e9 for row in rows for speed in row["bandwidth"]]
    commits = sorted({row["commit"] for row in rows if row.get("commit")})
    held = ""
    if results.get("isa"):
        held = (
            f"Engines were held to {results['isa']}; a dagger marks those that cannot be, and use "
            "all that this processor has. "
        )
    lines = [
        f"{results['machine']}, {results['threads']} threads, model {results['model']}. {held}"
        "Tokens per second, medians; in brackets our speed over theirs, the median of neighboring "
        "runs. A star marks cases without a round in which nothing else is known to have run.",
        "",
        f"- Processor: {results.get('flags') or 'unknown'}",
        f"- Memory, read by all threads: {min(memory):.1f} to {max(memory):.1f} GB/s",
        f"- Commit: {', '.join(commits) or 'unknown'}",
        *(f"- {peer}: {version}" for peer, version in sorted(results["versions"].items())),
        "",
        "| weights | case | gpt2fast | share of the floor | memory GB/s | others |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in results["rows"].items():
        weights, name = key.split("/")
        found = summary(row)
        ours, others = "–", []
        for label, speed in found["speeds"].items():
            ratio = found["ratios"].get(label)
            if label.startswith(OURS):
                ours = f"{speed:,.0f}"
            else:
                peer, own = label.split()
                shown = peer if own == weights else label
                shown += "†" if peer in row.get("free", ()) else ""
                beside = f" ({ratio:.2f} x)" if ratio else ""
                others.append(f"{shown} {speed:,.0f}{beside}")
        share = "–"
        if "floor" in found:
            share = f"of {found['floor']:,.0f}"
            if "share" in found:
                share = f"{found['share']:.2f} {share}"
        speed = found["bandwidth"] / 1e9
        star = "" if found["calm_rounds"] else " \\*"
        lines.append(
            f"| {weights} | {name}{star} | {ours} | {share} | {speed:.1f} | {', '.join(others)} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], file: Path) -> bool:
    """Bars of every case, one picture; False where matplotlib is not installed."""
    if not CAN_DRAW:
        return False
    rows = {key: summary(row) for key, row in results["rows"].items()}
    columns = 4
    height = -(-len(rows) // columns)
    with picture(file, 16, 3 * height, height, columns) as axes:
        for axis in axes[len(rows) :]:
            axis.axis("off")
        for axis, (key, found) in zip(axes, rows.items(), strict=False):
            labels = list(found["speeds"])
            colors = ["tab:red" if label.startswith(OURS) else "tab:gray" for label in labels]
            axis.barh(labels, list(found["speeds"].values()), color=colors)
            axis.invert_yaxis()
            if "floor" in found:
                axis.axvline(found["floor"], color="black", linestyle=":", label="floor")
            axis.set_title(f"{key}, tokens/s", fontsize=10)
            axis.tick_params(labelsize=8)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER, help="of setup_peers.py")
    parser.add_argument(
        "--converted", type=Path, help="converted models; default: `models` in the peers' folder"
    )
    parser.add_argument("--isa", choices=SWITCHES, help="hold the engines to an instruction set")
    parser.add_argument(
        "--results", type=Path, help="default: cpu.json, or cpu_ISA.json, in benchmarks/results"
    )
    parser.add_argument("--check", action="store_true", help="compare tokens instead of speed")
    options = parser.parse_args(argv)
    if options.results is None:
        name = f"cpu_{options.isa}.json" if options.isa else "cpu.json"
        options.results = _HERE.parent / "results" / name
    try:
        _run(options)
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    checkpoint = Checkpoint(options.model)
    converted = options.converted or options.peers / "models"
    groups = ["float32"] if options.check else options.weights
    results = _earlier(options)
    for weights in groups:
        engines, missing = start(
            weights, options.model, options.threads, options.peers, converted, options.isa
        )
        for reason in missing:
            print(f"left out: {reason}", file=sys.stderr)
        try:
            if options.check:
                for label, same in check(engines, checkpoint).items():
                    print(f"{label}: {same} of 20 continuations equal those of {engines[0].label}")
                continue
            for engine in engines:
                results["versions"][engine.peer] = engine.version
            for name in options.cases if engines else ():
                row = measure(engines, CASES[name], options.rounds, options.threads, checkpoint)
                row = completed(row, weights, checkpoint)
                results["rows"][f"{weights}/{name}"] = row
                _write(results, options.results)
                print(table({**results, "rows": {f"{weights}/{name}": row}}).splitlines()[-1])
        finally:
            for engine in engines:
                engine.close()


def _earlier(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"versions": {}, "rows": {}}
    if options.results.is_file():
        results = json.loads(options.results.read_text())
    results.update(
        machine=machine.name(),
        flags=machine.instruction_sets(),
        isa=options.isa,
        threads=options.threads,
        model=options.model.name,
    )
    return results


def _write(results: dict[str, Any], file: Path) -> None:
    order = [f"{weights}/{name}" for weights in FORMATS for name in CASES]
    results["rows"] = {key: results["rows"][key] for key in order if key in results["rows"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(results, indent=1) + "\n")
    atomic_write_text(file.with_suffix(".md"), table(results))
    plot(results, file.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
