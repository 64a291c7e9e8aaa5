"""The scripts as if on a GPU (tests/stand_in_cuda.py): what a run on the CPU never reaches.

Captured graphs, eight steps between two looks, row blocks of 32, what happens when memory runs out; and that
no tensor stays on the wrong device. Values are the CPU's: only what is computed, and where, is tested.
"""

import copy
import importlib
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import grpo
from common import curves, dist, models, shard
from common.run import retry_smaller
from tests.stand_in_cuda import CPU, CUDA, OnCuda, as_if_on_cuda, to_cuda
from tests.test_kernels import rotate
from tests.tiny_models import some_prompts, tiny_model

torch.set_num_threads(1)

STOP = {5, 6}
PROMPTS = some_prompts((3, 7, 5, 12, 4), seed=2)
KEYS = [[grpo.noise_key(0, p, g) for g in range(8)] for p in range(len(PROMPTS))]  # 40 rows


@pytest.fixture
def cuda():
    """The stand-in, switched on; a rule of CUDA's that was broken fails the test, even if it was caught."""
    with as_if_on_cuda() as device:
        yield device
    assert device.errors == []


def adapted(kind="qwen2", dtype=torch.float32):
    """A tiny model on the CPU with an adapter that is not zero, and its copy on the device."""
    torch.manual_seed(0)
    model = tiny_model(kind).to(dtype)
    move(grpo.add_lora(model, "policy", 4, 8, models.PROJECTIONS))
    return model, to_cuda(copy.deepcopy(model))


@torch.no_grad()
def move(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.add_((0.1 * torch.randn(p.shape, generator=generator)).to(p.device))


def ids(samples):
    return [[c.ids for c in row] for row in samples]


def logprobs(samples):
    return torch.tensor([x for row in samples for c in row for x in c.logprobs])


# ---- the stand-in itself ----

def test_the_stand_in_refuses_what_cuda_refuses():
    with as_if_on_cuda() as device:
        x = torch.ones(3, device=CUDA)
        assert x.device == CUDA and (x + torch.tensor(1.0) + 1).tolist() == [3, 3, 3]  # numbers go with all
        for mix in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x.long()],
                    lambda: torch.where(x > 0, x, torch.ones(3))):
            with pytest.raises(RuntimeError, match="two devices"):
                mix()
        for look in (x.sum().item, x.cpu, x.nonzero, lambda: x[x > 0], lambda: x[torch.zeros(1).long()],
                     lambda: torch.ones(3).to(CUDA), lambda: x.copy_(torch.ones(3))):
            before = len(device.waits)
            look()
            assert len(device.waits) == before + 1
            graph = torch.cuda.CUDAGraph()
            with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
                look()
            with pytest.raises(RuntimeError, match="replay"):
                graph.replay()
        assert len(device.errors) == 3 + 7
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "no GPU"


