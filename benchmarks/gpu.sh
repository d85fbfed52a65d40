#!/usr/bin/env bash
# Measure everything that `fastssl bench` knows on this machine's NVIDIA GPU, in eight minutes and without network.
#
#   bash benchmarks/gpu.sh [--python PATH] [--out DIR] [--minutes N] [--only PART,...] [--smoke]
#
#   --python   Python with torch and fastssl's other needs.  [default: the checkout's .venv, else python3]
#   --out      gets results.jsonl, the report (report.html, report.md, recipes.md, plots) and log.txt.    [default: runs/bench in the checkout]
#   --minutes  for all of it, the report included.           [default: 8]
#   --only     these parts alone, also if they were done before.    [default: all]
#   --smoke    the same parts with tiny settings, a few minutes on two CPU cores: shows that they run, its figures mean nothing.
#
# Parts run one after the other, the most valuable first, each as its own process with its own time limit. One that fails or runs out of time leaves
# the others alone; what it had finished is kept. Eight minutes reach the first ten parts even if each takes all of its time. The same command again
# goes on: a part that ended well, by log.txt, is left out. Exit status: 0 all done, 1 a part failed or was not reached (they are listed), 2 wrong usage.
#
# fastssl need not be installed: a temporary folder of links is put on PYTHONPATH, with pipelines/ and benchmarks/ where the installed package has them.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
PYTHON="" OUT="" SMOKE="" ONLY=""
MINUTES=8

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | grep '^#' | cut -c3-; }
refuse() { echo "gpu.sh: $1 (gpu.sh --help)" >&2; exit 2; }

while (($#)); do
    case "$1" in
        --python | --out | --minutes | --only)
            (($# > 1)) && [[ -n "$2" ]] || refuse "$1 needs a value"
            case "$1" in --python) PYTHON="$2" ;; --out) OUT="$2" ;; --only) ONLY="$2" ;; --minutes) MINUTES="$2" ;; esac
            shift 2
            ;;
        --smoke) SMOKE=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) refuse "unknown option $1" ;;
    esac
