from setuptools import setup

# The Triton kernels live in the folder kernels/ and are imported as texp.kernels: there is another `kernels` on
# PyPI, so that name is never installed at the top level.
setup(packages=["texp", "texp.kernels"], package_dir={"texp.kernels": "kernels"})
