#!/usr/bin/env bash
# The first quarter of an hour on a machine with an NVIDIA GPU, also one without network: what is broken shows before anything is measured.
#
#   bash tests/gpu_first.sh OUT [--python PATH] [--minutes N] [--smoke]
#
#   look    what is installed, how fast memory is copied, and the GPU tests of what all else stands on: at most 90 s
#   bench   benchmarks/gpu.sh, at most 8 minutes
#   tests   all other GPU tests
#   learn   the recipe quickstart with views of 128 px, trained on the sample photos in what is left of the time
#
# Nothing stops at a failure, but for a GPU that torch does not see (status 1). OUT gets at most eight files: first.txt, all that was printed; log.txt,
# results.jsonl and report.html of the benchmarks; learned.json, learned.jsonl and learned.html of the run. The same command again goes on: a step that
# ended, well or badly, is left out, one for which time was short runs again. So time can be had in pieces (--minutes 10, then --minutes 5). --smoke:
# the same steps on a CPU, as small as they can be.
# Exit status: 0 all well, 1 something failed or was cut off (listed at the end), 2 wrong usage.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
OUT="" PYTHON="" SMOKE="" MINUTES=15
usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | grep '^#' | cut -c3-; }
while (($#)); do
    case "$1" in
        --python | --minutes)
            (($# > 1)) || { echo "gpu_first.sh: $1 needs a value" >&2; exit 2; }
            [[ "$1" == --python ]] && PYTHON="$2" || MINUTES="$2"
            shift 2
            ;;
        --smoke) SMOKE=1; shift ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "gpu_first.sh: unknown option $1 (--help)" >&2; exit 2 ;;
        *) [[ -z "$OUT" ]] || { echo "gpu_first.sh: one OUT, not $OUT and $1" >&2; exit 2; }; OUT="$1"; shift ;;
    esac
done
[[ -n "$OUT" && "$MINUTES" =~ ^[0-9]+$ ]] || { echo "gpu_first.sh: it takes OUT, a folder, and whole minutes (--help)" >&2; exit 2; }
if [[ -z "$PYTHON" ]]; then
    [[ -x "$ROOT/.venv/bin/python" ]] && PYTHON="$ROOT/.venv/bin/python" || PYTHON=python3
fi
[[ "$PYTHON" != */* ]] || PYTHON="$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")"
mkdir -p "$OUT" && OUT="$(cd "$OUT" && pwd)" || exit 2
END=$((60 * 10#$MINUTES)) LOG="$OUT/first.txt"
touch "$LOG"

# Python imports this checkout, installed or not, and pytest must not find fastssl/ without its parts in the folder where it runs.
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$WORK/fastssl" && ln -s "$ROOT"/fastssl/* "$ROOT/pipelines" "$ROOT/benchmarks" "$WORK/fastssl/"
export PYTHONPATH="$WORK${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$WORK" || exit 1
# All steps would fail, and count as done when the GPU is there.
[[ -n "$SMOKE" ]] || "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_first.sh: torch sees no NVIDIA GPU here; --smoke runs the same steps on a CPU" >&2
    exit 1
}

say() { printf '== [%3d s] %s\n' "$SECONDS" "$*" | tee -a "$LOG"; }
bad=()
step() { # NAME SECONDS COMMAND...
    local name="$1" wanted="$2" limit="$2" status
    shift 2
    ! grep -q "^== \[[ 0-9]* s\] $name ended" "$LOG" || { say "$name: done before"; return; }
    ((limit > END - SECONDS)) && limit=$((END - SECONDS))
    if ((limit < 10)); then
        say "$name: not reached" && bad+=("$name: not reached")
        return
    fi
    say "$name: at most $limit s: $*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
    status=${PIPESTATUS[0]}
    if ((status == 0)); then
        say "$name ended well"
        return
    fi
    if ((status == 124 || status == 137 || limit < wanted)); then
        say "$name was cut off"
    else
        say "$name ended with status $status"
    fi
    bad+=("$name: status $status after at most $limit s")
}

if [[ -n "$SMOKE" ]]; then
    MARK="not gpu" DEVICE=cpu PARTS=(--smoke --only loss) FIRST=(fastssl/test_meters.py) CHOSEN=blocks OTHERS=(fastssl/test_devices.py)
    LEARN=(--device cpu --arch lcnet_035 --epochs 1 --set views.0.size=16 --set zero_init_residual=false --set probe.size=16)
else
    MARK=gpu DEVICE=cuda PARTS=() CHOSEN="augment or crop or loader or meters or graph or waits"
    FIRST=(pipelines/test_augment.py pipelines/test_crop.py pipelines/test_loader.py fastssl/test_meters.py)
    mapfile -t OTHERS < <(cd "$ROOT/tests" && grep -rl "mark\.gpu" --include='test_*.py' . | grep -vF "$(printf '%s\n' "${FIRST[@]}")")
    FIRST+=(fastssl/test_step.py)
    LEARN=(--device cuda --check --set views.0.size=128 --set "views.0.blur_sigma=[0.1, 1.15]" --set probe.size=128)
fi
TESTS=("$PYTHON" -m pytest --rootdir "$ROOT" -c "$ROOT/setup.cfg" -o addopts= -p no:cacheprovider -m "$MARK" -v --tb=short --durations=5
    --continue-on-collection-errors)

step versions 40 "$PYTHON" -m fastssl doctor
step copies 30 "$PYTHON" -c "
import torch
from fastssl.benchmarks.harness.timing import copy_limit, measure_in_turns
copy, moved = copy_limit(torch.device('$DEVICE'))
print(f'{moved / measure_in_turns({\"copy\": copy}, device=\"$DEVICE\")[\"copy\"].median_s / 1e9:,.0f} GB/s read and written by a large copy')"
step first-tests $((SECONDS < 80 ? 90 - SECONDS : 10)) "${TESTS[@]}" -k "$CHOSEN" "${FIRST[@]/#/$ROOT/tests/}"
minutes="$(awk "BEGIN { left = ($END - $SECONDS) / 60; print left < 0 ? 0 : left < 8 ? left : 8 }")"
step bench 500 bash "$ROOT/benchmarks/gpu.sh" --python "$PYTHON" --out "$OUT" --minutes "$minutes" "${PARTS[@]}"
rm -f "$OUT"/*.png "$OUT"/report.md "$OUT"/recipes.md
step other-tests $((END - SECONDS > 240 ? END - SECONDS - 120 : 120)) "${TESTS[@]}" "${OTHERS[@]/#/$ROOT/tests/}"
step learn 600 "$PYTHON" -m fastssl pretrain --recipe quickstart "${LEARN[@]}" --out "$WORK/learned" --json "$OUT/learned.json"
for kind in jsonl:metrics.jsonl html:report.html; do
    [[ ! -f "$WORK/learned/${kind#*:}" ]] || cp "$WORK/learned/${kind#*:}" "$OUT/learned.${kind%%:*}"
done
for one in "${bad[@]}"; do say "FAILED $one"; done
((${#bad[@]} == 0))
