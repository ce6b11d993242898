"""texp info: versions and backends."""

import platform

import torch
from rich.table import Table

from texp import __version__, backends, native
from texp.cli.common import make_console


def info() -> None:
    """Shows versions, which backends are available or why they are not, and which are the defaults."""
    table = Table(show_header=False)
    table.add_row("texp", __version__)
    table.add_row("torch", torch.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, reason in backends.available().items():
        table.add_row(f"backend {name}", reason)
    core = native.core()
    table.add_row("C++ core", "none" if core is None else core.__file__)
    for device, where in (("cpu", "the CPU"), ("cuda", "GPUs")):
        table.add_row(f"default on {where}", backends.default_for(device))
    make_console().print(table)
