"""Builds the package: with compiled kernels where a C++ compiler and torch's headers are at hand.

Neither is needed. torch is never imported here nor asked for as a build requirement, which would
download another one than the one that will run; without it or a compiler the package carries the
kernels' source, and compiles it when it is first used.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpt2fast.errors import BackendError
from gpt2fast.kernels.library import file_name, is_switched_off
from gpt2fast.kernels.toolchain import (
    CPU,
    CUDA,
    compile_library,
    find_toolchain,
    source_files,
    source_folder,
)


class BuildPackage(build_py):
    """Adds csrc, and the library if it can be compiled now, to the package."""

    has_library = False

    def run(self):
        super().run()
        if self.editable_mode:  # the sources change: the library is compiled when it is used
            return
        package = Path(self.build_lib, "gpt2fast")
        shutil.rmtree(package / "csrc", ignore_errors=True)  # of an earlier build
        for path in source_files(source_folder()):
            copy = package / "csrc" / path.relative_to(source_folder())
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        # Compiling for GPUs takes minutes, and most machines have none: it has to be asked for.
        for part in (CPU, CUDA) if os.environ.get("GPT2FAST_CUDA_ARCHS") else (CPU,):
            library = package / file_name(part)
            library.unlink(missing_ok=True)
            try:
                if is_switched_off():
                    raise BackendError("switched off by GPT2FAST_NATIVE")
                compile_library(library.absolute(), find_toolchain(part), part)
                BuildPackage.has_library = True
            except (BackendError, OSError) as error:
                # pip shows this with --verbose; gpt2fast says it again when it matters.
                print(
                    f"gpt2fast: the {part.name} kernels are left to be compiled at first use: "
                    f"{error}",
                    file=sys.stderr,
                )


class BuildWheel(bdist_wheel):
    """Names the platform if there is a compiled library inside; it fits every Python."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not BuildPackage.has_library
        # Where there is a library, everything goes where the platform's files go.
        self.distribution.has_ext_modules = lambda: BuildPackage.has_library
        super().run()

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
