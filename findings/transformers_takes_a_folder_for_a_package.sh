#!/usr/bin/env bash
# transformers 5.8.1, with torch 2.13.0.
# Guess: whether an optional package is there is decided by its distribution. A folder without Python files that is named
#   like one (kernels, here) changes nothing.
# Seen: where the current folder holds an empty folder `kernels`, which Python takes for a namespace package,
#   transformers.utils.is_kernels_available() holds Hugging Face's package `kernels` for installed, in the version "N/A",
#   and instead of answering raises InvalidVersion.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" "transformers==5.8.1"
mkdir -p without with/kernels
declare -A seen
for folder in without with; do
  seen[$folder]=$(cd "$folder" && ../env/bin/python -c "
from transformers.utils import is_kernels_available
print(is_kernels_available())" 2>&1 | tail -n 1) || true
  echo "$folder a folder named kernels: ${seen[$folder]}"
done
[[ ${seen[without]} == False ]]
[[ ${seen[with]} == *InvalidVersion*N/A* ]]
