#!/usr/bin/env bash
# A run on two nodes with 8 GPUs each that goes on where it stopped, job after job:
#   sbatch configs/accelerate/slurm.sh configs/pretrain/X.yaml train.out=runs/x key=value …
# Five minutes before the end of its time Slurm sends USR1 to this script, and to it alone (B:). It asks the run to save
# and end by touching its stop file, waits for that, and puts the job into the queue again.
#SBATCH --job-name=mmcl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mmcl-%j.log
set -u

run=
for argument in "$@"; do
  case $argument in train.out=*) run=${argument#train.out=} ;; esac
done
[ -n "$run" ] || { echo "give train.out=FOLDER: its stop file is how this script ends the run" >&2; exit 2; }

again=false
stop() {
  again=true
  mkdir -p "$run" && touch "$run/stop"
}
trap stop USR1

MMCL_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MMCL_PORT=$((29500 + SLURM_JOB_ID % 1000))
export MMCL_HOST MMCL_PORT

# one launcher per node; $SLURM_NODEID is known there alone
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
  --config_file "${MMCL_LAUNCH:-configs/accelerate/nodes_2x8.yaml}" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$MMCL_HOST" --main_process_port "$MMCL_PORT" \
  pipelines/pretrain.py "$@" --resume auto' launch "$@" &
steps=$!

# a signal ends `wait` early
while :; do
  wait "$steps"
  code=$?
  kill -0 "$steps" 2>/dev/null || break
done

if $again && [ "$code" -eq 0 ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
