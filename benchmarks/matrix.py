"""Whether the C++ core can be built for every torch: make matrix, or python -m benchmarks.matrix VERSION…

Each is compiled and linked with the flags of an installation, for the interpreter that runs this, and asked whether
it would load. Of torch only the headers and libraries of its wheels are needed, which stay in the cache. Without the
CUDA kernel, which needs no torch.
"""

import argparse
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.build_for import CACHE, BuildError, Python, make, torch_of

_downloading = threading.Lock()  # one wheel at a time, which fills the line and takes up to 2 GB while it is unpacked


def outcome(given: str, python: Python, cache: Path) -> tuple[str, bool]:
    """What is printed of this torch, and whether the core can be built for it."""
    start, why = time.monotonic(), ""
    try:
        with _downloading:
            torch = torch_of(given, python, cache, lambda what: print(what, file=sys.stderr, flush=True))
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="texp-") as folder:
            make(Path(folder), torch, python, with_cuda=False, jobs=1)
    except (BuildError, OSError) as error:
        why = " ".join(str(error).split())
    return f"torch {given:8} {time.monotonic() - start:4.0f} s  {why or 'ok'}", not why


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.matrix")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER")
    parser.add_argument("torch", nargs="+", metavar="TORCH", help="a version, or a folder as of build_for.sh")
    given = parser.parse_args(arguments)
    try:
        python = Python.of(Path(sysconfig.get_path("include")))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    all_ok = True
    with ThreadPoolExecutor(2) as pool:
        for line, ok in pool.map(partial(outcome, python=python, cache=given.cache), given.torch):
            print(line, flush=True)
            all_ok &= ok
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
