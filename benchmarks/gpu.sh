#!/usr/bin/env bash
# Everything that needs a GPU, in runs of ten minutes. The most telling comes first.
#
#   benchmarks/gpu.sh [OPTION…] [STEP…]   steps or sets of steps; without any, "first second"
#       --budget SECONDS                  for all of them together, 570 unless given
#       --out OUT                         a folder
#       --dry-run                         without a GPU: every command at a tiny size
#   benchmarks/gpu.sh --list              sets, steps and their limits in seconds
#
# Steps run in the order given, each once, until the budget is spent: those that a run had no time for
# are named in summary.txt, and the next run is given them. OUT (default
# benchmarks/results/gpu-<device>) gets summary.txt, a line for each step, and one archive, <set>.tar.gz,
# written anew after every step: NAME.txt, what a step printed as it went, and most a NAME.json. A step
# that fails does not stop the others; then the exit code is 1.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

# A step has at most its limit, and the limits of a set add up to no more than the budget.
declare -A limit=(
    [env]=20 [driver]=10 [gemms]=60 [graphs]=100 [fit-step-pythia-160m]=80 [fit-step-llama-3.2-1b]=90
    [decoder]=40 [throughput]=110
    [tests]=150 [ncu]=80 [fit-step-pythia-1.4b]=80 [fit-step-llama-3.1-8b]=100 [throughput-256]=140
    [slots]=60 [kernels]=100 [profile]=40 [table4]=190
    [memcheck]=180 [racecheck]=180
)
sets="first second third fourth"
declare -A set_of=(
    [first]="env driver gemms graphs fit-step-pythia-160m fit-step-llama-3.2-1b decoder throughput"
    [second]="env tests ncu fit-step-pythia-1.4b fit-step-llama-3.1-8b throughput-256"
    [third]="env slots kernels profile table4"
    [fourth]="env memcheck racecheck"
)
budget=570

dry= out= chosen=()
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry=1 ;;
    --list)
        for name in $sets; do
            total=0 line=
            for step in ${set_of[$name]}; do
                total=$((total + limit[$step]))
                line+=" $step=${limit[$step]}"
            done
            echo "$name ($total of $budget s):$line"
        done
        exit 0
        ;;
    --budget)
        [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: --budget needs seconds" >&2; exit 2; }
        budget=$2
        shift
        ;;
    --out)
        [ $# -gt 1 ] || { echo "gpu.sh: --out needs a folder" >&2; exit 2; }
        out=$2
        shift
        ;;
    *)
        if [ -n "${set_of[$1]:-}" ]; then
            chosen+=(${set_of[$1]})
        elif [ -n "${limit[$1]:-}" ]; then
            chosen+=("$1")
        else
            echo "gpu.sh: $1 is no step and no set of steps; see --list" >&2
            exit 2
        fi
        archive=${archive:+steps} archive=${archive:-$1}
        ;;
    esac
    shift
done
[ ${#chosen[@]} -gt 0 ] || { chosen=(${set_of[first]} ${set_of[second]}) archive=steps; }

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
out=${out:-$root/benchmarks/results/gpu-$device}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$out/summary.txt"
failed=0

say() { echo "$*" | tee -a "$out/summary.txt" >&2; }
keep() { tar -czf "$work.tar.gz" -C "$work" . && mv "$work.tar.gz" "$out/$archive.tar.gz"; }
# step NAME COMMAND…: at most NAME's limit, or what is left of the budget.
step() {
    local name=$1 most=${limit[$1]} code started=$SECONDS
    shift
    local left=$((budget - SECONDS))
    if [ "$left" -lt 5 ]; then
        say "$name: not run, no time left"
        failed=1
        return
    fi
    [ "$most" -gt "$left" ] && most=$left
    echo "== $name: $*" >&2
    timeout -k 5 "$most" "$@" >"$work/$name.txt" 2>&1
    code=$?
    case $code in
    0) say "$name: ok, $((SECONDS - started)) s" ;;
    124 | 137) say "$name: stopped after $most s" && failed=1 ;;
    *) say "$name: failed with exit code $code, see $name.txt" && failed=1 ;;
    esac
    keep
}
# have TOOL STEP: whether the tool is there; a step without its tool is named and is no failure.
have() {
    command -v "$1" >/dev/null && return
    say "$2: not run, $1 is not installed"
    return 1
}
# One value on a GPU, another where only the command is tried.
either() { if [ $dry ]; then echo "$2"; else echo "$1"; fi; }

