"""How the C++ core and its CUDA kernel are compiled: for setup.py, for `texp build` and on first use (texp.native).

setup.py loads this file without torch, so only the standard library is imported until something is compiled. The name
of a core's folder says what the core was built for and from, so that cores for different versions of torch or Python,
or of different sources, lie side by side and are never confused.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TextIO

PACKAGE = Path(__file__).absolute().parent.parent

# In an installed package inside it, in a checkout (perhaps behind a link) beside it.
SOURCES = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.resolve().parent / "csrc"
CORES = "_native"  # the folder, in the package, of the folders of cores
SCRATCH = "building-"  # prefix of temporary folders
CORE_FILE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

CPP_SOURCES = ("bindings.cpp", "cpu/kernels.cpp")
CUDA_SOURCE = "cuda/kernels.cu"
WITH_CUDA = "TEXP_WITH_CUDA"  # macro: the CUDA kernel will be linked

FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # torch's threads are OpenMP's
FLAGS += [*OPENMP, "-fno-plt"] if OPENMP else []

# For nvcc. Host and device must compute the same bits, so products and sums are fused only where row.h says so.
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80;90a;100+PTX"
CUDA_LIBRARIES = ["rt", "pthread", "dl"]  # for CUDA's static runtime

PARTS = {"TEXP_NATIVE": "the C++ core", "TEXP_CUDA": "the CUDA kernel"}  # by the variables that control them

_LEFT_OUT = "left_out.txt"  # in the package's folder of cores
_FAILED = "failed.json"  # in the folder of a core


class BuildError(Exception):
    """The core cannot be built; the message is one line."""


class CompileError(BuildError):
    """A compiler, linker or nvcc failed."""

    passing = False  # whether a retry may succeed


class SettingError(ValueError):
    """An environment variable has an invalid value; the message is one line."""


_PASSING = re.compile(
    r"KeyboardInterrupt|interrupted by user|signal terminated|due to signal|died with <Signals|: Killed"
    r"|No space left|quota exceeded|memory exhausted|out of memory|allocate memory"
)


def setting(variable: str, installed: str | None = None) -> str:
    """TEXP_NATIVE or TEXP_CUDA from the environment: auto, 0 or 1; raises SettingError for another value.

    If it is not set, `installed`, by default what texp was installed with: 0 or else auto.
    """
    value = os.environ.get(variable) or installed or ("0" if variable in left_out() else "auto")
    if value not in ("auto", "0", "1"):
        raise SettingError(f"{variable} must be auto, 1 or 0, got {value!r}")
    return value


def left_out() -> list[str]:
    """The variables of the parts that texp was installed without."""
    try:
        return (PACKAGE / CORES / _LEFT_OUT).read_text().split()
    except OSError:
        return []


def write_left_out(package: Path, variables: list[str]) -> None:
    """Records which parts the installation in `package` was told to leave out."""
    note = package / CORES / _LEFT_OUT
    note.unlink(missing_ok=True)
    if variables:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("".join(f"{variable}\n" for variable in variables))


def core_name(with_cuda: bool) -> str:
    """The folder of a core: torch-2.13.0+cpu-cpython-311-x86_64-linux-gnu-cuda-0123456789ab, say.

    The name holds, or is a hash of, all that a core depends on except the compiler: torch and its ABI, Python's ABI,
    sources, flags, and whether the CUDA kernel is included. GPUs named by TEXP_CUDA_ARCHS follow: _80_90a.
    """
    import torch

    of_torch = torch.__version__, torch.version.git_version, torch.compiled_with_cxx11_abi()
    return core_name_for(*of_torch, CORE_FILE, with_cuda)


def core_name_for(version: str, git_version: str, cxx11_abi: bool, file: str, with_cuda: bool) -> str:
    """The same for any torch, and the CORE_FILE of any Python."""
    made_from = [git_version, cxx11_abi, FLAGS, _sanitizers(), *([CUDA_FLAGS, CUDA_ARCHS] if with_cuda else [])]
    gpus = "_".join(["", *archs()]) if with_cuda and archs() != CUDA_ARCHS.split(";") else ""
    digest = hashlib.sha256(repr(made_from).encode())
    for path in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cpp", ".cu")):
        digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    abi = file.removeprefix("_C.").partition(".")[0]
    return f"torch-{version}-{abi}{'-cuda' if with_cuda else ''}-{digest.hexdigest()[:12]}{gpus}"


def compiler() -> str:
    """The path of the C++ compiler, from CXX or else c++; raises BuildError if there is none."""
    name = (os.environ.get("CXX", "").split() or ["c++"])[0]
    if (path := shutil.which(name)) is None:
        raise BuildError(f"there is no C++ compiler {name!r}")
    return path


def toolkit() -> tuple[str, str]:
    """The paths of nvcc and of CUDA's static runtime; raises BuildError if one is missing."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise BuildError(f"there is no nvcc in {f'CUDA_HOME={home}' if home else 'PATH or /usr/local/cuda/bin'}")
    # nvcc itself knows where its libraries are: folders differ between distributions, and nvcc may be a script.
    try:
        done = subprocess.run([nvcc, "--dryrun", "-c", "kernels.cu"], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{nvcc} does not run: {error.strerror}") from None
    for folder in re.findall(r'"-L(.+?)"', done.stderr):
        if (runtime := Path(folder, "libcudart_static.a")).exists():
            return nvcc, str(runtime)
    raise BuildError(f"{nvcc} comes without libcudart_static.a")


def tools(with_cuda: bool) -> str:
    """Identifies the compilers, by paths and dates: where one failed, another may succeed.

    Raises BuildError if a compiler, torch or setuptools is missing.
    """
    # Does not import torch.utils.cpp_extension, which initialises CUDA, so that processes forked later could not use
    # it; nor setuptools, which replaces distutils and warns if that is loaded.
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:
        raise BuildError(f"torch cannot be imported: {' '.join(str(error).split())}") from None
    if "setuptools" not in sys.modules and importlib.util.find_spec("setuptools") is None:
        raise BuildError("setuptools is not installed")
    paths = [compiler(), toolkit()[0]] if with_cuda else [compiler()]
    return " ".join(f"{path} {os.stat(path).st_mtime_ns}" for path in paths)


def build(root: Path, with_cuda: bool) -> Path:
    """Compiles the core into root/core_name(with_cuda) and returns the path of the library, which appears there only
    when it is complete. The output of the compilers is in build.log beside it.

    Raises BuildError if a compiler or torch is missing; CompileError, with the compiler's first error, which is
    recorded for `failed_before` unless it is passing; OSError if `root` is not writable.
    """
    tools(with_cuda)
    folder = root.absolute() / core_name(with_cuda)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch,
        (folder / "build.log").open("w", errors="backslashreplace") as log,  # names of folders need not be valid text
    ):
        try:
            objects = compile_kernel(scratch, log) if with_cuda else []
            # In a separate process, so that its output is kept and torch and setuptools do not affect this one.
            code = "import runpy, sys; runpy.run_path(sys.argv[1])['compile_core'](*sys.argv[2:])"
            command = [sys.executable, "-c", code, str(Path(__file__).absolute()), str(SOURCES), scratch, *objects]
            path = [entry for entry in sys.path if entry and isinstance(entry, str)]  # as Python does
            run(command, log, cwd=scratch, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)})
        except CompileError as error:
            if not error.passing:
                note_failure(folder, with_cuda, str(error))
            raise
        (folder / _FAILED).unlink(missing_ok=True)
        return Path(scratch, CORE_FILE).replace(folder / CORE_FILE)


