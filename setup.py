"""Packages, the C++ core and its CUDA kernel; everything else is in pyproject.toml.

TEXP_NATIVE=auto (default) builds the core where torch and a compiler are found and otherwise installs the package
without it; 1 fails where it cannot be built; 0 leaves it out. TEXP_CUDA says the same of the kernel, which needs the
core, nvcc and CUDA's static runtime, but no GPU and no torch built with CUDA; TEXP_CUDA_ARCHS says for which GPUs.
Why a part was left out is written to texp/_build.py, for `texp info` and errors: pip shows nothing of a build that
ends well.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off"]
if sys.platform == "linux":
    FLAGS += ["-fopenmp", "-fno-plt"]  # torch's threads are OpenMP's

# For nvcc. The host computes the same rows and its tests compare bits, so no product is fused with a sum unless row.h
# says so by name.
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = (os.environ.get("TEXP_CUDA_ARCHS") or "80;90a;100+PTX").split(";")
if not all(re.fullmatch(r"\d+[af]?(\+PTX)?", arch) for arch in CUDA_ARCHS):
    raise SystemExit(f"TEXP_CUDA_ARCHS must be like 80;90a;100+PTX, got {';'.join(CUDA_ARCHS)!r}")

PARTS = {"TEXP_NATIVE": "the C++ core", "TEXP_CUDA": "the CUDA kernel"}
WANTED = {variable: os.environ.get(variable) or "auto" for variable in PARTS}
for variable, wanted in WANTED.items():
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 1 or 0, got {wanted!r}")
if not os.environ.get("CXX", "").split():
    os.environ.pop("CXX", None)  # torch would look for a compiler without a name


def obstacle() -> str:
    """Why the core is not to be built, as far as that is known before compiling; "" if it is."""
    if WANTED["TEXP_NATIVE"] == "0":
        return "TEXP_NATIVE=0 left it out"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except (ImportError, OSError) as error:
        return f"the build could not import torch ({error}), which pip hides from it without --no-build-isolation"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "" if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"


def toolkit() -> tuple[str, str]:
    """nvcc and CUDA's static runtime; raises LookupError, with the reason, where one is missing."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise LookupError(f"there is no nvcc in {f'CUDA_HOME={home}' if home else 'PATH or /usr/local/cuda/bin'}")
    # Where its libraries are, nvcc says itself: it may be a script, and every distribution has other folders.
    try:
        done = subprocess.run([nvcc, "--dryrun", "-c", "step_cuda.cu"], capture_output=True, text=True)
    except OSError as error:
        raise LookupError(f"{nvcc} does not run: {error.strerror}") from None
    for folder in re.findall(r'"-L(.+?)"', done.stderr):
        if (runtime := Path(folder, "libcudart_static.a")).exists():
            return nvcc, str(runtime)
    raise LookupError(f"{nvcc} comes without libcudart_static.a")


def cuda_obstacle(no_core: str) -> str:
    """Likewise for the kernel."""
    if WANTED["TEXP_CUDA"] == "0":
        return "TEXP_CUDA=0 left it out"
    if no_core:
        return f"there is no C++ core to call it: {no_core}"
    try:
        toolkit()
    except LookupError as error:
        return str(error)
    return ""


def compile_kernel(to: Path) -> list[str]:
    """What is to be linked; raises RuntimeError with nvcc's first error."""
    nvcc, runtime = toolkit()
    archs = []
    for arch in CUDA_ARCHS:
        number, _, ptx = arch.partition("+")
        archs.append(f"-gencode=arch=compute_{number},code=[sm_{number}{f',compute_{number}' if ptx else ''}]")
    to.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, *CUDA_FLAGS, *archs, "-c", "csrc/step_cuda.cu", "-o", str(to)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", file=sys.stderr)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"{nvcc} says nothing and returns {done.returncode}"]
        raise RuntimeError(next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1]))
    return [str(to), runtime]


def announce(variable: str, reason: str) -> None:
    """That what `variable` names is left out for `reason`; ends the build if it was asked for."""
    if WANTED[variable] == "1":
        raise SystemExit(f"{variable}=1 asks for {PARTS[variable]}, but {reason}")
    if WANTED[variable] == "auto":
        print(f"texp: installing without {PARTS[variable]}: {reason}", file=sys.stderr)


def record(package: Path, no_core: str, no_cuda: str) -> None:
    """Makes the folder `package` say why it has no core and no kernel ("": it has), whatever was there before."""
    note = package / "_build.py"
    note.unlink(missing_ok=True)
    if no_core:
        (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
    if no_core or no_cuda:
        reasons = f"NO_CORE = {no_core!r}\nNO_CUDA = {no_cuda!r}\n"
        note.write_text(f'"""Written by setup.py."""\n\n{reasons}', encoding="utf-8")


NO_CORE = obstacle()
NO_CUDA = cuda_obstacle(NO_CORE)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        package = self.get_package_dir("texp") if self.editable_mode else f"{self.build_lib}/texp"
        record(Path(package), NO_CORE, NO_CUDA)


def native() -> tuple:
    """texp._C, and the command that builds it, with the kernel unless there is an obstacle."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            packages, no_core, no_cuda = [Path(self.build_lib, "texp")], "", NO_CUDA
            if self.inplace:
                packages.append(Path(self.get_finalized_command("build_py").get_package_dir("texp")))
            self.force = True  # else a core built with another torch, or other flags, passes for this one
            # Not by torch's own command for CUDA sources, which a torch without CUDA refuses.
            if not no_cuda:
                try:
                    core.extra_objects = compile_kernel(Path(self.build_temp, "step_cuda.o"))
                    core.libraries += ["rt", "pthread", "dl"]  # of the runtime
                    core.define_macros.append(("TEXP_WITH_CUDA", None))
                except RuntimeError as error:
                    no_cuda = f"compiling it failed: {error}"
                    announce("TEXP_CUDA", no_cuda)
            try:
                super().run()
            except Exception as error:
                no_core, self.extensions = f"compiling it failed: {' '.join(str(error).split()).rstrip('.')}", []
            for package in filter(Path.is_dir, packages):
                record(package, no_core, no_cuda)
            if no_core:
                announce("TEXP_NATIVE", no_core)
                if WANTED["TEXP_CUDA"] == "1":
                    announce("TEXP_CUDA", f"there is no C++ core to call it: {no_core}")

    sanitize = os.environ.get("TEXP_SANITIZE", "")
    flags = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g"] if sanitize else []
    core = CppExtension(
        "texp._C",
        ["csrc/bindings.cpp", "csrc/step_cpu.cpp"],
        extra_compile_args=FLAGS + flags,
        extra_link_args=flags[:1] + (["-fopenmp"] if "-fopenmp" in FLAGS else []),
    )
    return core, Build


ext_modules, cmdclass = [], {"build_py": BuildPy}
if NO_CORE:
    announce("TEXP_NATIVE", NO_CORE)
if NO_CUDA and (not NO_CORE or WANTED["TEXP_CUDA"] == "1"):
    announce("TEXP_CUDA", NO_CUDA)
if not NO_CORE:
    core, cmdclass["build_ext"] = native()
    ext_modules.append(core)

# The Triton kernels live in the folder kernels/ and are imported as texp.kernels: there is another `kernels` on
# PyPI, so that name is never installed at the top level.
setup(
    packages=["texp", "texp.kernels"],
    package_dir={"texp.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
