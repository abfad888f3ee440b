#!/usr/bin/env bash
# Makes the GPU part of docs/benchmarks.md, on a machine with a GPU and PyTorch; builds nothing.
# PROGRAM, KERNELS, PACKAGE: sparvar, gpu_kernels and the folder of the Python package of a build with -DSPARVAR_CUDA=ON
# -DSPARVAR_PYTHON=ON (PACKAGE empty: without the tables of calls from PyTorch); MODEL: the bundled model; OUT: a folder for the
# measurements; PYTHON: one with PyTorch; COMMIT: where git is not there; REPEAT: runs of which the median counts; DOCUMENT: where
# the tables go; -: standard output.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PROGRAM=${PROGRAM:-$root/build/cuda/apps/cli/sparvar}
KERNELS=${KERNELS:-$root/build/cuda/bench/gpu_kernels}
PACKAGE=${PACKAGE-$root/build/cuda/python}
MODEL=${MODEL:-$root/models/emoji}
OUT=${OUT:-$root/build/bench-gpu}
PYTHON=${PYTHON:-python3}
REPEAT=${REPEAT:-5}
DOCUMENT=${DOCUMENT:-$root/docs/benchmarks.md}
if [ -n "$PACKAGE" ] && [ ! -d "$PACKAGE/sparvar" ]; then
  echo "bench/gpu.sh: $PACKAGE has no Python package; build with -DSPARVAR_PYTHON=ON, or set PACKAGE= to leave its tables out" >&2
  exit 1
fi
mkdir -p "$OUT"

measure() {  # file, geometry, further arguments
  local file=$1 geometry=$2
  shift 2
  "$PROGRAM" bench model --geometry "$geometry" --random-weights --device cuda --quiet --json -r "$REPEAT" "$@" >"$OUT/$file.json"
}

for size in 8b 2b 125m; do  # peer and engine one after the other, on the same warm card
  "$PYTHON" "$root/bench/peer_pytorch_gpu.py" --geometry "infinity-$size" --repeat "$REPEAT" >"$OUT/peer-$size.json"
  measure "$size" "infinity-$size"
  measure "$size-csla" "infinity-$size" --attention csla
  measure "$size-csla-fp8" "infinity-$size" --attention csla --weights fp8
done
for plan in published sparvar; do measure "8b-$plan" infinity-8b --attention "$plan"; done
measure 8b-sparvar-fp8 infinity-8b --attention sparvar --weights fp8
rm -f "$OUT/products.choices"
SPARVAR_PRODUCTS="$OUT/products.choices" measure 8b-products infinity-8b
for plan in dense sparvar; do measure "8b-$plan-skip" infinity-8b --attention "$plan" --skip-scales 2; done
measure emoji "$MODEL/config.json"
for batch in 1 2 4 8; do measure "2b-batch-$batch" infinity-2b --batch "$batch"; done

# One call of attention: PyTorch's kernels and the engine's.
"$PYTHON" "$root/bench/peer_attention_gpu.py" --heads 28,16 --scales 10,11,12 --repeat "$REPEAT" --seconds 90 >"$OUT/peer-attention.json"
for size in 8b 2b; do
  "$PROGRAM" bench attention --device cuda --geometry "infinity-$size" --scale 10,11,12 -r "$REPEAT" --json --quiet \
    --attention "dense,csla,csla-blocks,$root/bench/cs4a-112.json,cs4a,probe,sparvar" >"$OUT/attention-$size.json"
done

if [ -n "$PACKAGE" ]; then  # the same kernels on torch tensors, and a PyTorch model that is patched with them
  export PYTHONPATH=$PACKAGE${PYTHONPATH:+:$PYTHONPATH}
  "$PYTHON" "$root/bench/python_attention.py" --program "$PROGRAM" --repeat "$REPEAT" --json >"$OUT/python-attention.json"
  for sdpa in auto flash; do
    # small scales wait for the host, whose times vary: more pictures
    "$PYTHON" "$root/bench/python_patch.py" --geometry infinity-8b --attention dense,csla,sparvar --sdpa $sdpa \
      --repeat $((2 * REPEAT + 1)) --json >"$OUT/python-patch-$sdpa.json"
  done
fi

# From the start of the process to the written file, the first run left out: it reads the libraries from the disk.
picture=$(mktemp -d)/picture.png
for _ in $(seq 0 "$REPEAT"); do
  start=$(date +%s%N)
  SPARVAR_MODEL=$MODEL "$PROGRAM" generate "red apple, 3d style" --device cuda --quiet -o "$picture"
  echo $(($(date +%s%N) - start))
done >"$OUT/start-nanoseconds.txt"
"$KERNELS" convolutions attention lists norms fp8 >"$OUT/kernels.json"
"$PYTHON" "$root/bench/gpu_tables.py" "$OUT" "$DOCUMENT"
