#!/usr/bin/env bash
# The C++ core for a machine with another Python and another torch, made on one that has neither, and needs no torch:
# benchmarks/build_for.sh OUT TORCH [PYTHON_INCLUDE]; --help says what these are and what it needs. PYTHON names the
# interpreter that runs it.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit
exec "${PYTHON:-python3}" "$root/benchmarks/build_for.py" "$@"
