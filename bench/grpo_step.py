"""Seconds of a GRPO step: TRL's GRPOTrainer beside a step of grpo.py's own functions, same model, same sizes.

    python bench/models.py /tmp/tiny --eos-prob 0.02
    python bench/grpo_step.py --model /tmp/tiny --prompts 8 --group 8 --new 128 --beta 0.04 --rounds 5

A step: sample, reward (the share of odd token ids), log-probs of the reference if beta > 0, forward,
backward, clip, AdamW; LoRA on all linear layers, float32, no gradient checkpointing, on the CPU. Each side
runs in a process of its own, which reports its seconds per step by phase and its peak memory; a round runs
both, now this one first and now that, and the median of the rounds' ratios counts. --micro is TRL's batch per
forward pass (unrolled has its token budget): with the wide vocabulary give 8, or each copy of its logits
takes 5 GB. TRL is optional: pip install trl peft datasets accelerate.
"""

import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import nn

import grpo
from bench import beside
from bench.models import read_prompts
from common import models
from common.run import retry_smaller


def odd_share(ids):
    return sum(token % 2 for token in ids) / max(1, len(ids))


def one_step(model, params, optimizer, sampler, prompt_ids, args, step, device, tokenizer=None):
    """One optimizer step as grpo.py's loop makes it; the seconds of each phase, and the completions' lengths.

    args: grpo.Args, resolved; its tokens_per_batch is halved in place when memory runs out. With a tokenizer
    the completions are decoded too, as for a reward that reads text.
    """
    seconds, device = {}, torch.device(device)

    @contextmanager
    def phase(name):
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start

    def within_memory(attempt):
        result, args.tokens_per_batch = retry_smaller(attempt, args.tokens_per_batch, device,
                                                      max(map(len, rollouts)), "tokens per batch")
        return result

    with phase("sample"):
        keys = [[grpo.noise_key(args.seed, step, p, g) for g in range(args.num_generations)]
                for p in range(len(prompt_ids))]
        completions = sampler.sample(prompt_ids, keys, args.max_new_tokens, args.temperature)
    with phase("reward"):
        rollouts = [grpo.Rollout(None, p, g, prompt_ids[p], completion)
                    for p, row in enumerate(completions) for g, completion in enumerate(row)]
        for r in rollouts:
            r.response = tokenizer.decode(r.completion.ids, skip_special_tokens=True) if tokenizer else ""
            r.reward = odd_share(r.completion.ids)
            r.old_logprobs = torch.tensor(r.completion.logprobs)
    if args.beta:
        with phase("reference"), grpo.use_adapter(model, None):
            ids = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
            reference = within_memory(
                lambda size: grpo.completion_logprobs(model, *ids, args.temperature, size, device))
            for r, values in zip(rollouts, reference):
                r.ref_logprobs = values
    with phase("update"):
        advantages = grpo.group_advantages(torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
                                           torch.tensor([r.group for r in rollouts]), args.group_scaling)
        for r, advantage in zip(rollouts, advantages.tolist()):
            r.advantage = advantage
        live = [r for r in rollouts if r.advantage or args.beta]
        n_tokens = sum(len(r.completion.ids) for r in rollouts)

        def attempt(size):
            optimizer.zero_grad()
            return grpo.accumulate_gradients(model, live, args, len(rollouts), n_tokens, size, device)

        within_memory(attempt)
        nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        optimizer.step()
    return seconds, [len(r.completion.ids) for r in rollouts]


