#!/bin/bash
# PPO against GRPO: the same questions, sampler, evaluation and number of sampled tokens.
#   bash sbatch/ppo_vs_grpo.sh                                     # the embedded model on the CPU, minutes
#   ACCOUNT=my-project MODEL=Qwen/Qwen2.5-3B-Instruct DATA=gsm8k TOKENS=30000000 \
#       bash sbatch/ppo_vs_grpo.sh --sbatch "--gpus=1 --time=24:00:00"
# --sbatch sends jobs with these options, each after those it needs: the start model on the test split, both
# trainings, both trained models on the test split, the comparison. --dry prints them only.
# More arguments go to both trainings: bash sbatch/ppo_vs_grpo.sh --eval-questions 200
set -euo pipefail

MODEL=${MODEL:-}                # hub id, folder or run; empty: the embedded model
DATA=${DATA:-}                  # data set; empty: the model's default
TOKENS=${TOKENS:-150000}        # tokens that each may sample for training
SEED=${SEED:-0}
OUT=${OUT:-runs/ppo-vs-grpo-s$SEED}
CPU=${CPU:-}                    # sbatch options of jobs without a GPU, with a network: these download first

here=$(dirname "$0") jobs='' options='' dry=''
while [[ ${1:-} == --sbatch || ${1:-} == --dry ]]; do
    jobs=1
    if [ "$1" = --dry ]; then dry=--dry; else options=${2?--sbatch needs options, such as --gpus=1}; shift; fi
    shift
done
start=(--model "$MODEL" --data "$DATA" --seed "$SEED")
training=("${start[@]}" --max-steps 1000000 --token-budget "$TOKENS" "$@")

if [ -z "$jobs" ]; then
    for method in grpo ppo; do
        bash "$here/train.sbatch" $method.py --out "$OUT/$method" "${training[@]}"
    done
    bash "$here/train.sbatch" runs.py compare "$OUT/grpo" "$OUT/ppo" --examples 0
    bash "$here/train.sbatch" runs.py plot "$OUT/grpo" "$OUT/ppo" --out "$OUT/curves.png"
    exit
fi

send() {  # send NAME IDS OPTIONS SCRIPT ...: a job that starts when the jobs IDS, if any, are done; sets id
    local name=$1 ids=$2 words
    read -ra words <<< "$3"
    shift 3
    words+=(--job-name="$name" --parsable --kill-on-invalid-dep=yes)
    [ -z "$ids" ] || words+=(--dependency="afterok:$ids")
    if [ -n "$dry" ]; then
        bash "$here/submit.sh" --dry "${words[@]}" "$@"
        id=$name
    else
        id=$(bash "$here/submit.sh" "${words[@]}" "$@")
        id=${id%%;*}  # ID;CLUSTER where there are several
        echo "$name: job $id"
    fi
}

id=''
[ -z "$CPU" ] || send download '' "$CPU" grpo.py --out "$OUT/download" "${start[@]}" --download-only
send baseline "$id" "$options" eval.py --out "$OUT/baseline" "${start[@]}"
baseline=$id evaluated=''
for method in grpo ppo; do
    send $method "$baseline" "$options" $method.py --out "$OUT/$method" "${training[@]}"
    send eval-$method "$id" "$options" eval.py --out "$OUT/eval-$method" --model "$OUT/$method" \
        --seed "$SEED"
    evaluated+=${evaluated:+:}$id
done
send compare "$evaluated" "${CPU:-$options}" \
    runs.py compare "$OUT/eval-grpo" "$OUT/eval-ppo" "$OUT/baseline" --examples 0
send plot "$evaluated" "${CPU:-$options}" runs.py plot "$OUT/grpo" "$OUT/ppo" --out "$OUT/curves.png"
