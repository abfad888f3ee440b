#!/usr/bin/env bash
# Continues the training of the bundled model on a machine with a GPU and no network, for a number of seconds.
#   training/h100.sh --seconds 520 --carried DIR --out DIR [--rehearse] [--evaluate]
# Run from the repository root. --carried holds what cannot be fetched there: data/*.jsonl.xz, wheels/*.whl, spiece.model and,
# from the second session on, checkpoint/ (what --out of the run before held). --out gets a checkpoint, the log, and
# extras.tar.gz with sheets and reports: at most 6 files of at most 16 MB. Pictures, full checkpoints (with the optimizer) and
# compiled kernels stay in $WORK (default /tmp/sparvar-training) for the next run on the same machine.
#   --rehearse   every stage for some seconds, in a place of its own: shows that all of it works, and leaves kernels compiled
#   BUDGET=1.3   in the environment: every stage 1.3 times as long
#   --evaluate   no training: the report of the newest checkpoint
set -euo pipefail

seconds=520 carried="" out="" mode=run
while [ $# -gt 0 ]; do
  case "$1" in
    --seconds | --carried | --out)
      [ $# -ge 2 ] || { echo "training/h100.sh: $1 needs a value" >&2; exit 2; }
      case "$1" in --seconds) seconds=$2 ;; --carried) carried=$2 ;; --out) out=$2 ;; esac
      shift ;;
    --rehearse) mode=rehearse ;;
    --evaluate) mode=evaluate ;;
    *) echo "training/h100.sh: unknown option $1 (there are --seconds, --carried, --out, --rehearse and --evaluate)" >&2; exit 2 ;;
  esac
  shift
done
[[ $seconds =~ ^[0-9]+$ ]] || { echo "training/h100.sh: --seconds $seconds is not a whole number" >&2; exit 2; }
[ -d "$carried/data" ] || { echo "training/h100.sh: --carried '$carried' has no folder data" >&2; exit 2; }
[ -n "$out" ] || { echo "training/h100.sh: --out is missing" >&2; exit 2; }

work=${WORK:-/tmp/sparvar-training}
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$work/kernels TRITON_CACHE_DIR=$work/triton
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$work" "$out"
if ! python3 -c 'import resvg_py' 2>/dev/null; then
  python3 -m pip install -q --no-index --no-deps --target "$work/site" "$carried"/wheels/*.whl
fi

# The run's own folder, new each time: what it holds at the end goes home.
fresh=$work/out
rm -rf "$fresh"
[ "$mode" = rehearse ] && budget=0.012 || budget=${BUDGET:-1}
arguments=(--data "$carried/data" --tokenizer "$carried/spiece.model" --out "$fresh" --budget "$budget" --device "${DEVICE:-cuda}" --preset "${PRESET:-emoji}")
left=$((seconds - SECONDS - 10)) # the last seconds are for packing
case $mode in
  run) arguments=(run "${arguments[@]}" --work "$work" --seconds "$left") ;;
  evaluate) arguments=(evaluate "${arguments[@]}" --work "$work") ;;
  rehearse)
    mkdir -p "$work/rehearsal"
    ln -sfn "../pictures-512" "$work/rehearsal/pictures-512" # the pictures are the same
    mkdir -p "$work/pictures-512"
    arguments=(run "${arguments[@]}" --work "$work/rehearsal" --seconds "$left" --list-limit 24)
    ;;
esac
if [ "$mode" != rehearse ] && [ -f "$carried/checkpoint/state.json" ]; then
  arguments+=(--resume "$carried/checkpoint")
fi

status=0
timeout --signal=INT --kill-after=5 "$((left + 8))" python3 -m training "${arguments[@]}" 2>&1 | tee "$work/console.txt" || status=$?
mkdir -p "$fresh"
mv "$work/console.txt" "$fresh/console.txt"
for file in "$fresh"/*.safetensors "$fresh/state.json" "$fresh/log.jsonl"; do
  if [ -e "$file" ]; then cp "$file" "$out/"; fi
done
tar -C "$fresh" --exclude='*.safetensors' -czf "$out/extras.tar.gz" .
ls -l "$out"
exit "$status"
