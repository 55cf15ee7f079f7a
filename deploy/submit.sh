#!/usr/bin/env bash
# Submit a command to a Ray cluster with this project as its working folder:
#   RAY_ADDRESS=http://HEAD:8265 deploy/submit.sh rlhf --config configs/grpo.yaml --model /shared/model --dataset /shared/train.jsonl \
#       --output_dir /shared/runs --nnodes 2 --nproc_per_node 8
# .gitignore keeps .venv and runs out of the upload. The job sees a copy of this folder: give model, dataset and output_dir as
# absolute paths that every node sees, or set MEGARAY_OUTPUT_ROOT for a relative output_dir.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RAY_ADDRESS:?set RAY_ADDRESS to the dashboard of the head node, http://HEAD:8265}"
exec ray job submit --address "$RAY_ADDRESS" --working-dir . -- python rlhf/main.py "$@"
