"""--quantize nf4: the linear layers of the decoder in 4 bits, adapters on top; bitsandbytes on the CPU."""

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo
from common import models
from tests.processes import train_lines, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model wide enough that blocks of 64 weights mean something, under the embedded model's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "wide"
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=384, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=2)).save_pretrained(folder)
    models.load_tokenizer("").save_pretrained(folder)
    return folder


def load(folder, dtype=torch.bfloat16, quantize="none"):
    model = models.load_model(str(folder), dtype, CPU, quantize=quantize)
    params = grpo.add_lora(model, "policy", 4, 8, models.PROJECTIONS)
    return model, params


def n_bytes(model):
    """Of all that a model holds, the scales of 4-bit weights included."""
    total = 0
    for p in model.parameters():
        total += p.numel() * p.element_size()
        if state := getattr(p, "quant_state", None):
            total += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax))
    return total


def test_forward_is_near_bfloat16_and_only_adapters_get_gradient(saved):
    """A weight is off by 0.095 of its deviation (rms), what two layers make of that by 0.21 (seen here); from
    a plain model of the dequantized weights it differs by bfloat16's rounding (0.4 %) alone."""
    small, params = load(saved, quantize="nf4")
    plain, _ = load(saved)
    rounded, _ = load(saved)
    for a, b in zip(grpo.lora_modules(rounded).values(), grpo.lora_modules(small).values()):
        packed = b.base.weight
        a.base.weight.data = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad():
        a, b, c = (m.base_model(input_ids=ids).last_hidden_state.float() for m in (small, plain, rounded))
    assert 0.1 < ((a - b).norm() / b.norm()).item() < 0.3
    assert ((a - c).norm() / c.norm()).item() < 0.01
    frozen = {name: p.detach().clone() for name, p in small.named_parameters() if not p.requires_grad}
    grpo.token_logprobs(small, ids, torch.ones(3, 20, dtype=torch.bool)).sum().backward()
    grads = {name for name, p in small.named_parameters() if p.grad is not None}
    assert grads == {name for name, _ in small.named_parameters() if ".A." in name or ".B." in name}
    assert any(p.grad.abs().max() > 0 for p in params)
    torch.optim.AdamW(params, lr=0.1).step()
    assert all(torch.equal(p, frozen[name]) for name, p in small.named_parameters() if name in frozen)


def test_memory(saved):
    """4 bits a weight, 8 for the scale of 64, 32 for the scale of 256 of these: 4.127 bits."""
    small, plain = (models.load_model(str(saved), torch.bfloat16, CPU, quantize=q) for q in ("nf4", "none"))
    linear = sum(m.weight.numel() for m in plain.base_model.layers.modules() if isinstance(m, nn.Linear))
    rest = n_bytes(plain) - 2 * linear
    assert n_bytes(small) - rest == pytest.approx(4.127 / 8 * linear, rel=0.01)


def test_sampler_and_trainer_agree(saved):
    model, params = load(saved, torch.float32, "nf4")
    with torch.no_grad():
        for p in params:
            p.normal_(std=0.05)  # an adapter that does something
    sampler = grpo.Sampler(model, [], slots=3)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    samples = sampler.sample(prompts, [[1, 2, 3], [4, 5]], 9)
    for prompt, row in zip(prompts, samples):
        for c in row:
            found = grpo.completion_logprobs(model, [prompt], [c.ids], 1.0, 100, CPU)[0]
            assert (found - torch.tensor(c.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("script", ["grpo.py", "ppo.py"])
def test_a_run(go, saved, tmp_path, script):
    (tmp_path / "own.py").write_text("def variety(prompts, responses, answers):\n"
                                     "    return [len(set(response)) / 9 for response in responses]\n")
    embedded = script == "ppo.py"  # which pays finished answers alone: the random model gives none
    folder = go("run", script=script, model="" if embedded else saved, quantize="nf4", lr=1e-3, max_steps=2,
                max_new_tokens=40 if embedded else 12, rewards="own.py:variety").folder
    assert len(train_lines(folder)) == 2
    assert all(t.abs().max() > 0 for name, t in weights(folder).items() if "lora_B" in name)
    assert train_lines(go("on", model=folder, max_steps=1).folder)  # the adapter on the plain base


@pytest.mark.parametrize("flag", ["full", "merge"])
def test_mistakes(go, flag):
    run = go("run", quantize="nf4", fails=True, **{flag: True})
    assert f"--quantize nf4 does not go with --{flag}" in run.err


def test_without_bitsandbytes(go, tmp_path):
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError")
    assert "pip install bitsandbytes" in go("run", quantize="nf4", fails=True, path=[tmp_path]).err