def note_failure(folder: Path, with_cuda: bool, why: str) -> None:
    """Records why the core of this folder cannot be built, for :func:`failed_before`."""
    (folder / _FAILED).write_text(json.dumps({"tools": tools(with_cuda), "why": why}))


def failed_before(folder: Path, with_cuda: bool) -> str | None:
    """Why building the core of this folder has failed, if it has with the same compilers; else None."""
    try:
        note = json.loads((folder / _FAILED).read_text())
        return note["why"] if note["tools"] == tools(with_cuda) else None
    except (OSError, ValueError):
        return None


def compile_core(sources: str, to: str, *objects: str) -> None:
    """Compiles and links the core into the folder `to`, as torch builds extensions; `objects`: of the CUDA kernel."""
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    with contextlib.suppress(ImportError):  # torch then compiles one file at a time
        import ninja  # whose virtual environment need not be activated

        os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", os.defpath)))
    if not os.environ.get("CXX", "").split():
        os.environ.pop("CXX", None)  # torch would run an empty command
    core = CppExtension(
        "_C",
        [f"{sources}/{name}" for name in CPP_SOURCES],
        extra_compile_args=compile_flags(),
        extra_link_args=link_flags(),
        extra_objects=list(objects),
    )
    if objects:
        core.libraries += CUDA_LIBRARIES
        core.define_macros.append((WITH_CUDA, None))
    distribution = Distribution({"name": "texp", "ext_modules": [core], "cmdclass": {"build_ext": BuildExtension}})
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = to, f"{to}/objects"
    command.ensure_finalized()
    command.run()


