"""Seconds of a DPO or SFT step: TRL's trainer beside a step of dpo.py's or sft.py's own functions.

    python bench/models.py /tmp/tiny --eos-prob 0.02
    python bench/pairs_step.py --method dpo --model /tmp/tiny --rounds 5
    python bench/pairs_step.py --method sft --model /tmp/tiny --rounds 5
    python bench/pairs_step.py --method dpo --model /tmp/tiny --check      # loss, gradient norm as TRL's

A step: log-probs of the reference (dpo; --cached: those of a second pass, kept from the first), forward,
backward, clip, AdamW; LoRA on all linear layers, float32, no gradient checkpointing, on the CPU. Prompts of
32 to 64 tokens, replies of log-normal length up to --new. Each side runs in a process of its own; a round
runs both, and the median of the rounds' ratios counts. --micro is TRL's batch per forward pass (unrolled has
its token budget).
TRL is optional: pip install trl peft datasets accelerate.
"""

import json
import math
import os
import random
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import nn

import dpo
import sft
from bench import beside
from bench.models import read_prompts
from common import data, models

CPU = torch.device("cpu")


def make_rows(a):
    """Prompts with a chosen and a rejected reply, --batch for each step."""
    rng, prompts = random.Random(a.seed), read_prompts(a.model)

    def reply():
        length = int(min(a.new, max(8, rng.lognormvariate(math.log(a.new / 3), 0.6))))
        return "".join(rng.choices("0123456789 ", k=length - 1))  # the end token makes up the rest

    return [{"prompt": prompts[i % len(prompts)], "chosen": reply(), "rejected": reply()}
            for i in range(a.steps * a.batch)]


def load_ours(a):
    """(model, its trainable parameters, tokenizer, arguments) as dpo.py's main makes them."""
    torch.manual_seed(a.seed)
    args = dpo.Args(lora_r=a.rank, lora_alpha=2 * a.rank, lr=a.lr, beta=a.beta, loss=a.loss,
                    length_normalize=a.loss == "ipo", tokens_per_batch=2048)
    model = models.load_model(a.model, torch.float32, CPU)
    params = dpo.add_lora(model, "policy", args.lora_r, args.lora_alpha, args.lora_targets)
    model.train()
    return model, params, models.load_tokenizer(a.model), args


def make_pairs(tokenizer, rows):
    def completion(text):
        return data.encode_completion(tokenizer, text, tokenizer.eos_token_id)

    return [dpo.Pair(tokenizer(row["prompt"])["input_ids"], completion(row["chosen"]),
                     completion(row["rejected"])) for row in rows]


def add_reference(model, pairs, args):
    with dpo.use_adapter(model, None):
        refs = dpo.completion_logprobs(
            model, [p.prompt_ids for p in pairs] * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs],
            1.0, args.tokens_per_batch, CPU)
    for pair, chosen, rejected in zip(pairs, refs, refs[len(pairs):]):
        pair.ref_chosen, pair.ref_rejected = chosen.sum().item(), rejected.sum().item()


def unrolled(a):
    model, params, tokenizer, args = load_ours(a)
    optimizer = torch.optim.AdamW(params, lr=a.lr, weight_decay=0.0)
    pairs, steps = make_pairs(tokenizer, make_rows(a)), []
    if a.cached and a.method == "dpo":
        add_reference(model, pairs, args)
    for step in range(a.steps):
        batch, start, seconds = pairs[step * a.batch:(step + 1) * a.batch], time.perf_counter(), {}
        if a.method == "dpo" and not a.cached:
            add_reference(model, batch, args)
            seconds["reference"] = time.perf_counter() - start
        if a.method == "dpo":
            dpo.accumulate_gradients(model, batch, args, len(batch), args.tokens_per_batch, CPU)
        else:
            rows = [(p.prompt_ids, p.chosen) for p in batch]
            sft.accumulate_gradients(model, rows, sum(len(c) for _, c in rows), args.tokens_per_batch, CPU)
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(seconds | {"step": time.perf_counter() - start})
    return steps


