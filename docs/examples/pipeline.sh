#!/usr/bin/env bash
# Two training stages with a widening between them. May be run again at any time: only what is missing is
# done. Usage: pipeline.sh DIR
set -euo pipefail

run=${1:?usage: pipeline.sh DIR}
half=$run/checkpoint-100
wide=$run/wide/checkpoint-100
final=$run/checkpoint-200
# put your own training script here
train() { python -m sparkling_cli.examples.train --out "$run" "$@"; }

# The Trainer writes trainer_state.json last: with it, a checkpoint is whole.
whole() { [ -f "$1/trainer_state.json" ]; }

mkdir -p "$run/wide"

if whole "$half"; then echo "there    $half"; else
    train --stop-at 100
fi

# An output of `sparkling expand` appears whole or not at all.
if [ -d "$wide" ]; then echo "there    $wide"; else
    sparkling expand "$half" "$wide" --axis ffn --factor 2 --rewarmup-steps 10 --json > "$run/expand.json"
fi
sparkling verify "$half" "$wide" --quiet

if whole "$final"; then echo "there    $final"; else
    train --resume "$wide" --stop-at 200
fi
echo "done     $final"
