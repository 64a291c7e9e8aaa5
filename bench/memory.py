"""The memory of runs: measured beside the estimate of estimate.py; and a plan of GPUs by size of model.

    python bench/memory.py           # dry runs, one process at a time: minutes each on two cores, up to 10 GB
    python bench/memory.py --only full
    python bench/memory.py --plan    # the estimate alone: seconds

Measured is the peak that a script's --dry-run prints, on models of random weights with a byte-level tokenizer
as large as Qwen2.5's. glibc is told to hand freed blocks back at once (MALLOC_MMAP_THRESHOLD_): left alone it
keeps those of up to 32 MB, and the same runs take some per cent more.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import tyro
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen2ForCausalLM

import grpo
from bench import estimate
from bench.models import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # hidden, MLP, layers, heads, key heads, vocabulary, tied embeddings: as published
    "Qwen2.5 0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen2.5 3B": (2048, 11008, 36, 16, 2, 151_936, True),
    "Qwen2.5 7B": (3584, 18944, 28, 28, 4, 152_064, False),
    "Qwen2.5 14B": (5120, 13824, 48, 40, 8, 152_064, False),
    "Qwen2.5 32B": (5120, 27648, 64, 40, 8, 152_064, False),
    "Llama 3 70B": (8192, 28672, 80, 64, 8, 128_256, False)}
SMALL, NARROW = (256, 1376, 8, 4, 2, 151_936, True), (512, 2048, 8, 8, 2, 2048, True)

STEP = "--data arithmetic --prompts-per-step 4 --num-generations 4 --max-new-tokens 32 --eval-questions 16 "
RUNS = [  # model, script, flags
    ("0.5B", "grpo.py", STEP + "--tokens-per-batch 1024"),
    ("0.5B", "grpo.py", STEP + "--tokens-per-batch 512"),
    ("0.5B", "grpo.py", STEP + "--tokens-per-batch 1024 --gradient-checkpointing"),
    ("small", "grpo.py", STEP + "--tokens-per-batch 1024 --full --beta 0.04"),
    ("small", "grpo.py", STEP.replace("step 4", "step 16") + "--tokens-per-batch 128 --max-new-tokens 64"),
    ("small", "ppo.py", STEP + "--tokens-per-batch 512"),
    ("small", "ppo.py", STEP + "--tokens-per-batch 512 --full --beta 0.04"),
    ("narrow", "grpo.py", STEP + "--tokens-per-batch 1024"),
    ("narrow", "grpo.py", STEP + "--tokens-per-batch 1024 --quantize nf4"),
    ("narrow", "grpo.py", STEP.replace("step 4", "step 16") + "--tokens-per-batch 4096 --full"),
    ("narrow", "dpo.py", "--data arithmetic --max-new-tokens 32 --tokens-per-batch 2048 --full"),
]


def config(shape):
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = shape
    family = LlamaConfig if vocabulary == 128_256 else Qwen2Config  # which has biases
    return family(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                  num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
                  tie_word_embeddings=tied, max_position_embeddings=32768)


def build(folder, shape, dtype):
    """Write a random model, and a tokenizer. Its dtype is the run's: loading need not convert it."""
    tokenizer = make_tokenizer(shape[5])
    torch.manual_seed(0)
    settings = config(shape)
    settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    Qwen2ForCausalLM(settings).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(only):
    """Run those of RUNS whose words hold `only`, one after the other; prints a row of the table for each."""
    print("| model | run | largest phase | measured, GB | estimated, GB | error |\n"
          "| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as home:
        for name, script, words in RUNS:
            if only not in f"{name} {script} {words}":
                continue
            folder = Path(home, name)
            if not folder.exists():
                build(folder, {"small": SMALL, "narrow": NARROW}.get(name) or SHAPES[f"Qwen2.5 {name}"],
                      torch.float32)
            command = [sys.executable, str(ROOT / script), "--dry-run", "--model", folder, *words.split()]
            done = subprocess.run(command, capture_output=True, text=True, cwd=home, check=False,
                                  env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)})
            found = re.search(r"up to (\d+) tokens.*peak memory ([\d.]+) of", done.stdout, re.DOTALL)
            if not found:
                sys.exit(f"{script} {words} failed:\n{done.stderr[-2000:]}")
            args = tyro.cli(importlib.import_module(Path(script).stem).Args, args=words.split())
            row, measured = int(found[1]), float(found[2])
            row += args.max_new_tokens if "prompts up to" in done.stdout else 0
            settings = AutoConfig.from_pretrained(folder)
            parts = estimate.peak(estimate.estimate(settings, **estimate.of_run(
                args, Path(script).stem, settings, torch.device("cpu"), row)), first_step=True)
            estimated, phase = parts["sum"], next(p for p in estimate.PHASES.values() if p in parts)
            words = words.removeprefix("--data arithmetic ")
            print(f"| {name} | `{script} {words}` | {phase} | {measured:.2f} | {estimated:.2f} | "
                  f"{estimated / measured - 1:+.1%} |", flush=True)


