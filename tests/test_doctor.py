from __future__ import annotations

import importlib

import pytest

from gpt2fast import ops
from gpt2fast.cli import doctor
from gpt2fast.ops import native
from gpt2fast.ops.backend import AVAILABILITY, requested_backend
from without_kernels import printed_without_kernels


def test_every_op_is_listed_with_its_backend_and_the_reason(capsys):
    assert doctor.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    for name in ops.__all__:
        assert rows[name][0] in ("native", "torch", "reference")
        assert "first" in rows[name] or "native:" in rows[name]
    for name in ("torch", "compiler", "cuda", "cpu", "kernels"):
        assert rows[name]


def test_the_kernels_are_named_with_their_instruction_set_and_origin(capsys):
    found = native.loaded()
    if found is None:
        pytest.skip(str(native.unavailable()))
    assert doctor.main(["--device", "cpu"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels"))
    assert line.split()[1].rstrip(",") == found.isa
    assert str(found.library.path) in line and found.library.origin in line


def test_kernels_that_are_not_there_are_explained():
    printed = printed_without_kernels("gpt2fast.doctor", "--device", "cpu")
    assert "none: switched off by GPT2FAST_NATIVE" in printed
    assert "native: switched off by GPT2FAST_NATIVE" in printed


def test_an_op_that_is_left_to_torch_on_a_device_is_listed(monkeypatch, capsys):
    module = importlib.import_module("gpt2fast.ops.projection")
    monkeypatch.setattr(module, "reads_wider_weights", lambda x: False)  # as on a GPU
    assert doctor.main(["--device", "cpu"]) == 0
    rows = {
        line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line
    }
    assert rows["projection"] == "torch" and set(ops.__all__) <= set(rows)


def test_a_forced_backend_is_shown(capsys):
    assert doctor.main(["--device", "cpu", "--backend", "reference"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "reference" in rows["causal_attention"] and "first" in rows["causal_attention"]
    assert requested_backend() == "auto"


def test_an_absent_backend_is_one_line_on_stderr(capsys, monkeypatch):
    monkeypatch.setitem(AVAILABILITY, "triton", lambda: "not today")
    assert doctor.main(["--device", "cpu", "--backend", "triton"]) == 1
    assert capsys.readouterr().err.startswith("error: backend 'triton'")


def test_an_unknown_backend_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--backend", "cuda"])
    assert stop.value.code == 2


@pytest.mark.parametrize("device", ["cuda:7", "meta", "toaster"])
def test_a_device_that_is_not_there_is_one_line(device, capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--device", device])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and device in printed.err
