#!/usr/bin/env bash
# torch 2.12.0 and 2.13.0 (headers of the wheels), g++ with -std=c++20, Python's headers.
# Guess: ATen/NativeFunctions.h, the native functions of ATen, declares at::zeros_like, so that an extension which includes
#   it compiles against every torch.
# Seen: it declares at::native::zeros_like alone, in both. With torch/csrc/autograd/python_variable.h beside it the
#   extension compiles against 2.13.0, whose header happens to bring all operators along, and not against 2.12.0.
#   ATen/ops/zeros_like.h serves both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
echo 'at::Tensor f(const at::Tensor& x) { return at::zeros_like(x); }' >use.h
cat >native.cpp <<'END'
#include <ATen/core/Tensor.h>
#include <ATen/NativeFunctions.h>
#include "use.h"
END
cat >python.cpp <<'END'
#include <ATen/NativeFunctions.h>
#include <torch/csrc/autograd/python_variable.h>
#include "use.h"
END
cat >ops.cpp <<'END'
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>
#include "use.h"
END
declare -A seen
for version in 2.12.0 2.13.0; do
  "$python" -m pip download -q --no-deps --only-binary=:all: -d "$version" "torch==$version"
  "$python" -m zipfile -e "$version"/*.whl "$version" && rm "$version"/*.whl
  for file in native python ops; do
    seen[$file$version]=compiles
    g++ -std=c++20 -fsyntax-only -I"$version/torch/include" -I"$include" "$file.cpp" 2>"$file.err" ||
      seen[$file$version]=$(grep -m 1 -o 'error: .*' "$file.err")
    echo "torch $version, $file.cpp: ${seen[$file$version]}"
  done
  rm -r "$version"
done
[[ ${seen[native2.12.0]} == *zeros_like* && ${seen[native2.13.0]} == *zeros_like* ]]
[[ ${seen[python2.12.0]} == *zeros_like* && ${seen[python2.13.0]} == compiles ]]
[[ ${seen[ops2.12.0]} == compiles && ${seen[ops2.13.0]} == compiles ]]
