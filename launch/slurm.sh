#!/usr/bin/env bash
# A run on several nodes under SLURM, to be edited where your cluster differs:
#
#   sbatch --nodes 16 launch/slurm.sh --recipe radio-v2.5-h --data.images '/data/{00000..01287}.tar'
#
# OUT (default runs/slurm) must be on a disk that all nodes see. A job that is preempted, requeued or
# out of time goes on from its last checkpoint when it starts again; submit it once more after the
# time limit. RESTARTS (default 3): how often torchrun starts all ranks anew when one dies.
#SBATCH --job-name=fastagglo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
set -euo pipefail

out=${OUT:-runs/slurm}
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

run=(train.py "$@" --out "$out")
if [ -f "$out/checkpoint.pt" ]; then
    run=(train.py --resume "$out")
fi

# Ranks that are started again must not read the addresses of the dead from torchrun's own store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# SIGTERM, three minutes before the limit, reaches every rank: it finishes its step and saves.
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$gpus" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:${PORT:-29500}" \
    --max-restarts "${RESTARTS:-3}" \
    "${run[@]}"
