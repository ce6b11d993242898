"""How the C++ core and its CUDA kernel are compiled: for setup.py, for `texp build` and on first use (texp.native).

setup.py reads this file where there is no torch, so nothing but the standard library is imported until something is
compiled. A core stands in a folder whose name says what it was made for and from. Cores for other versions of torch
or Python, or of other sources, stand beside it, and none is ever taken for another.
"""

import hashlib
import importlib
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

SOURCES = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.resolve().parent / "csrc"
"""Inside an installed package; beside it in a checkout, to which there may be a link."""

CORES = "_native"
"""The folder of a package, or of a cache, that holds the folders of cores."""

SCRATCH = "building-"  # what the names of folders begin with that are there only while a core is built

CORE_FILE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

CPP_SOURCES = ("bindings.cpp", "cpu/kernels.cpp")
CUDA_SOURCE = "cuda/kernels.cu"
WITH_CUDA = "TEXP_WITH_CUDA"  # the macro that they see where the CUDA kernel is to be linked

FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # torch's threads are OpenMP's
FLAGS += [*OPENMP, *(["-fno-plt"] if OPENMP else [])]

# For nvcc. The host computes the same rows and its tests compare bits, so no product is fused with a sum unless row.h
# says so by name.
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80;90a;100+PTX"
CUDA_LIBRARIES = ["rt", "pthread", "dl"]  # what CUDA's static runtime needs

PARTS = {"TEXP_NATIVE": "the C++ core", "TEXP_CUDA": "the CUDA kernel"}
"""By the variable that says whether they are built."""

_LEFT_OUT = "left_out.txt"  # in the package's folder of cores
_FAILED = "failed.json"  # in the folder of a core


class BuildError(Exception):
    """Why the core cannot be built, in one line."""


class CompileError(BuildError):
    """The same, where it took a compiler to find out."""

    passing = False
    """Whether the next time may well go better."""


class SettingError(ValueError):
    """Of a variable in the environment, in one line."""


_PASSING = re.compile(
    r"KeyboardInterrupt|interrupted by user|signal terminated|due to signal|died with <Signals|: Killed"
    r"|No space left|quota exceeded|memory exhausted|out of memory|allocate memory"
)


def setting(variable: str, installed: str | None = None) -> str:
    """What the environment says of TEXP_NATIVE or TEXP_CUDA: auto, 0 or 1.

    Where it says nothing, `installed`: by default what the installation was told, 0 or else auto. Raises SettingError
    for another value.
    """
    value = os.environ.get(variable) or installed or ("0" if variable in left_out() else "auto")
    if value not in ("auto", "0", "1"):
        raise SettingError(f"{variable} must be auto, 1 or 0, got {value!r}")
    return value


def left_out() -> list[str]:
    """The variables of the parts that the installation was told to leave out."""
    try:
        return (PACKAGE / CORES / _LEFT_OUT).read_text().split()
    except OSError:
        return []


def write_left_out(package: Path, variables: list[str]) -> None:
    """Makes the installation in `package` remember what it was told to leave out, and nothing of before."""
    note = package / CORES / _LEFT_OUT
    note.unlink(missing_ok=True)
    if variables:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("".join(f"{variable}\n" for variable in variables))


def core_name(with_cuda: bool) -> str:
    """The folder of a core: torch-2.13.0+cpu-cpython-311-x86_64-linux-gnu-cuda-0123456789ab, say.

    It says, or is a digest of, all that a core depends on but the compiler: torch and its ABI, Python's ABI, the
    sources, the flags, and whether the CUDA kernel is in it. GPUs that TEXP_CUDA_ARCHS names follow: _80_90a.
    """
    import torch

    return core_name_for(
        torch.__version__, torch.version.git_version, torch.compiled_with_cxx11_abi(), CORE_FILE, with_cuda
    )


