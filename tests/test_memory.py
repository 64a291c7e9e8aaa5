"""The estimate of memory against tensors that are there: weights, moments, cache, what autograd keeps."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dpo
import grpo
import ppo
import reward_model
import sft
import star
from bench import estimate as memory
from bench import memory as bench
from common import models
from common.run import Run
from tests.commands import run
from tests.tiny_models import SIZES, some_prompts, tiny_model

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
torch.set_num_threads(1)
R = 4


def prepared(kind="qwen2", full=False, dtype=torch.float32, checkpointing=False, layers=None, **sizes):
    """A tiny model as the scripts prepare it: (model, trained parameters, its estimate's fields)."""
    model = tiny_model(kind, **sizes)
    if full:
        params = [p.requires_grad_() for p in model.parameters()]
    else:
        params = grpo.add_lora(model.to(dtype), "policy", R, 8, models.PROJECTIONS, layers)
    if checkpointing:
        grpo.enable_checkpointing(model)
    model.train()
    return model, params, {"dtype": dtype, "full": full, "lora_r": R, "checkpointing": checkpointing,
                           "layers": layers, "on_gpu": False}


def size(tensors):
    """Bytes of their storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


KINDS = ("qwen2", "qwen3", "gemma2", "llama")  # tied and not, biases, wide heads, four norms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_is_exact(kind, full, dtype):
    """Weights, adapters, AdamW's moments, the sampler's own weights and its cache, to the byte."""
    model, params, setup = prepared(kind, full, dtype)
    prompts = some_prompts([9, 5])
    sampler = grpo.Sampler(model, (), slots=3, dtype=dtype)
    sampler.sample(prompts, [[1, 2], [3, 4]], 11)
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    parts = memory.estimate(model.config, slots=3, length=20, prompt=9, samples=2, tokens=8, row=4, **setup)
    adapters = [] if full else params
    assert parts["weights"] == sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in adapters)
    assert parts["adapters"] == sum(p.nbytes for p in adapters)
    assert parts["moments"] == sum(state[name].nbytes for state in optimizer.state.values()
                                   for name in ("exp_avg", "exp_avg_sq"))
    assert parts["cache"] == sum(
        tensor.nbytes for tensor in (sampler.cache, sampler.ids, sampler.logprobs, sampler.noise))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    fused = [part for layer in sampler.layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    tensors = [t for part in [*fused, sampler.head] for t in (part.weight, part.B)
               if t is not None and t.untyped_storage().data_ptr() not in own]
    under_weights = sum(part.A.nbytes for part in fused if part.shared)  # in the storage of the modules' own
    assert parts["sampler"] == size(tensors) + under_weights


def kept_by_autograd(model, dtype, full, ids, mask):
    """Bytes of the storages that autograd saves, each once, those of parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16, enabled=full and dtype == torch.bfloat16,
                        cache_enabled=False)):
        grpo.token_logprobs(model, ids, mask)
    return size(t for t in kept if t.untyped_storage().data_ptr() not in own)


WIDE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}


@pytest.mark.parametrize("kind, layers", [*((kind, None) for kind in KINDS), ("qwen2", range(1, 2))])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_autograd_keeps(kind, layers, full, dtype, checkpointing):
    """To 5%: left out are positions, token ids, and that the first layer's input needs no gradient."""
    model, _, setup = prepared(kind, full, dtype, checkpointing, None if full else layers, **WIDE)
    ids, mask = torch.tensor(some_prompts([64] * 4)), torch.ones(4, 64, dtype=torch.bool)
    m, s = memory.Shape(model.config), memory.Setup(tokens=4 * 64, row=64, **setup)
    estimated = memory.saved(m, s)[0] + (0 if checkpointing else memory.weight_copies(m, s)[1])
    assert estimated == pytest.approx(kept_by_autograd(model, dtype, full, ids, mask), rel=0.05)


