#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: correctness, CUDA graphs,
# kernels, the fit step, decoding, sanitizer and profiler. The most important comes first.
#
#   benchmarks/gpu.sh [OUT]            OUT: folder for the results, default results/gpu-<device>
#   benchmarks/gpu.sh --dry-run [OUT]  on a machine without a GPU: every command at a tiny size
#
# Each step has a time limit, a file OUT/<step>.txt with its output, and most a <step>.json. A step
# that fails does not stop the others; OUT/summary.txt lists them, and the exit code is 1.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
python=${PYTHON:-python3}
# From the source tree, whether or not prototok is installed.
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ $dry ]; then
    device=cpu
    export TRITON_INTERPRET=1
else
    device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) ||
        { echo "gpu.sh: torch sees no CUDA device; --dry-run tries the commands without one" >&2; exit 2; }
    device=$(tr ' A-Z' '-a-z' <<<"$device")
fi
out=${1:-$root/benchmarks/results/gpu-$device}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"
budget=${BUDGET:-570} # seconds for all steps together
: >"$out/summary.txt"
failed=0

# step NAME LIMIT COMMAND…: at most LIMIT seconds, or what is left of the budget.
step() {
    local name=$1 limit=$2 code started=$SECONDS
    shift 2
    local left=$((budget - SECONDS))
    if [ "$left" -lt 5 ]; then
        say "$name: not run, no time left"
        failed=1
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo "== $name: $*" >&2
    timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
    code=$?
    case $code in
    0) say "$name: ok, $((SECONDS - started)) s" ;;
    124 | 137) say "$name: stopped after $limit s" && failed=1 ;;
    *) say "$name: failed with exit code $code, see $name.txt" && failed=1 ;;
    esac
}
say() { echo "$*" | tee -a "$out/summary.txt" >&2; }
# have TOOL STEP: whether the tool is there; a step without its tool is named and is no failure.
have() {
    command -v "$1" >/dev/null && return
    say "$2: not run, $1 is not installed"
    return 1
}
# One value on a GPU, another where only the command is tried.
either() { if [ $dry ]; then echo "$2"; else echo "$1"; fi; }

# The C++ kernels are built where they are missing: the tests compare with them.
"$python" -c 'import prototok_kernels._cpu' 2>/dev/null ||
    step build 60 "$python" setup.py -q build_ext --inplace
step env 60 "$python" -m prototok env
[ $dry ] || { have nvidia-smi driver && step driver 10 nvidia-smi; }

pytest=("$python" -m pytest -q -p no:cacheprovider)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8) # what takes long is compiling
step graphs 90 "${pytest[@]}" tests/fitting/engine/test_static_buffers.py tests/fitting/engine/test_buckets.py
step tests 150 "${pytest[@]}" "${parallel[@]}" $(either "tests/kernels tests/fitting/engine tests/model/families tests/autoregressive" \
    "tests/fitting/test_recipe.py tests/fitting/engine/test_rows.py")

for preset in pythia-160m llama-3.2-1b; do
    step "fit-step-$preset" 100 "$python" benchmarks/fit_step.py \
        --preset "$(either $preset smoke)" \
        $(either "--rounds 5" "--rounds 1 --seconds 0.1") --flat-steps 0 --out "$out/fit-step-$preset.json"
done
step kernels 90 "${pytest[@]}" benchmarks/kernels \
    $(either "--benchmark-only --benchmark-json=$out/kernels.json" "--benchmark-disable --collect-only")

names=$("$python" benchmarks/launch_kernels.py --names)
launch=("$python" benchmarks/launch_kernels.py)
[ $dry ] && launch+=(--device cpu)
# Only our kernels, where this version of the tool can choose: the libraries' take minutes.
ours=()
if command -v compute-sanitizer >/dev/null && compute-sanitizer --help 2>&1 | grep -q -- '--kernel-name '; then
    for name in $names; do ours+=(--kernel-name "kernel_substring=$name"); done
fi
for tool in memcheck racecheck; do
    if [ $dry ]; then
        step $tool 60 "${launch[@]}" $([ $tool = memcheck ] || echo --names) # once is enough
    elif have compute-sanitizer $tool; then
        # Every allocation by itself, or a write past the end of one stays within torch's pool.
        step $tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
            "${ours[@]}" --error-exitcode 9 "${launch[@]}"
    fi
done

step throughput 90 "$python" benchmarks/throughput.py \
    --shape $(either "llama-3.2-1b --lengths 128,256" "smoke --lengths 4") --out "$out/throughput.json"
step slots 60 "$python" benchmarks/slots.py --texts $(either 512 4) --slots $(either 64 2) \
    --length $(either 8 2) --singles $(either 8 1) --max-steps $(either 1500 5) --out "$out/slots.json"

if [ $dry ]; then
    step ncu 60 "${launch[@]}" --size real --names
elif have ncu ncu; then
    step ncu 60 ncu --clock-control none --set detailed --kernel-name "regex:^($(paste -sd'|' <<<"$names"))" \
        --launch-count 12 "${launch[@]}" --size real
fi
step profile 40 "$python" -m prototok profile fit $(either "--shape pythia-160m --batch 64" "--batch 2") \
    --length $(either 128 4) --eager --steps $(either 5:8 1:2) --trace "$out/profile.json"

for preset in pythia-1.4b llama-3.1-8b; do
    step "fit-step-$preset" 100 "$python" benchmarks/fit_step.py \
        --preset "$(either $preset smoke)" \
        $(either "--rounds 5" "--rounds 1 --seconds 0.1") --flat-steps 0 --out "$out/fit-step-$preset.json"
done

echo
cat "$out/summary.txt"
exit $failed
