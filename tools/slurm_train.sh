#!/usr/bin/env bash
# bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [option of train.py ...]
# Resources by GPUS, GPUS_PER_NODE, CPUS_PER_TASK; anything else for srun in SRUN_ARGS.
set -euo pipefail
(($# >= 4)) || { echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [option of train.py ...]" >&2; exit 2; }
tools="$(cd "$(dirname "$0")" && pwd)"
read -ra srun_args <<<"${SRUN_ARGS:-}"

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec srun -p "$1" \
    --job-name="$2" \
    --gres="gpu:${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    python -u "$tools/train.py" "$3" --work-dir="$4" --launcher=slurm "${@:5}"
