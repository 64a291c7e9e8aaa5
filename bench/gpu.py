"""Check and time a CUDA machine for grpo.py in one run of a few minutes: right first, then how fast.

    python bench/gpu.py                       # Qwen2.5-0.5B and 3B shapes, random weights made on the card
    python bench/gpu.py --shapes 0.5B --profile
    python bench/gpu.py --small               # toy sizes on any machine, a CPU too: does it run to its end?

Needs torch and transformers, and neither the network nor any other package. Prints a JSON line for each figure as it is
found, then Markdown tables; exit code 1 if a check fails or a part breaks (the rest goes on).

A decode step's limit is the larger of bytes / copy bandwidth (weights once, every slot's keys and values once) and
operations / matrix rate; both ceilings are measured first, on this card. A training step counts two operations per
weight and token forward and two backward (the frozen weights need no gradient), lm_head on completion tokens alone.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

import grpo
from bench.grpo_step import one_step

# hidden, intermediate, layers, heads, key-value heads, vocabulary; embeddings are tied in all
SHAPES = {"0.5B": (896, 4864, 24, 14, 2, 151_936), "3B": (2048, 11_008, 36, 16, 2, 151_936),
          "check": (256, 688, 4, 4, 2, 8192), "one layer": (896, 4864, 1, 14, 2, 151_936), "toy": (64, 96, 2, 4, 2, 512)}
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
    except Exception as error:  # out of memory, a kernel that this card lacks, ...: the other figures are still wanted
        traceback.print_exc()
        report("broken", part=name, error=f"{type(error).__name__}: {error}"[:300])
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
    config = Qwen2Config(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocabulary,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=hidden**-0.5,
                         max_position_embeddings=4096, rope_theta=1e6, tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def add_adapter(model, rank):
    """The policy's adapter, with a B that is not zero, so that it matters."""
    params = grpo.add_lora(model, "policy", rank, 2 * rank, grpo.models.PROJECTIONS)
    move(params, 0.02)
    model.train()
    return params


@torch.no_grad()
def move(params, std):
    """A random step of the adapters' B: what an optimizer step does to the sampler."""
    for B in params[1::2]:
        B.add_(torch.randn_like(B), alpha=std)


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


def measure_ceilings(device, small):
    """(bytes per second of a copy, reads and writes counted; operations per second of a bfloat16 matrix product)."""
    n_bytes, n = (2**24, 256) if small else (2**32, 8192)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16)
    copy = 2 * n_bytes / statistics.median([timed(lambda: target.copy_(source), device) for _ in range(13)][3:])
    matmul = 2 * n**3 / statistics.median([timed(lambda: a @ b, device) for _ in range(13)][3:])
    report("ceilings", copy_tb_per_s=round(copy / 1e12, 3), bf16_tflop_per_s=round(matmul / 1e12, 2))
    return copy, matmul


# ---- correctness ----


def check_float32(device, shape):
    """Sampler and trainer against transformers' own forward pass; slots, graphs and updates change what they should."""
    temperature, model = 0.8, random_model(shape, torch.float32, device)
    vocabulary, params = model.config.vocab_size, add_adapter(model, 8)
    prompts, new = random_prompts(8, 3, 60, vocabulary), 64
    sampler = grpo.Sampler(model, (), 64, torch.float32)
    rows, completions = sample(sampler, prompts, 4, new, temperature)
    _, greedy = sample(sampler, prompts, 4, new, 0)

    def logits_of(prompt, completion):
        ids = torch.tensor([prompt + completion.ids], device=device)
        return model(input_ids=ids).logits[0, len(prompt) - 1:-1], ids[0, len(prompt):, None]

    sampler_gap, greedy_gap = [], []
    with torch.no_grad():
        for prompt, c, g in zip(rows, completions, greedy):
            logits, ids = logits_of(prompt, c)
            expected = (logits / temperature).log_softmax(-1).gather(1, ids)[:, 0]
            sampler_gap.append((expected - torch.tensor(c.logprobs, device=device)).abs().max().item())
            logits, ids = logits_of(prompt, g)
            greedy_gap.append((logits.amax(-1) - logits.gather(1, ids)[:, 0]).max().item())
    check("float32: sampler's log-probs = transformers'", max(sampler_gap), 1e-4)
    check("float32: greedy takes transformers' best logit", max(greedy_gap), 1e-4)

    batch = [c.ids for c in completions[::4]]
    input_ids, mask = grpo.make_batch(prompts, batch, device)
    scale = torch.randn(input_ids.shape, device=device)  # a different weight on each token's log-prob

    def gradients(total):
        total.backward()
        flat = torch.cat([p.grad.flatten() for p in params])
        for p in params:
            p.grad = None
        return flat

    logprobs = grpo.token_logprobs(model, input_ids, mask, temperature)
    all_logits = model(input_ids=input_ids).logits / temperature
    expected = all_logits.log_softmax(-1)[:, :-1].gather(2, input_ids[:, 1:, None])[..., 0]
    expected = torch.where(mask.to(device), torch.nn.functional.pad(expected, (1, 0)), 0.0)
    check("float32: trainer's log-probs = transformers'", (logprobs - expected).abs().max(), 1e-4)
    ours, theirs = gradients((logprobs * scale).sum()), gradients((expected * scale).sum())
    check("float32: their gradients, relative", (ours - theirs).norm() / theirs.norm(), 1e-4)

    for slots in (4, 8):
        other = sample(grpo.Sampler(model, (), slots, torch.float32), prompts, 4, new, temperature)[1]
        check(f"float32: {slots} slots, tokens that differ from 64 slots", differing(completions, other), 0)
    return model, params, prompts, new


