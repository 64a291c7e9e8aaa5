"""Check and time a CUDA machine for grpo.py in one run of a few minutes: right first, then how fast.

    python bench/gpu.py                       # Qwen2.5-0.5B and 3B shapes, random weights made on the card
    python bench/gpu.py --shapes 0.5B --profile
    python bench/gpu.py --small               # toy sizes on any machine, a CPU too: does it run to its end?

Needs torch and transformers, and neither the network nor any other package. Prints a JSON line for each
figure as it is found, then Markdown tables; exit code 1 if a check fails or a part breaks (the rest goes on).

A decode step's limit is the larger of bytes / copy bandwidth (the weights once, every row's keys and values
once) and operations / matrix rate; both ceilings are measured first, on this card. Training counts two
operations per weight and token forward and two backward (frozen weights need no gradient of their own), with
lm_head on completion tokens alone.
"""

import gc
import json
import math
import random
import statistics
import sys
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

import grpo
from bench.grpo_step import one_step
from common import models

# hidden, intermediate, layers, heads, key-value heads, vocabulary; embeddings are tied in all
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "3B": (2048, 11_008, 36, 16, 2, 151_936),
    "one layer": (896, 4864, 1, 14, 2, 151_936),
    "check": (256, 688, 4, 4, 2, 8192),
    "toy": (64, 96, 2, 4, 2, 512)}
figures = []


def report(kind, **values):
    figures.append({"figure": kind, **values})
    print(json.dumps(figures[-1]), flush=True)


def check(name, value, limit):
    report("check", name=name, value=float(value), limit=limit, ok=bool(value <= limit))  # NaN is not


@contextmanager
def part(name, device):
    """What breaks inside is reported, and the rest of the run goes on."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:  # noqa: BLE001 (memory, a missing kernel: the other figures count still)
        traceback.print_exc()
        report("broken", part=name, error=f"{type(error).__name__}: {error}"[:300])
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def timed(run, device):
    """Seconds of run(), the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_time(run, device, repeats):
    return statistics.median(timed(run, device) for _ in range(repeats))


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device):
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None


def random_model(shape, dtype, device):
    """Random weights made on the device, wide enough that layers matter and logits differ by about a nat."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=hidden**-0.5,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def add_adapter(model, rank):
    """The policy's adapter, with a B that is not zero, so that it matters."""
    params = grpo.add_lora(model, "policy", rank, 2 * rank, models.PROJECTIONS)
    move(params)
    model.train()
    return params


@torch.no_grad()
def move(params):
    """A random step of the adapters' B, as an optimizer would make it behind the sampler's back."""
    for B in params[1::2]:
        B.add_(torch.randn_like(B), alpha=0.02)


def random_prompts(n, shortest, longest, vocabulary):
    rng = random.Random(0)
    return [rng.choices(range(vocabulary), k=rng.randint(shortest, longest)) for _ in range(n)]


def noise_keys(n, group):
    return [[grpo.noise_key(0, p, g) for g in range(group)] for p in range(n)]


def sample(sampler, prompts, group, new, temperature=1.0):
    """Flat lists: the prompt of each row, and its Completion."""
    completions = sampler.sample(prompts, noise_keys(len(prompts), group), new, temperature)
    return [p for p in prompts for _ in range(group)], [c for row in completions for c in row]


def differing(first, second):
    return sum(a != b for x, y in zip(first, second) for a, b in zip(x.ids, y.ids, strict=True))


def largest_gap(first, second):
    return max(abs(a - b) for x, y in zip(first, second) for a, b in zip(x.logprobs, y.logprobs))


# ---- ceilings ----


