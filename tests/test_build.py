"""Compiling the kernels at first use: with compilers that pretend to, in folders of all kinds."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpt2fast
from fake_compiler import FakeCompiler
from gpt2fast._system.output import shown
from gpt2fast.errors import BackendError
from gpt2fast.kernels import library
from gpt2fast.kernels import toolchain as compilation
from gpt2fast.ops import native
from time_limits import patience, wait_until

ROOT = Path(__file__).parents[1]


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> FakeCompiler:
    """The only compiler there is; with an empty cache."""
    if not torch_has_headers():
        pytest.skip("torch came without its headers")
    made = FakeCompiler(tmp_path / "compiler")
    for name in ("GPT2FAST_NATIVE", "GPT2FAST_LIBRARY", "CXXFLAGS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", str(made.path))
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))
    return made


def torch_has_headers() -> bool:
    return Path(torch.__file__).with_name("include").is_dir()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter; None takes a variable away."""
    merged = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={name: value for name, value in merged.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=patience(),
    )


def test_it_is_built_once_and_announced_in_one_line(compiler, tmp_path, capsys):
    with shown():
        first = library.find_library()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("gpt2fast: compiling its kernels for this machine, once (about")
    assert first.path.read_text() == "compiled\n" and first.origin == "built at first use"
    assert files(tmp_path / "cache") == [first.path.name]  # no lock, no half of anything
    assert library.find_library() == first
    assert capsys.readouterr() == ("", "") and compiler.links == 1


def test_every_source_is_compiled_with_the_same_flags(compiler):
    library.find_library()
    calls = compiler.calls
    sources = [
        p
        for p in library.source_files(library.source_folder(), compilation.CPU)
        if p.suffix == ".cpp"
    ]
    assert len(calls) == len(sources) + 1
    for source in sources:
        (call,) = (call for call in calls if str(source) in call.split())
        assert all(flag in call.split() for flag in compilation.FLAGS)
        assert "-march" not in call


def test_a_library_cut_short_is_built_again(compiler):
    path = library.find_library().path
    whole = struct.pack("<6s34xQ10xHH2x", b"\x7fELF\x02\x01", 64, 64, 2) + bytes(128)
    for content, builds in [(whole, 1), (whole[:-1], 2), (whole[:20], 3), (b"", 4)]:
        path.write_bytes(content)
        assert library.find_library().path == path
        assert compiler.links == builds


def test_sources_flags_and_compiler_make_another_library(compiler, tmp_path, monkeypatch):
    made = {library.find_library().path}
    monkeypatch.setenv("CXXFLAGS", "-O1")
    made.add(library.find_library().path)
    monkeypatch.delenv("CXXFLAGS")
    compiler.path.write_text(compiler.path.read_text() + "# a new version\n")
    made.add(library.find_library().path)
    other = tmp_path / "csrc"
    (other / "cpu").mkdir(parents=True)
    (other / "binding" / "cpu").mkdir(parents=True)
    (other / "binding" / "cpu" / "tensors.h").touch()
    (other / "cpu" / "isa.cpp").touch()
    # The sources lie in the package; a test that changed those would disturb the others.
    monkeypatch.setattr(library, "source_folder", lambda: other)
    monkeypatch.setattr(compilation, "source_folder", lambda: other)
    made.add(library.find_library().path)
    (other / "cpu" / "isa.cpp").write_text("int x;")
    made.add(library.find_library().path)
    assert len(made) == 5 == compiler.links


def test_the_gpus_to_compile_for_are_named_in_any_of_the_usual_ways(monkeypatch):
    monkeypatch.delenv("GPT2FAST_CUDA_ARCHS", raising=False)
    assert compilation.cuda_architectures() == compilation.ARCHITECTURES
    assert compilation.cuda_architectures(("86",)) == ("86",)
    for spelling in ("80;90a", "80 90a", "80,90a"):
        monkeypatch.setenv("GPT2FAST_CUDA_ARCHS", spelling)
        assert compilation.cuda_architectures(("86",)) == ("80", "90a")
    for wrong in ("foo", "75", "sm_80", "8.0"):
        monkeypatch.setenv("GPT2FAST_CUDA_ARCHS", f"80;{wrong}")
        with pytest.raises(BackendError, match=f"GPT2FAST_CUDA_ARCHS: '{wrong}'.*80;90a"):
            compilation.cuda_architectures()


def test_a_folder_without_cuda_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BackendError, match=f"CUDA_HOME={tmp_path} has no include/cuda_runtime.h"):
        compilation.find_cuda()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert compilation.find_cuda() == tmp_path


def test_what_was_built_is_used_without_a_compiler(compiler, monkeypatch):
    built = library.find_library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library.find_library() == built


