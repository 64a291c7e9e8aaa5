"""Tokens per second of transformers' `generate` (dynamic cache) and of grpo.py's Sampler, on the same work.

    python bench/models.py /tmp/tiny --eos-prob 0.02
    python bench/sampling.py --model /tmp/tiny --prompts 8 --group 8 --new 128 --rounds 5
    python bench/sampling.py --model SmolLM2-135M-Instruct --plain     # common/generic.py's sampler, sums as prompts

One process, on the CPU in float32. Each round times both, one after the other, now this one first and now
that; only figures of the same round are divided, for a machine's speed drifts. Tokens count up to and
including the end token. Prints one JSON line: both rates of each round and the median of the rounds' ratios;
`logprob_gap` is how far the sampler's log-probs are from transformers' own.
"""

import json
import os
import statistics
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

import grpo
from bench.models import read_prompts
from common import data, generic, models


def make_generate(folder, tokenizer, prompts, group, new):
    """A function that samples with transformers and returns the lengths of the completions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end, repeated = tokenizer.eos_token_id, [prompt for prompt in prompts for _ in range(group)]
    config = GenerationConfig(max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              eos_token_id=end, pad_token_id=tokenizer.pad_token_id, disable_compile=True)

    @torch.inference_mode()
    def generate(seed):
        torch.manual_seed(seed)
        batch = tokenizer(repeated, return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1]:]
        return [row.index(end) + 1 if end in row else len(row) for row in ids.tolist()]

    return generate, model


def make_sampler(folder, tokenizer, prompts, group, new, plain=False):
    """A function that samples with grpo.Sampler, or PlainSampler, and returns the completions' lengths."""
    model = models.load_model(folder, torch.float32, torch.device("cpu"))
    Sampler = generic.PlainSampler if plain else grpo.Sampler
    sampler = Sampler(model, models.stop_ids(model, tokenizer), slots=len(prompts) * group)

    def sample(seed):
        keys = [[grpo.noise_key(seed, p, g) for g in range(group)] for p in range(len(prompts))]
        return [len(c.ids) for row in sampler.sample(tokenizer(prompts)["input_ids"], keys, new) for c in row]

    return sample, sampler


@torch.no_grad()
def logprob_gap(model, sampler, prompt_ids, new):
    """Largest difference between the sampler's log-probs and transformers', one completion of each prompt."""
    gap = 0.0
    for ids, (c,) in zip(prompt_ids, sampler.sample(prompt_ids, [[p] for p in range(len(prompt_ids))], new)):
        logprobs = model(torch.tensor([ids + c.ids])).logits[0, len(ids) - 1:-1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        gap = max(gap, (expected - torch.tensor(c.logprobs)).abs().max().item())
    return gap


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that bench/models.py wrote, or any model's")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="samples per prompt")
    parser.add_argument("--new", type=int, default=128, help="longest completion, tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="by the model's own forward pass and cache")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    tokenizer = models.load_tokenizer(args.model)
    if Path(args.model, "prompts.jsonl").exists():
        prompts = read_prompts(args.model)[:args.prompts]
    else:
        prompts = [data.render(tokenizer, [{"role": "user", "content": e.prompt}])
                   for e in data.load_examples("arithmetic", limit=args.prompts)]
    settings = args.model, tokenizer, prompts, args.group, args.new
    (generate, model), (sample, sampler) = make_generate(*settings), make_sampler(*settings, args.plain)
    runs = {"generate": generate, "sampler": sample}
    rates, lengths = {name: [] for name in runs}, {name: [] for name in runs}
    for r in range(args.rounds + 1):
        for name in list(runs)[::-1 if r % 2 else 1]:
            start = time.perf_counter()
            n = runs[name](seed=r)
            seconds = time.perf_counter() - start
            if r:  # the first round is the warm-up
                rates[name].append(sum(n) / seconds)
                lengths[name] += n
    ratios = [ours / theirs for theirs, ours in zip(rates["generate"], rates["sampler"])]
    print(json.dumps({
        "bench": "sampling", **vars(args),
        "tokens_per_s": {name: [round(x, 1) for x in values] for name, values in rates.items()},
        "median": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "mean_length": {name: round(statistics.mean(values), 1) for name, values in lengths.items()},
        "longest": max(map(max, lengths.values())),
        "logprob_gap": logprob_gap(model, sampler, tokenizer(prompts)["input_ids"], args.new),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}"}))


if __name__ == "__main__":
    main()
