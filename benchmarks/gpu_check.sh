#!/usr/bin/env bash
# All that needs a GPU, in less than eight minutes: benchmarks/gpu_check.sh OUT
#
# Builds texp in place with its CUDA kernel, runs the tests marked gpu, compute-sanitizer and the benchmark, and leaves
# summary.json, step_time.csv, step_time.png and log.txt in the folder OUT. It installs nothing: what is not there is
# called missing, and is no failure. Fails if a stage does. PYTHON names the interpreter. TEXP_PREBUILT names a core that
# build_for.sh has made elsewhere, to be used instead of building one; TEXP_CUDA_ARCHS must be as it was there.
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu_check.sh OUT" >&2
  exit 2
fi
prebuilt=${TEXP_PREBUILT:+$(realpath -m -- "$TEXP_PREBUILT")}  # before the folder changes
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD TEXP_NATIVE=1 TEXP_CUDA=1
unset TRITON_INTERPRET
TRITON_CACHE_DIR=$(mktemp -d) && export TRITON_CACHE_DIR && trap 'rm -rf "$TRITON_CACHE_DIR"' EXIT || exit 2
log=$out/log.txt
rm -f "$out"/{summary.json,step_time.csv,step_time.png,stages.txt}
: >"$log"

# Puts the core of TEXP_PREBUILT where texp looks for it. Its folder still says what it was made for and from, so that
# the results are never those of other sources.
install='
import os, shutil, sys
from pathlib import Path
from texp import native
from texp.native import build
given = Path(sys.argv[1])
if not given.is_file():
    sys.exit("there is no such file")
if given.name != build.CORE_FILE:
    sys.exit(f"it is for another Python: for this one it would be called {build.CORE_FILE}")
name = build.core_name(True)
if given.parent.name.rpartition("-")[2] != name.rpartition("-")[2]:
    sys.exit(f"it is of other sources, for another torch or other TEXP_CUDA_ARCHS: its folder is not called {name}")
try:
    native._import(given)
except ImportError as error:
    sys.exit(f"it does not load: {error}")
folder = build.PACKAGE / build.CORES / name
folder.mkdir(parents=True, exist_ok=True)
copy = folder / f"{build.SCRATCH}{os.getpid()}"
shutil.copy(given, copy)
copy.replace(folder / build.CORE_FILE)
print(name)
'
if [ -n "$prebuilt" ] && ! "$python" -c "$install" "$prebuilt" >>"$log" 2>&1; then
  echo "gpu_check.sh cannot use $prebuilt: $(tail -n 1 "$log")" >&2
  exit 2
fi

if ! "$python" -c 'import torch; torch.zeros(1, device="cuda")' >>"$log" 2>&1; then
  echo "gpu_check.sh needs a GPU that torch can use, but $python says: $(tail -n 1 "$log")" >&2
  exit 2
fi

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }

# note NAME RESULT SECONDS SAYS
note() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$(tr '\t' ' ' <<<"$4")" >>"$out/stages.txt"; }

missing() {
  echo "$1: missing, $2"
  note "$1" missing 0 "$2"
}

# stage NAME LIMIT COMMAND…: the limits add up to less than eight minutes.
stage() {
  local name=$1 limit=$2 start=$SECONDS lines status
  shift 2
  echo "$name …"
  echo "=== $name: $*" >>"$log"
  lines=$(wc -l <"$log")
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  if [ "$status" -eq 0 ]; then
    note "$name" ok $((SECONDS - start)) "$(tail -n 1 "$log" | cut -c 1-80)"
  else
    tail -n "+$((lines + 1))" "$log" | tail -n 40
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
      note "$name" failed $((SECONDS - start)) "not done after $limit s"
    else
      note "$name" failed $((SECONDS - start)) "exit status $status"
    fi
  fi
}

# Some steps of every dtype, of sizes that fill no tile and no vector, at addresses that are not aligned; the last one
# is of a scaled loss, so that its rows are computed on the device.
steps='
import sys, torch, texp
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for scale_invariant in (False, True):
        whole = [torch.randn(n + 1, device="cuda", dtype=dtype) for n in (1, 3, 1000, 4096, 10001)]
        params = [torch.nn.Parameter(x[i % 2 :]) for i, x in enumerate(whole)]
        arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "scale_invariant": scale_invariant}
        optimizer = texp.SGD(params, backend=sys.argv[1], **arguments)
        for t in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            if t == 2:
                optimizer.grad_scale, optimizer.found_inf = (torch.full((), x, device="cuda") for x in (2.0, 0.0))
            optimizer.step()
        assert all(p.isfinite().all() for p in params)
