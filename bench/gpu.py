"""Check and time a CUDA machine for this project in one run of minutes: right first, then how fast.

    python bench/gpu.py --out runs/gpu              # all of it, in about --seconds 330
    python bench/gpu.py --only "3B: decode" OOM     # the parts whose names hold one of these words
    python bench/gpu.py --small                     # toy sizes on any machine: does it run to its end?

Needs torch and transformers, and neither the network nor any other package. Prints a JSON line for each
figure as it is found, then Markdown tables; exit code 1 if a check fails or a part breaks (the rest goes on).
In --out: gpu.jsonl, a line at once for each figure; gpu.md, the tables; kernels.md, the slowest kernels;
scripts.log, what the scripts print. A part that would end after --seconds is left out and named. SIGTERM,
Ctrl-C or a part that hangs for 45 seconds past the budget end the run with the tables of what there is.

A decode step's limit is the larger of bytes / copy bandwidth (the weights once, the keys and values that are
read once) and operations / matrix rate; both ceilings are measured first, on this card. Training counts two
operations per weight and token forward and two backward (--full: four), with lm_head on completion tokens
alone; what is recomputed does not count.

On a CPU a stand-in takes the place of CUDA's graphs: it records the operators of a capture and replays them
on the same tensors. So the sampler's graph path runs there as on a card, eight steps between two looks.
"""

import time

IMPORTS_BEGAN = time.monotonic()  # they take long enough on a fresh machine to count

import copy
import functools
import gc
import importlib
import json
import math
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

import grpo
from bench.grpo_step import one_step
from common import dist, models

IMPORTS_TOOK = time.monotonic() - IMPORTS_BEGAN

# hidden, intermediate, layers, heads, key-value heads, vocabulary; embeddings are tied in all
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "3B": (2048, 11_008, 36, 16, 2, 151_936),
    "one layer": (896, 4864, 1, 14, 2, 151_936),
    # where tokens must be equal: each word more is an edge more that rounding can move across a draw
    "check": (256, 688, 4, 4, 2, 512),
    "toy": (64, 96, 2, 4, 2, 512)}
RANK = 32
STOP_STRIDE = 310, 10  # every 310th word ends a row: a mean of 250 tokens when cut at 512 (small: 8 of 16)
ALWAYS = "environment", "ceilings"  # also with --only
HANGS = 45  # seconds past the budget after which the run is ended from outside the part

# What main sets, and where the run stands.
here = SimpleNamespace(device=torch.device("cpu"), small=True, only=(), out=None, began=0.0, seconds=math.inf,
                       part="", stdout=None)
figures = []
printing = threading.RLock()


def report(kind, **values):
    with printing:
        figures.append({"figure": kind, **values})
        line = json.dumps(figures[-1])
        print(line, file=here.stdout or sys.stdout, flush=True)
        if here.out:
            with open(here.out / "gpu.jsonl", "a") as file:
                file.write(line + "\n")


def check(name, value, limit):
    value, limit = float(value), float(limit)
    report("check", name=name, value=value, limit=limit, ok=value <= limit)  # NaN is not


def elapsed():
    return time.monotonic() - here.began


def on_gpu():
    return here.device.type == "cuda"


def clean():
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def attempt(name, cost, function, *args):
    """function(*args), a part of the run; cost: its seconds on an H100, as far as they are known.

    It is left out, and named, if it would end after the budget. What breaks is reported, and the run goes on.
    """
    if here.only and name not in ALWAYS and not any(word in name for word in here.only):
        return
    if elapsed() + (0 if here.small else cost) > here.seconds:
        report("left out", part=name, needs=cost, at=round(elapsed()))
        return
    start, here.part = time.monotonic(), name
    try:
        clean()
        function(*args)
        clean()
    except BaseException as error:  # noqa: BLE001 (a script's sys.exit, too: the other figures count still)
        traceback.print_exc()
        report("broken", part=name, error=f"{type(error).__name__}: {error}"[:300])
    report("part", name=name, seconds=round(time.monotonic() - start, 1), expected=cost, at=round(elapsed()))


