#!/bin/sh
# Join a Dask scheduler with a worker for each GPU of this machine: jobs/gpu_workers.sh tcp://HEAD:8786
# The workers share the cores, and end when this does; it fails if one of them has. CUDA_VISIBLE_DEVICES
# may choose among the GPUs.
set -eu
address=$1
# shellcheck disable=SC2046  # words: threads of a worker, and the GPUs
set -- $(python -c '
from embedder.machine import gpus, num_cores
found = gpus()
print(max(1, num_cores() // max(1, len(found))), *(gpu.id for gpu in found))')
threads=$1
shift
[ $# -gt 0 ] || { echo "No GPU is found" >&2; exit 1; }
# Dask would ask the driver what the GPUs do, twice a second, and kill workers for their memory.
export DASK_DISTRIBUTED__DIAGNOSTICS__NVML=False
workers=
# shellcheck disable=SC2086  # words: process ids
trap 'trap - EXIT; kill $workers 2>/dev/null || :; wait' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
for gpu in "$@"; do
    CUDA_VISIBLE_DEVICES=$gpu dask worker "$address" --resources GPU=1 --nworkers 1 \
        --nthreads "$threads" --memory-limit 0 --no-dashboard &
    workers="$workers $!"
done
status=0
for worker in $workers; do
    wait "$worker" || status=$?
done
exit $status
