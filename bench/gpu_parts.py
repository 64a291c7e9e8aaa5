"""The parts of bench/gpu.py: what is checked, and what is timed."""

import copy
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig

import grpo
from bench.gpu_tools import (SHAPES, Capture, add_adapter, check, clean, differing, figures, here,
                             largest_gap, listen, move, new_sampler, noise_keys, on_gpu, out_of_memory,
                             peak_gb, per_run, random_model, random_prompts, report, reserved_gb, reset_peak,
                             sample, timed)
from bench.grpo_step import one_step
from common import models

RANK = 32
STOP_STRIDE = 310, 10  # every 310th word ends a row: a mean of 250 tokens when cut at 512 (small: 8 of 16)


# ---- the machine ----


def environment(dtype):
    """The card and its software, and which attention kernel each use takes by default."""
    values = {"device": "CPU"}
    if on_gpu():
        free, total = torch.cuda.mem_get_info()
        values = {"device": torch.cuda.get_device_name(), "driver": driver_version(),
                  "cudnn": torch.backends.cudnn.version(), "free_gb": round(free / 2**30, 1),
                  "total_gb": round(total / 2**30, 1)}
    new = partial(torch.zeros, dtype=dtype, device=here.device)
    decode = new(64, 2, 8, 128), new(64, 2, 512, 128), new(64, 2, 512, 128), new(64, 1, 1, 512)
    shape = (4, 16, 150, 128), (4, 2, 150, 128)
    calls = {"decode with a bias": (decode, {}),
             "prefill with a bias": ((*[new(*shape[0])] * 3, new(150, 150)), {}),
             "training": ((new(*shape[0]), *[new(*shape[1])] * 2), {"is_causal": True, "enable_gqa": True})}
    choices = {name: SDPBackend(torch._fused_sdp_choice(*args, **kwargs)).name
               for name, (args, kwargs) in calls.items()}
    report("machine", **values, torch=torch.__version__, transformers=transformers.__version__,
           dtype=str(dtype)[6:], small=here.small, imports_s=round(here.imports_took, 1), attention=choices,
           attention_order=[SDPBackend(n).name for n in torch._C._get_sdp_priority_order()],
           cudnn_attention=torch.backends.cuda.cudnn_sdp_enabled(),
           alloc_conf=os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")))


def driver_version():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def measure_ceilings(dtype, ceilings):
    """Bytes per second of a copy (reads and writes counted), operations per second of a matrix product."""
    n_bytes, n = (2**24, 256) if here.small else (2**32, 8192)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=here.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, n, n, device=here.device).to(dtype)
    copying, multiplying = partial(target.copy_, source), partial(torch.mm, a, b)
    for run in (copying, multiplying):
        per_run(run, 3, 1)  # warm-up
    ceilings.copy = 2 * n_bytes / per_run(copying, 5)
    ceilings.matmul = 2 * n**3 / per_run(multiplying, 5)
    report("ceilings", copy_tb_per_s=float(f"{ceilings.copy / 1e12:.3g}"),
           matrix_tflop_per_s=float(f"{ceilings.matmul / 1e12:.3g}"))


# ---- the scripts, on the embedded model ----

SHORT = {"max_steps": 2, "max_new_tokens": 16, "eval_questions": 8}
GRPO = SHORT | {"prompts_per_step": 4, "num_generations": 4, "eval_every": 2, "save_every": 1, "slots": 64}
SCRIPTS = (  # name, seconds on an H100, script, arguments
    ("grpo", 15, "grpo", GRPO | {"max_steps": 3}),
    ("grpo --resume", 6, "grpo", GRPO | {"max_steps": 4, "resume": True}),
    ("ppo", 8, "ppo", SHORT | {"prompts_per_step": 16}),
    ("dpo", 5, "dpo", {"max_steps": 2, "train_questions": 40, "questions": 16, "num_generations": 8,
                       "pairs_per_step": 4, "eval_questions": 4, "max_new_tokens": 48}),
    ("sft", 4, "sft", SHORT | {"batch_size": 8}),
    ("star", 5, "star", {"iterations": 1, "train_questions": 12, "questions": 6, "num_generations": 2,
                         "eval_questions": 4, "max_new_tokens": 12, "first_steps": 1, "batch_size": 4}),
    ("reward_model", 4, "reward_model", {"max_steps": 2, "train_pairs": 12, "eval_pairs": 6,
                                         "pairs_per_step": 4}),
    ("eval", 4, "eval", {"limit": 6, "max_new_tokens": 8}))


