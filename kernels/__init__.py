"""Triton kernels of texp, imported as `texp.kernels`."""

if __name__ != "texp.kernels":
    raise ImportError(
        f"this folder holds texp's Triton kernels and is imported as texp.kernels, not as {__name__}: "
        "install the package and leave its source folder off sys.path"
    )
