"""Tiny models with random weights, of every family that is supported, for the tests to import."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from common import models

KINDS = models.SUPPORTED

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
