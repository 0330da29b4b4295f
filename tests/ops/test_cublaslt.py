"""The feed-forward layer through cuBLASLt: on a GPU NVIDIA's, in the simulator a fake one.

What the fake (csrc/tests/fake_cublaslt.cpp) models, and what it cannot tell, is said at its top.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from comparison import (
    BACKENDS,
    CUDA_BACKENDS,
    LAYOUTS,
    backend,
    compare,
    needs_simulator,
    simulated_library,
)
from fake_compiler import FakeCompiler
from gpt2fast import ops
from gpt2fast.errors import BackendError
from gpt2fast.kernels import toolchain as compilation
from gpt2fast.kernels.toolchain import SIMULATED, Toolchain, find_compiler, find_cublas, find_cuda
from gpt2fast.ops.cuda import cublaslt
from gpt2fast.ops.mlp import _gelu_mlp
from ops.test_mlp import mlp_inputs, torch_mlp

ROOT = Path(__file__).parents[2]
DTYPES = [torch.bfloat16, torch.float16]
SIMULATOR = pytest.mark.parametrize("name", [pytest.param("simulator", marks=needs_simulator)])
ON_CUDA = pytest.mark.parametrize("name", CUDA_BACKENDS)

# Of cublasLtEpilogue_t.
BIAS, GELU_BIAS, GELU_AUX_BIAS, DGELU_BGRAD, BGRADA = 4, 36, 164, 208, 256
TRAINING = [GELU_AUX_BIAS, BIAS, DGELU_BGRAD, BGRADA]


def _no_header() -> str | None:
    try:
        return None if find_cublas() is not None else "cublasLt.h is not here"
    except BackendError as error:
        return str(error)


pytestmark = pytest.mark.skipif(_no_header() is not None, reason=str(_no_header()))


class Fake:
    """The fake library, and what was asked of it."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.fake_cublaslt_log.restype = ctypes.c_char_p

    def log(self) -> list[str]:
        """The lines since the last call; none of them may be a refusal."""
        lines = self._library.fake_cublaslt_log().decode().splitlines()
        assert not [line for line in lines if line.startswith("refused")], lines
        assert self._library.fake_cublaslt_living() == 0
        return lines

    def epilogues(self) -> list[int]:
        """Epilogues of the products since the last call."""
        return [int(line.split()[2]) for line in self.log() if line.startswith("ran")]


@pytest.fixture(scope="session")
def compiled_fake(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cublaslt") / "libcublasLt.so.13"
    command = [
        *(*find_compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
        *("-fvisibility=hidden", f"-Wl,-soname,{path.name}", "-isystem", str(find_cublas())),
        *("-isystem", f"{find_cuda()}/include", str(ROOT / "csrc/tests/fake_cublaslt.cpp")),
        *("-o", str(path)),
    ]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def fake(request, compiled_fake, monkeypatch) -> Iterator[Fake | None]:
    """The fake, which the simulator's library finds; None on a GPU, where NVIDIA's runs."""
    with cublaslt.forced(True):
        if request.node.callspec.params["name"] != "simulator":
            yield None
            return
        monkeypatch.setenv("GPT2FAST_CUBLASLT_LIBRARY", str(compiled_fake))
        fake = Fake(compiled_fake)
        yield fake
        fake.log()


def ran(fake: Fake | None, expected: list[int]) -> None:
    if fake is not None:
        assert fake.epilogues() == expected


@ON_CUDA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 16), (3, 17, 24), (1, 301, 8), (2, 2, 64)], ids=str)
def test_matches_torch_at_odd_shapes(name, dtype, shape, fake):
    compare(ops.gelu_mlp, torch_mlp, mlp_inputs(*shape), dtype, name)
    ran(fake, TRAINING)


@ON_CUDA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [(True, True), (True, False), (False, True)], ids=str)
def test_reads_transposed_weights_in_place(name, dtype, transposed, fake):
    def through(mlp):
        def run(x, w_fc, b_fc, w_proj, b_proj):
            w_fc = w_fc.t() if transposed[0] else w_fc
            return mlp(x, w_fc, b_fc, w_proj.t() if transposed[1] else w_proj, b_proj)

        return run

    x, w_fc, b_fc, w_proj, b_proj = mlp_inputs(2, 5, 16, inner=48)
    w_fc = w_fc.t().contiguous() if transposed[0] else w_fc
    w_proj = w_proj.t().contiguous() if transposed[1] else w_proj
    inputs = [x, w_fc, b_fc, w_proj, b_proj]
    compare(through(ops.gelu_mlp), through(torch_mlp), inputs, dtype, name)
    ran(fake, TRAINING)