def check_graphs(model, params, prompts, new, dtype):
    """A captured step draws what the same step run eagerly draws, also after the weights have moved under the graph."""
    name = str(dtype)[6:]
    captured, eager = (grpo.Sampler(model, (), 64, dtype, graphs=graphs) for graphs in (True, False))
    before = sample(captured, prompts, 4, new)[1]
    for when in ("", ", after an update"):
        (_, on), (_, off) = sample(captured, prompts, 4, new), sample(eager, prompts, 4, new)
        check(f"{name}: graph on = off{when}: tokens that differ", differing(on, off), 0)
        check(f"{name}: graph on = off{when}: log-probs", largest_gap(on, off), 1e-5)
        move(params, 0.02)
    check(f"{name}: the update changed no token", differing(before, on) == 0, 0)


def check_bfloat16(model, sampler, device, shape, small):
    """The bfloat16 sampler's log-probs against the trainer's: what the importance ratio would see as a change of policy."""
    prompts = random_prompts(4 if small else 16, 10, 20 if small else 150, model.config.vocab_size)
    rows, completions = sample(sampler, prompts, 8, 16 if small else 64)
    trained = grpo.completion_logprobs(model, rows, [c.ids for c in completions], 1.0, 8192, device)
    gap = torch.cat(trained) - torch.tensor([x for c in completions for x in c.logprobs])
    check(f"{shape} bfloat16: |sampler - trainer|, mean", gap.abs().mean(), 0.05)
    check(f"{shape} bfloat16: |sampler - trainer|, largest", gap.abs().max(), 1.0)
    check(f"{shape} bfloat16: bias of sampler - trainer", abs(gap.mean()), 0.01)


def check_logprob_memory(device):
    """Values and gradient of [4, 1024] tokens at 151,936 words, less than one float32 copy of their logits."""
    model = random_model("one layer", torch.bfloat16, device)
    add_adapter(model, 8)
    input_ids = torch.randint(0, model.config.vocab_size, (4, 1024), device=device)
    mask = torch.ones(4, 1024, dtype=torch.bool)

    def naive():
        logits = model(input_ids=input_ids).logits.float()
        return logits.log_softmax(-1)[:, :-1].gather(2, input_ids[:, 1:, None])

    peaks = {}
    for name, values in (("ours", lambda: grpo.token_logprobs(model, input_ids, mask)), ("naive", naive)):
        torch.cuda.empty_cache()
        reset_peak(device)
        start = torch.cuda.memory_allocated()
        seconds = timed(lambda: values().sum().backward(), device)
        peaks[name] = (torch.cuda.max_memory_allocated() - start) / 2**30
        report("logprob memory", form=name, peak_gb=round(peaks[name], 2), seconds=round(seconds, 3))
    check("log-probs of [4, 1024] at 151,936 words: peak, GiB", peaks["ours"], input_ids.numel() * model.config.vocab_size * 4 / 2**30)


# ---- speed ----


def weights_of(model):
    """Numbers in the layers and in lm_head (the tied embedding), without adapters."""
    total = sum(p.numel() for name, p in model.named_parameters() if ".A." not in name and ".B." not in name)
    head = model.get_output_embeddings().weight.numel()
    return total - head, head


