#!/usr/bin/env bash
# bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [option of test.py ...]
# One process a GPU, or that many on CPU. Several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT.
set -euo pipefail
(($# >= 3)) || { echo "usage: $0 CONFIG CHECKPOINT PROCESSES [option of test.py ...]" >&2; exit 2; }
tools="$(cd "$(dirname "$0")" && pwd)"

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$tools/test.py" "$1" "$2" --launcher pytorch "${@:4}"