@SIMULATOR
def test_reads_rows_and_weights_with_gaps_in_place(name, fake):
    """Rows of a wider tensor: a leading dimension of its own for each operand."""

    def gaps(x):
        larger = x.new_zeros(*x.shape[:-1], x.shape[-1] + 16)
        larger[..., 8:-8] = x
        return larger[..., 8:-8]

    def through(x, w_fc, b_fc, w_proj, b_proj):
        return ops.gelu_mlp(gaps(x), gaps(w_fc), b_fc, gaps(w_proj), b_proj)

    compare(through, torch_mlp, mlp_inputs(3, 7, 16, inner=56), torch.bfloat16, name)
    lines = [line for line in fake.log() if line.startswith("ran")]
    assert len(lines) == 4
    assert "ld 72 32 56" in lines[0] and "ld 32 56 16" in lines[1], lines


@ON_CUDA
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_and_unaligned_views_are_right(name, layout, fake):
    compare(ops.gelu_mlp, torch_mlp, mlp_inputs(3, 17, 16), torch.bfloat16, name, layout)


@ON_CUDA
@pytest.mark.parametrize(("shape", "inner"), [((3, 17, 9), 40), ((3, 17, 16), 36)], ids=str)
def test_rows_of_no_multiple_of_16_bytes_are_left_to_torch(name, shape, inner, fake):
    compare(ops.gelu_mlp, torch_mlp, mlp_inputs(*shape, inner=inner), torch.bfloat16, name)
    ran(fake, [])


@ON_CUDA
def test_float32_is_left_to_torch(name, fake):
    compare(ops.gelu_mlp, torch_mlp, mlp_inputs(3, 17, 16), torch.float32, name)
    ran(fake, [])


@SIMULATOR
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_sets_the_dtype(name, dtype, fake):
    def cast(mlp):
        def run(*inputs):
            with torch.autocast("cpu", dtype):
                return mlp(*inputs)

        return run

    def linear(x, w_fc, b_fc, w_proj, b_proj):
        """Casts the biases, too."""
        inner = F.linear(x, w_fc.t(), b_fc)
        return F.linear(F.gelu(inner, approximate="tanh"), w_proj.t(), b_proj)

    # float64 passes through autocast as it is.
    compare(cast(ops.gelu_mlp), cast(linear), mlp_inputs(3, 17, 16), torch.float32, name)
    ran(fake, TRAINING)


@ON_CUDA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_nothing_is_kept(name, dtype, fake):
    inputs = [x.to(dtype).requires_grad_() for x in mlp_inputs(3, 11, 16)]
    exact = torch_mlp(*(x.detach().double() for x in inputs))
    with torch.no_grad():
        theirs = torch_mlp(*inputs)
        with backend(name):
            mine = ops.gelu_mlp(*inputs)
            kept = _gelu_mlp.call(*inputs, "nothing")[1]
    assert (mine - exact).norm() <= 2 * (theirs - exact).norm()
    assert kept.shape == (0, 40)
    ran(fake, [GELU_BIAS, BIAS] * 2)


@SIMULATOR
def test_an_algorithm_is_looked_up_once(name, fake):
    a, b, bias, out = (torch.zeros(n, 72).bfloat16() for n in (18, 72, 1, 18))
    with backend(name):
        for _ in range(3):
            assert torch.ops.gpt2fast_cuda.cublaslt_bias(a, b, bias[0], out)
    assert [line.split()[0] for line in fake.log()] == ["planned", "ran", "ran", "ran"]


@SIMULATOR
@pytest.mark.parametrize("less_aligned", ["a", "b", "bias", "out", "inner"])
def test_an_algorithm_is_found_for_the_alignment_of_each_operand(name, less_aligned, fake):
    shapes = {"a": (9, 16), "b": (16, 88), "bias": (88,), "out": (9, 88), "inner": (9, 88)}

    def operands(offsets):
        for each, shape in shapes.items():
            memory = torch.zeros(2048).bfloat16()
            begin = -memory.data_ptr() % 256 // 2 + offsets.get(each, 0)
            yield memory[begin : begin + math.prod(shape)].view(shape)

    with backend(name):
        for offset in (0, 8, 16):  # aligned to 256, 16, 32 bytes
            arguments = operands({less_aligned: offset})
            assert torch.ops.gpt2fast_cuda.cublaslt_bias_gelu(*arguments)
    assert fake.epilogues() == [GELU_AUX_BIAS] * 3


