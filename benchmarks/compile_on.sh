#!/usr/bin/env bash
# The rehearsal and the Triton tests with other versions of triton than the one that is installed.
#
#   benchmarks/compile_on.sh [VERSION…]     default: 3.6.0, the oldest that is supported
#
# Each version is installed beside the environment, without what it depends on, and stands in front of
# its own. Compiling needs no GPU. torch stays as it is: its CPU build has no triton of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
for version in "${@:-3.6.0}"; do
    place=${TMPDIR:-/tmp}/triton-$version
    [ -d "$place/triton" ] || "$python" -m pip install -q --no-deps --target "$place" "triton==$version"
    echo "== triton $version"
    run() { PYTHONPATH="$place:$PYTHONPATH" "$@"; }
    found=$(run "$python" -c 'import triton; print(triton.__version__)')
    [ "$found" = "$version" ] || { echo "compile_on.sh: triton is $found, not $version" >&2; exit 1; }
    run "$python" -m pytest -q -p no:cacheprovider tests/rehearsal tests/kernels/test_triton.py \
        tests/kernels/test_first_layer.py tests/kernels/test_second_layer.py -k "rehears or triton or compile"
done
