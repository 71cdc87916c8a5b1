#!/bin/sh
# Embed an archive on Slurm: sbatch --nodes 4 --cpus-per-task 16 jobs/slurm.sh SOURCE STORE
#SBATCH --ntasks-per-node=1
set -eu
file=$PWD/scheduler-$SLURM_JOB_ID.json
dask scheduler --scheduler-file "$file" --port 0 --no-dashboard &
while [ ! -s "$file" ]; do sleep 1; done
address=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$file")
srun dask worker "$address" --nworkers 1 --nthreads "$SLURM_CPUS_PER_TASK" --no-dashboard &
embedder extract "$1" "$2" --scheduler "$address"
rm -f "$file"