def test_old_libraries_are_forgotten(compiler, monkeypatch, tmp_path):
    for i in range(12):
        monkeypatch.setenv("CXXFLAGS", f"-DX={i}")
        newest = library.find_library().path
        os.utime(newest, (i, i))
    kept = list((tmp_path / "cache").glob("*.so"))
    assert 1 < len(kept) < 12 and newest in kept


def test_without_a_compiler_the_reason_says_what_to_install(compiler, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    with pytest.raises(BackendError, match=r"no C\+\+ compiler; install g\+\+"):
        library.find_library()
    monkeypatch.setenv("CXX", "frobnicate -x")
    with pytest.raises(BackendError, match=r"CXX=frobnicate is not found"):
        library.find_library()


def test_flags_may_stand_behind_the_compilers_name(compiler, monkeypatch):
    monkeypatch.setenv("CXX", f"{compiler.path} -m64")
    library.find_library()
    assert all(" -m64 " in call for call in compiler.calls)


def test_without_headers_the_reason_says_so(compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda kind: str(tmp_path))
    with pytest.raises(BackendError, match="headers are not here"):
        library.find_library()


def test_a_failure_is_explained_kept_in_a_log_and_not_repeated_at_once(compiler, tmp_path, capsys):
    compiler.behave("broken")
    with pytest.raises(BackendError, match="error: no such thing") as first:
        library.find_library()
    (log,) = (tmp_path / "cache").iterdir()
    assert str(log) in str(first.value) and "no such thing" in log.read_text()
    capsys.readouterr()
    calls = compiler.calls
    with pytest.raises(BackendError) as second:
        library.find_library()
    assert str(second.value) == str(first.value)
    assert capsys.readouterr().err == "" and compiler.calls == calls

    (compiler.folder / "broken").unlink()
    os.utime(log, (0, 0))  # an old failure is forgotten
    assert library.find_library().path.is_file()
    assert not log.exists()


def test_a_compiler_that_does_not_run_is_a_failure_as_well(compiler):
    compiler.path.write_bytes(b"\x7fELF")
    with pytest.raises(BackendError, match="does not run"):
        library.find_library()


def test_switched_off_nothing_is_built_or_said(compiler, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPT2FAST_NATIVE", "0")
    with pytest.raises(BackendError, match="switched off by GPT2FAST_NATIVE"):
        library.find_library()
    assert not (tmp_path / "cache").exists() and capsys.readouterr().err == ""


def test_a_named_library_is_taken_as_it_is(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2FAST_LIBRARY", str(tmp_path / "mine.so"))
    with pytest.raises(BackendError, match="mine.so is not a file"):
        library.find_library()
    (tmp_path / "mine.so").touch()
    found = library.find_library()
    assert found.path == tmp_path / "mine.so" and "GPT2FAST_LIBRARY" in found.origin
    assert compiler.links == 0


@pytest.mark.parametrize("given", ["XDG_CACHE_HOME", "HOME"])
def test_the_users_cache_is_where_the_system_says(given, compiler, tmp_path, monkeypatch):
    monkeypatch.delenv("GPT2FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(given, str(tmp_path / "here"))
    between = () if given == "XDG_CACHE_HOME" else (".cache",)
    assert library.find_library().path.parent == tmp_path.joinpath("here", *between, "gpt2fast")


def test_without_a_writable_home_a_temporary_folder_serves(compiler, tmp_path, monkeypatch):
    monkeypatch.delenv("GPT2FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody/writes/here")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(library.tempfile, "tempdir", str(temporary))
    built = library.find_library()
    assert built.path.parent == temporary / f"gpt2fast-{os.getuid()}"
    assert built.path.parent.stat().st_mode & 0o077 == 0
    assert library.find_library() == built and compiler.links == 1

    # What others can write is not loaded.
    built.path.parent.chmod(0o777)
    with pytest.raises(BackendError, match="others can write there.*GPT2FAST_CACHE"):
        library.find_library()


@pytest.fixture
def temporary(compiler, tmp_path, monkeypatch) -> Path:
    """Path of the cache in the shared temporary folder, with a library in it."""
    monkeypatch.delenv("GPT2FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody/writes/here")
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path))
    return library.find_library().path.parent


@pytest.mark.parametrize("mode", [0o770, 0o775, 0o777, 0o702, 0o720, 0o1777])
def test_a_folder_that_others_can_write_is_not_loaded_from(temporary, mode):
    built = library.find_library()
    temporary.chmod(mode)
    with pytest.raises(BackendError, match="others can write there"):
        library.find_library()
    with pytest.raises(OSError, match="others can write there"):
        library.opened(built)


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_somebody_else_owns_is_not_loaded(temporary, compiler, what):
    built = library.find_library()
    os.chown(temporary if what == "folder" else built.path, 12345, 12345)
    with pytest.raises(OSError, match="others can"):
        library.opened(built)
    if what == "folder":
        with pytest.raises(BackendError, match="others can write there"):
            library.find_library()
    else:
        assert library.find_library() == built and compiler.links == 2
        assert built.path.stat().st_uid == os.getuid()


def test_links_in_the_temporary_folder_are_not_followed(temporary, tmp_path):
    built = library.find_library()
    theirs = tmp_path / "theirs"
    temporary.rename(theirs)
    temporary.symlink_to(theirs)
    with pytest.raises(BackendError, match="it is a link, not a folder"):
        library.find_library()
    with pytest.raises(OSError, match="it is a link"):
        library.opened(built)
    temporary.unlink()
    temporary.mkdir(mode=0o700)
    built.path.symlink_to(theirs / built.path.name)  # swapped between look and load
    with pytest.raises(OSError):
        library.opened(built)


def test_what_was_looked_at_is_what_is_loaded(temporary, monkeypatch):
    built = library.find_library()
    loaded = []

    def swapped(path: str) -> None:
        other = built.path.with_name("other")
        other.write_text("theirs")
        other.replace(built.path)
        loaded.append(Path(path).read_text())

    monkeypatch.setattr(native.ctypes, "CDLL", swapped)
    # What is kept open, and would be for the whole process, is closed by this test.
    monkeypatch.setattr(native, "_kept_open", [])
    native.load_library(built, "gpt2fast_native", compilation.CPU)
    assert loaded == ["compiled\n"] and built.path.read_text() == "theirs"
    os.close(native._kept_open[0])


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o666])
def test_a_library_that_others_can_write_is_built_again(temporary, compiler, mode):
    built = library.find_library()
    built.path.chmod(mode)
    with pytest.raises(OSError, match="others can have written it"):
        library.opened(built)
    assert library.find_library() == built and compiler.links == 2
    assert not built.path.stat().st_mode & 0o022