def decode_limit(model, slots, length, copy, matmul):
    """Seconds under which no decode step of `slots` rows of `length` tokens can go on this card."""
    c = model.config
    weights, head_dim, item = sum(weights_of(model)), c.hidden_size // c.num_attention_heads, model.dtype.itemsize
    cache = slots * length * c.num_hidden_layers * 2 * c.num_key_value_heads * head_dim
    attention = 4 * slots * length * c.num_hidden_layers * c.hidden_size
    return max((weights + cache) * item / copy, (2 * weights * slots + attention) / matmul)


def time_decode(sampler, slots, prompt_tokens, new, device, repeats):
    """Seconds per decode step: a whole sampling call less one that stops after the first token."""
    vocabulary, group = sampler.model.config.vocab_size, 4
    prompts = random_prompts(slots // group, prompt_tokens, prompt_tokens, vocabulary)
    sampler.slots = slots

    def run(tokens):
        sampler.sample(prompts, noise_keys(len(prompts), group), tokens)

    run(new)  # allocates, and captures the graphs
    first, whole = (median_time(lambda: run(tokens), device, repeats) for tokens in (1, new))
    return (whole - first) / (new - 1)


@torch.inference_mode()
def time_generate(model, rows, prompt_tokens, new, device):
    """Seconds per step of transformers' `generate` with its dynamic cache."""
    ids = torch.tensor(random_prompts(rows, prompt_tokens, prompt_tokens, model.config.vocab_size), device=device)

    def run(tokens):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(
            max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, disable_compile=True))

    run(2)
    first, whole = (median_time(lambda: run(tokens), device, 3) for tokens in (1, new))
    return (whole - first) / (new - 1)


