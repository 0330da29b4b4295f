"""The benchmark of many clients, in small: its figures are there, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server_process import Server
from time_limits import patience

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving" / "load.py"


def test_clients_of_which_a_third_hangs_up_leave_no_page(server: Server):
    flags = [
        "--clients", "6", "--requests", "24", "--prompt-tokens", "6", "--max-tokens", "20",
        "--hang-up", "0.33", "--seconds", "600",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), server.url, *flags],
        capture_output=True, text=True, timeout=patience(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["finished"] + report["hung up"] == 24 and report["hung up"] > 0
    assert report["failures"] == {} and report["new tokens/s"] > 0
    assert report["pages held before and after"] == [0, 0]
    assert 0 < report["first piece, ms"]["median"] <= report["first piece, ms"]["most"]
    assert report["between pieces, ms"]["p95"] > 0
