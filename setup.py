"""Packages and the C++ core; everything else is in pyproject.toml.

TEXP_NATIVE=auto (default) builds the core where torch and a compiler are found and otherwise installs the package
without it; 1 fails where it cannot be built; 0 leaves it out. Why there is no core is written to texp/_build.py, for
`texp info` and errors: pip shows nothing of a build that ends well.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off"]
if sys.platform == "linux":
    FLAGS += ["-fopenmp", "-fno-plt"]  # torch's threads are OpenMP's

WANTED = os.environ.get("TEXP_NATIVE") or "auto"
if WANTED not in ("auto", "0", "1"):
    raise SystemExit(f"TEXP_NATIVE must be auto, 1 or 0, got {WANTED!r}")
if not os.environ.get("CXX", "").split():
    os.environ.pop("CXX", None)  # torch would look for a compiler without a name


def obstacle() -> str:
    """Why the core is not to be built, as far as that is known before compiling; "" if it is."""
    if WANTED == "0":
        return "TEXP_NATIVE=0 left it out"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except (ImportError, OSError) as error:
        return f"the build could not import torch ({error}), which pip hides from it without --no-build-isolation"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "" if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"


def announce(reason: str) -> None:
    """That the core is left out for `reason`; ends the build if it was asked for."""
    if WANTED == "1":
        raise SystemExit(f"TEXP_NATIVE=1 asks for the C++ core, but {reason}")
    if WANTED == "auto":
        print(f"texp: installing without the C++ core: {reason}", file=sys.stderr)


def record(package: Path, reason: str) -> None:
    """Makes the folder `package` say why it has no core ("": it has one), whatever an earlier build left there."""
    note = package / "_build.py"
    note.unlink(missing_ok=True)
    if reason:
        (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        note.write_text(f'"""Written by setup.py."""\n\nNO_CORE = {reason!r}\n', encoding="utf-8")


REASON = obstacle()


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        record(Path(self.get_package_dir("texp") if self.editable_mode else f"{self.build_lib}/texp"), REASON)


def native() -> tuple:
    """texp._C, and the command that builds it."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            packages, reason = [Path(self.build_lib, "texp")], ""
            if self.inplace:
                packages.append(Path(self.get_finalized_command("build_py").get_package_dir("texp")))
            self.force = True  # else a core built with another torch, or other flags, passes for this one
            try:
                super().run()
            except Exception as error:
                reason, self.extensions = f"compiling it failed: {' '.join(str(error).split()).rstrip('.')}", []
            for package in filter(Path.is_dir, packages):
                record(package, reason)
            if reason:
                announce(reason)

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
if REASON:
    announce(REASON)
else:
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
