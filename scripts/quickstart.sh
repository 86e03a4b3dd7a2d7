#!/usr/bin/env bash
# The whole way once, on the CPU and on the bundled sample corpus: install, tokenizer,
# training, and a sample in each voice. Can be run again; it then starts again.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH"
gothic-tokenize --files data/sample/mixed_train.txt --vocab-size 1024 \
    --output data/tokenizer_sample.json
gothic-train --config=configs/quickstart.py --overwrite
for voice in wilde lovecraft; do
    printf '\n=== %s ===\n' "$voice"
    gothic-chat --checkpoint checkpoints/quickstart/best --voice "$voice" \
        --prompt "The door" --max-tokens 120 --seed 1
done
