#!/usr/bin/env bash
# The rehearsal and the Triton tests with other versions than those that are installed.
#
#   benchmarks/compile_on.sh [VERSION…]     of triton; default: 3.6.0, the oldest that is supported
#   benchmarks/compile_on.sh --with 'torch==2.11.0 triton==3.6.0 transformers==5.17.0'
#
# A triton is installed beside the environment, without what it depends on, and stands in front of
# its own: torch stays as it is, since its CPU build has no triton of its own. With --with an
# environment of its own is made, from whichever torch pip finds (for CUDA: some gigabytes), and
# PYTHON says of which Python. What was installed once is used again. Compiling needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
tests=(tests/rehearsal tests/cuda tests/kernels/test_triton.py tests/kernels/test_first_layer.py
    tests/kernels/test_second_layer.py)
# Bodies of tests/cuda run on stand-ins here.
chosen="rehears or triton or compile or cuda"

if [ "${1:-}" = --with ]; then
    read -r -a asked <<< "${2:?compile_on.sh: --with needs what to install}"
    place=${TMPDIR:-/tmp}/$(printf '%s-' "${asked[@]}" | tr -c 'a-zA-Z0-9.-' '-')environment
    if [ ! -e "$place/installed" ]; then
        "$python" -m venv "$place"
        "$place/bin/python" -m pip install -q "${asked[@]}" '.[test]'
        touch "$place/installed"
    fi
    "$place/bin/python" -c 'import sys, torch, transformers, triton
print("== Python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__,
      "transformers", transformers.__version__)'
    "$place/bin/python" -m pytest -q -p no:cacheprovider "${tests[@]}" -k "$chosen"
    exit
fi

for version in "${@:-3.6.0}"; do
    place=${TMPDIR:-/tmp}/triton-$version
    [ -d "$place/triton" ] || "$python" -m pip install -q --no-deps --target "$place" "triton==$version"
    echo "== triton $version"
    run() { PYTHONPATH="$place:$PYTHONPATH" "$@"; }
    found=$(run "$python" -c 'import triton; print(triton.__version__)')
    [ "$found" = "$version" ] || { echo "compile_on.sh: triton is $found, not $version" >&2; exit 1; }
    run "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" -k "$chosen"
done