def measure_ceilings(device, dtype, small):
    """Bytes per second of a copy (reads and writes counted), operations per second of a matrix product."""
    n_bytes, n = (2**24, 256) if small else (2**32, 8192)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    copying, multiplying = partial(target.copy_, source), partial(torch.mm, a, b)
    for run in (copying, multiplying):
        median_time(run, device, 3)  # warm-up
    copy = 2 * n_bytes / median_time(copying, device, 10)
    matmul = 2 * n**3 / median_time(multiplying, device, 10)
    report("ceilings", copy_tb_per_s=float(f"{copy / 1e12:.3g}"),
           matrix_tflop_per_s=float(f"{matmul / 1e12:.3g}"))
    return copy, matmul


# ---- correctness ----


def check_float32(device, small):
    """Sampler and trainer against transformers' own forward pass; the number of slots changes no token."""
    shape, n_prompts, group, new = ("toy", 4, 2, 12) if small else ("check", 8, 4, 64)
    temperature, model = 0.8, random_model(shape, torch.float32, device)
    params = add_adapter(model, 8)
    prompts = random_prompts(n_prompts, 3, 60, model.config.vocab_size)
    sampler = grpo.Sampler(model, (), 64, torch.float32)
    rows, completions = sample(sampler, prompts, group, new, temperature)
    _, greedy = sample(sampler, prompts, group, new, 0)

    def logits_of(prompt, completion):
        ids = torch.tensor([prompt + completion.ids], device=device)
        return model(input_ids=ids).logits[0, len(prompt) - 1:-1], ids[0, len(prompt):, None]

    sampler_gap, greedy_gap = [], []
    with torch.no_grad():
        for prompt, drawn, best in zip(rows, completions, greedy):
            logits, ids = logits_of(prompt, drawn)
            expected = (logits / temperature).log_softmax(-1).gather(1, ids)[:, 0].cpu()
            sampler_gap.append((expected - torch.tensor(drawn.logprobs)).abs().max().item())
            logits, ids = logits_of(prompt, best)
            greedy_gap.append((logits.amax(-1) - logits.gather(1, ids)[:, 0]).max().item())
    check("float32: sampler's log-probs = transformers'", max(sampler_gap), 1e-4)
    check("float32: greedy takes transformers' best logit", max(greedy_gap), 1e-4)

    input_ids, mask = grpo.make_batch(prompts, [c.ids for c in completions[::group]], device)
    scale = torch.randn(input_ids.shape, device=device)  # a weight of its own for each token

    def gradients(logprobs):
        (logprobs * scale).sum().backward()
        flat = torch.cat([p.grad.flatten() for p in params])
        for p in params:
            p.grad = None
        return flat

    logprobs = grpo.token_logprobs(model, input_ids, mask, temperature)
    expected = (model(input_ids=input_ids).logits / temperature).log_softmax(-1)[:, :-1]
    expected = F.pad(expected.gather(2, input_ids[:, 1:, None])[..., 0], (1, 0)) * mask.to(device)
    check("float32: trainer's log-probs = transformers'", (logprobs - expected).detach().abs().max(), 1e-4)
    ours, theirs = gradients(logprobs), gradients(expected)
    check("float32: their gradients, relative", (ours - theirs).norm() / theirs.norm(), 1e-4)

    for slots in (2, 5):
        _, other = sample(grpo.Sampler(model, (), slots, torch.float32), prompts, group, new, temperature)
        check(f"float32: {slots} slots, tokens that differ from 64 slots", differing(completions, other), 0)


def check_graphs(device, dtype):
    """A captured step draws what the same step draws eagerly, also after weights moved under the graph."""
    name, model = str(dtype)[6:], random_model("check", dtype, device)
    params = add_adapter(model, 8)
    prompts = random_prompts(16, 3, 60, model.config.vocab_size)
    captured, eager = (grpo.Sampler(model, (), 64, dtype, graphs=graphs) for graphs in (True, False))
    _, before = sample(captured, prompts, 4, 64)
    for when in ("", ", after an update"):
        (_, on), (_, off) = sample(captured, prompts, 4, 64), sample(eager, prompts, 4, 64)
        check(f"{name}: graph on = off{when}: tokens that differ", differing(on, off), 0)
        check(f"{name}: graph on = off{when}: log-probs", largest_gap(on, off), 1e-5)
        move(params)
    check(f"{name}: the graph never saw the update", differing(before, on) == 0, 0)


