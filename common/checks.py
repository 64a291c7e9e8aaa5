"""The self-check at the start of a run: what must hold before hours are spent on it.

What is checked are the blocks of the script that asks, below its ruled line; it passes them in.
"""

import copy
from functools import partial

import torch
from torch import nn

from common import shard


def before_training(model, params, sampler, prompt_ids, args, temperature, token_logprobs,
                    completion_logprobs, make_batch, use_adapter):
    """Measure on a few short samples what must hold before training: name -> (value, largest right value).

    The sampler agrees with the trainer (in bfloat16 roughly, and exactly on two layers in float64); a row's
    padding changes nothing; a fresh adapter equals the base; the stop token is in the mask; every adapter
    gets gradient; no frozen weight does. Leaves no gradient.
    """
    device = sampler.device
    exact = device.type == "cpu" and sampler.dtype == torch.float32
    measure, limit = (torch.max, 1e-4) if exact else (torch.mean, 0.3)  # rounding to bfloat16 makes up to 0.1
    with shard.whole_model(model):
        samples = sampler.sample(prompt_ids, noise_keys(args.seed, len(prompt_ids)), 16, temperature)
    # a row that did not stop by itself gets a stop token, so that each has one to look for
    completion_ids = [c.ids if c.finished else c.ids + [min(sampler.stop_ids, default=0)] for (c,) in samples]
    input_ids, mask = make_batch(prompt_ids, completion_ids, device)
    logprobs = token_logprobs(model, input_ids, mask, temperature)
    logprobs.sum().backward()
    gap = torch.cat([row[of_row][:len(c.logprobs)] - torch.tensor(c.logprobs)
                     for row, of_row, (c,) in zip(logprobs.detach().cpu(), mask, samples)]).abs()
    under = partial(completion_logprobs, model, prompt_ids, completion_ids, temperature)
    alone, padded = torch.cat(under(1, device)), torch.cat(under(10**9, device))
    checks = {
        "sampler-trainer": (measure(gap).item(), limit),
        "padding": (measure((alone - padded).abs()).item(), limit),
        "stop tokens left out": (sum(not row[len(p) + len(c) - 1]
                                     for row, p, c in zip(mask, prompt_ids, completion_ids)), 0),
        **gradients(model)}
    if not exact and hasattr(sampler, "layers") and not sampler.layers[0].qkv.apart:
        checks["in float64"] = gap_in_float64(
            model, prompt_ids, args.seed, temperature, device, type(sampler), completion_logprobs), 1e-4
    if adapted(model) and not args.resume:
        with use_adapter(model, None):
            checks["step-0 KL"] = ((torch.cat(under(10**9, device)) - padded).abs().max().item(), 0)
    for p in params:
        p.grad = None
    return checks


def before_reward_training(model, head, score, accumulate_gradients):
    """The same for a reward model: padding changes no score; every adapter and the head get gradient.

    score(tokens_per_batch): the scores of some replies, tensors; accumulate_gradients(tokens_per_batch=n):
    their loss's gradient.
    """
    alone, padded = (torch.cat(score(size)) for size in (1, 10**9))
    accumulate_gradients(tokens_per_batch=10**9)
    exact = head.device.type == "cpu" and next(model.parameters()).dtype == torch.float32
    checks = {"padding": ((alone - padded).abs().max().item(), 1e-4 if exact else 0.5),
              "heads without gradient": (int(not head.grad.any()), 0), **gradients(model)}
    for p in [head, *model.parameters()]:
        p.grad = None
    return checks


def gradients(model):
    """Checks after a backward pass: every active adapter has gradient, no frozen weight has."""
    adapters = [module for module in adapted(model) if module.active]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {"adapters without gradient": (sum(not m.B[m.active].grad.any() for m in adapters), 0),
            "frozen weights with gradient": (sum(p.grad is not None for p in frozen), 0)}


def noise_keys(seed, n):
    """Sampling noise for n rows: any numbers that differ."""
    return [[seed * n + i] for i in range(n)]


def adapted(model):
    """The LoRALinear modules of a script."""
    return [module for module in model.modules() if hasattr(module, "active")]


@torch.no_grad()
def gap_in_float64(model, prompt_ids, seed, temperature, device, Sampler, completion_logprobs):
    """Largest gap of sampler and trainer on a cut-out of the model in float64, where rounding hides no error.

    It has two decoder layers (the first that have an adapter, if any do) and the first 1024 tokens; prompts
    are made of those. The head and the adapters' B are drawn anew: the model's own head may be so sure of the
    next token that its log-prob is 0 whatever the sampler does, and a B of zero would hide an adapter that
    the sampler leaves out.
    """
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    base, embedding, head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()
    layers = nn.ModuleList(sorted(base.layers, key=lambda layer: not adapted(layer))[:2])
    generator = torch.Generator().manual_seed(seed)

    def double(tensor):
        return tensor.detach().to(device=device, dtype=torch.float64)

    def drawn(std, *shape):
        return nn.Parameter((std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device))

    table = double(embedding.weight[:1024])  # [V, D]
    new_head = nn.utils.skip_init(nn.Linear, table.shape[1], len(table), bias=False)
    new_head.weight = drawn(table.shape[1] ** -0.5, *table.shape)
    copies = {id(embedding.weight): nn.Parameter(table), id(head): new_head}  # by what they stand for
    for part in (layers, base.norm, base.rotary_emb):
        copies |= {id(p): nn.Parameter(double(p), p.requires_grad) for p in part.parameters()}
        copies |= {id(b): double(b) for b in part.buffers()}
    copies |= {id(b): double(b) for b in embedding.buffers()}  # Gemma's scale
    copies |= {id(B): drawn(0.02, *B.shape) for module in adapted(layers) for B in module.B.values()}
    copies[id(base.layers)] = copy.deepcopy(layers, copies)
    for i, layer in enumerate(copies[id(base.layers)]):
        layer.self_attn.layer_idx = i  # its place in the cache of a pass
    small = copy.deepcopy(model, copies)
    small.get_input_embeddings().padding_idx = None
    prompts = [[i % 1024 for i in ids[:8 + 8 * p]] for p, ids in enumerate(prompt_ids)]
    samples = [c for (c,) in Sampler(small, ()).sample(prompts, noise_keys(seed, len(prompts)), 12,
                                                       temperature)]
    logprobs = completion_logprobs(small, prompts, [c.ids for c in samples], temperature, 10**9, device)
    return (torch.stack(logprobs) - torch.tensor([c.logprobs for c in samples])).abs().max().item()
