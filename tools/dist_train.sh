#!/usr/bin/env bash
# bash tools/dist_train.sh CONFIG PROCESSES [option of train.py ...]
# One process a GPU, or that many on CPU. Several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT.
set -euo pipefail
(($# >= 2)) || { echo "usage: $0 CONFIG PROCESSES [option of train.py ...]" >&2; exit 2; }
tools="$(cd "$(dirname "$0")" && pwd)"

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$tools/train.py" "$1" --launcher pytorch "${@:3}"