def test_a_captured_graph_computes_at_its_replays_on_the_tensors_of_the_capture(cuda):
    x, total = torch.ones(2, 3, device=CUDA), torch.zeros(3, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x[0] * 2
        total += y
    assert total.tolist() == [0, 0, 0]
    graph.replay()
    x[0] = 5.0
    graph.replay()
    assert y.tolist() == [10, 10, 10] and total.tolist() == [12, 12, 12]


# ---- the sampler ----

@pytest.mark.parametrize("temperature", [1.0, 0])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_the_sampler_draws_the_cpus_tokens(kind, temperature, cuda):
    """Token by token in float32, also by the graphs captured before the weights have moved."""
    model, on_cuda = adapted(kind)
    samplers = [grpo.Sampler(of, STOP, 64) for of in (model, on_cuda)]
    for seed in (2, 3):
        want, got = (s.sample(PROMPTS, KEYS, 20, temperature) for s in samplers)
        assert ids(got) == ids(want)
        assert (logprobs(got) - logprobs(want)).abs().max() <= 1e-5  # float32, sums in another order
        for of in (model, on_cuda):
            move([p for p in of.parameters() if p.requires_grad], seed)
    graphs = list(samplers[1].graphs.values())
    assert graphs and all(graph.whole and graph.kernels for graph in graphs)


def test_in_bfloat16_the_sampler_agrees_with_the_trainer(cuda):
    """0.03 on average: bfloat16's rounding, of sums in two orders (0.01 is found here)."""
    model, on_cuda = adapted(dtype=torch.bfloat16)
    sampler = grpo.Sampler(on_cuda, STOP, 64)
    samples = [c for row in sampler.sample(PROMPTS, [[key] for key, *_ in KEYS], 20) for c in row]
    values = grpo.completion_logprobs(model, PROMPTS, [c.ids for c in samples], 1.0, 10**6, CPU)
    gap = torch.cat([row - torch.tensor(c.logprobs) for row, c in zip(values, samples)]).abs()
    assert sampler.graphs and gap.mean() <= 0.03


def plain_attend(qkv, cos, sin, positions, keys, values, scale):
    """kernels.attend, over all columns of the cache."""
    n, kv_heads, rows = len(qkv), keys.shape[1], torch.arange(len(qkv), device=qkv.device)
    q, kv = rotate(qkv, kv_heads, cos[positions], sin[positions])
    keys[rows, :, positions], values[rows, :, positions] = kv[:, 0], kv[:, 1]
    ahead = torch.arange(keys.shape[2], device=qkv.device) > positions[:, None]
    scores = (q.reshape(n, kv_heads, -1, q.shape[-1]) * scale) @ keys[:n].transpose(-1, -2)
    scores = scores.masked_fill(ahead[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values[:n]).reshape(n, -1)


def test_the_sampler_hands_the_kernels_what_its_plain_forms_take():
    """Tokens equal the CPU's, where the kernels are plain forms; in float64 no draw is near a boundary.

    One graph serves all lengths.
    """
    called = set()

    def attend(*args):
        called.add("attend")
        return plain_attend(*args)

    def add_norm(x, y, norm):
        called.add("add_norm")
        return x + y, norm(x + y)

    def swiglu(x):
        called.add("swiglu")
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    stand_in = SimpleNamespace(fit=lambda layer, dtype: True, attend=attend, add_norm=add_norm, swiglu=swiglu)
    for kind in ("qwen2", "qwen3"):
        model, plain = tiny_model(kind).double(), tiny_model(kind).double()
        want = grpo.Sampler(plain, STOP, 64).sample(PROMPTS, KEYS, 20)
        with as_if_on_cuda(stand_in) as cuda:
            sampler = grpo.Sampler(to_cuda(model), STOP, 64)
            got = sampler.sample(PROMPTS, KEYS, 20)
            assert ids(got) == ids(want)
            sampler.sample([p * 30 for p in PROMPTS], KEYS, 4)  # 360 tokens: a longer cache
        assert cuda.errors == [] and called == {"attend", "add_norm", "swiglu"}
        called.clear()
        assert {length for _, length, _ in sampler.graphs} == {sampler.cache.shape[4]}


@pytest.mark.parametrize("graphs", [True, False])
def test_the_host_waits_per_block_of_steps_not_per_token(graphs, cuda):
    """Three blocks of 2 steps and three of 16, and what stands around them, wait as often."""
    _, model = adapted()
    counted = []
    for sync_every in (2, 16):
        sampler = grpo.Sampler(model, (), 64, sync_every=sync_every, graphs=graphs)
        cuda.waits.clear()
        samples = sampler.sample(PROMPTS, KEYS, 1 + 3 * sync_every)  # the first token comes with the prompt
        assert {len(c.ids) for row in samples for c in row} == {1 + 3 * sync_every}
        counted.append(sorted(cuda.waits))
    assert counted[0] == counted[1] and len(counted[0]) < 20


@pytest.mark.parametrize("slots", [256, 40])
def test_rows_are_decoded_in_whole_blocks_whatever_ran_before(slots, cuda, monkeypatch):
    """Products of other sizes round otherwise: a resumed run, which has not evaluated, would differ."""
    real, rows = grpo.Sampler._decode, []
    monkeypatch.setattr(grpo.Sampler, "_decode",
                        lambda self, n, *rest: (rows.append(n), real(self, n, *rest))[1])
    _, model = adapted()
    decoded = []
    for evaluated in (False, True):
        sampler = grpo.Sampler(model, STOP, slots, graphs=False)
        if evaluated:
            sampler.sample(PROMPTS, [[grpo.noise_key(1, p, g) for g in range(30)] for p in range(5)], 4, 0)
        rows.clear()
        sampler.sample(PROMPTS, KEYS, 20)
        decoded.append(list(rows))
    assert decoded[0] == decoded[1]
    assert max(rows) == min(64, slots) and all(n in (32, 64, slots) for n in rows)
    assert sampler.cache.shape[2] <= slots


# ---- when memory runs out ----

@pytest.fixture
def short_of_memory(monkeypatch):
    """short_of_memory(when): the first decode step for which when(n) holds ends in torch's own error."""
    real = grpo.Sampler._decode

    def fail(when):
        failed = []

        def decode(self, n, *rest):
            real(self, n, *rest)
            if not failed and when(n):
                failed.append(n)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(grpo.Sampler, "_decode", decode)

    return fail


def test_a_graph_whose_capture_failed_is_not_replayed(cuda, short_of_memory):
    """What it holds is half a step, and a replay would run it without an error."""
    model, on_cuda = adapted()
    want = grpo.Sampler(model, STOP, 64).sample(PROMPTS, KEYS, 20)
    short_of_memory(lambda n: torch.cuda.is_current_stream_capturing())
    sampler = grpo.Sampler(on_cuda, STOP, 64)
    with pytest.raises(torch.OutOfMemoryError):
        sampler.sample(PROMPTS, KEYS, 20)
    assert all(graph.whole for graph in (sampler.graphs or {}).values())
    assert ids(sampler.sample(PROMPTS, KEYS, 20)) == ids(want)


@pytest.mark.parametrize("capturing", [True, False])
def test_a_retry_of_sampling_starts_without_cache_and_graphs(capturing, cuda, short_of_memory):
    """The first retry takes half the rows, not half the slots, which may be more than there are rows."""
    model, on_cuda = adapted()
    want = grpo.Sampler(model, STOP, 64).sample(PROMPTS, KEYS, 20)
    sampler, attempts = grpo.Sampler(on_cuda, STOP, 256), []
    sampler.sample(PROMPTS, KEYS, 2)  # a step before: the cache is there, and a graph
    short_of_memory(lambda n: n > 32 and torch.cuda.is_current_stream_capturing() == capturing)
    sampler.graphs.clear()  # so that it comes to a step that is captured
    sample = sampler.sample

    def attempt(*args):
        attempts.append((sampler.slots, sampler.cache is None, not sampler.graphs))
        return sample(*args)

    sampler.sample = attempt
    run = SimpleNamespace(device=CUDA, progress=lambda text: None)
    got = grpo.sample_all(sampler, PROMPTS, KEYS, 20, 1.0, run, None)
    assert ids(got) == ids(want)
    assert attempts[1:] == [(20, True, True)] and sampler.cache.shape[2] == 20


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")],
    ids=["allocator", "graph or module", "cuBLAS", "cuDNN", "Triton", "CPU"])
def test_every_way_to_be_out_of_memory_is_tried_again_with_less(error):
    def attempt(size):
        if size > 2:
            raise error
        return "done"

    assert retry_smaller(attempt, 8, CPU, 1, "slots") == ("done", 2)


@pytest.mark.parametrize("error", [
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error, NCCL version 2.28.9\nncclUnhandled"
        "CudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")], ids=["NCCL", "illegal access", "cuBLAS"])
