"""Imports run one way: from the commands down to the theory, and never in a circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A module may import what stands below its room, and its own room; not what stands beside it.
LAYERS = [
    ("texp.theory", "texp.torch_internals"),
    ("texp.native", "texp.kernels", "texp.schedules"),
    ("texp.backends",),
    ("texp.step",),
    ("texp.optimizer", "texp.invariance"),
    ("texp.sgd", "texp.lars", "texp.integrations"),
    ("texp.clipping",),
    ("texp",),  # the package itself: what users see
    ("texp.bench",),
    ("texp.cli",),
    ("texp.__main__",),
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def sources() -> dict[str, Path]:
    """Every module of texp and its file."""
    found = {}
    for package, folder in (("texp", ROOT / "texp"), ("texp.kernels", ROOT / "kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = sources()


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Lines and modules, of imports within functions too. Of texp, the module that is meant and not its packages."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in MODULES else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, x.value) for x in node.args if isinstance(x, ast.Constant))


def own(module: str) -> list[tuple[int, str]]:
    """What it imports of texp."""
    return [(line, name) for line, name in imports(module) if name.partition(".")[0] == "texp"]


def room(module: str) -> str:
    """As LAYERS names it."""
    return ".".join(module.split(".")[:2])


def test_every_module_has_its_layer():
    assert {room(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in own(module)
        if room(name) != room(module) and LEVEL[room(name)] >= LEVEL[room(module)]
    ]
    assert not wrong


def test_no_circles():
    graph = {module: {name for _, name in own(module)} for module in MODULES}
    assert set().union(*graph.values()) <= set(MODULES)
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)  # raises for a circle


def test_the_bottom_is_plain():
    """theory.py can be read with nothing but Python; build.py is run by setup.py, where there is no torch."""
    assert {name for _, name in imports("texp.theory")} == {"math", "collections.abc", "typing"}
    assert not own("texp.native.build")
