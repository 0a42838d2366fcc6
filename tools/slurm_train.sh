#!/usr/bin/env bash
# bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [option of train.py ...]
# Resources by GPUS, GPUS_PER_NODE, CPUS_PER_TASK; anything else for srun in SRUN_ARGS.
set -euo pipefail
(($# >= 4)) || { echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [option of train.py ...]" >&2; exit 2; }
source "$(dirname "$0")/_slurm.sh"
run_on_slurm "$1" "$2" "$tools/train.py" "$3" --work-dir="$4" "${@:5}"