def time_shape(shape, a, copy, matmul, device, dtype):
    small = a.small
    prompt_tokens, new, repeats = (12, 17, 1) if small else (150, 513, 3)
    length = prompt_tokens + new // 2
    model = random_model(shape, dtype, device).eval()
    peer_rows = a.slots[0]

    def decode_figure(what, slots, seconds, at_length):
        limit = decode_limit(model, slots, at_length, copy, matmul)
        report("decode", shape=shape, what=what, slots=slots, length=at_length, ms_per_step=round(1e3 * seconds, 3),
               tokens_per_s=round(slots / seconds), limit_ms=round(1e3 * limit, 3), share=round(limit / seconds, 3),
               peak_gb=peak_gb(device))

    reset_peak(device)
    with part(f"{shape}: generate", device):
        peer_new = min(new, 33)
        decode_figure("transformers", peer_rows, time_generate(model, peer_rows, prompt_tokens, peer_new, device),
                      prompt_tokens + peer_new // 2)
    params = add_adapter(model, 32)
    sampler = grpo.Sampler(model, (), max(a.slots), dtype)
    with part(f"{shape}: sampler against trainer", device):
        check_bfloat16(model, sampler, device, shape, small)
    for slots in a.slots:
        with part(f"{shape}: decode, {slots} slots", device):
            reset_peak(device)
            decode_figure("unrolled", slots, time_decode(sampler, slots, prompt_tokens, new, device, repeats), length)
    if a.profile:
        with part(f"{shape}: profile", device):
            sampler.slots = a.slots[0]
            prompts = random_prompts(a.slots[0] // 4, prompt_tokens, prompt_tokens, model.config.vocab_size)
            profile(f"{shape}: 16 decode steps, {a.slots[0]} slots", lambda: sample(sampler, prompts, 4, 17), device)
    with part(f"{shape}: GRPO step", device):
        time_steps(shape, model, params, sampler, a, matmul, device)


def time_steps(shape, model, params, sampler, a, matmul, device):
    n_prompts, group, prompt_tokens, new = (4, 4, 12, 16) if a.small else (64, 8, 150, 512)
    args = grpo.resolve(grpo.Args(num_generations=group, max_new_tokens=new, beta=0.04, lora_r=32, lr=2e-5,
                                  slots=n_prompts * group), device)
    sampler.slots = args.slots
    prompts = random_prompts(n_prompts, prompt_tokens, prompt_tokens, model.config.vocab_size)
    optimizer = torch.optim.AdamW(params, lr=args.lr)
    work = model, params, optimizer, sampler

    one_step(*work, prompts[:n_prompts // 4], args, 0, device)  # warm-up; and finds the tokens per batch that fit
    sampler.sample(prompts, noise_keys(n_prompts, group), new)  # captures the graphs of all slots
    reset_peak(device)
    steps = [one_step(*work, prompts, args, 1 + i, device)[0] for i in range(a.steps)]
    seconds = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    (body, head), rows = weights_of(model), n_prompts * group
    forward = 2 * rows * (body * (prompt_tokens + new) + head * new) / matmul  # seconds at the matrix rate
    report("step", shape=shape, prompts=n_prompts, group=group, prompt_tokens=prompt_tokens, new=new,
           tokens_per_batch=args.tokens_per_batch, seconds={name: round(x, 3) for name, x in seconds.items()},
           step_s=round(sum(seconds.values()), 3), sample_tokens_per_s=round(rows * new / seconds["sample"]),
           reference_share=round(forward / seconds["reference"], 3), update_share=round(2 * forward / seconds["update"], 3),
           peak_gb=peak_gb(device))
    if a.profile:
        ids = [prompts[0]] * 16, [prompts[-1]] * 16
        profile(f"{shape}: log-probs of 16 rows, forward and backward", lambda: grpo.token_logprobs(
            model, *grpo.make_batch(*ids, device)).sum().backward(), device)


def profile(title, run, device):
    """The operators and kernels of run() that take longest, to stderr."""
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        timed(run, device)
    key = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    print(f"\n{title}\n{trace.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)}", file=sys.stderr)


# ---- tables ----


def print_tables():
    def rows(kind):
        return [f for f in figures if f["figure"] == kind]

    print("\n| check | value | at most | |\n| --- | --- | --- | --- |")
    for f in rows("check"):
        print(f"| {f['name']} | {f['value']:.2g} | {f['limit']:.2g} | {'ok' if f['ok'] else 'FAILED'} |")
    print("\n| decode | slots | mean length | ms per step | tokens/s | limit, ms | share of the limit | peak GB |\n" + "| --- " * 8 + "|")
    for f in rows("decode"):
        print(f"| {f['shape']}, {f['what']} | {f['slots']} | {f['length']} | {f['ms_per_step']:.2f} | {f['tokens_per_s']:,} | "
              f"{f['limit_ms']:.2f} | {f['share']:.0%} | {f['peak_gb']} |")
    print("\n| GRPO step | sample s | reference s | update s | step s | sampled tokens/s | reference, share of the matrix rate "
          "| update, share | tokens per batch | peak GB |\n" + "| --- " * 10 + "|")
    for f in rows("step"):
        split = " | ".join(f"{f['seconds'][name]:.2f}" for name in ("sample", "reference", "update"))
        print(f"| {f['shape']}, {f['prompts']} x {f['group']}, {f['prompt_tokens']} + {f['new']} tokens | {split} | {f['step_s']:.2f} | "
              f"{f['sample_tokens_per_s']:,} | {f['reference_share']:.0%} | {f['update_share']:.0%} | {f['tokens_per_batch']:,} | "
              f"{f['peak_gb']} |")
    for f in rows("broken"):
        print(f"\nBROKEN: {f['part']}: {f['error']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes; runs on a CPU")
    parser.add_argument("--shapes", nargs="+", choices=("0.5B", "3B"), default=["0.5B", "3B"])
    parser.add_argument("--slots", nargs="+", type=int, default=[64, 256, 512])
    parser.add_argument("--steps", type=int, default=2, help="GRPO steps to time at each shape")
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take longest, to stderr")
    a = parser.parse_args()
    if not a.small and not torch.cuda.is_available():
        parser.error("no CUDA device here; --small runs toy sizes on any machine")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16
    if a.small:
        a.shapes, a.slots, a.steps = ["toy"], [4, 8], 1
    transformers.logging.set_verbosity_error()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report("machine", device=name, torch=torch.__version__, transformers=transformers.__version__, small=a.small)

    copy = matmul = math.nan
    with part("ceilings", device):
        copy, matmul = measure_ceilings(device, a.small)
    with part("float32 against transformers", device):
        checked = check_float32(device, "toy" if a.small else "check")
        if device.type == "cuda":
            check_graphs(*checked, torch.float32)
            checked[0].to(torch.bfloat16)
            check_graphs(*checked, torch.bfloat16)
    if device.type == "cuda" and not a.small:
        with part("memory of the log-probs", device):
            check_logprob_memory(device)
    for shape in a.shapes:
        with part(shape, device):
            time_shape(shape, a, copy, matmul, device, dtype)
    print_tables()
    sys.exit(any(not f.get("ok", True) or f["figure"] == "broken" for f in figures))


if __name__ == "__main__":
    main()