torch.cuda.synchronize()
'

info='
import texp
from texp import backends
print(texp.__file__, backends.available())
assert backends.core().with_cuda, "the core has no CUDA kernel"
devices, error = backends.core().cuda_devices()
assert devices > 0, error
print(devices, "CUDA device(s)")
'

if [ -n "$prebuilt" ]; then
  echo "build: $prebuilt"
  note build prebuilt 0 "$(basename "$(dirname "$prebuilt")")"
elif has setuptools; then
  stage build 95 "$python" setup.py -q build_ext --inplace
else
  missing build "there is no setuptools"
fi
stage info 15 "$python" -c "$info"
if has typer rich; then
  "$python" -m texp info | tee -a "$log"
fi

# Of the long grids of runs a few; all of them, with `pytest -m gpu`, would take many minutes. No file that needs more
# than torch, pytest and hypothesis. In several processes where there is pytest-xdist, but without any other plugin that
# happens to be installed: their warnings would end the run, and hypothesis needs none.
grids='test_the_whole_grid or test_outside_the_range or test_250_steps'
few="not ($grids) or (cosine and 0.3 and not reference and not high and not fixed)"
if has pytest hypothesis; then
  others='texp[.](bench|cli)|test_package|from benchmarks|texp[.](param_groups|audit)'
  mapfile -t files < <(find tests -name 'test_*.py' -not -path 'tests/integration/*' | sort | xargs grep -LE "$others")
  export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
  options=(-q -p no:cacheprovider)
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
  if [ "$cores" -gt 1 ] && has xdist; then
    options+=(-p xdist.plugin -n $((cores < 10 ? cores : 10)))
  fi
  stage "tests marked gpu" 120 "$python" -m pytest "${options[@]}" -m gpu -k "$few" "${files[@]}"
else
  missing "tests marked gpu" "they need pytest and hypothesis"
fi

declare -A reasons
while IFS=$'\t' read -r backend reason; do
  reasons[$backend]=$reason
done < <("$python" -c 'from texp import backends; [print(*x, sep="\t") for x in backends.available().items()]')

# check TOOL BACKEND LIMIT
check() {
  if [ "${reasons[$2]:-}" != ok ]; then
    missing "$1, $2" "${reasons[$2]:-texp cannot be imported}"
  elif ! command -v compute-sanitizer >/dev/null; then
    missing "$1, $2" "there is no compute-sanitizer"
  else
    stage "$1, $2" "$3" compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -c "$steps" "$2"
  fi
}
check memcheck cuda 50
check memcheck triton 50
check racecheck cuda 45

bench=("$python" benchmarks/step_time.py --device cuda --seconds 0.4 --csv "$out/step_time.csv")
if ! has typer rich; then
  missing benchmark "it needs typer and rich"
elif has matplotlib; then
  stage benchmark 90 "${bench[@]}" --plot "$out/step_time.png"
else
  stage benchmark 90 "${bench[@]}"
  missing plot "it needs matplotlib"
fi

"$python" - "$out" <<'END'
import json, subprocess, sys
from pathlib import Path

import torch


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


out = Path(sys.argv[1])
stages = [dict(zip(("stage", "result", "seconds", "says"), line.split("\t")))
          for line in (out / "stages.txt").read_text().splitlines()]
for stage in stages:
    stage["seconds"] = int(stage["seconds"])
(out / "stages.txt").unlink()
summary = {
    "gpu": torch.cuda.get_device_name(),
    "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "torch": torch.__version__,
    "cuda_of_torch": torch.version.cuda,
    "nvcc": (said("nvcc", "--version") or "").rpartition("\n")[2] or None,
    "python": sys.version.split()[0],
    "commit": said("git", "rev-parse", "HEAD"),
    "stages": stages,
}
(out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
print(*(f"{key}: {value}" for key, value in summary.items() if key != "stages"), sep="\n")
for stage in stages:
    print(f"{stage['stage']:20} {stage['result']:8} {stage['seconds']:4} s  {stage['says']}")
sys.exit(any(stage["result"] == "failed" for stage in stages))
END
