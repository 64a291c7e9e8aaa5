"""What bench/gpu.py's parts share: figures, checks, the budget, graphs that are counted, random models."""

import gc
import json
import math
import os
import random
import select
import signal
import statistics
import sys
import threading
import time
import traceback
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import grpo
from common import models

# hidden, intermediate, layers, heads, key-value heads, vocabulary; embeddings are tied in all
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "3B": (2048, 11_008, 36, 16, 2, 151_936),
    "one layer": (896, 4864, 1, 14, 2, 151_936),
    # where tokens must be equal: each word more is an edge more that rounding can move across a draw
    "check": (256, 688, 4, 4, 2, 512),
    "toy": (64, 96, 2, 4, 2, 512)}
ALWAYS = "environment", "ceilings"  # also with --only
HANGS = 45  # seconds past the budget after which the run is ended from outside the part

# What main sets, and where the run stands.
here = SimpleNamespace(device=torch.device("cpu"), small=True, only=(), out=None, began=0.0, seconds=math.inf,
                       part="", stdout=None, imports_took=0.0)
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
    """Give back the memory of what is gone."""
    if on_gpu():
        gc.collect()
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
    except BaseException as error:  # noqa: BLE001 (a script's sys.exit, too: the other figures count still)
        traceback.print_exc()
        report("broken", part=name, error=f"{type(error).__name__}: {error}"[:300])
    report("part", name=name, seconds=round(time.monotonic() - start, 1), expected=cost, at=round(elapsed()))


@contextmanager
def watch(finish):
    """A thread that ends the run with its tables (finish): at a signal, or when a part hangs past the budget.

    The main thread may be inside a call of CUDA, and the scripts set handlers of their own; through the
    wake-up file the thread hears of a signal whatever they do.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def wait():
        while True:
            heard = select.select([reader], [], [], 1)[0]
            what = set(os.read(reader, 64)) if heard else set()
            if 0 in what:
                return
            why = [signal.Signals(number).name for number in what & {signal.SIGTERM, signal.SIGINT}]
            if why or elapsed() > here.seconds + HANGS:
                report("broken", part=here.part, error=f"ended here: {why[0] if why else 'it hangs'}")
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
        given = {address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.made |= {address(tensor) for tensor in tree_leaves(out)} - given
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


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("a stand-in for CUDA's")


class Capture:
    """In place of torch.cuda.graph: counts and times the captures; one can be made to run out of memory.

    That one's draw fails, on a card too: with no memory left at all torch 2.11 ends the process in a capture.
    """

    real, number, seconds, starve = torch.cuda.graph, 0, 0.0, False

    def __init__(self, *args, **kwargs):
        self.inner = Capture.real(*args, **kwargs)

    def __enter__(self):
        self.began = time.perf_counter()
        self.failing = mock.patch.object(grpo, "draw", out_of_memory) if Capture.starve else nullcontext()
        Capture.starve = False
        self.failing.__enter__()
        return self.inner.__enter__()

    def __exit__(self, *error):
        self.failing.__exit__(None, None, None)
        result = self.inner.__exit__(*error)
        Capture.number += 1
        Capture.seconds += time.perf_counter() - self.began
        return result


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
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    models.fuse_norms(model)  # as load_model does
    return model


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