def allocated(step):
    """The most bytes that `step()` holds at a time beyond what was there, by torch's own record."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as record:
        step()
    now = most = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("full, dtype, checkpointing", [
    (False, torch.float32, False), (False, torch.bfloat16, True), (True, torch.float32, False),
    (True, torch.bfloat16, True)])
@pytest.mark.parametrize("one_pass", [False, True])
def test_the_pass_at_its_largest(full, dtype, checkpointing, one_pass):
    """Activations and gradients, to 10% of what torch allocates: a small layer's other products count."""
    model, _, setup = prepared("qwen2", full, dtype, checkpointing, vocab_size=512, hidden_size=64,
                               intermediate_size=512, num_hidden_layers=4)
    rows = some_prompts([256] * (2 if one_pass else 4), 512)
    rollouts = [grpo.Rollout(None, 0, 0, ids[:4], grpo.Completion(ids[4:], [-1.0] * 252, True), advantage=1.0,
                             old_logprobs=-torch.ones(252)) for ids in rows]
    args = grpo.Args(full=full)
    with torch.autocast("cpu", torch.bfloat16, enabled=full and dtype == torch.bfloat16,
                        cache_enabled=False):
        measured = allocated(lambda: grpo.accumulate_gradients(model, rollouts, args, 4, 1000, 512, CPU))
    parts = memory.estimate(model.config, tokens=512, row=256, one_pass=one_pass, **setup)
    assert parts["training"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("vocabulary, mlp, prompt", [(512, 256, 200), (512, 2048, 20), (32768, 256, 20)])
def test_sampling_at_its_largest(vocabulary, mlp, prompt):
    """In scores, MLP or logits: the cache and what comes and goes beside it, to 10%."""
    model, _, setup = prepared("qwen2", vocab_size=vocabulary, hidden_size=64, intermediate_size=mlp)
    sampler = grpo.Sampler(model, (), slots=16)
    measured = allocated(lambda: sampler.sample(some_prompts([prompt] * 8, 512), [[1, 2]] * 8, 4))
    parts = memory.estimate(model.config, slots=16, length=prompt + 4, prompt=prompt, samples=2, **setup)
    assert parts["cache"] + parts["sampling"] == pytest.approx(measured, rel=0.1)


# ---- split over ranks ----


@pytest.mark.parametrize("full", [False, True])
def test_matrices_are_split_and_the_rest_is_whole(full):
    model = tiny_model("llama")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    vectors = sum(p.numel() for p in model.parameters()) - matrices
    sizes = {"full": full, "lora_r": R, "tokens": 64, "row": 8, "slots": 8, "length": 40, "prompt": 20}
    one, four = (memory.estimate(model.config, **sizes, ranks=ranks) for ranks in (1, 4))
    each = 4 if full else 2
    assert one["weights"] == each * (matrices + vectors)
    assert four["weights"] == each * (matrices / 4 + vectors)
    assert four["moments"] == (8 * (matrices / 4 + vectors) if full else one["moments"])
    assert all(four[name] == one[name] for name in ("adapters", "cache"))
    assert four["sampling"] - one["sampling"] == each * matrices  # gathered


# ---- what a script's arguments come to ----


@pytest.mark.parametrize("script, more, expected", [
    (grpo, {}, {"networks": 1, "slots": 256, "samples": 1, "tokens": 16000, "one_pass": False}),
    (grpo, {"full": True, "beta": 0.1, "slots": 8}, {"reference": True, "slots": 8}),
    (grpo, {"beta": 0.1}, {"reference": False}),
    (grpo, {"prompts_per_step": 128, "eval_questions": 100}, {"slots": 256, "samples": 8}),
    (grpo, {"prompts_per_step": 1, "num_generations": 2}, {"tokens": 1000, "one_pass": True}),
    (ppo, {"full": True}, {"networks": 2, "reference": False}), (ppo, {"minibatches": 8}, {"tokens": 8000}),
    (dpo, {"full": True}, {"reference": True, "tokens": 16000}),
    (dpo, {"full": True, "loss": "simpo"}, {"reference": False}),
    (sft, {"batch_size": 4}, {"tokens": 2000, "logprobs": True}),
    (star, {"full": True}, {"reference": False}),
    (reward_model, {}, {"logprobs": False, "slots": 0})])
def test_fields_from_arguments(script, more, expected):
    args = script.Args(**{"tokens_per_batch": 16384, "dtype": "bfloat16"} | more)
    config = tiny_model("qwen2").config
    found = memory.of_run(args, script.__name__, config, CPU, 500)
    assert {name: found[name] for name in expected} == expected
    split = SimpleNamespace(**vars(args) | {"shard": True, "quantize": "nf4"})
    found = memory.of_run(split, script.__name__, config, CPU, 500, ranks=4)
    assert (found["ranks"], found["nf4"]) == (4, True)


def test_copies_and_critics():
    """--full: a further network is a copy of the weights; moments are of all trained but an untied head."""
    config = tiny_model("llama").config
    n = sum(p.numel() for p in tiny_model("llama").parameters())
    head = SIZES["vocab_size"] * SIZES["hidden_size"]
    full = {"full": True, "tokens": 8, "row": 8}
    parts = memory.estimate(config, **full, networks=2, reference=True)
    assert parts["copies"] == 2 * 4 * n and parts["moments"] == 8 * (2 * n - head)
    assert memory.estimate(config, **full, logprobs=False)["moments"] == 8 * (n - head)


# ---- what is printed ----

SMALL = ["--max-new-tokens", 8, "--eval-questions", 8]


@pytest.mark.parametrize("script, words", [
    ("grpo.py", ["--prompts-per-step", 2, "--num-generations", 2, "--train-questions", 8, *SMALL]),
    ("sft.py", ["--batch-size", 4, "--train-questions", 8, *SMALL]),
    ("eval.py", ["--limit", 4, "--max-new-tokens", 8])])
def test_a_dry_run_prints_the_measured_peak_beside_the_total(script, words, tmp_path, monkeypatch):
    """Of this machine; where the peak is larger than that, it says so."""
    out = run("--dry-run", *words, cwd=tmp_path, script=script)
    peak, total, left = map(float, re.search(
        r"peak memory ([\d.]+) of ([\d.]+) GB: it fits, ([\d.]+) GB are left", out).groups())
    assert 0.2 < peak < total and left == pytest.approx(total - peak, abs=0.02)
    assert total == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, abs=0.01)
    monkeypatch.setattr(Run, "_memory", lambda self: {"memory_gb": 2 * total})
    assert f"of {total:.2f} GB: it does not fit" in run("--dry-run", *words, cwd=tmp_path, script=script)