done
[[ "$MINUTES" =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse "--minutes $MINUTES: give a number"
# The last seconds are the report's.
BUDGET="$(awk "BEGIN { print int(60 * $MINUTES - 15) }")"
PARTS="$(grep -oP '^ *part \K[a-z0-9-]+' "${BASH_SOURCE[0]}")"
for name in ${ONLY//,/ }; do
    grep -qx -- "$name" <<<"$PARTS" || refuse "--only $name: the parts are ${PARTS//$'\n'/, }"
done
if [[ -z "$PYTHON" ]]; then
    PYTHON=python3
    [[ -x "$ROOT/.venv/bin/python" ]] && PYTHON="$ROOT/.venv/bin/python"
fi
# Parts run in another folder; a virtual environment's python is a link and must stay one.
[[ "$PYTHON" == */* ]] && PYTHON="$(realpath -sm "$PYTHON")"
command -v "$PYTHON" >/dev/null || refuse "--python $PYTHON: no such program"
OUT="${OUT:-$ROOT/runs/bench}"
mkdir -p "$OUT" && OUT="$(cd "$OUT" && pwd)" || { echo "gpu.sh: cannot make the folder $OUT" >&2; exit 1; }

WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
RESULTS="$OUT/results.jsonl" LOG="$OUT/log.txt"
: >>"$RESULTS" >>"$LOG" || exit 1
unfinished=""
keep() { # the records that the running part has finished
    [[ -n "$unfinished" && -s "$unfinished" ]] && cat "$unfinished" >>"$RESULTS"
    unfinished=""
}
running=""
stop() { # the part that runs: `timeout` hands the signal on to all of its processes
    [[ -n "$running" ]] && kill -TERM "$running" 2>/dev/null && wait "$running"
    exit 130
}
trap 'keep; rm -rf "$WORK"' EXIT
trap stop INT TERM

say() { printf '[%3d s] %s\n' "$SECONDS" "$*" | tee -a "$LOG"; }

# Python must not find fastssl/ without its two parts in the folder where it runs.
mkdir "$WORK/fastssl" && ln -s "$ROOT"/fastssl/* "$ROOT/pipelines" "$ROOT/benchmarks" "$WORK/fastssl/" && cd "$WORK" || exit 1
export PYTHONPATH="$WORK${PYTHONPATH:+:$PYTHONPATH}"
missing="$("$PYTHON" -c '
from importlib.util import find_spec
print(*[name for name in "torch torchvision timm numpy PIL click rich yaml safetensors simplejpeg numba matplotlib psutil pydantic jinja2".split() if find_spec(name) is None])')" || exit 1
[[ -z "$missing" ]] || { echo "gpu.sh: $PYTHON lacks the packages: $missing" >&2; exit 1; }

export PYTHONUNBUFFERED=1 PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
MAIN=(--recipe light-moco-mobilenetv3) BOTH=(--data synthetic --data samples)
OTHER=(--recipe light-moco-efficientnet_b0 --recipe moco-v2-resnet50 --recipe few-photos-moco)
# Local views beside the global ones: every method that takes them, and the ViT.
LOCAL=(--recipe dino-mobilenetv2-sslight --recipe dino-vit_tiny-sslight --recipe swav-mobilenetv2-sslight --recipe moco-mobilenetv2-sslight)
if [[ -n "$SMOKE" ]]; then
    # The compiled parts go the same way but compile nothing, and their records say so: a compiler needs minutes on two cores.
    export TORCH_COMPILE_DISABLE=1
    # Tensors this small gain nothing from a second thread, and lose much when others use the cores.
    export OMP_NUM_THREADS=1
    DEVICE=(--device cpu)
    TINY=("${DEVICE[@]}" --set views.0.size=32 --set moco.queue=256 --set moco.split_bn=2 --set moco.split_bn_queries=1)
    TINY_LOCAL=("${DEVICE[@]}" --set views.global_size=32 --set views.local_size=16)
    NET=(--arch mobilenetv3_small_050 --batch-size 4) FITTING=()
    INPUT=(--photos 16)
    BATCH=(--batch-size 4)
    QUERIES=(--batch-size 16)
    LONG=(--seconds 0.5) SHORT=(--seconds 0.2)
    THREADS=(--workers 2 --workers 1)
    PEERS=(--photos 16 --batch-size 4 --seconds 2)
    # bfloat16 is several times slower than float32 on a CPU without its instructions: one part shows that it runs.
    AMP=(--amp off)
    FILES=(--photos 16)
else
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu.sh: torch sees no NVIDIA GPU here; --smoke runs the same parts on a CPU" >&2
        exit 1
    }
    DEVICE=(--device cuda)
    TINY=("${DEVICE[@]}") TINY_LOCAL=("${DEVICE[@]}") NET=() BATCH=() INPUT=()
    # Their own 1,024 pictures want 110 GB and more; halving until they fit takes longer than the part has.
    FITTING=(--batch-size 256)
    AMP=(--amp bf16)
    QUERIES=(--batch-size 256 --batch-size 512)
    LONG=(--seconds 8) SHORT=(--seconds 4)
    CORES="$(nproc)"
    THREADS=(--workers "$CORES")
    for threads in 8 4 1; do ((threads < CORES)) && THREADS+=(--workers "$threads"); done
    # Fewer seconds a turn than the command's own: rates of slow loaders are then rough, and what is left of the time decides.
    PEERS=(--seconds 45)
    FILES=(--photos 512)
fi

failed=() due=$SECONDS
mkfifo "$WORK/pipe" || exit 1
part() { # NAME SECONDS ARGUMENTS-OF-BENCH...
    local name="$1" limit="$2" left=$((BUDGET - SECONDS)) status reader
    shift 2
    local finished="$name: done: fastssl bench $*"
    if [[ -n "$ONLY" ]]; then
        [[ ",$ONLY," == *",$name,"* ]] || return 0
    elif [[ "$(<"$LOG")"$'\n' == *" s] $finished"$'\n'* ]]; then
        say "$name: done before"
        return
    fi
    [[ -z "$SMOKE" ]] || limit=$((2 * limit)) # a slow or busy machine is no fault of the part
    # What earlier parts left of their time is the next one's.
    limit=$(((due = (due > SECONDS ? due : SECONDS) + limit) - SECONDS))
    ((limit > left)) && limit=$left
    ((limit >= 3)) || { say "$name: not reached" && failed+=("$name: not reached within $MINUTES min"); return; }
    say "$name: at most $limit s"
    unfinished="$WORK/$name.jsonl"
    # In the background, since bash answers signals only between commands or while it waits; each line of output gets the clock.
    while IFS= read -r line; do say "  $line"; done <"$WORK/pipe" &
    reader=$!
    timeout --kill-after=5 "$limit" "$PYTHON" -m fastssl bench "$@" --json "$unfinished" >"$WORK/pipe" 2>&1 &
    running=$!
    wait "$running"
    status=$?
    running=""
    # A process that outlives its part, as a compiler's helper may, keeps the pipe open: it is not waited for.
    for _ in {1..50}; do kill -0 "$reader" 2>/dev/null || break; sleep 0.1; done
    kill "$reader" 2>/dev/null
    wait "$reader" 2>/dev/null
    keep
    ((status == 0)) || failed+=("$name: status $status after at most $limit s: fastssl bench $*")
    ((status == 0)) && say "$finished" || say "${failed[-1]}"
}

# What eight minutes must reach: these limits come to 465 s.
part ceilings 25 ceilings "${DEVICE[@]}" "${INPUT[@]}" "${SHORT[@]}"
part step-graph 70 step "${MAIN[@]}" "${TINY[@]}" "${NET[@]}" "${AMP[@]}" --graph --peers
part step 35 step "${MAIN[@]}" "${TINY[@]}" "${NET[@]}" --amp bf16 --peers
part views 30 views "${MAIN[@]}" "${TINY[@]}" "${BATCH[@]}" "${INPUT[@]}" "${BOTH[@]}" --amp bf16
part train 50 train "${MAIN[@]}" "${TINY[@]}" "${NET[@]}" "${INPUT[@]}" "${BOTH[@]}" "${AMP[@]}" --graph "${LONG[@]}"
part loader 40 loader "${MAIN[@]}" "${TINY[@]}" "${BATCH[@]}" "${INPUT[@]}" "${THREADS[@]}" "${BOTH[@]}" "${SHORT[@]}"
part step-compiled 110 step "${MAIN[@]}" "${TINY[@]}" "${NET[@]}" "${AMP[@]}" --compile --graph --peers
part step-local 55 step "${LOCAL[@]}" "${TINY_LOCAL[@]}" "${NET[@]}" "${FITTING[@]}" "${AMP[@]}" --graph
part loss 15 loss "${MAIN[@]}" "${TINY[@]}" "${QUERIES[@]}"
part step-recipes 35 step "${OTHER[@]}" "${TINY[@]}" "${NET[@]}" "${AMP[@]}" --graph

# As time is left.
part train-recipes 80 train "${OTHER[@]}" "${TINY[@]}" "${NET[@]}" "${INPUT[@]}" "${BOTH[@]}" "${AMP[@]}" --graph "${SHORT[@]}"
part train-local 40 train --recipe dino-mobilenetv2-sslight "${TINY_LOCAL[@]}" "${NET[@]}" "${FITTING[@]}" "${INPUT[@]}" --data synthetic "${AMP[@]}" --graph "${SHORT[@]}"
part loader-local 30 loader --recipe dino-mobilenetv2-sslight "${TINY_LOCAL[@]}" "${BATCH[@]}" "${INPUT[@]}" --data synthetic "${SHORT[@]}"
part loader-recipes 50 loader "${OTHER[@]}" "${TINY[@]}" "${BATCH[@]}" "${INPUT[@]}" "${BOTH[@]}" "${SHORT[@]}"
# Other engines, where they are installed: each with 1, 4, 8 and all threads.
ENGINES=()
ready="$("$PYTHON" -c '
from fastssl.pipelines.engines.registry import engine_state
print(*[name for name in ("dali", "ffcv", "torchcodec") if not engine_state(name).problem])' 2>/dev/null)"
for engine in $ready; do ENGINES+=(--pipeline "$engine"); done
if ((${#ENGINES[@]})); then
    part engines 90 loader "${MAIN[@]}" "${TINY[@]}" "${BATCH[@]}" "${INPUT[@]}" "${THREADS[@]}" "${ENGINES[@]}" "${SHORT[@]}"
else
    say "engines: none but native is installed"
fi

part convert 60 convert "${FILES[@]}"
part peers 110 loader --peers "${PEERS[@]}"
part views-recipes 40 views "${OTHER[@]}" "${TINY[@]}" "${BATCH[@]}" "${INPUT[@]}" "${BOTH[@]}" --amp bf16
part step-compiled-recipes 180 step "${OTHER[@]}" "${TINY[@]}" "${NET[@]}" "${AMP[@]}" --compile --graph
part step-float32 60 step "${MAIN[@]}" "${TINY[@]}" "${NET[@]}" --amp off --peers

[[ -s "$RESULTS" ]] && "$PYTHON" -m fastssl bench report "$RESULTS" --out "$OUT" >/dev/null || failed+=("the report")
say "$(wc -l <"$RESULTS") records in $RESULTS"
for one in "${failed[@]}"; do say "FAILED $one"; done
((${#failed[@]} == 0))