def test_a_named_cache_may_be_a_groups_and_not_everybodys(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "link"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    (tmp_path / "shared").chmod(0o775)
    os.close(library.opened(library.find_library()))
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(BackendError, match="others can write there"):
        library.find_library()


def test_a_foreign_library_is_named(tmp_path):
    if native.unavailable():
        pytest.skip(str(native.unavailable()))
    import _ctypes

    for content, told in (
        (b"text", "does not load"),
        (Path(_ctypes.__file__).read_bytes(), "lacks the op gpt2fast_native::"),
        (Path(_ctypes.__file__).read_bytes()[:20_000], "only the beginning of a library"),
    ):
        path = tmp_path / "foreign.so"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        done = run(USE, GPT2FAST_LIBRARY=str(path))
        assert done.returncode == 0 and float(done.stdout) > 0
        assert told in done.stderr and str(path) in done.stderr and done.stderr.count("\n") == 1


def test_a_library_of_another_version_is_named(monkeypatch):
    if native.unavailable():
        pytest.skip(str(native.unavailable()))
    found = native.loaded().library
    named = library.Library(found.path, "named by GPT2FAST_LIBRARY")
    native.load_library(named, "gpt2fast_native", compilation.CPU)
    ops = native._ops(compilation.CPU)
    assert len(ops) > 20
    changed = {**ops, "embedding": [*ops["embedding"], "more"]}
    # Stands for the package of another version.
    monkeypatch.setattr(native, "_ops", lambda part: changed)
    with pytest.raises(BackendError, match="another form of the op .*embedding.*this version"):
        native.load_library(named, "gpt2fast_native", compilation.CPU)


def test_a_named_cache_that_cannot_be_written_is_an_error(compiler, monkeypatch):
    monkeypatch.setenv("GPT2FAST_CACHE", "/proc/nobody/writes/here")
    with pytest.raises(BackendError, match="nowhere to keep compiled kernels.*/proc/nobody"):
        library.find_library()


def test_two_processes_build_once(tmp_path, compiler):
    slow = FakeCompiler(tmp_path / "slow", seconds=0.3)
    code = LOGGED + "from gpt2fast.kernels import library; print(library.find_library().path)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "CXX": str(slow.path)}
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=patience()) for process in both]
    assert printed[0][0] == printed[1][0] != "" and slow.links == 1
    said = sorted(err for _, err in printed)
    assert "waiting" in said[0] and "compiling its kernels" in said[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_that_would_be_used(how, compiler, tmp_path):
    compiler.behave("slow")
    code = "from gpt2fast.kernels import library; library.find_library()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(compiler.calls) >= compilation.processors(), process)
    time.sleep(0.3)  # the last one is known to its starter as well
    process.send_signal(how)
    assert process.wait(patience()) != 0
    assert not list((tmp_path / "cache").glob("*.so"))
    pids = [int(line.split()[0]) for line in compiler.calls]
    if how == signal.SIGINT:
        assert files(tmp_path / "cache") == []
        assert not any(is_running(pid) for pid in pids)
    else:  # nothing could be tidied up, but the lock is gone with the process
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)
    (compiler.folder / "slow").unlink()
    built = library.find_library()
    assert files(tmp_path / "cache") == [built.path.name]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