@contextmanager
def watch():
    """A thread that ends the run with its tables: at a signal, or when a part hangs long past the budget.

    The main thread may be inside a call of CUDA, and the scripts set handlers of their own; through the
    wake-up file the thread hears of a signal whatever they do.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def wait():
        while True:
            left = here.began + here.seconds + HANGS - time.monotonic()
            heard = select.select([reader], [], [], max(0, left))[0]
            what = set(os.read(reader, 64)) if heard else {signal.SIGALRM}
            if 0 in what:
                return
            if what & {signal.SIGTERM, signal.SIGINT, signal.SIGALRM}:
                names = ", ".join(signal.Signals(number).name for number in what) if heard else "it hangs"
                report("broken", part=here.part, error=f"ended here: {names}")
                finish()
                os._exit(1)

    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listen()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.write(writer, b"\0")
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader), os.close(writer)


def listen():
    """A signal that is ignored, as at a script's end, would not reach the thread either."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)


# ---- time and memory ----


def timed(run):
    """Seconds of run(), the device's queue included."""
    if on_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def per_run(run, times, series=3):
    """Seconds of one run(), in the median series of `times` without a look in between."""
    return statistics.median(timed(lambda: [run() for _ in range(times)]) for _ in range(series)) / times


def reset_peak():
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_gb():
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu() else None


def reserved_gb():
    return round(torch.cuda.memory_reserved() / 2**30, 2) if on_gpu() else None


# ---- graphs: counted on CUDA, stood in for elsewhere ----


