#!/usr/bin/env bash
#SBATCH --job-name=megaray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=megaray-%j.log
# sbatch deploy/slurm.sh rlhf --config configs/grpo.yaml --model /shared/model --dataset /shared/train.jsonl --output_dir /shared/runs \
#     --nnodes 2 --nproc_per_node 8 --run_name grpo --resume_from_checkpoint auto
# Run it from the project's folder on a file system that every node sees, with the environment's bin folder on the PATH.
set -euo pipefail

# Ray 2.60 asks for a token: one for this job, known to all of its nodes.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$address:$port"

srun --nodes=1 --ntasks=1 -w "$head" ray start --head --node-ip-address="$address" --port="$port" --block &
until srun --overlap --nodes=1 --ntasks=1 -w "$head" ray status >/dev/null 2>&1; do sleep 2; done
workers=$((SLURM_JOB_NUM_NODES - 1))
if [ "$workers" -gt 0 ]; then
    srun --nodes="$workers" --ntasks="$workers" --exclude="$head" ray start --address="$RAY_ADDRESS" --block &
fi
until [ "$(srun --overlap --nodes=1 --ntasks=1 -w "$head" ray list nodes --filter state=ALIVE 2>/dev/null | grep -c ALIVE)" -ge "$SLURM_JOB_NUM_NODES" ]; do
    sleep 2
done
srun --overlap --nodes=1 --ntasks=1 -w "$head" python rlhf/main.py "$@"
