"""Makes texp's C++ core and CUDA kernel for another Python and another torch, on a machine that has neither.

It compiles them with the headers of both, links them with torch's libraries, checks that torch defines what they
need, says what the machine that they are for must have, and prints the path of the core: OUT/NAME/_C….so, where NAME
says what it was made for and from. There texp finds it if OUT is texp/_native of that machine's texp, or texp in its
TORCH_EXTENSIONS_DIR, and TEXP_CUDA_ARCHS is the same; benchmarks/gpu_check.sh takes it as TEXP_PREBUILT.

Needs a C++20 compiler (CXX) and binutils, nvcc for the kernel, and pip for a download. TEXP_CUDA_ARCHS says for which
GPUs the kernel is, as in 90a;100+PTX; TEXP_CUDA=0 leaves it out. The other machine must be Linux, with the same kind
of processor.
"""

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# texp/native/build.py leaves to the torch that is running how its extensions are compiled and linked. Here none is
# running, so what it would say is read from the files of its wheel.

ROOT = Path(__file__).resolve().parent.parent

# Not imported as a part of texp, which needs torch.
_spec = importlib.util.spec_from_file_location("texp_build", ROOT / "texp" / "native" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)
BuildError = build.BuildError

CACHE = ROOT / "build" / "wheels"

LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")  # what torch links its extensions with


@dataclass(frozen=True)
class Python:
    """One for which there are headers."""

    include: Path
    version: str
    """As in 3.12."""
    tag: str
    """As in 312, or 313t without the global interpreter lock."""

    @classmethod
    def of(cls, include: Path) -> "Python":
        """What the headers in this folder say of themselves; raises BuildError where there are none."""
        if not (include / "Python.h").exists():
            raise BuildError(f"there is no Python.h in {include}; Debian's python3-dev has it, as has pyenv")
        source = "#include <Python.h>\n#ifdef Py_GIL_DISABLED\nit is PY_MAJOR_VERSION PY_MINOR_VERSION t\n"
        source += "#else\nit is PY_MAJOR_VERSION PY_MINOR_VERSION\n#endif\n"
        command = [*compiler(), "-E", "-P", "-x", "c++", f"-I{include}", "-"]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        says = re.search(r"^it is (\d+) (\d+)( t)?$", done.stdout, re.MULTILINE)
        if done.returncode or says is None:
            raise BuildError(f"{include} cannot be compiled with: {build.first_error(done.stderr)}")
        major, minor, free_threaded = says.groups()
        return cls(include, f"{major}.{minor}", f"{major}{minor}{'t' if free_threaded else ''}")

    @property
    def core_file(self) -> str:
        """The name that the core has there, build.CORE_FILE."""
        return re.sub(r"cpython-\d+t?", f"cpython-{self.tag}", build.CORE_FILE)


@dataclass(frozen=True)
class Torch:
    """One whose headers and libraries are in a folder."""

    folder: Path
    version: str
    git_version: str
    cxx11_abi: bool
    """Whether its std::string is the one of C++11: the wheels of 2.6 still have the one before."""
    pybind11: str
    """Which extensions share the types and exceptions that torch has registered: those that say the same."""

    @classmethod
    def of(cls, folder: Path) -> "Torch":
        """What is in the folder; raises BuildError where something is missing."""
        needed = ["version.py", "include", *(f"lib/lib{name}.so" for name in LIBRARIES)]
        if missing := [name for name in needed if not (folder / name).exists()]:
            raise BuildError(f"{folder} is no folder of torch: it has no {missing[0]}")
        says = dict(re.findall(r"^(\w+)\b.*= *'(.+)'", (folder / "version.py").read_text(), re.MULTILINE))
        if not {"__version__", "git_version"} <= says.keys():
            raise BuildError(f"{folder}/version.py does not say which version it is")
        functions = [name for name in defined_in([folder / "lib" / "libc10.so"]) if re.match("_ZNK?3c10", name)]
        cxx11_abi = any("__cxx11" in name for name in functions)
        pybind11 = pybind11_of(folder / "lib" / "libtorch_python.so")
        return cls(folder.absolute(), says["__version__"], says["git_version"], cxx11_abi, pybind11)

    def flags(self) -> list[str]:
        """For the compiler, as torch.utils.cpp_extension has them."""
        flags = ["-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"]
        flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(self.cxx11_abi)}"]
        # To pybind11 before 3, every version of the compiler is another ABI, unless it is told which one to name.
        if named := re.fullmatch(r"__pybind11_internals_v\d+(_[a-z]+)(_lib[a-z]+)(_cxxabi\d+)__", self.pybind11):
            for macro, value in zip(("COMPILER_TYPE", "STDLIB", "BUILD_ABI"), named.groups(), strict=True):
                flags.append(f'-DPYBIND11_{macro}="{value}"')
        return [*flags, f"-I{self.folder}/include", f"-I{self.folder}/include/torch/csrc/api/include"]

    def libraries(self) -> list[Path]:
        return [self.folder / "lib" / f"lib{name}.so" for name in LIBRARIES]


