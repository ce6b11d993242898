"""Packages and the C++ core; everything else is in pyproject.toml.

TEXP_NATIVE=auto (default) builds the core where torch and a compiler are found and otherwise installs the package
without it; 1 fails where it cannot be built; 0 leaves it out.
"""

import os
import shutil
import sys

from setuptools import setup

FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off"]
if sys.platform == "linux":
    FLAGS += ["-fopenmp", "-fno-plt"]  # torch's threads are OpenMP's


def native() -> dict:
    """The arguments of setup() that build texp._C, or none."""
    wanted = os.environ.get("TEXP_NATIVE", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"TEXP_NATIVE must be auto, 1 or 0, got {wanted!r}")
    if wanted == "0":
        return {}
    compiler = os.environ.get("CXX", "c++").split()[0]
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return without(wanted, "torch is not there at build time (pip's --no-build-isolation lets it be)")
    if shutil.which(compiler) is None:
        return without(wanted, f"there is no C++ compiler {compiler!r}")

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                without(wanted, f"compiling it failed: {error}")
                self.extensions = []

    sanitize = os.environ.get("TEXP_SANITIZE", "")
    flags = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g"] if sanitize else []
    core = CppExtension(
        "texp._C",
        ["csrc/bindings.cpp", "csrc/step_cpu.cpp"],
        depends=[f"csrc/{header}.h" for header in ("plan", "row", "scale", "step", "tiles")],
        extra_compile_args=FLAGS + flags,
        extra_link_args=flags[:1] + (["-fopenmp"] if "-fopenmp" in FLAGS else []),
    )
    return {"ext_modules": [core], "cmdclass": {"build_ext": Build}}


def without(wanted: str, reason: str) -> dict:
    if wanted == "1":
        raise SystemExit(f"TEXP_NATIVE=1 asks for the C++ core, but {reason}")
    print(f"texp: installing without the C++ core: {reason}", file=sys.stderr)
    return {}


# The Triton kernels live in the folder kernels/ and are imported as texp.kernels: there is another `kernels` on
# PyPI, so that name is never installed at the top level.
setup(packages=["texp", "texp.kernels"], package_dir={"texp.kernels": "kernels"}, **native())
