#!/usr/bin/env bash
# Four machines of eight cards by Slurm:   sbatch --export=ALL,MODEL=...,DATA=... examples/clusters/slurm.sh
#
# MODEL and DATA are paths that every machine has, RUN a folder that outlives the job. Ten minutes before the time is over
# Slurm sends SIGTERM to torchrun, the run stops between two steps and saves, and the requeued job goes on with it.
#SBATCH --job-name=tunesmith
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600

set -eu
: "${MODEL:?a model that every machine can read}" "${DATA:?a file of rows that every machine can read}"
RUN=${RUN:-runs/slurm-$SLURM_JOB_ID}

srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node gpu --max-restarts 3 --shutdown-timeout 600 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
  --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" \
  -m tunesmith train "$MODEL" "$DATA" --out "$RUN"