def run_script(name, script, folder, values):
    """main(Args(...)) as the command line calls it; what the run logged last is reported."""
    module, out = importlib.import_module(script), Path(folder, script)
    if "out" in module.Args.__dataclass_fields__:
        values = values | {"out": str(out)}
    log = here.out / "scripts.log" if here.out else os.devnull
    try:
        with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
            module.main(module.Args(device=here.device.type, **values))
    finally:
        listen()  # a run ignores signals when it has ended
    last = {}
    if (out / "metrics.jsonl").exists():
        for line in (out / "metrics.jsonl").read_text().splitlines():
            last |= json.loads(line)
    keys = ("step", "sampler_gap", "sampler_gap/max", "grad_norm", "loss", "memory_gb", "seconds")
    report("script", name=name, **{key: last[key] for key in keys if key in last})
    for key in ("loss", "grad_norm"):
        if key in last:  # a value that is not finite is logged as null
            check(f"{name}: {key} is not finite", last[key] is None, 0)
    if values.get("resume"):
        check(f"{name}: steps missing at the end", values["max_steps"] - last["step"], 0)


def run_sharded(folder):
    """Two steps of grpo.py --shard in a process of its own, as torchrun starts one of a single rank.

    It joins NCCL and gloo, splits the model by FSDP2 and gathers it for sampling.
    """
    out = Path(folder, "sharded")
    values = GRPO | {"out": str(out), "shard": True, "device": here.device.type}
    code = f"import grpo; from common import dist; grpo.main(grpo.Args(**{values})); dist.finish()"
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "29517"}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=os.environ | ranks,
                          capture_output=True, text=True, check=False, timeout=100)
    if here.out:
        with open(here.out / "scripts.log", "a") as file:
            file.write(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no word").splitlines()[-1])
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    report("script", name="grpo --shard", step=last["step"])


# ---- correctness ----


def check_float32():
    """Sampler and trainer against transformers' own forward pass; the number of slots changes no token."""
    shape, n_prompts, group, new = ("toy", 4, 2, 12) if here.small else ("check", 8, 4, 64)
    temperature, device, model = 0.8, here.device, random_model(shape, torch.float32, here.device)
    params = add_adapter(model, 8)
    prompts = random_prompts(n_prompts, 3, 60, model.config.vocab_size)
    sampler = new_sampler(model, 64)
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
        return take_gradient(params)

    logprobs = grpo.token_logprobs(model, input_ids, mask, temperature)
    expected = (model(input_ids=input_ids).logits / temperature).log_softmax(-1)[:, :-1]
    expected = F.pad(expected.gather(2, input_ids[:, 1:, None])[..., 0], (1, 0)) * mask.to(device)
    check("float32: trainer's log-probs = transformers'", (logprobs - expected).detach().abs().max(), 1e-4)
    ours, theirs = gradients(logprobs), gradients(expected)
    check("float32: their gradients, relative", (ours - theirs).norm() / theirs.norm(), 1e-4)

    for slots in (2, 5):
        _, other = sample(new_sampler(model, slots), prompts, group, new, temperature)
        # products of other sizes round differently, which may move one draw in some hundred thousand
        check(f"float32: {slots} slots = 64: rows that differ, of {len(rows)}", differing(completions, other),
              1 if on_gpu() else 0)


def take_gradient(params):
    """All of it as one vector; the parameters are left without."""
    flat = torch.cat([p.grad.flatten() for p in params])
    for p in params:
        p.grad = None
    return flat


def check_across_devices():
    """The noise is the CPU's to the bit; a float32 sampler draws its tokens, as far as rounding lets it."""
    keys, columns = torch.randint(-2**63, 2**63 - 1, (4096, 1)), torch.arange(64)
    noise = grpo.uniform(keys.to(here.device), columns.to(here.device)).cpu()
    check("uniform = the CPU's: numbers that differ", (noise != grpo.uniform(keys, columns)).sum(), 0)
    model = random_model("toy" if here.small else "check", torch.float32, here.device)
    add_adapter(model, 8)
    prompts = random_prompts(4, 3, 60, model.config.vocab_size)
    _, on_device = sample(new_sampler(model, 64), prompts, 4, 32)
    _, on_cpu = sample(grpo.Sampler(copy.deepcopy(model).cpu(), (), 64), prompts, 4, 32)
    check("float32: sampler = the CPU's: rows that differ, of 16", differing(on_device, on_cpu), 1)
    check("float32: sampler = the CPU's: log-probs", largest_gap(on_device, on_cpu), 1e-4)


def check_draw():
    """Draws at 151,936 words against the distribution function in float64."""
    rows, words = 64, 151_936
    torch.manual_seed(0)
    logits = 2 * torch.randn(rows, words, device=here.device)
    u = grpo.uniform(torch.arange(rows, device=here.device), 0)
    for temperature in (1.0, 0.7):
        tokens, logprobs = grpo.draw(logits.clone(), temperature, u)
        exact = (logits.double() / temperature).softmax(-1)
        above, mass = (values.gather(1, tokens[:, None]).squeeze(1) for values in (exact.cumsum(-1), exact))
        outside = torch.maximum(u - above, above - mass - u).clamp(min=0)
        check(f"draw at temperature {temperature}: u outside the token's interval", outside.max(), 1e-5)
        check(f"draw at temperature {temperature}: log-probs", (logprobs - mass.log()).abs().max(), 1e-4)
    tokens, logprobs = grpo.draw(logits.clone(), 0, u)
    check("draw at temperature 0: not the top token", (tokens != logits.argmax(-1)).sum(), 0)


def check_graphs(dtype):
    """A captured step draws what the same step draws eagerly, also after weights moved under the graph."""
    name, model = str(dtype)[6:], random_model("toy" if here.small else "check", dtype, here.device)
    params, new = add_adapter(model, 8), 20 if here.small else 64
    prompts = random_prompts(12, 3, 60, model.config.vocab_size)
    captured, eager = (new_sampler(model, 40, dtype, graphs) for graphs in (True, False))  # blocks: 32, 40
    run = partial(sample, prompts=prompts, group=4, new=new)
    number, before = Capture.number, run(captured)[1]
    check(f"{name}: no graph was captured", Capture.number == number, 0)
    for when in ("", ", after an update"):
        (_, on), (_, off) = run(captured), run(eager)
        check(f"{name}: graph on = off{when}: rows that differ", differing(on, off), 0)
        check(f"{name}: graph on = off{when}: log-probs", largest_gap(on, off), 1e-5)
        move(params)
    check(f"{name}: the graph never saw the update", differing(before, on) == 0, 0)


def check_logprob_memory():
    """Log-probs and gradient of [4, 1024] tokens at 151,936 words: under one float32 copy of their logits."""
    model = random_model("toy" if here.small else "one layer", torch.bfloat16, here.device)
    add_adapter(model, 8)
    input_ids = torch.randint(0, model.config.vocab_size, (4, 64 if here.small else 1024), device=here.device)
    mask = torch.ones(input_ids.shape, dtype=torch.bool)

    def naive():
        logprobs = model(input_ids=input_ids).logits.float().log_softmax(-1)
        logprobs[:, :-1].gather(2, input_ids[:, 1:, None]).sum().backward()

    def ours():
        grpo.token_logprobs(model, input_ids, mask).sum().backward()

    for name, run in (("naive", naive), ("token_logprobs", ours)):
        clean()
        reset_peak()
        before = torch.cuda.memory_allocated() if on_gpu() else 0
        seconds, peak = timed(run), 0.0
        if on_gpu():
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        report("logprob memory", form=name, peak_gb=round(peak, 2), seconds=round(seconds, 3))
    one_copy = input_ids.numel() * model.config.vocab_size * 4 / 2**30
    check("memory of [4, 1024] log-probs at 151,936 words, GB", peak, one_copy)


# ---- out of memory ----


@contextmanager
def short_of_memory(n_bytes, name, too_much):
    """The process may reserve n_bytes more, no further. On a CPU `name` of grpo fails if too_much(...)."""
    if on_gpu():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + n_bytes) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    owner, _, name = name.rpartition(".")
    owner = getattr(grpo, owner) if owner else grpo
    real = getattr(owner, name)
    with mock.patch.object(owner, name, lambda *args, **kwargs: (
            out_of_memory if too_much(*args) else real)(*args, **kwargs)):
        yield