def check_gap(model, sampler, device, shape, small):
    """The sampler's log-probs against the trainer's: what a ratio would take for a change of the policy."""
    name = f"{shape}, {str(sampler.dtype)[6:]}"
    prompts = random_prompts(*(4, 10, 20) if small else (16, 10, 150), model.config.vocab_size)
    rows, completions = sample(sampler, prompts, 2 if small else 8, 12 if small else 64)
    trained = grpo.completion_logprobs(model, rows, [c.ids for c in completions], 1.0, 8192, device)
    gap = torch.cat(trained) - torch.tensor([x for c in completions for x in c.logprobs])
    check(f"{name}: |trainer - sampler|, mean", gap.abs().mean(), 0.05)
    check(f"{name}: |trainer - sampler|, largest", gap.abs().max(), 1.0)
    check(f"{name}: mean of trainer - sampler", gap.mean().abs(), 0.01)


def check_logprob_memory(device):
    """Log-probs and gradient of [4, 1024] tokens at 151,936 words: under one float32 copy of their logits."""
    model = random_model("one layer", torch.bfloat16, device)
    add_adapter(model, 8)
    input_ids = torch.randint(0, model.config.vocab_size, (4, 1024), device=device)
    mask = torch.ones(4, 1024, dtype=torch.bool)

    def naive():
        logprobs = model(input_ids=input_ids).logits.float().log_softmax(-1)
        logprobs[:, :-1].gather(2, input_ids[:, 1:, None]).sum().backward()

    def ours():
        grpo.token_logprobs(model, input_ids, mask).sum().backward()

    for name, run in (("naive", naive), ("token_logprobs", ours)):
        gc.collect()
        torch.cuda.empty_cache()
        reset_peak(device)
        before = torch.cuda.memory_allocated()
        seconds = timed(run, device)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        report("logprob memory", form=name, peak_gb=round(peak, 2), seconds=round(seconds, 3))
    one_copy = input_ids.numel() * model.config.vocab_size * 4 / 2**30
    check("memory of [4, 1024] log-probs at 151,936 words, GB", peak, one_copy)


# ---- speed ----


def weights_of(model):
    """How many numbers the layers hold, and lm_head (the tied embedding); adapters are left out."""
    total = sum(p.numel() for name, p in model.named_parameters() if ".A." not in name and ".B." not in name)
    head = model.get_output_embeddings().weight.numel()
    return total - head, head


def decode_limit(model, rows, length, copy, matmul):
    """Seconds below which no decode step of `rows` rows of `length` tokens can come on this card."""
    c = model.config
    weights, head_dim = sum(weights_of(model)), c.hidden_size // c.num_attention_heads
    cache = rows * length * c.num_hidden_layers * 2 * c.num_key_value_heads * head_dim
    operations = rows * (2 * weights + 4 * length * c.num_hidden_layers * c.hidden_size)
    return max((weights + cache) * model.dtype.itemsize / copy, operations / matmul)


def time_decode(sampler, slots, prompt_tokens, new, device, repeats):
    """Seconds per decode step: a whole sampling call, less one that stops after the first token."""
    group = 4
    prompts = random_prompts(slots // group, prompt_tokens, prompt_tokens, sampler.model.config.vocab_size)
    run = partial(sampler.sample, prompts, noise_keys(len(prompts), group))
    sampler.slots = slots
    run(new)  # allocates, and captures the graphs
    first, whole = (median_time(partial(run, tokens), device, repeats) for tokens in (1, new))
    return (whole - first) / (new - 1)


@torch.inference_mode()
def time_generate(model, rows, prompt_tokens, new, device):
    """Seconds per step of transformers' `generate` with its dynamic cache."""
    prompts = random_prompts(rows, prompt_tokens, prompt_tokens, model.config.vocab_size)
    ids = torch.tensor(prompts, device=device)

    def run(tokens):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(
            max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, disable_compile=True))

    run(2)
    first, whole = (median_time(partial(run, tokens), device, 3) for tokens in (1, new))
    return (whole - first) / (new - 1)