CARDS, RANKS = (24, 40, 80), (2, 4, 8, 16, 32, 64)
LORA, FULL = "--gradient-checkpointing", "--full --gradient-checkpointing"
FLAGS = ("", LORA, f"{LORA} --quantize nf4", f"{LORA} --shard",
         "--full", FULL, f"{FULL} --shard")


def per_gpu(shape, settings, flags, ranks, a):
    """GB of grpo.py's peak with `flags`, by part."""
    args = grpo.Args(full="--full" in flags, gradient_checkpointing="checkpointing" in flags, slots=a.slots,
                     dtype="bfloat16", max_new_tokens=a.new, tokens_per_batch=a.tokens_per_batch)
    args = SimpleNamespace(**vars(args) | {"shard": "--shard" in flags,
                                           "quantize": "nf4" if "nf4" in flags else ""})
    setup = estimate.of_run(args, "grpo", settings, torch.device("cuda"), a.prompt + a.new, ranks=ranks)
    return estimate.peak(estimate.estimate(shape, **setup))


def plan(a):
    """For each model and set of flags that fits, a row: fewest GPUs, and what one of the largest card holds.

    A tenth of a card is left for what the estimate leaves out.
    """
    print("| model | flags | GPUs of 24 GB | 40 GB | 80 GB | weights | optimizer | cache | largest phase "
          "| sum |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, sizes in SHAPES.items():
        shape, whole = estimate.Shape(config(sizes)), set()
        for flags in FLAGS:
            full, split = "--full" in flags, "--shard" in flags
            if split and full in whole:
                continue
            options = {n: per_gpu(shape, config(sizes), flags, n, a) for n in (RANKS if split else (1,))}
            fewest = [next((n for n in options if options[n]["sum"] <= 0.9 * card), 0) for card in CARDS]
            if not fewest[-1]:
                continue
            if fewest[0] and not split and "nf4" not in flags:
                whole.add(full)  # on the smallest card: nothing to split
            parts = options[fewest[-1]]
            phase = next(phase for phase in estimate.PHASES.values() if phase in parts)
            print(f"| {name} | {flags and f'`{flags}`'} | " + " | ".join(str(n or "-") for n in fewest)
                  + "".join(f" | {parts[part]:.1f}" for part in ("weights", "optimizer", "cache"))
                  + f" | {phase} {parts[phase]:.1f} | {parts['sum']:.1f} |")


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the plan of GPUs, and measure nothing")
    parser.add_argument("--only", default="", help="measure the runs whose words hold this text")
    parser.add_argument("--prompt", type=int, default=512, help="of the plan: tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=512, help="and of the longest completion")
    parser.add_argument("--slots", type=int, default=64, help="rows sampled at a time per GPU")
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="in a forward and backward pass")
    a = parser.parse_args()
    plan(a) if a.plan else measure(a.only)


if __name__ == "__main__":
    main()
