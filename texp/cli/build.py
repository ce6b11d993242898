"""texp build: the C++ core ahead of its first use."""

from texp import native


def build() -> int:
    """Builds the C++ core, with nvcc its CUDA kernel too, ahead of the first use: for container images, say."""
    return native.main()
