#!/usr/bin/env bash
# Two training stages with a widening between them. May be run again at any time: only what is missing is
# done. Usage, from the repository's root: docs/examples/pipeline.sh DIR
set -euo pipefail

run=${1:?usage: pipeline.sh DIR}
train=docs/examples/train.py
spec=docs/examples/expansion.yaml
half=$run/checkpoint-100
wide=$run/wide/checkpoint-100
final=$run/checkpoint-200

# The Trainer writes trainer_state.json last: with it, a checkpoint is whole.
whole() { [ -f "$1/trainer_state.json" ]; }

mkdir -p "$run/wide"

if whole "$half"; then echo "there    $half"; else
    python "$train" --out "$run" --stop-at 100
fi

# An output of `sparkling expand` appears whole or not at all.
if [ -d "$wide" ]; then echo "there    $wide"; else
    sparkling expand "$half" "$wide" --spec "$spec" --json > "$run/expand.json"
fi
sparkling verify "$half" "$wide" --quiet

if whole "$final"; then echo "there    $final"; else
    python "$train" --out "$run" --resume "$wide" --stop-at 200
fi
echo "done     $final"
