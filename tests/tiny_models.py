"""Tiny models with random weights, of every family that is supported, and what tests of them share."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from common import models
from grpo import add_lora

KINDS = [kind for kind in models.SUPPORTED if kind != "seed_oss"]  # a Llama in all; test_generic has it

SIZES = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
         "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}

# What sets each family apart: tied embeddings (not Gemma's: tied and random, they repeat one token), heads
# wider than hidden_size / heads, soft-caps low enough to bend values, a window that no test's run reaches.
EXTRA = {"qwen2": {"tie_word_embeddings": True},
         "qwen3": {"head_dim": 16},
         "mistral": {"sliding_window": None},
         "gemma": {"head_dim": 16, "tie_word_embeddings": False},
         "gemma2": {"head_dim": 16, "tie_word_embeddings": False, "query_pre_attn_scalar": 16,
                    "sliding_window": 512, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}}


def tiny_model(kind, seed=0, **overrides):
    """A seeded random model of `kind` (one of KINDS), float32, dropout off; overrides go to its config.

    The weights are spread widely (logits differ by a nat or two), so that greedy choices are no near ties and
    distributions not near uniform; norms and biases are random too, so that none can be left out unseen.
    """
    config = CONFIG_MAPPING[kind](**(SIZES | EXTRA.get(kind, {}) | overrides))
    model = AutoModelForCausalLM.from_config(config)
    spread(model, seed)
    return model.eval()


@torch.no_grad()
def spread(model, seed=0):
    """Draw every parameter anew, widely, from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    # small where the model scales them by sqrt(D), and where as lm_head they would vote for the last token
    small = "gemma" in model.config.model_type or model.config.tie_word_embeddings
    embedding_std = 0.2 if small else 0.5
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name or name.endswith("bias"):
            p.add_(0.3 * noise)
        elif "embed" in name:
            p.copy_(noise * embedding_std)
        else:
            p.copy_(noise * (2 if "lm_head" in name else 1) / p.shape[-1] ** 0.5)


def tiny_tokenizer():
    """The embedded model's own: 384 tokens, a chat template."""
    return models.load_tokenizer("")


def some_prompts(lengths, vocab=SIZES["vocab_size"], seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def shake(params, seed=1):
    """Move the parameters away from where they start: an adapter with B = 0 would show nothing."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return params


def assert_close(a, b, tolerance):
    """Within `tolerance`, absolute where the values are below 1 and relative to the largest above."""
    largest = b.abs().max().item()
    assert torch.isfinite(a).all() and (a - b).abs().max().item() <= tolerance * max(1.0, largest)


def adapted_model(kind, r=3, alpha=5, name="policy", **overrides):
    """A tiny model with an adapter that matters, on all projections; the scale is not 1 or 2 on purpose."""
    model = tiny_model(kind, **overrides)
    return model, shake(add_lora(model, name, r, alpha, models.PROJECTIONS))


def greedy_by_generate(model, prompts, max_new_tokens, stop_ids=()):
    """transformers' own greedy decoding of a left-padded batch, each row cut after its first stop token."""
    T = max(map(len, prompts))
    input_ids, attended = torch.zeros(2, len(prompts), T, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        input_ids[i, T - len(prompt):], attended[i, T - len(prompt):] = torch.tensor(prompt), 1
    model.generation_config.eos_token_id = sorted(stop_ids) or None
    output = model.generate(
        input_ids, attention_mask=attended, do_sample=False, max_new_tokens=max_new_tokens)
    rows = []
    for row in output[:, T:].tolist():
        ends = [i for i, token in enumerate(row) if token in stop_ids]
        rows.append(row[:ends[0] + 1] if ends else row)
    return rows