@SIMULATOR
@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        (GELU_AUX_BIAS, [DGELU_BGRAD, BGRADA]),
        (BIAS, [GELU_AUX_BIAS, DGELU_BGRAD, BGRADA]),
        (DGELU_BGRAD, [GELU_AUX_BIAS, BIAS]),
        (BGRADA, [GELU_AUX_BIAS, BIAS, DGELU_BGRAD]),
    ],
)
def test_what_cublaslt_has_no_kernel_for_is_done_otherwise(
    name, refused, expected, fake, monkeypatch
):
    monkeypatch.setenv("GPT2FAST_FAKE_REFUSES", str(refused))
    # Sizes of their own: what was refused once is not asked for again.
    inputs = mlp_inputs(3, 5, 16, inner=1000 + 8 * refused)
    compare(ops.gelu_mlp, torch_mlp, inputs, torch.bfloat16, name)
    ran(fake, expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_can_keep_the_sum(name, dtype):
    with cublaslt.forced(False):
        compare(
            lambda *inputs: _gelu_mlp.call(*inputs, "sum")[0],
            torch_mlp,
            mlp_inputs(3, 17, 16),
            dtype,
            name,
        )


@SIMULATOR
@pytest.mark.parametrize("other", ["torch", "reference", "triton"])
def test_the_backward_pass_may_run_on_another_backend(name, other, fake):
    if other == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("there is no Triton")
    inputs = [x.bfloat16().requires_grad_() for x in mlp_inputs(3, 17, 16)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(torch_mlp(*exact_inputs).sum(), exact_inputs)
    theirs = torch.autograd.grad(torch_mlp(*inputs).sum(), inputs)
    with backend(name):
        out = ops.gelu_mlp(*inputs)
    with backend(other):
        mine = torch.autograd.grad(out.sum(), inputs)
    ran(fake, [GELU_AUX_BIAS, BIAS])
    for ours, their, true in zip(mine, theirs, exact, strict=True):
        assert (ours - true).norm() <= 3 * (their - true).norm() + 1e-6 * true.norm()


@SIMULATOR
@pytest.mark.parametrize("keep", ["product", "sum", "nothing"])
def test_passes_opcheck(name, keep, fake):
    differentiable = keep != "nothing"
    inputs = [x.bfloat16().requires_grad_(differentiable) for x in mlp_inputs(2, 7, 16)]
    with backend(name):
        opcheck(_gelu_mlp.call, (*inputs, keep), atol=0.1, rtol=0.1)


@SIMULATOR
def test_compiles_into_one_graph(name, fake):
    inputs = [x.bfloat16().requires_grad_() for x in mlp_inputs(2, 7, 16)]
    with backend(name):
        compiled = torch.compile(ops.gelu_mlp, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(ops.gelu_mlp(*inputs).sum(), inputs)
        got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    ran(fake, TRAINING * 2)


@SIMULATOR
def test_the_backward_pass_can_be_repeated(name, fake):
    inputs = [x.bfloat16().requires_grad_() for x in mlp_inputs(2, 7, 16)]
    with backend(name):
        out = ops.gelu_mlp(*inputs).sum()
        first = torch.autograd.grad(out, inputs, retain_graph=True)
        again = torch.autograd.grad(out, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("variable", "capabilities", "expected"),
    [
        (None, [(9, 0)], True),
        (None, [(8, 0)], False),
        (None, [(9, 0), (8, 9)], False),
        (None, [], False),
        ("0", [(9, 0)], False),
        ("off", [(10, 0)], False),
        ("1", [(8, 0)], True),
    ],
)
def test_where_it_is_wanted(monkeypatch, variable, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    if variable is None:
        monkeypatch.delenv("GPT2FAST_CUBLASLT", raising=False)
    else:
        monkeypatch.setenv("GPT2FAST_CUBLASLT", variable)
    cublaslt._suits_the_gpus.cache_clear()
    try:
        assert cublaslt._by_default() is expected
    finally:
        cublaslt._suits_the_gpus.cache_clear()


def test_whether_it_is_wanted_is_a_constant_of_compiled_code(monkeypatch):
    def add(x):
        return x + 1 if cublaslt._by_default() else x

    compiled = torch.compile(add, fullgraph=True, backend="eager")
    monkeypatch.setenv("GPT2FAST_CUBLASLT", "1")
    assert compiled(torch.zeros(1)).item() == 1


@SIMULATOR
def test_nothing_goes_to_it_where_it_is_not_wanted(name, fake):
    inputs = mlp_inputs(3, 17, 16)
    with cublaslt.forced(False):
        compare(ops.gelu_mlp, torch_mlp, inputs, torch.bfloat16, name)
        with torch.no_grad(), backend(name):
            ops.gelu_mlp(*(x.bfloat16() for x in inputs))
    ran(fake, [])


@SIMULATOR
def test_a_library_compiled_without_the_header_is_enough(name, fake, monkeypatch):
    # Stands for a library of another machine; one without it would take minutes to compile.
    monkeypatch.setattr(cublaslt, "is_compiled", lambda: False)
    compare(ops.gelu_mlp, torch_mlp, mlp_inputs(3, 17, 16), torch.bfloat16, name)
    assert "without cublasLt.h" in str(cublaslt.missing(torch.zeros(1)))
    ran(fake, [])


def test_without_the_header_what_uses_it_is_left_out(tmp_path):
    for header in (None, tmp_path):
        compiler = FakeCompiler(tmp_path / f"compiler-{header is None}")
        toolchain = Toolchain((str(compiler.path),), tmp_path, tmp_path, ("90a",), header)
        compilation.compile_library(tmp_path / "library.so", toolchain, SIMULATED)
        compiled = [Path(part).name for call in compiler.calls for part in call.split()]
        assert compiled.count("cublaslt.cpp") == (0 if header is None else 2)
        assert "mlp.cpp" in compiled and compiler.links == 1


def run(code: str, **environment: str) -> str:
    """Output of a new process, since a library looks for cuBLASLt once."""
    prelude = f"""
import ctypes, sys
import torch
from gpt2fast import backend, ops
from gpt2fast.kernels.library import Library
from gpt2fast.ops.cuda import cublaslt, simulated
from pathlib import Path
library = Library(Path({str(simulated_library().path)!r}), "")
torch.manual_seed(0)
inputs = [torch.randn(s).bfloat16() for s in ((5, 16), (16, 40), (40,), (40, 16), (16,))]
inputs = [x.requires_grad_() for x in inputs]
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=ROOT,
        env={**os.environ, "GPT2FAST_NATIVE": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN = """
with simulated(library), backend("auto"), cublaslt.forced(True):
    print("missing:", cublaslt.missing(inputs[0]))
    print("gradients:", len(torch.autograd.grad(ops.gelu_mlp(*inputs).sum(), inputs)))
"""


@needs_simulator
def test_without_cublaslt_torch_multiplies(tmp_path):
    nowhere = str(tmp_path / "libcublasLt.so.13")
    said = run(RUN, GPT2FAST_CUBLASLT_LIBRARY=nowhere)
    assert f"missing: GPT2FAST_CUBLASLT_LIBRARY={nowhere} does not load" in said
    assert "gradients: 5" in said


@needs_simulator
def test_the_library_that_is_loaded_already_is_found(compiled_fake):
    load = f"fake = ctypes.CDLL({str(compiled_fake)!r})\n"
    log = "fake.fake_cublaslt_log.restype = ctypes.c_char_p\nprint(fake.fake_cublaslt_log())"
    said = run(load + RUN + log, GPT2FAST_CUBLASLT_LIBRARY="")
    assert "missing: None" in said
    assert said.count("ran epilogue") == len(TRAINING)


@needs_simulator
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="NVIDIA's library works here")
def test_nvidias_library_without_a_gpu_is_passed_over():
    folder = find_cublas()
    assert folder is not None
    found = sorted((folder.parent / "lib").glob("libcublasLt.so.1?"))
    if not found:
        pytest.skip("there is no libcublasLt beside its header")
    said = run(RUN, GPT2FAST_CUBLASLT_LIBRARY=str(found[0]))
    assert "missing: cublasLtCreate failed" in said
    assert "gradients: 5" in said
