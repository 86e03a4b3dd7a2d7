#!/usr/bin/env bash
# The whole way once, on the CPU: install, let the model of the repository write, fine-tune it on
# the bundled sample corpus, and let it write again. Can be run again; it then fine-tunes again.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH"

write() {
    printf '\n=== %s ===\n' "$1"
    shift
    gothic-chat --prompt "In the evening" --max-tokens 100 --seed 1 "$@"
}

write "Wilde" --voice wilde
write "Lovecraft" --voice lovecraft
write "half of each" --blend wilde=0.5,lovecraft=0.5
printf '\n=== fine-tuning ===\n'
gothic-train --config=configs/finetune.py --init-from checkpoints/gothic-dandy --overwrite
write "Wilde, fine-tuned" --voice wilde --checkpoint checkpoints/finetuned/best
write "Lovecraft, fine-tuned" --voice lovecraft --checkpoint checkpoints/finetuned/best