class Recorder(TorchDispatchMode):
    """Notes operators. As in a real capture nothing outside changes: there, what would be written is not."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [args[i] if i < len(args) else kwargs.get(argument.name)
                   for i, argument in enumerate(function._schema.arguments)
                   if argument.alias_info and argument.alias_info.is_write]
        if all(address(tensor) in self.made for tensor in written):
            out = function(*args, **kwargs)
        else:
            out = written[0]
        before = {address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        self.made |= {address(tensor) for tensor in tree_leaves(out)} - before
        self.calls.append((function, args, kwargs, out))
        return out


def address(tensor):
    return tensor.untyped_storage().data_ptr()


class StandInGraph:
    """A CUDA graph for a CPU: replay runs the recorded operators again, on the very same tensors."""

    recorder = None

    def replay(self):
        for function, args, kwargs, out in self.recorder.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                if address(old) != address(new):  # not a view, nor written in place
                    old.copy_(new)


class StandInCapture:
    """torch.cuda.graph for a CPU; an error inside leaves a graph of half a step, as on CUDA."""

    def __init__(self, graph, **_):
        self.recorder = graph.recorder = Recorder()

    def __enter__(self):
        self.recorder.__enter__()

    def __exit__(self, *error):
        self.recorder.__exit__(*error)


class Capture:
    """In place of torch.cuda.graph: counts and times the captures; one can be made to run out of memory."""

    real, number, seconds, starve = torch.cuda.graph, 0, 0.0, False

    def __init__(self, *args, **kwargs):
        self.inner = Capture.real(*args, **kwargs)

    def __enter__(self):
        self.began = time.perf_counter()
        self.nothing = no_memory() if Capture.starve else nullcontext()
        Capture.starve = False
        self.nothing.__enter__()
        try:
            return self.inner.__enter__()
        except BaseException:
            self.nothing.__exit__(None, None, None)
            raise

    def __exit__(self, *error):
        self.nothing.__exit__(None, None, None)
        result = self.inner.__exit__(*error)
        Capture.number += 1
        Capture.seconds += time.perf_counter() - self.began
        return result


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("a stand-in for CUDA's")


@contextmanager
def no_memory():
    """No segment more for the process (a graph's pool has none yet); on a CPU a decode step's draw fails."""
    if not on_gpu():
        with mock.patch.object(grpo, "draw", out_of_memory):
            yield
        return
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def counted_graphs():
    if on_gpu():
        return mock.patch.object(torch.cuda, "graph", Capture)
    Capture.real = StandInCapture
    return mock.patch.multiple(torch.cuda, graph=Capture, CUDAGraph=StandInGraph,
                               graph_pool_handle=lambda: (0, 1))


# ---- models and samples ----


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


def new_sampler(model, slots, dtype=None, graphs=True):
    """As the scripts make it on CUDA: eight steps between two looks, captured; rows in blocks of 32."""
    sampler = grpo.Sampler(model, (), slots, dtype, sync_every=8, graphs=graphs)
    sampler.row_block = 32
    return sampler


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
    """Rows of other tokens: after one that differs the rest of its row does too."""
    return sum(x.ids != y.ids for x, y in zip(first, second, strict=True))


def largest_gap(first, second):
    """Of log-probs, in rows of the same tokens."""
    return max((abs(a - b) for x, y in zip(first, second) if x.ids == y.ids
                for a, b in zip(x.logprobs, y.logprobs)), default=math.nan)


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
           dtype=str(dtype)[6:], small=here.small, imports_s=round(IMPORTS_TOOK, 1), attention=choices,
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
    rows, tokens, new = (8, 40, 12) if here.small else (128, 600, 24)
    model = random_model("toy" if here.small else "check", torch.float32, here.device)
    add_adapter(model, 8)
    prompts = random_prompts(2, tokens, tokens, model.config.vocab_size)
    keys, run = noise_keys(2, rows // 2), SimpleNamespace(device=here.device, progress=lambda *_: None)
    # what is first used is made for good: workspaces of products, for one
    sample(new_sampler(model, rows), prompts, 1, new)
    expected, needed = reserved_by(lambda: sample(new_sampler(model, rows), prompts, rows // 2, new)[1])
    for what, slots, short in (
            ("sampling", 2 * rows, partial(short_of_memory, 0.75 * needed, "Sampler._allocate",
                                           lambda _, slots, length: slots > rows // 2)),
            ("capture", 2 * rows, nullcontext), ("capture, all slots in use", rows, nullcontext)):
        sampler = new_sampler(model, slots)
        clean()
        Capture.starve = "capture" in what
        with short():
            found = grpo.sample_all(sampler, prompts, keys, new, 1.0, run, "out of memory")
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
    """One query a row against its cache, four ways, each captured over several layers' caches.

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

        ways = {"two products": lambda i: products(*cache[i])}
        if on_gpu():
            ways |= {"cuDNN": lambda i: fused(SDPBackend.CUDNN_ATTENTION, *cache[i]),
                     "efficient": lambda i: fused(SDPBackend.EFFICIENT_ATTENTION, *cache[i]), "flash": flash}
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
    """grpo.Args of a timed step, resolved. tokens_per_batch is the script's own default, set here alone."""
    return grpo.resolve(grpo.Args(num_generations=group, max_new_tokens=new, lora_r=RANK, lr=2e-5,
                                  slots=n_prompts * group, **more), here.device)


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
        return length if on_gpu() else -(-longest // self.sampler.block) * self.sampler.block

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
        sampler._gather()
        sampler._allocate(rows, self.prompt_tokens + self.new + sampler.sync_every)
        sampler.tokens.zero_()
        sampler.noise.fill_(0.5)

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
    def generate(self, slots):
        """transformers' `generate` with its dynamic cache, without the adapter."""
        few = 9
        ids = torch.tensor(self.prompts(slots), device=here.device)

        def run(tokens):
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(
                    max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    disable_compile=True))

        assert self.params
        reset_peak()
        with grpo.use_adapter(self.model, None):
            run(2)
            first, whole = (timed(partial(run, tokens)) for tokens in (1, few))
        length = self.prompt_tokens + few // 2
        seconds = (whole - first) / (few - 1)
        self.decode_figure("generate", slots, seconds, length, length)
        ours = [f for f in figures if f["figure"] == "decode" and f["shape"] == self.shape
                and (f["what"], f["slots"]) == ("Sampler", slots)]
        if ours:
            report("against generate", shape=self.shape, slots=slots,
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
        prompts, optimizer = self.prompts(n_prompts), torch.optim.AdamW(params, lr=args.lr)
        run = partial(one_step, model, params, optimizer, sampler, args=args, device=here.device)
        compute = (torch.autocast(here.device.type, torch.bfloat16, cache_enabled=False)
                   if more.get("full") and self.dtype == torch.bfloat16 else nullcontext())
        if checkpointing:
            grpo.enable_checkpointing(model)
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
            sampler.count.zero_()
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
        if event.key.startswith("aten::") and (used := getattr(event, time_name)):
            kind = class_of(event.key, event.input_shapes, vocabulary)
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


# ---- tables ----


def table(kind, columns, cells):
    rows = [cells(figure) for figure in figures if figure["figure"] == kind]
    lines = [" | ".join(row) for row in [columns, ["---"] * len(columns), *rows]]
    return "\n" + "\n".join(f"| {line} |" for line in lines) + "\n" if rows else ""


def against_generate(f):
    return next((f"{g['ratio']:.1f} x" for g in figures if g["figure"] == "against generate" and (
        f["what"], f["shape"], f["slots"]) == ("Sampler", g["shape"], g["slots"])), "")


def tables():
    """All of them as Markdown."""
    def ms(value):
        return "" if value is None else f"{value:.2f}"

    def share(f, name):
        return f"{f['shares'][name]:.0%}" if name in f["shares"] else ""

    machine = next((f for f in figures if f["figure"] == "machine"), {})
    ceilings = next((f for f in figures if f["figure"] == "ceilings"), {})
    lines = [f"{key}: {value}" for key, value in (machine | ceilings).items() if key != "figure"]
    return "; ".join(lines) + "\n" + "".join([
        table("check", ("check", "value", "at most", ""), lambda f: (
            f["name"].replace("|", "\\|"), f"{f['value']:.2g}", f"{f['limit']:.2g}",
            "ok" if f["ok"] else "**FAILED**")),
        table("decode", ("decode", "slots", "mean length", "keys read", "ms per step", "replayed alone, ms",
                         "limit, ms", "share of the limit", "tokens/s", "against generate", "peak GB"),
              lambda f: (f"{f['shape']}, {f['what']}", str(f["slots"]), str(f["length"]), str(f["keys_read"]),
                         ms(f["ms_per_step"]), ms(f.get("replay_ms")), ms(f["limit_ms"]), f"{f['share']:.0%}",
                         f"{f['tokens_per_s']:,}", against_generate(f), str(f["peak_gb"]))),
        table("step", ("GRPO step", "rows", "tokens", "sample s", "reference s", "update s", "step s",
                       "sampled tokens/s", "reference, share of the matrix rate", "update, share",
                       "tokens per batch", "peak GB"), lambda f: (
            f"{f['shape']}, {f['what']}", f"{f['prompts']} x {f['group']}",
            f"{f['prompt_tokens']} + {f['mean_new']} (longest {f['longest']})",
            *(ms(f["seconds"].get(name)) for name in ("sample", "reference", "update")), ms(f["step_s"]),
            f"{f['sample_tokens_per_s'] or 0:,}", share(f, "reference"), share(f, "update"),
            f"{f['tokens_per_batch']:,}", str(f["peak_gb"]))),
        table("kernels", ("where the time goes", "ms", "as a graph, ms", "of it"), lambda f: (
            f["what"], ms(f["total_ms"]), ms(f.get("as_graph_ms")), ", ".join(
                f"{kind} {value:.2f} ({f['calls'][kind]})" for kind, value in f["ms"].items()))),
        table("captures", ("captures", "slots", "graphs", "seconds", "reserved GB before", "after"),
              lambda f: (f["shape"], str(f["slots"]), str(f["number"]), ms(f["seconds"]),
                         str(f["reserved_gb_before"]), str(f["reserved_gb_after"]))),
        table("gap", ("trainer - sampler", "mean size", "largest", "mean"), lambda f: (
            f["shape"], f"{f['mean']:.4f}", f"{f['largest']:.3f}", f"{f['bias']:.5f}")),
        table("same update twice", ("same update twice", "equal to the bit", "difference, relative"),
              lambda f: (f["shape"], str(f["bit_equal"]), f"{f['relative']:.1g}")),
        table("cudnn attention", ("training's attention", "rows x tokens", "first call, ms", "second, ms"),
              lambda f: (f"cuDNN {'on' if f['enabled'] else 'off'}", f"{f['rows']} x {f['tokens']}",
                         ms(f["first_ms"]), ms(f["second_ms"]))),
        table("decode attention", ("decode's attention", "mean live keys", "limit, us", "us of a layer"),
              lambda f: (f"{f['rows']} x {f['columns']}", str(f["mean_live"]), str(f["limit_us"]), ", ".join(
                  f"{name} {value}" for name, value in f["us"].items()))),
        table("script", ("script", "step", "sampler gap", "seconds of the last step"), lambda f: (
            f["name"], str(f.get("step", "")), f"{f.get('sampler_gap') or 0:.2g}", ms(f.get("seconds")))),
        table("part", ("part", "seconds", "expected", "done at"), lambda f: (
            f["name"], f"{f['seconds']:.1f}", str(f["expected"]), str(f["at"]))),
        table("left out", ("left out: no time", "expected s"), lambda f: (f["part"], str(f["needs"]))),
        table("broken", ("broken", "why"), lambda f: (f["part"], f["error"].replace("\n", " ")))])


def finish():
    """The tables, to the terminal and to --out."""
    with printing:
        text = tables()
        if here.out:
            (here.out / "gpu.md").write_text(text)
        print("\n" + text, file=here.stdout, flush=True)


# ---- the run ----


def large_shape(s):
    """What the project is for: speed first, then where the time goes."""
    for slots in s.a.slots[:2]:
        attempt(f"{s.shape}: decode, {slots} slots", 10, s.decode, slots)
    attempt(f"{s.shape}: generate, {s.a.slots[0]} slots", 6, s.generate, s.a.slots[0])
    n_prompts, group, new = (4, 4, 16) if here.small else (64, 8, 512)
    attempt(f"{s.shape}: GRPO step", 40, partial(s.step, "with KL", n_prompts, group, new, beta=0.04))
    attempt(f"{s.shape}: step of the defaults", 15, s.default_step, "the defaults")
    for slots in s.a.slots[:2]:
        attempt(f"{s.shape}: kernels of a step, {slots} slots", 4, s.step_kernels, slots)
    attempt(f"{s.shape}: kernels of a micro-batch", 6, s.batch_kernels)
    for slots in s.a.slots[2:]:
        attempt(f"{s.shape}: decode, {slots} slots", 10, s.decode, slots)


def small_shape(s):
    """What needs a second model beside the first, and speed at a size that launches bind."""
    attempt(f"{s.shape}: sampler, trainer and float32", 6, s.gap)
    for slots in s.a.slots:
        attempt(f"{s.shape}: decode, {slots} slots", 5, s.decode, slots)
    attempt(f"{s.shape}: generate, {s.a.slots[0]} slots", 5, s.generate, s.a.slots[0])
    attempt(f"{s.shape}: the same update twice", 3, s.twice)
    attempt(f"{s.shape}: step of the defaults", 8, s.default_step, "the defaults")
    attempt(f"{s.shape}: --gradient-checkpointing", 8, partial(
        s.default_step, "--gradient-checkpointing", checkpointing=True))
    attempt(f"{s.shape}: --full", 12, s.full_step)


def all_parts(a, dtype):
    """Correctness first, then the 3B figures: what the budget leaves out is at the end."""
    ceilings = SimpleNamespace(copy=math.nan, matmul=math.nan)
    attempt("environment", 3, environment, dtype)
    attempt("ceilings", 3, measure_ceilings, dtype, ceilings)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, cost, script, values in SCRIPTS:
            attempt(f"script: {name}", cost, run_script, name, script, folder, values)
    attempt("noise and tokens are the CPU's", 5, check_across_devices)
    attempt("draw", 2, check_draw)
    attempt("float32 against transformers", 6, check_float32)
    for each in (torch.float32, torch.bfloat16):
        attempt(f"graphs, {str(each)[6:]}", 5, check_graphs, each)
    attempt("memory of the log-probs", 3, check_logprob_memory)
    if "3B" in a.shapes:
        large_shape(Shape("toy" if here.small else "3B", a, ceilings, dtype))
    attempt("OOM in sampling", 6, check_oom_sampling)
    attempt("OOM in an update", 4, check_oom_update)
    if "0.5B" in a.shapes:
        small_shape(Shape("toy" if here.small else "0.5B", a, ceilings, dtype))
    attempt("cuDNN attention, on and off", 8, time_cudnn)
    attempt("attention of a decode step", 6, time_decode_attention, ceilings)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes; runs on a CPU, in float32")
    parser.add_argument("--seconds", type=float, default=330, help="begin no part that would end after them")
    parser.add_argument("--out", type=Path, help="folder for the figures, tables and logs")
    parser.add_argument("--only", nargs="+", default=(), help="parts whose names hold one of these words")
    parser.add_argument("--shapes", nargs="+", choices=("0.5B", "3B"), default=["0.5B", "3B"])
    parser.add_argument("--slots", nargs="+", type=int, default=[64, 256, 512], help="multiples of 4")
    parser.add_argument("--steps", type=int, default=1, help="GRPO steps to time of each kind")
    a = parser.parse_args()
    if not a.small and not torch.cuda.is_available():
        parser.error("no CUDA device here; --small runs toy sizes on any machine")
    if a.small:
        a.slots = [4, 40]
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
    figures.clear()
    vars(here).update(small=a.small, only=a.only, out=a.out, seconds=a.seconds, stdout=sys.stdout,
                      began=time.monotonic() - IMPORTS_TOOK, device=dist.setup())
    transformers.logging.set_verbosity_error()
    with watch(), counted_graphs():
        all_parts(a, models.choose_dtype("auto", here.device))
        finish()
    sys.exit(any(f["figure"] == "broken" or not f.get("ok", True) for f in figures))


if __name__ == "__main__":
    main()