def test_other_errors_are_not_tried_again(error):
    """NCCL's communicator is broken after its error, on this rank and on the others."""
    sizes = []

    def attempt(size):
        sizes.append(size)
        raise error

    with pytest.raises(type(error)):
        retry_smaller(attempt, 8, CPU, 1, "slots")
    assert sizes == [8]


# ---- training ----

@pytest.mark.parametrize("trained", ["adapter", "adapter, layers recomputed", "all weights"])
def test_a_training_step_is_the_cpus(trained, cuda):
    """Gradients, their norm and the weights after AdamW; 1e-5 of the largest: float32 rounding."""
    outcomes = []
    for model, device in zip(adapted(), (CPU, CUDA)):
        if trained == "all weights":
            model.requires_grad_(True)
        params = [p for p in model.parameters() if p.requires_grad]
        if "recomputed" in trained:
            grpo.enable_checkpointing(model)
        args = grpo.Args(beta=0.1, full=trained == "all weights")
        completions = [[11, 4, 9], [7, 7, 30, 2], [5], [8, 100, 200], [3, 1]]
        with grpo.use_adapter(model, None):
            reference = grpo.completion_logprobs(model, PROMPTS, completions, 1.0, 40, device)
        rollouts = [grpo.Rollout(None, 0, g, prompt, grpo.Completion(row, [-1.0] * len(row), True),
                                 advantage=(-1.0) ** g, old_logprobs=ref + 0.01, ref_logprobs=ref)
                    for g, (prompt, row, ref) in enumerate(zip(PROMPTS, completions, reference))]
        optimizer = torch.optim.AdamW(params, lr=0.01)
        sums = grpo.accumulate_gradients(model.train(), rollouts, args, 5, 13, 40, device)
        dist.sum_gradients(params)
        gradients = torch.cat([p.grad.flatten().cpu() for p in params])
        norm = shard.clip_gradients(params, 1.0)
        optimizer.step()
        weights = torch.cat([p.detach().flatten().cpu() for p in params])
        outcomes.append((gradients, torch.tensor([norm, *sums.values()]), weights))
    assert gradients.any() and not isinstance(gradients, OnCuda)
    for want, got in zip(*outcomes):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# ---- whole runs, on the embedded model in bfloat16 ----