def test_the_page_shows_what_the_code_plans(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--plan"])
    bench.main()
    table, page = capsys.readouterr().out, (ROOT / "MEMORY.md").read_text()
    assert len(table.splitlines()) > 20 and table in page


def test_the_bench_measures(capsys, monkeypatch):
    """A row of its table, at a toy size and in this process."""
    def here(command, cwd, **_):
        return SimpleNamespace(stdout=run(*command[2:], cwd=cwd, script=Path(command[1]).name), stderr="")

    monkeypatch.setattr(bench, "SMALL", (32, 48, 2, 2, 1, 512, True))
    words = "--data arithmetic --batch-size 2 --train-questions 4 --eval-questions 4"
    monkeypatch.setattr(bench, "RUNS", [("small", "sft.py", words)])
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=here))
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    bench.main()
    assert re.search(r"\| small \| `sft.py.*` \| .* \| \d\.\d\d \| 0\.\d\d \| [+-]\d+\.\d% \|$",
                     capsys.readouterr().out)


def test_gpu_utilisation_is_logged_where_it_can_be_asked_for(monkeypatch):
    """A4.18: beside the memory, at each step; without nvidia-ml-py it is asked for once, and left out."""
    asked = []

    def fails(device):
        asked.append(device)
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 2**30)
    memory = {"memory_gb": 3.0, "memory_reserved_gb": 4.0}
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    of_run = Run.__new__(Run)
    of_run.device = torch.device("cuda")
    assert of_run._memory() == memory | {"gpu_utilisation": 87}
    monkeypatch.setattr(torch.cuda, "utilization", fails)
    assert of_run._memory() == of_run._memory() == memory and len(asked) == 1
    of_run.device = CPU
    assert set(of_run._memory()) == {"memory_gb"}
