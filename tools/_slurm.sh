# Sourced by slurm_train.sh and slurm_test.sh: run_on_slurm PARTITION JOB_NAME COMMAND ...
# Resources by GPUS, GPUS_PER_NODE, CPUS_PER_TASK; anything else for srun in SRUN_ARGS.
tools="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

run_on_slurm() {
    read -ra srun_args <<<"${SRUN_ARGS:-}"
    PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec srun -p "$1" \
        --job-name="$2" \
        --gres="gpu:${GPUS_PER_NODE:-8}" \
        --ntasks="${GPUS:-8}" \
        --ntasks-per-node="${GPUS_PER_NODE:-8}" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${srun_args[@]+"${srun_args[@]}"} \
        python -u "${@:3}" --launcher=slurm
}