def time_shape(shape, a, copy, matmul, device, dtype):
    prompt_tokens, new, repeats = (12, 17, 1) if a.small else (150, 513, 3)
    model = random_model(shape, dtype, device).eval()

    def decode_figure(what, slots, seconds, length):
        limit = decode_limit(model, slots, length, copy, matmul)
        report("decode", shape=shape, what=what, slots=slots, length=length,
               ms_per_step=round(1e3 * seconds, 3), limit_ms=round(1e3 * limit, 3),
               share=round(limit / seconds, 3), tokens_per_s=round(slots / seconds), peak_gb=peak_gb(device))

    with part(f"{shape}: generate", device):
        reset_peak(device)
        few = min(new, 33)
        seconds = time_generate(model, a.slots[0], prompt_tokens, few, device)
        decode_figure("generate", a.slots[0], seconds, prompt_tokens + few // 2)
    params = add_adapter(model, 32)
    sampler = grpo.Sampler(model, (), max(a.slots))
    with part(f"{shape}: sampler against trainer", device):
        check_gap(model, sampler, device, shape, a.small)
    for slots in a.slots:
        with part(f"{shape}: decode, {slots} slots", device):
            reset_peak(device)
            seconds = time_decode(sampler, slots, prompt_tokens, new, device, repeats)
            decode_figure("Sampler", slots, seconds, prompt_tokens + new // 2)
    with part(f"{shape}: GRPO step", device):
        time_steps(shape, model, params, sampler, a, matmul, device)
    if a.profile:
        with part(f"{shape}: profile", device):
            sampler.slots = a.slots[0]
            prompts = random_prompts(a.slots[0] // 4, prompt_tokens, prompt_tokens, model.config.vocab_size)
            profile(f"{shape}, {a.slots[0]} slots: prefill and 16 decode steps",
                    partial(sample, sampler, prompts, 4, 17), device)
            batch = grpo.make_batch([prompts[0]] * 16, [prompts[0]] * 16, device)
            profile(f"{shape}: log-probs of 16 rows, forward and backward",
                    lambda: grpo.token_logprobs(model, *batch).sum().backward(), device)


def time_steps(shape, model, params, sampler, a, matmul, device):
    n_prompts, group, prompt_tokens, new = (4, 4, 12, 16) if a.small else (64, 8, 150, 512)
    args = grpo.resolve(grpo.Args(num_generations=group, max_new_tokens=new, beta=0.04, lora_r=32, lr=2e-5,
                                  slots=n_prompts * group), device)
    sampler.slots = args.slots
    prompts = random_prompts(n_prompts, prompt_tokens, prompt_tokens, model.config.vocab_size)
    optimizer = torch.optim.AdamW(params, lr=args.lr)

    # the warm-up also captures the graphs of all slots, and finds the tokens per batch that fit
    sampler.sample(prompts, noise_keys(n_prompts, group), new)
    one_step(model, params, optimizer, sampler, prompts[:n_prompts // 4], args, 0, device)
    reset_peak(device)
    steps = [one_step(model, params, optimizer, sampler, prompts, args, step, device)[0]
             for step in range(1, 1 + a.steps)]
    seconds = {name: round(statistics.median(step[name] for step in steps), 3) for name in steps[0]}
    (body, head), rows = weights_of(model), n_prompts * group
    forward = 2 * rows * (body * (prompt_tokens + new) + head * new) / matmul  # seconds, at the matrix rate
    report("step", shape=shape, prompts=n_prompts, group=group, prompt_tokens=prompt_tokens, new=new,
           tokens_per_batch=args.tokens_per_batch, seconds=seconds, step_s=round(sum(seconds.values()), 3),
           sample_tokens_per_s=round(rows * new / seconds["sample"]),
           reference_share=round(forward / seconds["reference"], 3),
           update_share=round(2 * forward / seconds["update"], 3), peak_gb=peak_gb(device))


def profile(title, run, device):
    """The operators and kernels of run() that take longest, to stderr."""
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        timed(run, device)
    key = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    table = trace.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)
    print(f"\n{title}\n{table}", file=sys.stderr)


# ---- tables ----


def print_table(kind, columns, cells):
    rows = [figure for figure in figures if figure["figure"] == kind]
    if rows:
        print(f"\n| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for figure in rows:
        print(f"| {' | '.join(cells(figure))} |")


def print_tables():
    print_table("check", ("check", "value", "at most", ""), lambda f: (
        f["name"].replace("|", "\\|"), f"{f['value']:.2g}", f"{f['limit']:.2g}",
        "ok" if f["ok"] else "**FAILED**"))
    print_table("decode", ("decode", "slots", "mean length", "ms per step", "tokens/s", "limit, ms",
                           "share of the limit", "peak GB"), lambda f: (
        f"{f['shape']}, {f['what']}", str(f["slots"]), str(f["length"]), f"{f['ms_per_step']:.2f}",
        f"{f['tokens_per_s']:,}", f"{f['limit_ms']:.2f}", f"{f['share']:.0%}", str(f["peak_gb"])))
    print_table("step", ("GRPO step", "sample s", "reference s", "update s", "step s", "sampled tokens/s",
                         "reference, share of the matrix rate", "update, share", "tokens per batch",
                         "peak GB"), lambda f: (
        f"{f['shape']}, {f['prompts']} x {f['group']}, {f['prompt_tokens']} + {f['new']} tokens",
        *(f"{f['seconds'][name]:.2f}" for name in ("sample", "reference", "update")), f"{f['step_s']:.2f}",
        f"{f['sample_tokens_per_s']:,}", f"{f['reference_share']:.0%}", f"{f['update_share']:.0%}",
        f"{f['tokens_per_batch']:,}", str(f["peak_gb"])))
    print_table("broken", ("broken", "why"), lambda f: (f["part"], f["error"].replace("\n", " ")))


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes; runs on a CPU, in float32")
    parser.add_argument("--shapes", nargs="+", choices=("0.5B", "3B"), default=["0.5B", "3B"])
    parser.add_argument("--slots", nargs="+", type=int, default=[64, 256, 512], help="multiples of 4")
    parser.add_argument("--steps", type=int, default=2, help="GRPO steps to time at each shape")
    parser.add_argument("--profile", action="store_true", help="also print the slowest kernels, to stderr")
    a = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not a.small and not on_gpu:
        parser.error("no CUDA device here; --small runs toy sizes on any machine")
    if a.small:
        a.shapes, a.slots, a.steps = ["toy"], [4, 8], 1
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = models.choose_dtype("auto", device)
    transformers.logging.set_verbosity_error()
    report("machine", device=torch.cuda.get_device_name() if on_gpu else "CPU", torch=torch.__version__,
           transformers=transformers.__version__, dtype=str(dtype)[6:], small=a.small)

    copy = matmul = math.nan
    with part("ceilings", device):
        copy, matmul = measure_ceilings(device, dtype, a.small)
    with part("float32 against transformers", device):
        check_float32(device, a.small)
    if on_gpu:
        for dtype in (torch.float32, torch.bfloat16):
            with part(f"graphs, {dtype}", device):
                check_graphs(device, dtype)
        with part("memory of the log-probs", device):
            check_logprob_memory(device)
    else:
        report("skipped", parts=["graph on = off", "memory of the log-probs"], why="they need a CUDA device")
    for shape in a.shapes:
        with part(shape, device):
            time_shape(shape, a, copy, matmul, device, dtype)
    print_tables()
    sys.exit(any(f["figure"] == "broken" or not f.get("ok", True) for f in figures))


if __name__ == "__main__":
    main()