def reserved_by(run):
    """(Its result, bytes reserved on top at its peak.)"""
    clean()
    reset_peak()
    before = torch.cuda.memory_reserved() if on_gpu() else 0
    result = run()
    return result, (torch.cuda.max_memory_reserved() if on_gpu() else 0) - before


def check_oom_sampling():
    """Half the slots after a real lack of memory, and the same tokens; in the cache, then in a capture."""
    rows, tokens, new = (128, 8, 12) if here.small else (128, 600, 24)
    model = random_model("toy" if here.small else "check", torch.float32, here.device)
    add_adapter(model, 8)
    prompts = random_prompts(2, tokens, tokens, model.config.vocab_size)
    keys, run = noise_keys(2, rows // 2), SimpleNamespace(device=here.device, progress=lambda *_: None)
    # what is first used is made for good: workspaces of products, for one
    sample(new_sampler(model, rows), prompts, 1, new)
    expected, needed = reserved_by(lambda: sample(new_sampler(model, rows), prompts, rows // 2, new)[1])
    for what, slots, short in (
            ("sampling", 2 * rows, partial(short_of_memory, 0.75 * needed, "Sampler._allocate",
                                           lambda of, n, length: min(of.slots, n) > rows // 2)),
            ("capture", 2 * rows, nullcontext), ("capture, all slots in use", rows, nullcontext)):
        sampler = new_sampler(model, slots)
        clean()
        Capture.starve = "capture" in what
        with short():
            found = grpo.sample_all(sampler, prompts, keys, new, 1.0, run, None)
        check(f"OOM in {what}: not met", Capture.starve or sampler.slots == slots, 0)
        Capture.starve = False
        found = [completion for row in found for completion in row]
        check(f"OOM in {what}: rows that differ, of {rows}", differing(expected, found), 1 if on_gpu() else 0)
        del sampler


def check_oom_update():
    """Smaller micro-batches after a real lack of memory, and the same gradient."""
    n_prompts, new = (4, 8) if here.small else (16, 64)
    model = random_model("toy" if here.small else "check", torch.float32, here.device)
    params, rollouts = add_adapter(model, 8), random_rollouts(n_prompts, 4, new, new, model)
    args = step_args(n_prompts, 4, new)
    everything, n_tokens = sum(map(len, rollouts)), 4 * n_prompts * new

    def attempt(size):
        for p in params:
            p.grad = None
        grpo.accumulate_gradients(model, rollouts, args, len(rollouts), n_tokens, size, here.device)

    attempt(everything // 8)
    take_gradient(params)
    _, needed = reserved_by(lambda: attempt(everything))
    expected = take_gradient(params)
    clean()
    with short_of_memory(0.75 * needed, "token_logprobs",
                         lambda _, ids, *rest: ids.numel() > everything // 2):
        _, size = grpo.retry_smaller(attempt, everything, here.device, 2 * new, "tokens per batch")
    check("OOM in an update: not met", size == everything, 0)
    found = take_gradient(params)
    check("OOM in an update: gradient, relative", (found - expected).norm() / expected.norm(), 1e-4)


def random_rollouts(n_prompts, group, prompt_tokens, new, model):
    """Rows as a step trains on them, of random tokens."""
    rng, words = random.Random(1), model.config.vocab_size
    prompts = random_prompts(n_prompts, prompt_tokens, prompt_tokens, words)
    rollouts = [grpo.Rollout(None, p, g, prompt, grpo.Completion(
        rng.choices(range(words), k=new), [-math.log(words)] * new, False), advantage=rng.choice((-1.0, 1.0)))
                for p, prompt in enumerate(prompts) for g in range(group)]
    for r in rollouts:
        r.old_logprobs = r.ref_logprobs = torch.tensor(r.completion.logprobs)
    return rollouts


# ---- attention alone ----


def time_cudnn():
    """First and second call of training's attention at three new sizes: what a plan of cuDNN costs."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    sizes = ((2, 16), (3, 17), (2, 19)) if here.small else ((12, 611), (11, 653), (9, 702))
    try:
        for enabled in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            for B, T in sizes:
                q, k, v = (torch.randn(B, heads, T, 128, device=here.device, dtype=torch.bfloat16,
                                       requires_grad=True) for heads in (16, 2, 2))
                run = lambda: F.scaled_dot_product_attention(  # noqa: E731
                    q, k, v, is_causal=True, enable_gqa=True).sum().backward()
                report("cudnn attention", enabled=enabled, rows=B, tokens=T,
                       first_ms=round(1e3 * timed(run), 2), second_ms=round(1e3 * timed(run), 2))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def time_decode_attention(ceilings):
    """One query a row against its cache, several ways, each captured over several layers' caches.

    Rows hold between half and all of the columns; the limit is that of the live keys and values.
    """
    H, Hkv, K, layers = 16, 2, 128, 2 if here.small else 8  # more than the chip's own cache holds
    sizes = ((4, 16), (8, 32)) if here.small else ((64, 512), (64, 768), (256, 512), (256, 768))
    for n, length in sizes:
        new = partial(torch.randn, device=here.device, dtype=torch.bfloat16)
        q, cache = new(n, Hkv, H // Hkv, K), new(layers, 2, n, Hkv, length, K)
        live = torch.randint(length // 2, length + 1, (n,), dtype=torch.int32, device=here.device)
        ahead = torch.arange(length, device=here.device) >= live[:, None]
        bias = torch.zeros(n, length, dtype=q.dtype, device=here.device).masked_fill(
            ahead, -torch.inf)[:, None, None]
        flat = cache.transpose(3, 4).reshape(layers, 2, n * length, Hkv, K)
        last = cache[:, :, torch.arange(n, device=here.device), :, live.long() - 1]  # [n, layers, 2, Hkv, K]
        qkv = torch.cat([q.flatten(1, 2)[:, None].expand(-1, layers, -1, -1), last.flatten(2, 3)], 2)
        cos, sin = (torch.full((length, K), x, dtype=q.dtype, device=here.device) for x in (1.0, 0.0))
        starts = [torch.arange(n + 1, dtype=torch.int32, device=here.device) * step for step in (1, length)]

        def fused(backend, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        def products(k, v):
            scores = (q * K**-0.5) @ k.transpose(-1, -2) + bias
            return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

        def flash(i):
            return torch.ops.aten._flash_attention_forward(
                q.view(n, H, K), *flat[i], *starts, 1, length, 0.0, False, False, seqused_k=live)[0]

        def ours(i):
            return kernels.attend(qkv[:, i], cos, sin, live - 1, *cache[i], K**-0.5)

        ways = {"two products": lambda i: products(*cache[i])}
        if on_gpu():
            ways |= {"cuDNN": lambda i: fused(SDPBackend.CUDNN_ATTENTION, *cache[i]),
                     "efficient": lambda i: fused(SDPBackend.EFFICIENT_ATTENTION, *cache[i]), "flash": flash}
            from common import kernels

            ways["common/kernels.py"] = ours
        exact, seconds = products(*cache[0]).flatten().float(), {}
        for name, run in ways.items():
            try:
                gap = (run(0).flatten().float() - exact).abs().max()
                check(f"attention by {name}, {n} x {length}", gap, 0.05)
                each = time_captured(lambda: [run(i) for i in range(layers)]) / layers
                seconds[name] = round(1e6 * each, 1)
            except RuntimeError as error:  # a kernel that this card or torch lacks
                seconds[name] = f"{type(error).__name__}: {error}"[:100]
        limit = 2 * int(live.sum()) * Hkv * K * cache.itemsize / ceilings.copy
        report("decode attention", rows=n, columns=length, mean_live=round(float(live.float().mean())),
               us=seconds, limit_us=round(1e6 * limit, 1))


@torch.no_grad()
def time_captured(run):
    """Seconds of run() as a graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return per_run(graph.replay, 10)


# ---- speed ----


def weights_of(model):
    """How many numbers the layers hold, and lm_head (the tied embedding); adapters are left out."""
    total = sum(p.numel() for name, p in model.named_parameters() if ".A." not in name and ".B." not in name)
    head = model.get_output_embeddings().weight.numel()
    return total - head, head


def decode_limit(model, rows, length, copy, matmul):
    """Seconds below which no decode step that reads `length` keys of each of `rows` can come on this card."""
    c = model.config
    weights, head_dim = sum(weights_of(model)), c.hidden_size // c.num_attention_heads
    cache = rows * length * c.num_hidden_layers * 2 * c.num_key_value_heads * head_dim
    operations = rows * (2 * weights + 4 * length * c.num_hidden_layers * c.hidden_size)
    return max((weights + cache) * model.dtype.itemsize / copy, operations / matmul)


def step_args(n_prompts, group, new, **more):
    """grpo.Args of a timed step."""
    return grpo.Args(**{"num_generations": group, "max_new_tokens": new, "lora_r": RANK, "lr": 2e-5,
                        "slots": n_prompts * group, "tokens_per_batch": 0 if on_gpu() else 2048} | more)


class Shape:
    """A shape's model, policy adapter and sampler, made when the first part asks for them, and its parts."""

    def __init__(self, shape, a, ceilings, dtype):
        self.shape, self.a, self.ceilings, self.dtype = shape, a, ceilings, dtype
        self.prompt_tokens, self.new = (12, 17) if here.small else (150, 257)

    @cached_property
    def model(self):
        return random_model(self.shape, self.dtype, here.device)

    @cached_property
    def params(self):
        return add_adapter(self.model, RANK)

    @cached_property
    def sampler(self):
        assert self.params  # first: the sampler takes over the adapters that it finds
        return new_sampler(self.model, max(self.a.slots))

    def prompts(self, n):
        return random_prompts(n, self.prompt_tokens, self.prompt_tokens, self.model.config.vocab_size)

    # ---- decoding ----

    def decode_figure(self, what, slots, seconds, length, keys, **more):
        limit = decode_limit(self.model, slots, keys, self.ceilings.copy, self.ceilings.matmul)
        report("decode", shape=self.shape, what=what, slots=slots, length=length, keys_read=keys,
               ms_per_step=round(1e3 * seconds, 3), limit_ms=round(1e3 * limit, 3),
               share=round(limit / seconds, 3), tokens_per_s=round(slots / seconds), peak_gb=peak_gb(),
               **more)

    def keys_read(self, length, longest):
        """Of each row in a step. On CUDA attention reads live keys alone; else up to the longest's block."""
        return length if self.sampler.kernels else -(-longest // self.sampler.block) * self.sampler.block

    def decode(self, slots):
        """Seconds per step: a whole sampling call, less one that stops after the first token."""
        sampler, group, new = self.sampler, 4, self.new
        run = partial(sampler.sample, self.prompts(slots // group), noise_keys(slots // group, group))
        sampler.slots, sampler.stop_ids = slots, set()
        reset_peak()
        captures, seconds, before = Capture.number, Capture.seconds, reserved_gb()
        run(new)  # allocates, and captures the graphs
        report("captures", shape=self.shape, slots=slots, number=Capture.number - captures,
               seconds=round(Capture.seconds - seconds, 2), reserved_gb_before=before,
               reserved_gb_after=reserved_gb())
        first, whole = (timed(partial(run, tokens)) for tokens in (1, new))
        length = self.prompt_tokens + new // 2
        self.decode_figure("Sampler", slots, (whole - first) / (new - 1), length,
                           self.keys_read(length, self.prompt_tokens + new),
                           replay_ms=round(1e3 * self.replay_seconds(slots), 3))

    @torch.inference_mode()
    def stand(self, rows):
        """The sampler in the middle of `rows` rows; a step is captured. Returns a call of 8 steps."""
        sampler, middle = self.sampler, self.prompt_tokens + self.new // 2
        sampler.slots = rows
        for part in (*sampler.layers, sampler.head):
            part.refresh()
        sampler._allocate(rows, self.prompt_tokens + self.new + sampler.sync_every)
        sampler.ids.zero_()
        sampler.noise.fill_(0.5)
        sampler.ends.fill_(len(sampler.columns) - 1)  # no row ends

        @torch.inference_mode()
        def steps():
            sampler.positions.fill_(middle)
            sampler._run(rows, len(sampler.columns), 1.0)

        steps()
        return steps

    def replay_seconds(self, rows):
        """Of one step without the host's work between the looks, at the mean length."""
        steps = self.stand(rows)
        return per_run(steps, 2) / self.sampler.sync_every

    @torch.inference_mode()
    def generate(self, slots, adapter=None):
        """transformers' `generate` with its dynamic cache, of the bare base or with an adapter on it."""
        few = 9
        ids = torch.tensor(self.prompts(slots), device=here.device)

        def run(tokens):
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(
                    max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    disable_compile=True))

        assert self.params
        reset_peak()
        with grpo.use_adapter(self.model, adapter):
            run(2)
            first, whole = (timed(partial(run, tokens)) for tokens in (1, few))
        length = self.prompt_tokens + few // 2
        seconds = (whole - first) / (few - 1)
        what = f"generate, {'with' if adapter else 'no'} adapter"
        self.decode_figure(what, slots, seconds, length, length)
        ours = [f for f in figures if f["figure"] == "decode" and f["shape"] == self.shape
                and (f["what"], f["slots"]) == ("Sampler", slots)]
        if ours:
            report("against generate", shape=self.shape, what=what, slots=slots,
                   ratio=round(1e3 * seconds / ours[-1]["ms_per_step"], 2))

    # ---- training steps ----

    def step(self, what, n_prompts, group, new, *, params=None, sampler=None, stop_ids=(), passes=2,
             checkpointing=False, **more):
        """Seconds of GRPO steps by phase, after one that finds what fits and captures.

        stop_ids: words that end a row, drawn like any other: the model is random, so lengths are geometric.
        passes: the update's operations, in those of a forward pass. more: of grpo.Args.
        """
        model, params, sampler = self.model, params or self.params, sampler or self.sampler
        sampler.stop_ids, args = set(stop_ids), step_args(n_prompts, group, new, **more)
        sampler.slots = args.slots
        if checkpointing:
            grpo.enable_checkpointing(model)
        if not args.tokens_per_batch:  # as the scripts do
            args = replace(args, tokens_per_batch=models.tokens_that_fit(
                model, params, self.dtype, sampler.cache_bytes(self.prompt_tokens + new)))
        prompts = self.prompts(n_prompts)
        optimizer = torch.optim.AdamW(params, lr=args.lr, fused=on_gpu())
        run = partial(one_step, model, params, optimizer, sampler, args=args, device=here.device)
        compute = (torch.autocast(here.device.type, torch.bfloat16, cache_enabled=False)
                   if more.get("full") and self.dtype == torch.bfloat16 else nullcontext())
        try:
            with compute:
                if not stop_ids:  # the whole cache and its graph, so that few rows warm up the rest
                    with torch.inference_mode():
                        sampler._allocate(args.slots, self.prompt_tokens + new + sampler.sync_every)
                    sampler.sample(prompts, noise_keys(n_prompts, group), 9)
                run(prompts if stop_ids else prompts[:max(1, n_prompts // 4)], step=0)
                reset_peak()
                steps = [run(prompts, step=step) for step in range(1, 1 + self.a.steps)]
        finally:
            if checkpointing:
                model.gradient_checkpointing_disable()
            for p in params:
                p.grad = None
        seconds = {name: round(statistics.median(s[name] for s, _ in steps), 3) for name in steps[0][0]}
        (body, head), lengths = weights_of(model), [n for _, step in steps for n in step]
        trained = sum(lengths) / len(steps)
        forward = 2 * (body * (trained + n_prompts * group * self.prompt_tokens) + head * trained)
        shares = {name: round(times * forward / self.ceilings.matmul / seconds[name], 3)
                  for name, times in (("reference", 1), ("update", passes)) if name in seconds}
        report("step", shape=self.shape, what=what, prompts=n_prompts, group=group,
               prompt_tokens=self.prompt_tokens, mean_new=round(statistics.mean(lengths)),
               longest=max(lengths), tokens_per_batch=args.tokens_per_batch, seconds=seconds,
               step_s=round(sum(seconds.values()), 3),
               sample_tokens_per_s=round(trained / seconds["sample"]) if seconds["sample"] else None,
               shares=shares, peak_gb=peak_gb(), reserved_gb=reserved_gb())

    def default_step(self, what, **more):
        """The script's defaults, 16 x 8 samples without KL; every so many words one ends a row."""
        n_prompts, group, new = (4, 4, 16) if here.small else (16, 8, 512)
        self.step(what, n_prompts, group, new,
                  stop_ids=range(0, SHAPES[self.shape][5], STOP_STRIDE[here.small]), **more)

    def full_step(self):
        """--full: float32 weights under autocast. Its own model; what this shape holds makes room."""
        for name in ("sampler", "params", "model"):
            self.__dict__.pop(name, None)
        clean()
        model = random_model(self.shape, torch.float32, here.device)
        params = [p.requires_grad_() for p in model.parameters()]
        model.train()
        self.__dict__["model"] = model  # for its configuration
        try:
            self.default_step("--full", params=params, sampler=new_sampler(model, 256, self.dtype),
                              passes=3, full=True)
        finally:
            del self.__dict__["model"]

    def twice(self):
        """Is the gradient of the same rows the same to the bit? Reported, not checked: atomics may add up."""
        n, new = (4, 8) if here.small else (8, 256)
        rollouts, args, gradients = random_rollouts(n, 4, new, new, self.model), step_args(n, 4, new), []
        for _ in range(2):
            grpo.accumulate_gradients(self.model, rollouts, args, len(rollouts), 4 * n * new, 4096,
                                      here.device)
            gradients.append(take_gradient(self.params))
        first, second = gradients
        report("same update twice", shape=self.shape, bit_equal=torch.equal(first, second),
               relative=float((first - second).norm() / first.norm()))

    def gap(self):
        """Sampler and trainer each against a float32 copy: neither may be much further off than the other."""
        assert self.params
        exact = copy.deepcopy(self.model).float()  # before the sampler makes views of the weights
        prompts = random_prompts(*(4, 10, 20) if here.small else (16, 10, 150), self.model.config.vocab_size)
        self.sampler.stop_ids = set()
        rows, completions = sample(self.sampler, prompts, 2 if here.small else 8, 12 if here.small else 64)
        ids = [c.ids for c in completions]
        sampled = torch.tensor([x for c in completions for x in c.logprobs])
        trained, right = (torch.cat(grpo.completion_logprobs(model, rows, ids, 1.0, 8192, here.device))
                          for model in (self.model, exact))
        name = f"{self.shape}, {str(self.dtype)[6:]}"
        limit = 1.5 * (trained - right).abs().mean() + 1e-6  # where the computation is float32 both are right
        check(f"{name}: |sampler - float32|, mean; at most 1.5 |trainer - float32|",
              (sampled - right).abs().mean(), limit)
        between = trained - sampled
        report("gap", shape=self.shape, mean=between.abs().mean().item(), largest=between.abs().max().item(),
               bias=between.mean().item())
        check(f"{name}: mean of trainer - sampler", between.mean().abs(), 0.01)

    # ---- where the time goes ----

    def step_kernels(self, rows):
        """The classes of a decode step's operators, run one by one, and the kernels of its graph."""
        steps, sampler = self.stand(rows), self.sampler

        @torch.inference_mode()
        def eager():
            sampler.positions.fill_(self.prompt_tokens + self.new // 2)
            sampler._decode(rows, len(sampler.columns), 1.0)

        eager()
        what = f"{self.shape}, a decode step of {rows} rows"
        kernel_classes(what, eager, self.model.config.vocab_size,
                       as_graph_ms=round(1e3 * per_run(steps, 2) / sampler.sync_every, 3))
        kernel_table(f"{what}: {sampler.sync_every} replays of its graph", steps)

    def batch_kernels(self):
        """The same of a training micro-batch, forward and backward."""
        n, new, words, kept = *((4, 16) if here.small else (12, 512)), self.model.config.vocab_size, []
        batch = grpo.make_batch(self.prompts(n), random_prompts(n, new, new, words), here.device)

        def forward():
            kept.append(grpo.token_logprobs(self.model, *batch).sum())

        def backward():
            kept.pop().backward()

        what = f"{self.shape}, {n} rows of {self.prompt_tokens} + {new} tokens"
        assert self.params
        forward(), backward()  # warm-up
        for name, run in (("forward", forward), ("backward", backward)):
            kernel_classes(f"{what}: {name}", run, words)
        kernel_table(what, lambda: (forward(), backward()))
        for p in self.params:
            p.grad = None


CLASSES = {  # of aten's operators, by what their names hold; the first that fits
    "attention": ("attention", "flash", "efficient", "bmm"),
    "norm": ("norm", "rsqrt", "pow", "mean"),
    "draw, log-probs": ("softmax", "cumsum", "searchsorted", "gather", "scatter", "log", "exp", "max"),
    "copies, cache": ("copy", "cat", "index", "roll", "fill", "zero", "embedding", "clone", "repeat")}


OURS = {"_attend": "attention", "_add_norm": "norm", "_swiglu": "elementwise"}  # common/kernels.py


def class_of(name, shapes, vocabulary):
    """Products by their sizes: the adapter's have a side of its rank, or of a few ranks stacked."""
    name = name.removeprefix("aten::")
    if name in ("mm", "addmm", "addmm_", "_addmm_activation"):
        (n, k), (_, m) = shapes[0:2] if name == "mm" else shapes[1:3]
        if vocabulary in (n, k, m):
            return "head's product"
        return "LoRA's products" if {k, m} & {RANK, 2 * RANK, 3 * RANK} or n == RANK else "layers' products"
    return next((kind for kind, parts in CLASSES.items() if any(part in name for part in parts)),
                "elementwise")


def traced(run, **more):
    """(Averages of a trace of run(), the name of its time: on CUDA the kernels', else the CPU's.)"""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu() else [])
    with profile(activities=activities, record_shapes=bool(more)) as trace:
        timed(run)
    return trace.key_averages(**more), "self_device_time_total" if on_gpu() else "self_cpu_time_total"


def kernel_classes(what, run, vocabulary, **more):
    """Milliseconds and calls of run()'s operators, by class."""
    averages, time_name = traced(run, group_by_input_shape=True)
    milliseconds, calls = Counter(), Counter()
    for event in averages:
        of_ours = event.key in OURS and event.device_type == DeviceType.CUDA
        if (event.key.startswith("aten::") or of_ours) and (used := getattr(event, time_name)):
            kind = OURS[event.key] if of_ours else class_of(event.key, event.input_shapes, vocabulary)
            milliseconds[kind] += used / 1e3
            calls[kind] += event.count
    report("kernels", what=what, total_ms=round(sum(milliseconds.values()), 3), **more,
           ms={kind: round(value, 3) for kind, value in milliseconds.most_common()},
           calls={kind: calls[kind] for kind, _ in milliseconds.most_common()})


def kernel_table(title, run):
    """The 25 slowest kernels (on a CPU, operators) of run() to --out's kernels.md."""
    averages, time_name = traced(run)
    on_device = [e for e in averages if not on_gpu() or e.device_type == DeviceType.CUDA]
    slowest = sorted(on_device, key=lambda e: -getattr(e, time_name))
    total = sum(getattr(e, time_name) for e in slowest)
    lines = [f"\n{title}: {total / 1e3:.2f} ms in {sum(e.count for e in slowest)} calls\n",
             "| ms | calls | kernel |", "| --- | --- | --- |"]
    lines += [f"| {getattr(e, time_name) / 1e3:.3f} | {e.count} | {e.key[:150].replace('|', ' ')} |"
              for e in slowest[:25]]
    if here.out:
        with open(here.out / "kernels.md", "a") as file:
            file.write("\n".join(lines) + "\n")


