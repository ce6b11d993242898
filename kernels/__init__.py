"""Triton kernels of texp, imported as `texp.kernels`.

From a checkout's root Python finds this folder as `kernels`, too, before Hugging Face's package of that name, which
transformers looks for in every process. So under that name it hands over to the package that is next on the path.
"""

if __name__ == "kernels":
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    # The other folders of the path, among which may be further checkouts.
    path = [folder for folder in sys.path if not Path(folder, "kernels", "step.py").exists()]
    spec = PathFinder.find_spec("kernels", path)
    if spec is not None and spec.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels"])
    else:
        # As good as absent. No ImportError: where there is a folder but no distribution, transformers 5 imports it to
        # ask for its version and catches nothing, nor can versions before 5.10 compare with one that is missing.
        __version__ = "0"
        __path__ = []
