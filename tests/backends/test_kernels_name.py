"""The folder kernels/ is texp.kernels, and in no one's way as `kernels`, which is Hugging Face's package on PyPI.

In a checkout the folder is on the path, before any installed package. transformers looks for the package whenever it
makes a model; how, has changed, and every way must find the package if it is there, and nothing if it is not.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import texp

ROOT = Path(__file__).parents[2]

# What transformers does until it knows whether the package is there, by the version that came to do it.
PROBES = {
    "4.52": """
def available():
    if find_spec("kernels") is None:
        return False
    try:
        return bool(metadata.version("kernels"))
    except metadata.PackageNotFoundError:
        return False
""",
    "5.0": """
def available():
    if find_spec("kernels") is None:
        return False
    try:
        version = metadata.version(metadata.packages_distributions()["kernels"][0])
    except (metadata.PackageNotFoundError, KeyError):
        version = getattr(import_module("kernels"), "__version__", "N/A")
    return int(version.split(".")[0]) >= 9
""",
    "5.10": """
def available():
    if find_spec("kernels") is None:
        return False
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        package = import_module("kernels")
        version = getattr(package, "__version__", "N/A")
        if version == "N/A" and getattr(package, "__file__", None) is None:
            return False
    return version != "N/A" and int(version.split(".")[0]) >= 9
""",
}

START = """
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
"""

# What it does then; before 5.16 whatever the answer was.
END = """
print(available())
try:
    from kernels import get_kernel
except ImportError as error:
    print(type(error).__name__)
else:
    import kernels.layer
    print(kernels.__file__, kernels.layer.__file__, find_spec("kernels").origin, sep="\\n")
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """As far as it matters here: a folder that holds kernels/."""
    shutil.copytree(ROOT / "kernels", tmp_path / "checkout" / "kernels")
    return tmp_path / "checkout"


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder in which a package like Hugging Face's is installed."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("from .layer import get_kernel")
    (site / "kernels" / "layer.py").write_text("def get_kernel(): ...")
    (site / "kernels-9.1.dist-info").mkdir()
    (site / "kernels-9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.1\n")
    (site / "kernels-9.1.dist-info" / "top_level.txt").write_text("kernels\n")
    return site


def run(cwd: Path, *arguments: str, path: tuple[Path, ...] = ()) -> str:
    """What Python says, to which nothing is installed but what is in `path`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-S", "-W", "error", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("there", [False, True], ids=["not installed", "installed"])
@pytest.mark.parametrize("way", ["-c", "script"])
@pytest.mark.parametrize("version", PROBES)
def test_transformers_finds_the_package_that_is_installed_or_none(checkout, installed, version, way, there):
    code = START + PROBES[version] + END
    (checkout / "script.py").write_text(code)
    arguments = ["-c", code] if way == "-c" else [str(checkout / "script.py")]
    cwd = checkout if way == "-c" else checkout.parent
    package = installed / "kernels"
    found = ["True", str(package / "__init__.py"), str(package / "layer.py"), str(package / "__init__.py")]
    said = run(cwd, *arguments, path=(installed,) if there else ())
    assert said.splitlines() == (found if there else ["False", "ImportError"])


@pytest.mark.parametrize("there", [False, True], ids=["not installed", "installed"])
def test_two_checkouts_do_not_hand_over_to_each_other(tmp_path, checkout, installed, there):
    other = shutil.copytree(checkout, tmp_path / "other")
    code = "import kernels; print(hasattr(kernels, 'get_kernel'))"
    assert run(checkout, "-c", code, path=(other, *[installed] * there)) == f"{there}\n"


def test_its_modules_are_not_imported_as_kernels(checkout):
    """There would be two of each."""
    code = "import sys\ntry: import kernels.step\nexcept ImportError as error: print(error)"
    assert run(checkout, "-c", code) == "No module named 'kernels.step'\n"


def test_a_folder_without_code_is_no_package(tmp_path, checkout):
    """Some other project's, further on in the path."""
    (tmp_path / "project" / "kernels").mkdir(parents=True)
    code = START + PROBES["5.0"] + "print(available())"
    assert run(checkout, "-c", code, path=(tmp_path / "project",)) == "False\n"


def test_a_package_that_cannot_be_imported_says_why(checkout, installed):
    """It is not passed over, and can be tried again."""
    (installed / "kernels" / "layer.py").write_text("import something_that_is_missing")
    code = (
        "import sys\nfor _ in range(2):\n    try: import kernels\n"
        "    except ImportError as error: print(error.name)\nprint('kernels' in sys.modules)"
    )
    assert run(checkout, "-c", code, path=(installed,)).splitlines() == ["something_that_is_missing"] * 2 + ["False"]


def python(code: str, cwd: Path = ROOT, **changes: str) -> str:
    """With all that is installed here."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | changes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_are_imported_in_one_process(installed):
    if (reason := texp.backends.available()["triton"]) != "ok":
        pytest.skip(reason)
    code = (
        "import sys, torch, kernels, texp; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); "
        "texp.SGD([p], lr=0.5, backend='triton').step(); "
        "print(kernels.__file__, sys.modules['texp.kernels'].__file__, p.sum().item(), sep='\\n')"
    )
    said = python(code, PYTHONPATH=str(installed), TRITON_INTERPRET="1").splitlines()
    assert said == [str(installed / "kernels" / "__init__.py"), str(ROOT / "kernels" / "__init__.py"), "1.5"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_of_transformers(tmp_path):
    """The same here as in another folder: with Hugging Face's kernels where they are installed, else without."""
    code = """if True:
        import sys, torch, transformers
        from transformers.utils import is_kernels_available
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
        print(tuple(model(torch.arange(4)[None]).logits.shape))
        print(is_kernels_available() and sys.modules["kernels"].__file__)
    """
    here, elsewhere = python(code), python(code, tmp_path)
    assert here.startswith("(1, 4, 8)")
    assert here == elsewhere
