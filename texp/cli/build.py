"""texp build: the C++ core ahead of its first use."""

from texp import native


def build() -> int:
    """Builds the C++ core, and with nvcc its CUDA kernel, ahead of the first use, e.g. for a container image."""
    return native.main()