def make_trainer(a, folder, rows, callbacks=()):
    """TRL's trainer for the method, over the rows in their order."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    micro = a.micro or a.batch
    common = dict(
        output_dir=folder, max_steps=a.steps, seed=a.seed, use_cpu=True, dataloader_pin_memory=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, learning_rate=a.lr, lr_scheduler_type="constant",
        per_device_train_batch_size=micro, gradient_accumulation_steps=a.batch // micro, max_length=1024)
    if a.method == "dpo":
        config = DPOConfig(**common, beta=a.beta, loss_type=a.loss, precompute_ref_log_probs=a.cached)
        make = DPOTrainer
    else:
        config, make = SFTConfig(**common), SFTTrainer
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    trainer = make(
        model=AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(a.model),
        peft_config=LoraConfig(r=a.rank, lora_alpha=2 * a.rank, lora_dropout=0.0, task_type="CAUSAL_LM",
                               target_modules=list(models.PROJECTIONS)), callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl(a, folder):
    from transformers import TrainerCallback

    steps = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.last = time.perf_counter()

        def on_step_end(self, *_, **__):
            now = time.perf_counter()
            steps.append({"step": now - self.last})
            self.last = now

    make_trainer(a, folder, make_rows(a), [Clock()]).train()
    return steps


def measure(a, side):
    """Run one side in this process; the figures of its steps after the warm-up."""
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        steps = unrolled(a) if side == "unrolled" else trl(a, folder)
    return {"bench": "pairs_step", "side": side, "seconds": beside.median_of(steps, a.warmup),
            "peak_gb": round(beside.peak_memory_gb(), 3)}


def check(a):
    """Loss and gradient norm of both on one batch, from the same adapter, away from its start."""
    torch.set_num_threads(a.threads)
    a.steps = 1
    model, params, tokenizer, args = load_ours(a)
    with torch.no_grad():
        for p in params[1::2]:  # the Bs
            p.add_(0.02 * torch.randn_like(p))
    pairs = make_pairs(tokenizer, make_rows(a))
    if a.method == "dpo":
        add_reference(model, pairs, args)
        loss = dpo.accumulate_gradients(model, pairs, args, len(pairs), args.tokens_per_batch, CPU)["loss"]
        loss /= len(pairs)
    else:
        rows = [(p.prompt_ids, p.chosen) for p in pairs]
        loss = sft.accumulate_gradients(model, rows, sum(len(c) for _, c in rows), args.tokens_per_batch, CPU)
    norm = torch.cat([p.grad.flatten() for p in params]).norm().item()
    a.micro = 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(a, folder, make_rows(a))
        theirs = dict(trainer.model.named_parameters())
        with torch.no_grad():
            for path, pair in dpo.adapter_tensors(model, "policy").items():
                for letter, value in zip("AB", pair):
                    theirs[f"base_model.model.{path}.lora_{letter}.default.weight"].copy_(value)
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        their_loss = trainer.compute_loss(trainer.model, inputs)
        their_loss.backward()
    grads = [p.grad.flatten() for p in theirs.values() if p.grad is not None]
    return {"check": a.method, "loss": loss, "trl_loss": their_loss.item(), "grad_norm": norm,
            "trl_grad_norm": torch.cat(grads).norm().item(), "tensors": len(grads), "ours": len(params)}


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that bench/models.py wrote")
    parser.add_argument("--method", choices=("dpo", "sft"), required=True)
    parser.add_argument("--batch", type=int, default=16, help="pairs, or rows of SFT, a step")
    parser.add_argument("--new", type=int, default=256, help="longest reply, tokens")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss", choices=("sigmoid", "ipo", "hinge"), default="sigmoid",
                        help="ipo: over mean log-ratios, as TRL has it")
    parser.add_argument("--cached", action="store_true", help="reference log-probs are kept from before")
    parser.add_argument("--check", action="store_true", help="compare loss and gradient norm, not speed")
    beside.add_arguments(parser)
    a = parser.parse_args()
    if a.micro and a.batch % a.micro:
        parser.error(f"--micro {a.micro} does not divide the {a.batch} rows of a step")
    if a.check:
        print(json.dumps(check(a)))
    else:
        beside.compare(a, parser, __file__, measure)


if __name__ == "__main__":
    main()
