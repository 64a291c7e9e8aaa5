#!/bin/bash
#SBATCH --job-name=ppo-vs-grpo
#SBATCH --output=slurm-%x-%j.log
#SBATCH --nodes=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=24:00:00
# PPO against GRPO: the same questions, sampler, evaluation and number of sampled tokens.
#   bash sbatch/ppo_vs_grpo.sh                                     # the embedded model on the CPU, minutes
#   MODEL=Qwen/Qwen2.5-3B-Instruct DATA=gsm8k TOKENS=30000000 sbatch sbatch/ppo_vs_grpo.sh
# More arguments go to both scripts: bash sbatch/ppo_vs_grpo.sh --eval-questions 200
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

MODEL=${MODEL:-}                # hub id, folder or run; empty: the embedded model
DATA=${DATA:-}                  # data set; empty: the model's default
TOKENS=${TOKENS:-150000}        # tokens that each may sample for training
SEED=${SEED:-0}
OUT=${OUT:-runs/ppo-vs-grpo-s$SEED}
PYTHON=${PYTHON:-python}

for method in grpo ppo; do
    if [ ! -e "$OUT/$method/final" ]; then  # a job that was killed goes on where it was
        if [ -e "$OUT/$method/config.json" ]; then
            "$PYTHON" $method.py --out "$OUT/$method" --resume
        else
            "$PYTHON" $method.py --out "$OUT/$method" --model "$MODEL" --data "$DATA" --seed "$SEED" \
                --max-steps 1000000 --token-budget "$TOKENS" "$@"
        fi
    fi
done
"$PYTHON" eval.py compare "$OUT/grpo" "$OUT/ppo" --examples 0
"$PYTHON" eval.py plot "$OUT/grpo" "$OUT/ppo" --out "$OUT/curves.png"