def compiler() -> list[str]:
    return [build.compiler(), *os.environ.get("CXX", "").split()[1:]]


def symbols(path: Path, which: str) -> set[str]:
    """Those by which the dynamic linker finds things; raises BuildError where nm does not list them."""
    if shutil.which("nm") is None:
        raise BuildError("there is no nm; it is part of binutils")
    done = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"nm cannot read {path}: {done.stderr.strip().splitlines()[-1]}")
    return {line.split()[-1] for line in done.stdout.splitlines() if line.split()[-2] in "BDGRSTUVWiu"}


def defined_in(libraries: Iterable[Path]) -> set[str]:
    return {name.partition("@")[0] for path in libraries for name in symbols(path, "--defined-only")}


def pybind11_of(path: Path) -> str:
    """The name under which a library keeps what it shares with others that were built with pybind11."""
    found = re.search(rb"__pybind11_internals_\w+", path.read_bytes())
    if found is None:
        raise BuildError(f"{path} was not built with pybind11")
    return found[0].decode()


def unpacked(version: str, python: Python, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder torch of a wheel, from the cache or else by pip; raises BuildError where pip has none for it."""
    folder = cache / f"torch-{version}-cp{python.tag}-{platform.machine()}"
    if folder.exists():
        return folder / "torch"
    say(f"downloading torch {version} for Python {python.version}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="downloading-", dir=cache, ignore_cleanup_errors=True) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-input"]
        # Nor is a copy kept in pip's own cache: what is needed is kept here.
        command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        command += ["--implementation", "cp", "--python-version", python.version, "--abi", f"cp{python.tag}"]
        for system in ("manylinux_2_28", "manylinux2014", "manylinux1", "linux"):
            command += ["--platform", f"{system}_{platform.machine()}"]
        # pip first writes the wheel, up to 900 MB, to TMPDIR, which may be in memory.
        environment = os.environ | {"TMPDIR": scratch}
        done = subprocess.run([*command, f"torch=={version}"], env=environment, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("torch-*.whl"))
        if done.returncode or not wheels:
            why = build.first_error(done.stderr) or "it says nothing"
            raise BuildError(f"pip cannot download torch {version} for Python {python.version}: {why}")
        files = {"torch/version.py", *(f"torch/lib/lib{name}.so" for name in LIBRARIES)}
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in wheel.namelist():
                if name.startswith("torch/include/") or name in files:
                    wheel.extract(name, f"{scratch}/unpacked")
        try:
            Path(scratch, "unpacked").rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder / "torch"


def torch_of(given: str, python: Python, cache: Path, say: Callable[[str], None]) -> Torch:
    """That of a folder, or of the wheel of a version."""
    if re.fullmatch(r"\d+(\.\w+)+(\+\w+)?", given):
        return Torch.of(unpacked(given, python, cache, say))
    if Path(given).is_dir():
        return Torch.of(Path(given))
    raise BuildError(f"TORCH must be a version, as in 2.11.0, or a folder that holds one, got {given!r}")


def core_name(torch: Torch, python: Python, with_cuda: bool) -> str:
    """build.core_name there."""
    return build.core_name_for(torch.version, torch.git_version, torch.cxx11_abi, python.core_file, with_cuda)


def make(folder: Path, torch: Torch, python: Python, *, with_cuda: bool, jobs: int) -> Path:
    """Compiles, links and checks the core in this folder, as texp.native.build.build does, and returns its path.

    Args:
        jobs: how many compilers run at a time.

    Raises BuildError where the core is not compiled, or would not load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # -D to -f are what Python's own flags come to.
    flags = [*build.compile_flags(), "-DNDEBUG", "-fwrapv", "-fPIC", *torch.flags(), f"-I{python.include}"]
    flags += [f"-D{build.WITH_CUDA}"] if with_cuda else []
    with (
        tempfile.TemporaryDirectory(prefix=build.SCRATCH, dir=folder) as scratch,
        (folder / "build.log").open("w") as log,
    ):

        def compiled(source: str) -> list[str]:
            made = f"{scratch}/{source.replace('/', '_')}.o"
            build.run([*compiler(), *flags, "-c", str(build.SOURCES / source), "-o", made], log)
            return [made]

        tasks = [lambda: build.compile_kernel(scratch, log)] if with_cuda else []
        tasks += [lambda source=source: compiled(source) for source in build.CPP_SOURCES]
        with ThreadPoolExecutor(jobs) as pool:
            objects = [path for made in pool.map(lambda task: task(), tasks) for path in made]
        core = Path(scratch, python.core_file)
        libraries = [*LIBRARIES, *(build.CUDA_LIBRARIES if with_cuda else [])]
        command = [*compiler(), "-shared", *build.link_flags(), *objects, f"-L{torch.folder}/lib"]
        build.run([*command, *(f"-l{library}" for library in libraries), "-o", str(core)], log)
        check(core, torch)
        return core.replace(folder / core.name)


def check(core: Path, torch: Torch) -> None:
    """Raises BuildError if the core would not load into a process of this torch, or not share its exceptions."""
    # Those of the system's libraries bear the version of the library in which the linker has found them.
    needed = {name for name in symbols(core, "--undefined-only") if "@" not in name and not re.match("_?Py", name)}
    if missing := sorted(needed - defined_in(torch.libraries())):
        names = subprocess.run(["c++filt", *missing], capture_output=True, text=True).stdout.splitlines()
        others = f", nor {len(names) - 1} more that the core needs" if names[1:] else ", which the core needs"
        raise BuildError(f"torch {torch.version} does not define {names[0]}{others}")
    if (own := pybind11_of(core)) != torch.pybind11:
        raise BuildError(f"the core could not see the errors of torch {torch.version}: {own} is not {torch.pybind11}")


def requirements(core: Path) -> str:
    """The versions that the machine's own libraries must have at least."""
    newest: dict[str, str] = {}
    for name in symbols(core, "--undefined-only"):
        if found := re.search(r"@+(GLIBC|GLIBCXX|GOMP)_([\d.]+)$", name):
            library, version = found.groups()
            newest[library] = max(newest.get(library, "0"), version, key=lambda x: [*map(int, x.split("."))])
    return ", ".join(f"{library} {version}" for library, version in sorted(newest.items()))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks/build_for.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for it, which may hold others")
    parser.add_argument(
        "torch",
        metavar="TORCH",
        help="a version, as in 2.11.0, whose wheel pip downloads, or a folder that holds torch's include, lib and "
        "version.py, as site-packages/torch does",
    )
    parser.add_argument(
        "include",
        type=Path,
        nargs="?",
        metavar="PYTHON_INCLUDE",
        help="the folder with the other Python's Python.h: /usr/include/python3.12 of Debian's python3.12-dev, or "
        "versions/3.12.1/include/python3.12 of pyenv; by default that of the Python that runs this",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=CACHE,
        metavar="FOLDER",
        help="where the headers and libraries of wheels stay, about 500 MB each; by default build/wheels in this "
        "checkout. A download takes up to 2 GB there for a while",
    )
    given = parser.parse_args(arguments)
    try:
        print(_make(given.out, given.torch, given.include, given.cache))
    except (BuildError, ValueError, OSError) as error:
        _say(str(error))
        return 1
    return 0


def _say(what: str) -> None:
    print(f"build_for.sh: {what}", file=sys.stderr, flush=True)


def _make(out: Path, given: str, include: Path | None, cache: Path) -> Path:
    with_cuda = build.setting("TEXP_CUDA", installed="1") != "0"
    if with_cuda:  # asked before all that takes long
        build.archs()
        try:
            build.toolkit()
        except BuildError as error:
            raise BuildError(f"{error}; TEXP_CUDA=0 leaves the kernel out") from None
    python = Python.of(include or Path(sysconfig.get_path("include")))
    torch = torch_of(given, python, cache, _say)
    parts = "the core and the CUDA kernel" if with_cuda else "the core"
    _say(f"compiling {parts} for torch {torch.version} and Python {python.version}")
    folder = out.absolute() / core_name(torch, python, with_cuda)
    try:
        core = make(folder, torch, python, with_cuda=with_cuda, jobs=os.cpu_count() or 1)
    except build.CompileError as error:
        raise BuildError(f"{error} (all of it: {folder}/build.log)") from None
    _say(f"the machine must have {requirements(core)} or newer")
    return core


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
