"""Packages and the C++ core; everything else is in pyproject.toml.

TEXP_NATIVE=auto (default) builds the core where torch and a compiler can be found; otherwise, as where pip hides
torch from the build, the first use builds it. 1 fails where it cannot be built; 0 leaves it out. TEXP_CUDA says it of
the CUDA kernel, which needs the core, nvcc and CUDA's static runtime, but no GPU and no torch built with CUDA;
TEXP_CUDA_ARCHS says for which GPUs. How all this is built is in texp/native/build.py.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

spec = importlib.util.spec_from_file_location("texp_build", "texp/native/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

try:
    WANTED = {variable: build.setting(variable, installed="auto") for variable in build.PARTS}
    build.archs()
except ValueError as error:
    raise SystemExit(str(error)) from None


def obstacle(with_cuda: bool) -> str:
    """Why the core, or one with the CUDA kernel, is not to be built, as far as that is known before compiling."""
    for variable in list(build.PARTS)[: 2 if with_cuda else 1]:
        if WANTED[variable] == "0":
            return f"{variable}=0 left it out"
    try:
        build.tools(with_cuda)
    except build.BuildError as error:
        return str(error)
    return ""


def leave_out(variable: str, reason: str) -> None:
    """Says that what `variable` stands for is left out for `reason`; ends the build if it was asked for."""
    if WANTED[variable] == "1":
        raise SystemExit(f"{variable}=1 asks for {build.PARTS[variable]}, but {reason}")
    if WANTED[variable] == "auto":
        print(f"texp: installing without {build.PARTS[variable]}: {reason}", file=sys.stderr)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # what is left there of earlier builds would be installed, too
            shutil.rmtree(f"{self.build_lib}/texp/{build.CORES}", ignore_errors=True)
        package = self.get_package_dir("texp") if self.editable_mode else f"{self.build_lib}/texp"
        build.write_left_out(Path(package), [variable for variable in WANTED if WANTED[variable] == "0"])


class BuildCore(build_ext):
    """Builds the core into the folder in which texp looks for it, under a name that says what it is made for."""

    def run(self) -> None:
        package = self.get_finalized_command("build_py").get_package_dir("texp") if self.inplace else None
        self.cores = Path(package or f"{self.build_lib}/texp", build.CORES)
        for with_cuda, variable in ((True, "TEXP_CUDA"), (False, "TEXP_NATIVE")):
            reason = obstacle(with_cuda)
            if not reason:
                try:
                    build.build(self.cores, with_cuda)
                    return
                except build.CompileError as error:
                    reason = str(error)
            leave_out(variable, reason)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.cores.rglob("*") if path.is_file()]


NO_CORE = obstacle(with_cuda=False)
if NO_CORE:
    leave_out("TEXP_NATIVE", NO_CORE)
    if WANTED["TEXP_CUDA"] == "1":
        leave_out("TEXP_CUDA", f"there is no C++ core to call it: {NO_CORE}")

# The Triton kernels live in the folder kernels/ and are imported as texp.kernels: there is another `kernels` on
# PyPI, so that name is never installed at the top level. The core's sources travel along, for the first use to build.
setup(
    packages=[*find_packages(include=["texp", "texp.*"]), "texp.kernels", "texp.csrc"],
    package_dir={"texp.kernels": "kernels", "texp.csrc": "csrc"},
    package_data={"texp.csrc": ["*.*", "*/*"]},
    ext_modules=[] if NO_CORE else [Extension("texp._C", [])],
    cmdclass={"build_py": BuildPy, "build_ext": BuildCore},
)
