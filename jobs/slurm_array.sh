#!/bin/sh
# Embed an archive on Slurm in 16 jobs that need not run at the same time:
#   sbatch --array 1-16 --cpus-per-task 16 jobs/slurm_array.sh SOURCE STORE 16
# The number of parts stays 16 when some are run again: --array 3,7
set -eu
exec embedder extract "$1" "$2" --part "$SLURM_ARRAY_TASK_ID/$3"