LOGGED = "import logging; logging.basicConfig(level=logging.INFO, format='gpt2fast: %(message)s');"


def test_a_program_that_logs_nothing_hears_of_failures_alone(compiler):
    code = "from gpt2fast.kernels.library import find_library; find_library()"
    assert run(code).stderr == ""  # it was compiled
    compiler.behave("broken")
    assert run(USE).stderr.startswith("no compiled kernels, torch's operations run instead")
    quiet = "import logging; logging.getLogger('gpt2fast').setLevel(logging.ERROR);"
    assert run(quiet + USE).stderr == ""


def test_importing_builds_nothing(compiler, tmp_path):
    done = run("import gpt2fast.ops, gpt2fast.model, gpt2fast.nn, gpt2fast.inference.generator")
    assert done.returncode == 0 and done.stderr == "" and compiler.links == 0


USE = (
    "import torch, gpt2fast; from gpt2fast import ops; x = torch.ones(2, 8);"
    "ops.bias_gelu(x, x[0]); print(ops.bias_gelu(x, x[0]).sum().item());"
)


def test_a_failed_build_leaves_the_other_backends_and_one_line(compiler):
    compiler.behave("broken")
    done = run(LOGGED + USE + "gpt2fast.backend('native')")
    assert float(done.stdout) == pytest.approx(31.27, abs=0.01)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("gpt2fast: compiling its kernels")
    assert lines[1].startswith("gpt2fast: no compiled kernels, torch's operations run instead")
    assert "error: no such thing" in lines[1] and ".log" in lines[1]
    assert sum("gpt2fast: " in line for line in lines) == 2
    # Asked for by name, they are an error with the same reason.
    assert lines[-1].startswith("gpt2fast.errors.BackendError: backend 'native' is not available")
    assert "error: no such thing" in lines[-1]


def test_a_library_that_does_not_load_is_explained(compiler):
    done = run(USE)
    assert done.returncode == 0
    assert "does not load" in done.stderr and str(compiler.folder.parent / "cache") in done.stderr
    assert "file too short" in done.stderr or "invalid ELF header" in done.stderr


def test_an_instruction_set_that_is_not_here_is_explained():
    if native.unavailable():
        pytest.skip(str(native.unavailable()))
    done = run(USE, GPT2FAST_ISA="sse9")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "GPT2FAST_ISA=sse9 cannot run on this processor; choose one of" in done.stderr


def test_switched_off_the_ops_run_without_a_word(compiler):
    done = run(USE + "gpt2fast.backend('native')", GPT2FAST_NATIVE="0")
    assert float(done.stdout) == pytest.approx(31.27, abs=0.01) and compiler.links == 0
    last = done.stderr.splitlines()[-1]
    assert "gpt2fast: " not in done.stderr and "switched off by GPT2FAST_NATIVE" in last


FORKED = """
import torch
from torch.utils.data import DataLoader, Dataset
from gpt2fast import GPT2, GPT2Config, ops

torch.set_num_threads(4)
torch.manual_seed(0)
config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=64)
model = GPT2(config).eval().pack()
prompt = torch.arange(9)[None]

def decode():
    return model.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()

class Continued(Dataset):
    def __len__(self):
        return 2  # one for each worker, before it has threads that send results
    def __getitem__(self, index):
        assert torch.get_num_threads() == 1
        before = threads()
        x = torch.ones(300, 1024)
        tokens, activated = decode(), ops.bias_gelu(x, x[0])
        return torch.tensor(tokens), threads() - before

def threads():
    import os
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

expected = decode()  # the parent has a team of threads now
for tokens, count in DataLoader(Continued(), num_workers=2, multiprocessing_context="fork"):
    assert tokens[0].tolist() == expected
    print(int(count))
assert decode() == expected
"""


def test_workers_forked_from_a_busy_parent_work_alone():
    if native.unavailable():
        pytest.skip(str(native.unavailable()))
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    done = run(FORKED, OMP_NUM_THREADS=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"] * 2  # threads that the work has started


def test_the_package_says_where_its_source_is():
    folder = compilation.source_folder()
    assert folder == ROOT / "csrc" or folder.parent == Path(gpt2fast.__file__).parent