@pytest.fixture
def run_script(tmp_path, cuda, monkeypatch):
    """run_script("grpo", ...): main(Args(...)) on the device; returns the lines of metrics.jsonl."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(curves, "draw", lambda *_: None)
    small = {"train_questions": 40, "eval_questions": 3, "max_new_tokens": 9}

    def run_script(name, **args):
        script = importlib.import_module(name)
        fields = script.Args.__dataclass_fields__
        args = {key: value for key, value in small.items() if key in fields} | args
        script.main(script.Args(out=str(tmp_path / name), device="cuda", **args))
        return curves.read_metrics(tmp_path / name)

    yield run_script
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


STEPS = {"max_steps": 1, "prompts_per_step": 4, "num_generations": 4}


def test_grpo_runs_and_is_resumed(run_script, tmp_path):
    more = STEPS | {"beta": 0.04, "gradient_checkpointing": True, "merge": True}
    run_script("grpo", **more)
    lines = run_script("grpo", **more | {"max_steps": 2, "resume": True})
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (tmp_path / "grpo/final/model.safetensors").exists()


def test_grpo_trains_all_weights(run_script):
    lines = run_script("grpo", full=True, beta=0.04, **STEPS)
    assert lines[-1]["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("script, args", [
    ("ppo", {"max_steps": 1, "prompts_per_step": 8, "ppo_epochs": 1}),
    ("dpo", {"max_steps": 1, "questions": 24, "max_new_tokens": 32, "pairs_per_step": 2}),
    ("sft", {"max_steps": 1, "batch_size": 4}),
    ("star", {"iterations": 1, "first_steps": 1, "questions": 24, "max_new_tokens": 32, "batch_size": 2}),
    ("reward_model", {"max_steps": 1, "train_pairs": 12, "eval_pairs": 6, "pairs_per_step": 4}),
    ("eval", {"limit": 4})], ids=lambda value: value if isinstance(value, str) else "")
def test_the_other_scripts_run(script, args, run_script):
    assert run_script(script, **args)


# ---- what fits ----

@pytest.mark.parametrize("free, kept, fits", [
    (80, 0, 10_240),  # less 8 GB (a tenth), 2 (a chunk of log-probs) and 0.3 (what does not grow)
    (80, 40, 4096), (80, 70, 512), (300, 0, 16384)])
def test_tokens_that_fit(free, kept, fits, cuda, monkeypatch):
    """Passes whose peak is 0.3 GB and 7 MB a token: what is left of the card goes to tokens, in 512s."""
    _, model = adapted()
    params, taken = [p for p in model.parameters() if p.requires_grad], []
    forward = type(model.base_model).forward

    def counted(self, input_ids, **more):
        taken.append(input_ids.numel())
        return forward(self, input_ids[:, :8], **more)

    monkeypatch.setattr(type(model.base_model), "forward", counted)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: int(
        1.3 * 2**30 + 7e6 * (taken[-1] if taken else 0)))  # 1 GB was allocated before
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 2**30)
    found = models.tokens_that_fit(model, params, torch.float32, kept * 2**30)
    assert found == fits and taken == [512, 512, 1024] and all(p.grad is None for p in params)


def test_where_not_even_a_pass_fits_the_fewest_tokens_are_taken(cuda, monkeypatch):
    _, model = adapted()

    def fails(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.base_model), "forward", fails)
    assert models.tokens_that_fit(model, list(model.parameters()), torch.float32) == 512


def test_what_setup_switches(cuda, monkeypatch):
    """cuDNN's attention and sums in bfloat16 are off, segments expand unless the user says otherwise."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: switched.append(on))
    assert dist.setup("cuda") == CUDA and switched == [False]
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    dist.setup("cuda")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "backend:native"
