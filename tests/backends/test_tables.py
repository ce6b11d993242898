"""The structs that kernels read, as kernels/layout.py describes them, are those of csrc/tables.h."""

import ctypes
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.backends.tables import DTYPES, layout, tensor_entry
from texp import backends

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = (os.environ.get("CXX") or "c++").split()[0]
core = backends.core()

STRUCTS = {
    "TensorEntry": layout.TensorEntry, "RowRequest": layout.RowRequest, "Number": layout.Number,
    "GroupEntry": layout.GroupEntry, "DeviceScale": layout.DeviceScale, "DeviceStep": layout.DeviceStep,
    "Trust": layout.Trust, "Row<double>": layout.Row,
}  # fmt: skip
ENUMS = {
    "Dtype": layout.DTYPES,
    "RowKind": ("step", "idle", "statistic"),
    "Number::In": ("host", "float32", "float64"),
    "Reduction": ("squares", "grad_squares", "grad_max"),
}


def dtypes_of(*kinds: int) -> int:
    """What `tensor_entry` writes for tensors of these dtypes."""
    p, g, b = (torch.zeros(1, dtype=DTYPES[kind]) for kind in kinds)
    return layout.TensorEntry.from_buffer_copy(tensor_entry(p, g, b)).dtypes


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no C++ compiler {COMPILER!r}")
def test_they_are_laid_out_as_the_compiler_does(tmp_path):
    """Sizes and places of all structs and fields; the numbers of all enumerators; dtypes packed into a byte."""
    values = []  # pairs of what C++ calls it and what it is in Python
    for name, struct in STRUCTS.items():
        values.append((f"sizeof({name})", ctypes.sizeof(struct)))
        for field, *_ in struct._fields_:
            values.append((f"offsetof({name}, {field})", getattr(struct, field).offset))
            values.append((f"sizeof({name}::{field})", getattr(struct, field).size))
    for enum, members in ENUMS.items():
        values += [(f"int({enum}::{member})", i) for i, member in enumerate(members)]
    for kinds in product(range(4), repeat=3):
        of = ", ".join(f"Dtype::{layout.DTYPES[kind]}" for kind in kinds)
        values.append((f"Dtypes::of({of}).bits", dtypes_of(*kinds)))
    source = tmp_path / "tables.cpp"
    checks = "".join(f'static_assert({cpp} == {value}, "{value}");\n' for cpp, value in values)
    source.write_text(f'#include <cstddef>\n#include "tables.h"\nnamespace texp {{\n{checks}}}\n')
    subprocess.run([COMPILER, "-std=c++20", f"-I{CSRC}", "-fsyntax-only", str(source)], check=True)


def test_enumerators_have_the_numbers_that_their_order_gives():
    for name in ("RowKind", "Number::In", "Reduction"):
        assert [getattr(layout, member.upper()) for member in ENUMS[name]] == list(range(len(ENUMS[name])))


@pytest.mark.skipif(core is None, reason=f"without the C++ core: {backends.available()['cpu']}")
def test_they_are_laid_out_as_in_the_core():
    """The core that is loaded, which may have been built from other sources."""
    described = {name: layout.offsets(STRUCTS[name]) for name in core.layout()}
    assert described == core.layout()
    assert described.keys() == STRUCTS.keys() - {"Number", "Row<double>"}
