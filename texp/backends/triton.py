"""Tensors on GPUs, by the Triton kernels (the folder kernels/), which take no compiler but that of the C++ core."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from texp.backends import reference
from texp.backends.base import OK, Backend, reason_of_core
from texp.backends.reference import Entry


class Triton(Backend):
    name = "triton"
    advances = True

    def device_types(self) -> tuple[str, ...]:
        return ("cpu",) if self.reason() == OK and _kernels()[0].INTERPRETED else ("cuda",)

    def reason(self) -> str:
        return why if (why := reason_of_core()) != OK else _kernels()[1]

    def is_default(self) -> bool:
        """Not Triton's interpreter, which is for tests."""
        return not _kernels()[0].INTERPRETED

    def kernel(self) -> Any:
        return _kernels()[0].Launcher()

    def reduce(self, entries: Iterable[Entry], reduction: str = "squares") -> Tensor:
        launch = _kernels()[0]
        dense = [[x if x is None else x.contiguous() for x in entry[:2]] for entry in entries]
        if not dense:
            return reference.reduce(())
        table = (launch.layout.TensorEntry * len(dense))()
        for row, (p, g) in zip(table, dense, strict=True):
            row.p, row.g, row.numel = p.data_ptr(), None if g is None else g.data_ptr(), p.numel()
            of_p, of_g = (
                launch.layout.DTYPES.index(str(x.dtype).removeprefix("torch.")) for x in (p, p if g is None else g)
            )
            row.dtypes = of_p | of_g << 2 | of_p << 4
        number = reference.REDUCTIONS.index(reduction)
        return launch.Launcher().reduce(str(dense[0][0].device), memoryview(table).cast("B"), number)


def missing() -> str:
    """Why there is no Triton that the kernels can be compiled with; "" if there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, AttributeError) as error:  # any folder called triton passes for a package
        return f"Triton is installed but does not load: {error}"
    too_old = tuple(map(int, version.split(".")[:2])) < (3, 6)
    return f"Triton {version} is too old: its kernels need 3.6 or newer" if too_old else ""


# Imported on demand: importing Triton takes longer than everything else here.
@functools.cache
def _kernels() -> tuple[ModuleType | None, str]:
    """texp.kernels.launch, or None and the reason."""
    if why := missing():
        return None, why
    try:
        kernels = import_kernels()
    except ImportError as error:
        return None, f"Triton is installed but does not load: {error}"
    if not kernels.INTERPRETED and not torch.cuda.is_available():
        return None, "there is no GPU that torch can use; with TRITON_INTERPRET=1 it steps tensors on the CPU, slowly"
    return kernels, OK


def import_kernels(module: str = "launch") -> ModuleType:
    """A module of texp.kernels, from the package, or in a checkout from the folder beside it."""
    here = Path(__file__).parent.parent
    checkout = Path(__file__).resolve().parent.parent.parent  # to whose package there may be a link
    if "texp.kernels" not in sys.modules:
        folders = [folder for folder in (here / "kernels", checkout / "kernels") if (folder / "launch.py").exists()]
        if not folders:
            raise ImportError("texp.kernels is missing; reinstall texp")
        spec = importlib.util.spec_from_file_location(
            "texp.kernels", folders[0] / "__init__.py", submodule_search_locations=[str(folders[0])]
        )
        sys.modules["texp.kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["texp.kernels"])
    return importlib.import_module(f"texp.kernels.{module}")