def compile_flags() -> list[str]:
    """Flags for C++ in addition to those of torch and Python."""
    return FLAGS + (["-g", "-fno-omit-frame-pointer", *_sanitizers()] if _sanitizers() else [])


def link_flags() -> list[str]:
    return OPENMP + _sanitizers()


def _sanitizers() -> list[str]:
    """From TEXP_SANITIZE, as in TEXP_SANITIZE=address,undefined."""
    return [f"-fsanitize={names}"] if (names := os.environ.get("TEXP_SANITIZE")) else []


def compile_kernel(scratch: str, log: TextIO) -> list[str]:
    """Returns the objects to link. torch's own support for CUDA sources needs a torch built with CUDA."""
    nvcc, runtime = toolkit()
    made = f"{scratch}/cuda_kernels.o"
    command = [nvcc, *CUDA_FLAGS, *_arch_flags(nvcc), "-c", str(SOURCES / CUDA_SOURCE), "-o", made]
    run(command, log)
    return [made, runtime]


def archs() -> list[str]:
    """The GPU architectures of the kernel, from TEXP_CUDA_ARCHS or CUDA_ARCHS; raises SettingError if malformed."""
    listed = os.environ.get("TEXP_CUDA_ARCHS") or CUDA_ARCHS
    if not all(re.fullmatch(r"\d+[af]?(\+PTX)?", arch) for arch in listed.split(";")):
        raise SettingError(f"TEXP_CUDA_ARCHS must be like {CUDA_ARCHS}, got {listed!r}")
    return listed.split(";")


def _arch_flags(nvcc: str) -> list[str]:
    """Without the default architectures that nvcc is too old for; newer GPUs compile the PTX of the newest left."""
    wanted = [arch.partition("+")[::2] for arch in archs()]
    if not os.environ.get("TEXP_CUDA_ARCHS"):
        known = re.findall(r"\d+", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout)
        if fit := [arch for arch, _ in wanted if arch.rstrip("af") in known]:
            wanted = [(arch, arch == fit[-1]) for arch in fit]
    return [f"-gencode=arch=compute_{a},code=[sm_{a}{f',compute_{a}' if ptx else ''}]" for a, ptx in wanted]


def run(command: list[str], log: TextIO, **options) -> None:
    """Runs a compiler with its output in `log`; raises CompileError if it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **options
    )
    log.write(f"{shlex.join(command)}\n{done.stdout}")
    if done.returncode:
        why = first_error(done.stdout) or f"{command[0]} says nothing and returns {done.returncode}"
        error = CompileError(f"compiling it failed: {why}")
        error.passing = done.returncode < 0 or _PASSING.search(done.stdout) is not None
        raise error


def first_error(output: str) -> str:
    """The first error in the output of a compiler, linker or nvcc, or else its last line."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    pattern = r"\b(error|fatal)( \w+)?\s*:|\bundefined reference\b|\bld\b.*: cannot "
    error = next((line for line in lines if re.search(pattern, line, re.IGNORECASE)), (lines or [""])[-1])
    return error.replace(f"{SOURCES}{os.sep}", "csrc/")
