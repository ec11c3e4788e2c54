#!/usr/bin/env bash
# Slurm: one launcher a node, which starts that node's ranks; Slurm queues, places, ends and restarts.
#
#   sbatch --nodes=12 common/launch/slurm.sh ViT_for_PyTorch/test/train_cluster.sh --data_path=DIR --nproc=8 ...
#
# Submit from the repository's root, on a file system that all nodes share. Set --gres to your cluster's name of the
# cards (npu:8, gpu:8) and --partition; whatever is given to sbatch goes before what is written here. Activate the
# Python environment before sbatch, which passes it on, or in a line before srun.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

(($#)) || { echo "error: sbatch common/launch/slurm.sh SCRIPT.sh FLAGS..." >&2; exit 2; }
script=$1
shift
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
master_addr=${hosts%%$'\n'*}
master_port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs that meet on one node do not meet on one port
export script master_addr master_port

# SLURM_NODEID is known only inside the step. --wait ends the others when one has ended: not at once, since the nodes
# of a preempted run (SIGTERM, 120 s before the time limit) may still be writing their part of the checkpoint.
code=0
srun --ntasks-per-node=1 --wait=60 --label bash -c \
  'exec bash "$script" --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" --master_addr="$master_addr" \
    --master_port="$master_port" "$@"' slurm "$@" || code=$?
# stopped with a checkpoint: the same job again, which goes on from it, unless it was cancelled
if ((code == 75)) && [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
