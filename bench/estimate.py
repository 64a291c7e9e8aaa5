"""A run's memory per GPU, by part, from the model's configuration and the run's sizes alone.

What stays from step to step: weights, adapters, AdamW's moments, the sampler's own weights and its cache. On
top comes one phase after the other, and the largest makes the peak: sampling, forward and backward, AdamW's
step. What stays and what autograd keeps are counted; of what comes and goes, the largest at a time is.
Left out: a GPU's context, its allocator's gaps, buffers of communication, rewards with a model of their own.

Shapes: L layers, D hidden size, V vocabulary, H heads, K head size, R rank; e bytes of a number in the dtype.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from common import models

GB = 2**30  # as everywhere here
PROCESS = 0.5 * GB  # on the CPU, without any weights: the interpreter, torch, transformers, a large tokenizer
PHASES = {"sampling": "sampling", "training": "activations and gradients", "update": "AdamW's step"}
FUSED = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)  # SamplerLayer


@dataclass
class Setup:
    """What memory depends on beside the model."""

    dtype: torch.dtype = torch.bfloat16  # of the computation, and of frozen weights
    full: bool = False
    lora_r: int = 32  # 0: no adapter
    lora_targets: tuple[str, ...] = models.PROJECTIONS
    layers: range | None = None  # adapted; None: all
    nf4: bool = False
    networks: int = 1  # trained: PPO has two, policy and critic
    logprobs: bool = True  # the first is trained by log-probs, not by scores
    reference: bool = False  # a frozen copy; with adapters it is the base itself
    tokens: int = 0  # padded, in a forward and backward pass; 0: nothing is trained
    row: int = 0  # tokens of the longest row in it
    one_pass: bool = False  # of an optimizer step; another one would stand on the gradients of the first
    checkpointing: bool = False
    slots: int = 0  # rows sampled at a time; 0: no sampler
    length: int = 0  # tokens of the longest of these
    prompt: int = 1  # tokens of the longest prompt
    samples: int = 1  # of each prompt
    ranks: int = 1  # over which --shard splits the weights
    on_gpu: bool = True

    def __post_init__(self):
        self.e = self.dtype.itemsize
        self.autocast = self.full and self.e < 4
        targets = models.PROJECTIONS if "all-linear" in self.lora_targets else self.lora_targets
        self.targets = () if self.full or not self.lora_r else tuple(targets)


class Shape:
    """A model's sizes, counted on torch's meta device, which holds no weights."""

    def __init__(self, config):
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layer = model.base_model.layers[0]
        self.linears = {path.rpartition(".")[2]: tuple(module.weight.shape)  # [out, in]
                        for path, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        self.L, (self.V, self.D) = len(model.base_model.layers), model.get_output_embeddings().weight.shape
        self.mlp, self.q, self.kv = (self.linears[name][0] for name in ("gate_proj", "q_proj", "k_proj"))
        self.H = config.num_attention_heads
        self.largest = max(map(math.prod, self.linears.values()))
        self.layer = sum(map(math.prod, self.linears.values()))  # weights in a layer's matrices
        self.vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # norms, biases
        self.tables = sum(p.numel() for p in model.parameters()) - self.vectors - self.L * self.layer
        self.norms = sum({"q_norm": self.q, "k_norm": self.kv}.get(path.rpartition(".")[2], self.D)
                         for path, _ in layer.named_modules() if path.endswith("norm"))  # numbers normalised
        self.softcap = bool(getattr(config, "attn_logit_softcapping", None))

    def adapted(self, s):
        return self.L if s.layers is None else len(s.layers)

    def adapter(self, s):
        """Weights of an adapter: A [R, in] and B [out, R] of every target."""
        return self.adapted(s) * s.lora_r * sum(sum(self.linears[name]) for name in s.targets)


def estimate(model, **setup) -> dict[str, float]:
    """Bytes per GPU by part; `peak` adds them up. model: its configuration, or Shape; setup: fields of Setup.

    Stay:   weights, copies (reference, critic), adapters, moments, sampler, cache, process (on the CPU).
    Phases: sampling, training (activations and gradients), update (gradients, and what AdamW makes).
    --shard splits matrices, with --full their gradients and moments too; vectors and adapters are whole.
    """
    m, s = model if isinstance(model, Shape) else Shape(model), Setup(**setup)
    size = 4 if s.full else s.e
    matrix = 0.5 + (1 + 4 / 256) / 64 if s.nf4 else size  # a byte of scale for 64, and 4 for 256 of these
    weights = (m.L * m.layer * matrix + m.tables * size) / s.ranks + m.vectors * size
    trained = s.networks * ((m.L * m.layer + m.tables) / s.ranks + m.vectors if s.full else m.adapter(s))
    if s.full and (s.networks > 1 or not s.logprobs):
        trained -= (m.tables - m.V * m.D) / s.ranks  # scores do not come from an untied head
    # CUDA: fused, in place; CPU, --shard: two of a matrix after the other, or its norm
    largest = m.V * m.D * (2 if s.ranks > 1 else 1) / s.ranks if s.full else m.mlp * s.lora_r
    made = 0 if s.on_gpu and s.ranks == 1 else 2 * largest
    # CPU: fused weights are stored anew, but the pages of their file stay mapped
    twice = s.slots and not (s.autocast or s.targets and s.e == 4)
    return {"weights": weights, "copies": s.full * (s.networks + s.reference - 1) * weights,
            "adapters": 4 * s.networks * m.adapter(s), "moments": 8 * trained if s.tokens else 0,
            "sampler": sampler_weights(m, s) if s.slots else 0, "cache": cache(m, s),
            "process": 0 if s.on_gpu else PROCESS + bool(twice) * m.L * s.e * sum(
                math.prod(m.linears[name]) for group in FUSED if len(group) > 1 for name in group),
            "sampling": sampling(m, s) if s.slots else 0,
            "training": training(m, s, 4 * trained) if s.tokens else 0,
            "update": 4 * (trained + made) if s.tokens else 0}


def sampler_weights(m, s):
    """FusedLinear's own: in float32 a copy merged with adapters, in bfloat16 one of float32 weights, or A and
    block-diagonal B of each group beside the modules' own. Split weights leave no copy (see `sampling`).
    """
    if s.full:
        return (m.L * m.layer + m.V * m.D) * s.e if s.autocast and s.ranks == 1 else 0
    merged = low_rank = 0
    for group in FUSED:
        rank = s.lora_r * len(set(group) & set(s.targets))
        out, width = sum(m.linears[name][0] for name in group), m.linears[group[0]][1]
        merged, low_rank = merged + out * width * bool(rank), low_rank + (out + width) * rank
    return m.adapted(s) * s.e * (low_rank if s.e < 4 else merged if s.ranks == 1 else 0)


def cache(m, s):
    """Sampler._allocate: [L, 2, slots, Hkv, length, K], ids, log-probs and noise; on CUDA a step's logits, too."""
    block = 256 if s.on_gpu else 16  # Sampler.__init__
    length = -(-(s.length + 1) // block) * block
    return s.slots * (length * (2 * m.L * m.kv * s.e + 16) + s.on_gpu * step_logits(m, s))


def step_logits(m, s):
    """Of a row: the product, and in float32."""
    return m.V * (4 if s.e == 4 else s.e + 4)


def sampling(m, s):
    """Keys and values of the prompts, and the largest of: a layer of the model's pass (its q, k, v, and
    activation, up and product or, soft-capped, the scores twice), the logits in `_admit`, those of `_decode`.
    On top come split weights, gathered whole, and a matrix of NF4 in the dtype.
    """
    prompts = -(-s.slots // s.samples)
    rows = min(prompts, max(1, 16384 // s.prompt))  # prefilled at a time
    kept = 2 * m.L * m.kv * prompts * s.prompt * s.e
    attention = 3 * m.q * s.e + m.softcap * 8 * m.H * s.prompt
    layer = rows * s.prompt * ((2 * m.D + m.q + 2 * m.kv) * s.e + max(3 * m.mlp * s.e, attention))
    gathered = (s.ranks > 1) * (m.layer * m.L + m.tables) * (4 if s.full else s.e) + s.nf4 * m.largest * s.e
    admitted = kept + 4 * m.V * (prompts + s.slots)
    return gathered + max(kept + layer, admitted, s.slots * step_logits(m, s))


def saved(m, s):
    """What autograd keeps from forward to backward: (of all layers, of one that is recomputed or not).

    A layer, per token: float32 inputs of its norms (trained: the normalised values as well), q, k, v, result
    and log-sum of attention, gate, up, activation; inputs of what is adapted or trained: of qkv, of gate and
    up, of down (under autocast a cast for each module), and A x. --gradient-checkpointing keeps its input.
    After the layers: the last norm's, and TokenLogprobs' slopes, or with a trained head the hidden states.
    """
    fused = [m.linears[group[0]][1] for group in FUSED  # o_proj's input is attention's result
             if group != ("o_proj",) and (s.full or set(group) & set(s.targets))]
    inputs = s.e * (5 * m.D + m.mlp if s.autocast else sum(fused) + s.lora_r * len(s.targets))
    norms = m.norms * ((4 if s.full else s.e) if s.on_gpu else 4 * (1 + s.full))  # CUDA: fused
    layer = norms + 4 * m.H + s.e * (2 * m.q + 2 * m.kv + 3 * m.mlp)
    layer += m.softcap * 8 * m.H * s.row  # capped scores and their softmax
    reached = m.L if s.layers is None else m.L - min(s.layers)  # by the gradient, from above
    layers = (m.L * m.D * (4 if s.full else s.e) if s.checkpointing else
              reached * layer + (m.L if s.full else m.adapted(s)) * inputs)
    last = 4 * m.D * (1 + s.full) + s.logprobs * m.D * s.e
    return s.tokens * (layers + last), s.tokens * (layer + inputs)


def weight_copies(m, s):
    """(Beside the logits, in a layer): A and scaled B in the dtype, and autocast's copies, kept by autograd.
    Beside the logits the head in the dtype of autocast, and that of split weights whole; in a layer two of
    these whole, the buffer that gathers, and unsplit gradients of two; of NF4 the largest matrix.
    """
    size, split = 4 if s.full else s.e, s.ranks > 1
    scaled = sum((out + width * (s.e < 4)) * s.e for out, width in (m.linears[name] for name in s.targets))
    scaled *= s.lora_r * (1 if s.checkpointing else m.adapted(s))
    kept = scaled + s.autocast * s.e * m.layer * (1 if s.checkpointing else m.L)
    return (kept + m.V * m.D * (size * split + s.e * s.autocast),
            kept + split * m.layer * (3 * size + 2 * 4 * s.full) + s.nf4 * m.largest * s.e)


def training(m, s, gradients):
    """The largest of: TokenLogprobs at a chunk of logits (float32, and in bfloat16 the product and slope's
    factor); the backward pass in the last layer, and in the first, where the others' gradients are there
    (recomputed if checkpointed; two gradients of the MLP's width). The head's comes before, its own tensor.
    """
    kept, layer = saved(m, s)
    chunk = min(s.tokens, max(16, (2**27 if s.on_gpu else 2**24) // m.V))  # token_logprobs
    chunk *= s.logprobs * m.V * (4 if s.e == 4 else 6 if s.full else 8)
    wide, head = 2 * s.tokens * m.mlp * s.e, 4 * s.full * m.V * m.D
    kept += head + (0 if s.one_pass else gradients)
    at_logits, in_layer = weight_copies(m, s)
    return max(kept + chunk + at_logits, kept + s.checkpointing * layer + wide + in_layer,
               gradients + max(head, layer + wide + in_layer - 4 * s.full * m.layer / s.ranks))


def peak(parts, first_step=False) -> dict[str, float]:
    """GB at the peak: weights, optimizer (moments), cache, process, the largest phase by its name, the sum.

    In its first step AdamW makes its moments at the end: there is room for them before.
    """
    moments = {phase: parts["moments"] * (phase == "update" or not first_step) for phase in PHASES}
    phase = max(PHASES, key=lambda phase: parts[phase] + moments[phase])
    found = {"weights": sum(parts[name] for name in ("weights", "copies", "adapters", "sampler")),
             "optimizer": moments[phase], "cache": parts["cache"], "process": parts["process"],
             PHASES[phase]: parts[phase]}
    return {name: value / GB for name, value in (found | {"sum": sum(found.values())}).items()}


def of_run(args, script, config, device, row, ranks=1) -> dict:
    """Setup's fields for a run of `script` (sft, dpo, ...), whose longest row has `row` tokens.

    Rows sampled at a time: the most that training or evaluation ask for.
    """
    def get(name, default=0):
        return getattr(args, name, default)

    full, pairs = get("full", False), bool(get("pairs_per_step")) or get("strategy") == "dpo"
    rows = get("batch_size") or get("pairs_per_step")
    rows = rows or get("prompts_per_step") * get("num_generations") // get("minibatches", 1)
    rows, row_tokens = -(-rows // ranks), row * (1 + pairs)
    at_once = min(rows, max(1, get("tokens_per_batch") // max(1, row_tokens)))
    slots, length, samples = 0, row, get("num_generations", 1)
    if get("slots"):
        asked = (get("prompts_per_step") or get("questions")) * samples
        slots = min(args.slots, -(-max(asked, get("eval_questions")) // ranks))
        samples = samples if asked >= get("eval_questions") else 1
    return {
        "dtype": models.choose_dtype(args.dtype, device), "full": full, "lora_r": get("lora_r"),
        "lora_targets": get("lora_targets", ()), "nf4": get("quantize") == "nf4",
        "layers": models.layer_range(get("train_layers", ""), SimpleNamespace(config=config)),
        "networks": 1 + (script == "ppo"), "logprobs": script != "reward_model",
        "reference": full and bool(get("beta") if script in ("grpo", "ppo") else script == "dpo"
                                   and args.loss != "simpo" and args.reference == "base"),
        "tokens": at_once * row_tokens, "row": row, "one_pass": at_once == rows,
        "checkpointing": get("gradient_checkpointing", False), "slots": slots, "length": length,
        "prompt": max(1, length - get("max_new_tokens")), "samples": samples,
        "ranks": ranks if get("shard", False) else 1,
        "on_gpu": device.type == "cuda"}
