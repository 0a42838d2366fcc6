#!/usr/bin/env bash
# bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [option of test.py ...]
# Resources by GPUS, GPUS_PER_NODE, CPUS_PER_TASK; anything else for srun in SRUN_ARGS.
set -euo pipefail
(($# >= 4)) || { echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [option of test.py ...]" >&2; exit 2; }
source "$(dirname "$0")/_slurm.sh"
run_on_slurm "$1" "$2" "$tools/test.py" "$3" "$4" "${@:5}"