def core_name_for(version: str, git_version: str, cxx11_abi: bool, file: str, with_cuda: bool) -> str:
    """The same of a torch that may be none of this Python's, and of another Python's CORE_FILE."""
    made_from = [git_version, cxx11_abi, FLAGS, _sanitizers()]
    gpus = ""
    if with_cuda:
        made_from += [CUDA_FLAGS, CUDA_ARCHS]
        gpus = "" if archs() == CUDA_ARCHS.split(";") else "_".join(["", *archs()])
    digest = hashlib.sha256(repr(made_from).encode())
    for path in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cpp", ".cu")):
        digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    abi = file.removeprefix("_C.").partition(".")[0]
    return f"torch-{version}-{abi}{'-cuda' if with_cuda else ''}-{digest.hexdigest()[:12]}{gpus}"


def compiler() -> str:
    """The path of the C++ compiler, CXX in the environment or c++; raises BuildError where there is none."""
    name = (os.environ.get("CXX", "").split() or ["c++"])[0]
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"there is no C++ compiler {name!r}")
    return path


def toolkit() -> tuple[str, str]:
    """The paths of nvcc and of CUDA's static runtime; raises BuildError where one is missing."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise BuildError(f"there is no nvcc in {f'CUDA_HOME={home}' if home else 'PATH or /usr/local/cuda/bin'}")
    # Where its libraries are, nvcc says itself: it may be a script, and every distribution has other folders.
    try:
        done = subprocess.run([nvcc, "--dryrun", "-c", "kernels.cu"], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{nvcc} does not run: {error.strerror}") from None
    for folder in re.findall(r'"-L(.+?)"', done.stderr):
        if (runtime := Path(folder, "libcudart_static.a")).exists():
            return nvcc, str(runtime)
    raise BuildError(f"{nvcc} comes without libcudart_static.a")


def tools(with_cuda: bool) -> str:
    """The compilers that a core is built with, and when they were made: where one fails, another may not.

    Raises BuildError where one of them, or torch, is missing.
    """
    # Not torch.utils.cpp_extension, which asks CUDA for devices: a process that forks afterwards could use none. Nor
    # setuptools, which takes the place of distutils and warns where that is there already.
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:
        raise BuildError(f"torch cannot be imported: {' '.join(str(error).split())}") from None
    if "setuptools" not in sys.modules and importlib.util.find_spec("setuptools") is None:
        raise BuildError("setuptools is not installed")
    paths = [compiler(), toolkit()[0]] if with_cuda else [compiler()]
    return " ".join(f"{path} {os.stat(path).st_mtime_ns}" for path in paths)


def build(root: Path, with_cuda: bool) -> Path:
    """Compiles the core into root/core_name(with_cuda) and returns the path of the library.

    The library appears there when it is complete: an interrupted build leaves none. What the compilers say goes to
    build.log beside it.

    Raises BuildError where a compiler or torch is missing; CompileError, with the first error of the compiler, which
    is noted for `failed_before` unless it is passing; OSError where `root` cannot be written to.
    """
    tools(with_cuda)
    folder = root.absolute() / core_name(with_cuda)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch,
        (folder / "build.log").open("w", errors="backslashreplace") as log,  # names of folders may be no text
    ):
        try:
            objects = compile_kernel(scratch, log) if with_cuda else []
            # In a process of its own: what it prints is kept, and torch and setuptools change nothing here.
            code = "import runpy, sys; runpy.run_path(sys.argv[1])['compile_core'](*sys.argv[2:])"
            command = [sys.executable, "-c", code, str(Path(__file__).absolute()), str(SOURCES), scratch, *objects]
            path = [entry for entry in sys.path if entry and isinstance(entry, str)]  # Python skips others, too
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
            run(command, log, cwd=scratch, env=environment)
        except CompileError as error:
            if not error.passing:
                note_failure(folder, with_cuda, str(error))
            raise
        (folder / _FAILED).unlink(missing_ok=True)
        return Path(scratch, CORE_FILE).replace(folder / CORE_FILE)


def note_failure(folder: Path, with_cuda: bool, why: str) -> None:
    """Notes in the folder of a core why it cannot be had, for :func:`failed_before`."""
    (folder / _FAILED).write_text(json.dumps({"tools": tools(with_cuda), "why": why}))


def failed_before(folder: Path, with_cuda: bool) -> str | None:
    """Why the core of this folder cannot be had, if that has been tried with the same compilers; else None."""
    try:
        note = json.loads((folder / _FAILED).read_text())
        return note["why"] if note["tools"] == tools(with_cuda) else None
    except (OSError, ValueError):
        return None


def compile_core(sources: str, to: str, *objects: str) -> None:
    """Compiles and links the core into the folder `to`, by torch's rules; `objects`: those of the CUDA kernel."""
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    try:
        import ninja
    except ImportError:
        pass  # torch can do without, one file after the other
    else:  # its environment need not be activated
        os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", os.defpath)))
    if not os.environ.get("CXX", "").split():
        os.environ.pop("CXX", None)  # torch would look for a compiler without a name
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
    """Those for C++ that neither torch nor Python asks for."""
    return FLAGS + (["-g", "-fno-omit-frame-pointer", *_sanitizers()] if _sanitizers() else [])


