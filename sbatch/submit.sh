#!/bin/bash
# Send a run to SLURM: options of sbatch, then a script with its arguments; --dry prints the command only.
#   ACCOUNT=my-project bash sbatch/submit.sh --gpus=1 -C fat grpo.py --model Qwen/Qwen2.5-3B-Instruct
set -euo pipefail

ACCOUNT=${ACCOUNT:-}      # which is charged; none: this cluster asks for none
PARTITION=${PARTITION:-}  # empty: the cluster's default
LOGS=${LOGS:-logs}        # folder of the logs, NAME_ID.out
DRY=${DRY:-}              # 1: as --dry
UNROLLED=$(cd "$(dirname "$0")/.." && pwd)
export UNROLLED

if [ -z "$ACCOUNT" ]; then
    echo "error: set ACCOUNT, the account to charge; ACCOUNT=none where the cluster asks for none" >&2
    exit 1
fi
for script in "$@" ''; do
    [[ $script != *.py ]] || break
done
if [ -z "$script" ]; then
    echo "error: no script; for example: submit.sh --gpus=1 grpo.py --out runs/a" >&2
    exit 1
fi
command=(sbatch --job-name="$(basename "$script" .py)" --output="$LOGS/%x_%j.out")
[ "$ACCOUNT" = none ] || command+=(--account="$ACCOUNT")
[ -z "$PARTITION" ] || command+=(--partition="$PARTITION")
while [ "$1" != "$script" ]; do
    if [ "$1" = --dry ]; then DRY=1; else command+=("$1"); fi
    shift
done
command+=("$UNROLLED/sbatch/train.sbatch" "$@")
if [ -n "$DRY" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
mkdir -p "$LOGS"  # SLURM drops a log whose folder is not there, and says nothing
before=''
for word in "$@"; do  # where the run cannot be written is better known now than after hours in the queue
    [[ $before != --out ]] || mkdir -p "$(dirname "$word")"
    [[ $word != --out=* ]] || mkdir -p "$(dirname "${word#--out=}")"
    before=$word
done
exec "${command[@]}"
