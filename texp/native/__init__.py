"""The C++ core: loaded if an installation, `texp build` or an earlier use has built it, built otherwise."""

import contextlib
import glob
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch  # before the core, which needs its libraries
from filelock import FileLock

from texp import torch_internals
from texp.native import build
from texp.native.build import BuildError, CompileError

MODULE = "texp._C"

EXPECTED_TIME = "about half a minute"  # on two cores, with nvcc

_missing: dict[str, str] = {}  # why a part is missing, by variable (build.PARTS); set by `load`
_has_given_up = False


class MissingError(RuntimeError):
    """A part that the environment requires is missing; the message is one line."""


def core() -> ModuleType | None:
    """The core if it is loaded, else None."""
    return sys.modules.get(MODULE)


def why_missing(variable: str) -> str:
    """Why the core (TEXP_NATIVE) or the CUDA kernel (TEXP_CUDA) is missing, after a call of :func:`load`."""
    return _missing.get(variable, "the core that is loaded comes without it")  # by an earlier import of texp


def load(*, may_build: bool) -> ModuleType | None:
    """The core for this torch and this Python, or None; then :func:`why_missing` says why.

    Args:
        may_build: build it if necessary, which takes EXPECTED_TIME and is announced on stderr; other processes that
            need the same core wait. If it fails, a warning says why. This process does not try again, and, unless the
            build was interrupted, neither do others with the same compilers.

    Raises ValueError if TEXP_NATIVE, TEXP_CUDA or TEXP_CUDA_ARCHS has an invalid value, and MissingError if one of
    the first two is 1 but its part cannot be built.
    """
    global _has_given_up
    if build.setting("TEXP_NATIVE") == "0":
        _missing["TEXP_NATIVE"] = _turned_off("TEXP_NATIVE")
        return None
    if core() is not None or _has_given_up:
        return core()
    try:
        return _find_or_build(cache() if may_build else None)
    except BuildError as error:
        _missing["TEXP_NATIVE"] = str(error)
        if may_build:
            for variable, part in build.PARTS.items():
                if build.setting(variable) == "1":
                    raise MissingError(f"{variable}=1 asks for {part}, but {error}") from None
            if not _has_given_up:  # another thread may have
                _has_given_up = True
                warnings.warn(f"texp goes on without its C++ core: {error}", stacklevel=2)
        return None


def main() -> int:
    """The command `texp build`: builds the core if necessary, also if that has failed before; prints its path and
    returns the exit code. It is put where texp is installed, for all users, or if that is read-only, where the first
    use would put it.
    """
    try:
        if build.setting("TEXP_NATIVE") == "0":
            raise BuildError(_turned_off("TEXP_NATIVE"))
        root = build.PACKAGE / build.CORES if os.access(build.PACKAGE, os.W_OK) else cache()
        print(_find_or_build(root, again=True).__file__)
    except (BuildError, ValueError) as error:
        print(f"texp: the C++ core cannot be built: {error}", file=sys.stderr)
        return 1
    if build.setting("TEXP_CUDA") != "0" and not core().with_cuda:
        print(f"texp: without the CUDA kernel: {why_missing('TEXP_CUDA')}", file=sys.stderr)
    return 0


def cache() -> Path:
    """The folder of cores built on first use: `texp` in TORCH_EXTENSIONS_DIR or in torch's default for it."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or torch_internals.extensions_folder()) / "texp"


def _turned_off(variable: str) -> str:
    how = "in the environment turns it off" if os.environ.get(variable) else "left it out when texp was installed"
    return f"{variable}=0 {how}"


def _find_or_build(root: Path | None, *, again: bool = False) -> ModuleType:
    """The core, loaded; built in the folder `root`, unless that is None; `again`: also if that has failed before."""
    wanted = build.setting("TEXP_CUDA")
    if wanted == "0":
        _missing["TEXP_CUDA"] = _turned_off("TEXP_CUDA")
        return _variant(root, False, again)
    try:
        return _variant(root, True, again)
    except BuildError as error:
        if wanted == "1" or isinstance(error, _NotYetError):
            raise
        _missing["TEXP_CUDA"] = str(error)
    return _variant(root, False, again)  # it may exist, or be possible to build, without the kernel


class _NotYetError(BuildError):
    pass


def _variant(root: Path | None, with_cuda: bool, again: bool) -> ModuleType:
    """The core with the CUDA kernel, or without it."""
    name = build.core_name(with_cuda)
    folders = _folders(name)
    if (module := _load_from(folders)) is not None:
        return module
    build.tools(with_cuda)
    if not again:
        _check_failed_before(folders, with_cuda)
    if root is None:
        raise _NotYetError(f"it is not built yet: the first use does it, or `texp build` ({EXPECTED_TIME})")
    return _build(root, name, with_cuda, again)


def _folders(name: str) -> list[Path]:
    """Where a core of that name may be. Unless TEXP_CUDA_ARCHS is set, one for whatever GPUs the installation named
    will do."""
    installed = build.PACKAGE / build.CORES
    others = [] if os.environ.get("TEXP_CUDA_ARCHS") else sorted(installed.glob(f"{glob.escape(name)}_*"))
    return [installed / name, *others, cache() / name]


def _load_from(folders: Iterable[Path]) -> ModuleType | None:
    """The core in one of these folders; None if none can be loaded."""
    for folder in folders:
        # Otherwise it is built again. OSError: the folder may be another user's.
        with contextlib.suppress(ImportError, OSError):
            if (path := folder / build.CORE_FILE).exists():
                return _import(path)
    return None


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return module


def _build(root: Path, name: str, with_cuda: bool, again: bool) -> ModuleType:
    """Builds the core, or waits for another process to build it, and loads it."""
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not torch's FileBaton, which a killed process leaves locked: this lock ends with its process.
        with FileLock(folder / "lock"):
            if (module := _load_from([folder])) is not None:
                return module
            if not again:
                _check_failed_before([folder], with_cuda)
            for leftover in folder.glob(f"{build.SCRATCH}*"):  # of an interrupted build
                shutil.rmtree(leftover, ignore_errors=True)
            parts = f"C++ core{' and the CUDA kernel' if with_cuda else ''}"
            of = f"torch {torch.__version__} and Python {platform.python_version()}"
            print(f"texp: building the {parts} for {of}, once: {EXPECTED_TIME}", file=sys.stderr, flush=True)
            try:
                return _import(build.build(root, with_cuda))
            except CompileError as error:
                why = str(error)
            except ImportError as error:
                why = f"it was built but does not load: {error}"
                build.note_failure(folder, with_cuda, why)
            raise _failure(folder, why)
    except (OSError, NotImplementedError) as error:  # the latter if the file system has no locks
        raise BuildError(
            f"{root} cannot be used ({getattr(error, 'strerror', None) or error}); set TORCH_EXTENSIONS_DIR to a "
            "folder that can be written to"
        ) from None


def _check_failed_before(folders: Iterable[Path], with_cuda: bool) -> None:
    """Raises BuildError if a build in one of these folders has failed with the same compilers."""
    for folder in folders:
        if (why := build.failed_before(folder, with_cuda)) is not None:
            raise _failure(folder, why)


def _failure(folder: Path, why: str) -> BuildError:
    return BuildError(f"{' '.join(why.split())} (all of it: {folder / 'build.log'}; `texp build` tries again)")