def link_flags() -> list[str]:
    return OPENMP + _sanitizers()


def _sanitizers() -> list[str]:
    """Flags for those that TEXP_SANITIZE names, as in TEXP_SANITIZE=address,undefined."""
    return [f"-fsanitize={names}"] if (names := os.environ.get("TEXP_SANITIZE")) else []


def compile_kernel(scratch: str, log: TextIO) -> list[str]:
    """Returns what is to be linked. Torch's own command for CUDA sources is refused by a torch without CUDA."""
    nvcc, runtime = toolkit()
    made = f"{scratch}/cuda_kernels.o"
    command = [nvcc, *CUDA_FLAGS, *_arch_flags(nvcc), "-c", str(SOURCES / CUDA_SOURCE), "-o", made]
    run(command, log)
    return [made, runtime]


def archs() -> list[str]:
    """For which GPUs the kernel is built: TEXP_CUDA_ARCHS or CUDA_ARCHS. Raises SettingError if that names none."""
    listed = os.environ.get("TEXP_CUDA_ARCHS") or CUDA_ARCHS
    if not all(re.fullmatch(r"\d+[af]?(\+PTX)?", arch) for arch in listed.split(";")):
        raise SettingError(f"TEXP_CUDA_ARCHS must be like {CUDA_ARCHS}, got {listed!r}")
    return listed.split(";")


def _arch_flags(nvcc: str) -> list[str]:
    """Unless they were asked for, architectures that nvcc is too old for are left out; newer GPUs than those that are
    left compile the PTX of the newest."""
    wanted = [arch.partition("+")[::2] for arch in archs()]
    if not os.environ.get("TEXP_CUDA_ARCHS"):
        known = re.findall(r"\d+", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout)
        if fit := [arch for arch, _ in wanted if arch.rstrip("af") in known]:
            wanted = [(arch, arch == fit[-1]) for arch in fit]
    return [f"-gencode=arch=compute_{a},code=[sm_{a}{f',compute_{a}' if ptx else ''}]" for a, ptx in wanted]


def run(command: list[str], log: TextIO, **options) -> None:
    """Runs a compiler and keeps what it says in `log`; raises CompileError where it fails."""
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
    """The first error that a compiler, linker or nvcc reports, or else the last line; "" where there is no line."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    pattern = r"\b(error|fatal)( \w+)?\s*:|\bundefined reference\b|\bld\b.*: cannot "
    error = next((line for line in lines if re.search(pattern, line, re.IGNORECASE)), (lines or [""])[-1])
    return error.replace(f"{SOURCES}{os.sep}", "csrc/")
