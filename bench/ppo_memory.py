"""Peak memory of a PPO step: four roles on one base (ppo.py), beside four models of their own.

    python bench/ppo_memory.py                    # Qwen2.5-0.5B's shape, random weights, float32: minutes
    python bench/ppo_memory.py --layers 2 --hidden 64 --intermediate 128 --vocabulary 512 --tokens 32

A step: log-probs of policy and reference, values of the critic, scores of the reward model, then forward and
backward of policy and critic and a step of both optimizers; LoRA of rank 16 for whoever is trained. Each side
runs in a process of its own and reports what the operating system counts, the interpreter and torch included.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import ppo
from bench import beside
from common import data, models

CPU = torch.device("cpu")


def make_model(a):
    torch.manual_seed(0)
    heads = a.hidden // 64 if a.hidden >= 128 else 2
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=a.vocabulary, hidden_size=a.hidden, intermediate_size=a.intermediate,
        num_hidden_layers=a.layers, num_attention_heads=heads, num_key_value_heads=2,
        tie_word_embeddings=True)).requires_grad_(False)


def step(a):
    """One PPO step of --rows rows of --tokens tokens, half of them prompt; the weights in millions."""
    lora = 16, 32, models.PROJECTIONS
    model = make_model(a)
    if a.side == "shared":
        bodies = [model]
        _, critic_params, params = (ppo.add_lora(model, name, *lora)
                                    for name in ("reward", "critic", "policy"))
        critic, reward = (
            (model, partial(ppo.use_adapter, model, name)) for name in ("critic", "reward"))
        reference = model, partial(ppo.use_adapter, model, None)
    else:
        bodies = [model, *(make_model(a) for _ in range(3))]
        critic, reward, reference = ((body, nullcontext) for body in bodies[1:])
        params, critic_params = (ppo.add_lora(body, "policy", *lora) for body in bodies[:2])
    head = nn.Parameter(torch.zeros(1, a.hidden))
    critic_params.append(head)
    for p in params + critic_params:
        p.requires_grad_()
    optimizers = [torch.optim.AdamW(params), torch.optim.AdamW(critic_params)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(a.vocabulary, (a.rows, a.tokens), generator=generator).tolist()
    half = a.tokens // 2
    rollouts = [ppo.Rollout(data.Example(i, ""), i, 0, row[:half],
                            ppo.Completion(row[half:], [-1.0] * (a.tokens - half), True))
                for i, row in enumerate(ids)]
    rows = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
    args = ppo.Args(tokens_per_batch=a.tokens_per_batch)
    old = ppo.completion_logprobs(model, *rows, 1.0, args.tokens_per_batch, CPU)
    with reference[1]():
        ref = ppo.completion_logprobs(reference[0], *rows, 1.0, args.tokens_per_batch, CPU)
    with critic[1]():
        values = ppo.completion_values(critic[0], head, *rows, args.tokens_per_batch, CPU)
    with reward[1](), torch.no_grad():
        scores = [models.last_token_scores(reward[0], torch.ones(1, a.hidden), [row]).item() for row in ids]
    for r, *found in zip(rollouts, old, ref, values, scores):
        r.old_logprobs, r.ref_logprobs, r.values, r.reward = found
    ppo.set_advantages(rollouts, args, 0.1, CPU)
    ppo.accumulate_gradients(model, *critic, head, rollouts, args, 0.1, a.rows * (a.tokens - half),
                             args.tokens_per_batch, CPU)
    for optimizer in optimizers:
        optimizer.step()
    return sum(p.numel() for body in bodies for p in body.parameters()) / 1e6


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--intermediate", type=int, default=4864)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a row, half of them prompt")
    parser.add_argument("--tokens-per-batch", type=int, default=512)
    parser.add_argument("--side", choices=("both", "shared", "four"), default="both", help="one: here, once")
    a = parser.parse_args()
    if a.side != "both":
        weights = step(a)
        print(json.dumps({"side": a.side, "peak_gb": round(beside.peak_memory_gb(), 3),
                          "weights_m": round(weights, 1)}))
        return
    sides = {}
    for side in ("shared", "four"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        sides[side] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"bench": "ppo_memory", **sides,
                      "ratio": round(sides["four"]["peak_gb"] / sides["shared"]["peak_gb"], 3)}))


if __name__ == "__main__":
    main()