def unrolled(a):
    device = torch.device("cpu")
    torch.manual_seed(a.seed)
    args = grpo.Args(  # aggregation: TRL's default
        seed=a.seed, num_generations=a.group, max_new_tokens=a.new, beta=a.beta, lora_r=a.rank,
        lora_alpha=2 * a.rank, lr=a.lr, slots=a.prompts * a.group, aggregation="token", tokens_per_batch=2048)
    tokenizer = models.load_tokenizer(a.model)
    model = models.load_model(a.model, torch.float32, device)
    params = grpo.add_lora(model, "policy", args.lora_r, args.lora_alpha, args.lora_targets)
    model.train()
    optimizer = torch.optim.AdamW(params, lr=a.lr, weight_decay=0.0)
    sampler = grpo.Sampler(model, models.stop_ids(model, tokenizer), args.slots)
    prompts, steps, lengths = tokenizer(step_prompts(a))["input_ids"], [], []
    for step in range(a.steps):
        batch = prompts[step * a.prompts:(step + 1) * a.prompts]
        start = time.perf_counter()
        seconds, n = one_step(model, params, optimizer, sampler, batch, args, step, device, tokenizer)
        steps.append(seconds | {"step": time.perf_counter() - start})
        lengths.append(n)
    return steps, lengths


def step_prompts(a):
    """Prompts for all steps, none twice unless the file has too few."""
    prompts = read_prompts(a.model)
    return [prompts[i % len(prompts)] for i in range(a.steps * a.prompts)]


def trl(a, folder):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    total = a.prompts * a.group
    micro = a.micro or total
    steps, lengths, phases = [], [], defaultdict(float)

    def reward(completion_ids, **_):  # called once a step, with all of its samples
        lengths.append([len(ids) for ids in completion_ids])
        return [odd_share(ids) for ids in completion_ids]

    def timed(obj, name, phase):
        inner = getattr(obj, name)

        def outer(*args, **kwargs):
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                phases[phase()] += time.perf_counter() - start

        setattr(obj, name, outer)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.last = time.perf_counter()

        def on_step_end(self, *_, **__):
            now = time.perf_counter()
            steps.append({**phases, "rest": now - self.last - sum(phases.values()), "step": now - self.last})
            phases.clear()
            self.last = now

    config = GRPOConfig(
        output_dir=folder, max_steps=a.steps, seed=a.seed, use_cpu=True, dataloader_pin_memory=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, learning_rate=a.lr, lr_scheduler_type="constant", beta=a.beta,
        per_device_train_batch_size=micro, gradient_accumulation_steps=total // micro, num_iterations=1,
        num_generations=a.group, max_completion_length=a.new, temperature=1.0, top_k=0)
    lora = LoraConfig(r=a.rank, lora_alpha=2 * a.rank, lora_dropout=0.0, task_type="CAUSAL_LM",
                      target_modules=list(models.PROJECTIONS))
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(a.model, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in step_prompts(a)]),
        reward_funcs=reward, args=config, peft_config=lora, callbacks=[Clock()])
    timed(trainer, "_generate_single_turn", lambda: "sample")
    timed(trainer, "_calculate_rewards", lambda: "reward")
    timed(trainer, "_get_per_token_logps_and_entropies",
          lambda: "forward" if torch.is_grad_enabled() else "reference")
    timed(trainer.accelerator, "backward", lambda: "backward")
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps, lengths


def measure(a, side):
    """Run one side in this process; the figures of its steps after the warm-up."""
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        steps, lengths = unrolled(a) if side == "unrolled" else trl(a, folder)
    lengths = lengths[a.warmup:]
    flat = [n for step in lengths for n in step]
    return {"bench": "grpo_step", "side": side, "seconds": beside.median_of(steps, a.warmup),
            "longest": max(flat), "mean_length": round(statistics.mean(flat), 1),
            "tokens_per_step": round(sum(flat) / len(lengths)), "peak_gb": round(beside.peak_memory_gb(), 3)}


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that bench/models.py wrote")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="samples per prompt")
    parser.add_argument("--new", type=int, default=128, help="longest completion, tokens")
    parser.add_argument("--beta", type=float, default=0.04, help="KL coefficient; 0: no reference pass")
    beside.add_arguments(parser)
    a = parser.parse_args()
    if a.micro and a.prompts * a.group % a.micro:
        parser.error(f"--micro {a.micro} does not divide the {a.prompts * a.group} samples of a step")
    beside.compare(a, parser, __file__, measure)


if __name__ == "__main__":
    main()
