#!/usr/bin/env bash
# Everything that only a GPU can tell, in order of worth: the GPU tests, the benchmark, then the
# default run on the real corpus with its evaluation, samples, and whose a classifier takes them
# for. Needs data/processed and data/tokenizer.json.
#   scripts/gpu_run.sh RESULTS [gothic-train options]
# Uses the python on PATH, in which the package's dependencies must be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
results="$(mkdir -p "$1" && cd "$1" && pwd)"
shift
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
python -m pytest -m gpu -p no:cacheprovider 2>&1 | tee "$results/gpu-tests.txt" || true
python -m benchmarks.run --device cuda --output "$results/benchmark.json" 2>&1 |
    tee "$results/benchmark.txt" || true
python -m gothic_jax.train --out-dir checkpoints/gpu --overwrite "$@" 2>&1 |
    tee "$results/train.txt"
python -m gothic_jax.commands.evaluate --checkpoint checkpoints/gpu/best \
    --file data/processed/mixed_val.txt --json > "$results/eval.json"
for voice in wilde lovecraft; do
    python -m gothic_jax.commands.chat --checkpoint checkpoints/gpu/best --voice "$voice" \
        --num-samples 4 --max-tokens 200 --seed 1
done > "$results/samples.txt"
python -m gothic_jax.commands.index --file mixed_train.txt
python scripts/attribution.py checkpoints/gpu/best --output "$results/attribution.json" 2>&1 |
    tee "$results/attribution.txt" || true
cp checkpoints/gpu/logs/events.* "$results/"
nvidia-smi --query-gpu=name,driver_version --format=csv > "$results/device.txt"
python -m pip list 2> /dev/null | grep -iE '^(jax|flax|optax|orbax|grain|tokenizers)' \
    >> "$results/device.txt"