pytest=("$python" -m pytest -q -p no:cacheprovider)
launch=("$python" benchmarks/launch_kernels.py)
[ $dry ] && launch+=(--device cpu)

# What takes long in tests is compiling.
parallel() { "$python" -c 'import xdist' 2>/dev/null && echo "-n 8"; }
fit_step() { # of a preset
    step "fit-step-$1" "$python" benchmarks/fit_step.py --preset "$(either "$1" smoke)" \
        --rounds $(either 5 1) --seconds $(either 0.5 0.1) --flat-steps 0 \
        --out "$work/fit-step-$1.json"
}
throughput() { # a step, and the length it is of
    step "$1" "$python" benchmarks/throughput.py \
        --shape $(either "llama-3.2-1b --lengths $2 --texts 4" "smoke --lengths 4") \
        --out "$work/$1.json"
}
sanitize() { # by a tool
    if [ $dry ]; then
        step "$1" "${launch[@]}" $([ "$1" = memcheck ] || echo --names) # once is enough
        return
    fi
    have compute-sanitizer "$1" || return
    # Only our kernels, where this version can choose: the libraries' take minutes.
    local ours=() name
    if compute-sanitizer --help 2>&1 | grep -q -- '--kernel-name '; then
        for name in $("${launch[@]}" --names); do ours+=(--kernel-name "kernel_substring=$name"); done
    fi
    # Every allocation by itself, or a write past the end of one stays within torch's pool.
    step "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${ours[@]}" \
        --error-exitcode 9 "${launch[@]}"
}
run() {
    local names
    case $1 in
    env) step env "$python" -m prototok env ;;
    driver) [ $dry ] || { have nvidia-smi driver && step driver nvidia-smi; } ;;
    # Which rates the products reach decides what can be asked of a step.
    gemms) step gemms env TRITON_INTERPRET=0 "$python" benchmarks/rehearse.py --gemms \
        $(either "" "--shape pythia-160m") ;;
    graphs) step graphs "${pytest[@]}" $(parallel) $(either "" "-k decoder") tests/cuda ;;
    tests)
        step tests "${pytest[@]}" $(parallel) $(either \
            "tests/kernels tests/fitting/engine tests/model/families tests/autoregressive" \
            "tests/fitting/test_recipe.py tests/fitting/engine/test_rows.py")
        ;;
    fit-step-*) fit_step "${1#fit-step-}" ;;
    ncu)
        if [ $dry ]; then
            step ncu "${launch[@]}" --size real --names
        elif have ncu ncu; then
            names=$("${launch[@]}" --names)
            # All launches of ours: with a count, the first kernel would take them all.
            step ncu ncu --clock-control none --set detailed \
                --kernel-name "regex:^($(paste -sd'|' <<<"$names"))" "${launch[@]}" --size real
        fi
        ;;
    decoder) step decoder "$python" benchmarks/decoder.py --out "$work/decoder.json" \
        $(either "" "--shape smoke --length 4 --rounds 2 --device cpu") ;;
    throughput) throughput "$1" 128 ;;
    throughput-*) throughput "$1" "${1#throughput-}" ;;
    slots) step slots "$python" benchmarks/slots.py --texts $(either 512 4) --slots $(either 64 2) \
        --length $(either 8 2) --singles $(either 8 1) --max-steps $(either 1500 5) \
        --out "$work/slots.json" ;;
    kernels) step kernels "${pytest[@]}" benchmarks/kernels --measured "$work/kernels.jsonl" \
        $(either --benchmark-only "--benchmark-disable --collect-only") ;;
    profile) step profile "$python" -m prototok profile fit \
        $(either "--shape pythia-160m --batch 64" "--batch 2") --length $(either 128 4) --eager \
        --steps $(either 5:8 1:2) --trace "$work/profile.json" ;;
    memcheck | racecheck) sanitize "$1" ;;
    # The built-in models' texts as in the paper's Table 4: seconds a text.
    table4) step table4 "$python" -m prototok bench \
        $(either "" "--model tiny-llama --lengths 4 --texts 1") --out "$work/table4.json" ;;
    esac
}

declare -A done_with=()
for name in "${chosen[@]}"; do
    [ "${done_with[$name]:-}" ] || run "$name"
    done_with[$name]=1
done

echo
cat "$out/summary.txt"
exit $failed
