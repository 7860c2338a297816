#!/usr/bin/env bash
# One torchrun a node, one process a GPU; the numbers are those of one process with the same configuration.
# sbatch --nodes 2 --gpus-per-node 8 examples/slurm.sh --config run.yaml --run_dir /shared/run --sharded true
#SBATCH --job-name=react-fast
#SBATCH --ntasks-per-node=1
# SIGTERM ten minutes before the limit: the run saves and stops, and goes on from there when it is put in the queue again.
#SBATCH --signal=TERM@600
#SBATCH --requeue
set -euo pipefail

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend c10d \
  --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_endpoint "$first_node:29500" \
  -m react_fast.cli train --resume auto "$@"
