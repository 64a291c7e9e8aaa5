"""A reward model: from which of several replies people (or a checker) chose, learn a score for any reply.

    L = -log sigmoid(r(x, chosen) - r(x, rejected) - m) + c (r(x, chosen) + r(x, rejected))^2

r is a linear head on the hidden state of the reply's last token. Paper: InstructGPT, arXiv 2203.02155, eq. 1
(Bradley-Terry); the margin m of Llama 2, arXiv 2307.09288, eq. 2; the centring c of arXiv 2312.09244.
`--loss best-of-n` is the softmax over N candidates of arXiv 1909.08593, eq. 1. Differs from them in:
  - a low-rank adapter and the head are trained, on a frozen base;
  - used as a reward (`--rewards model:runs/rm` of grpo.py, ppo.py and eval.py), a score is scaled to mean 0
    and deviation 1 over the held-out replies, as arXiv 1909.08593 does over its policy's.
A loss near ln 2 = 0.693 means that nothing is learnt. Ranking well is no proof of a good reward: a policy
that is trained on it finds what it gets wrong, so look at the true accuracy beside it.

    python reward_model.py                                   # the embedded model, generated pairs
    python reward_model.py --pairs runs/a/samples.csv        # right against wrong samples of a run
    python reward_model.py --model Qwen/Qwen2.5-3B-Instruct --pairs ultrafeedback
    torchrun --nproc-per-node 8 reward_model.py --model Qwen/Qwen2.5-3B-Instruct --pairs ultrafeedback
"""

import itertools
import json
import math
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import checks, curves, data, dist, models, shard
from common.run import Fitting, Run, RunState, TrainArgs, cli, defaults

# Shapes: B questions of a micro-batch, N replies to a question, T tokens, D hidden size, R LoRA rank.


@dataclass
class Args(TrainArgs):
    # ---- run ----
    max_steps: int = 0  # steps in all; 0: as many as the passes over the data take
    # steps between checkpoints (one is always written at the end, and on SIGTERM or Ctrl-C)
    save_every: int = 200

    # ---- data ----

    # preferences: name, hub id, URL, file, a run's samples.csv, joined by commas; empty: by the model
    pairs: str = ""
    level: str = ""  # difficulty of a generated task, such as 3 or 1-4; empty: the task's own default
    train_pairs: int = 0  # pairs to train on; 0: all that are not held out
    eval_pairs: int = 500  # pairs held out, at most a tenth of all; no prompt of theirs is trained on
    system: str = ""  # system message, or none; empty: none
    prompt_template: str = "{prompt}"  # text around the question, {prompt} in it
    label_tokenizer: str = "openai-community/gpt2"  # of preferences that are token ids: hub id or folder
    max_tokens: int = 0  # leave out rows whose prompt and completion are longer; 0: none

    # ---- method ----
    pairs_per_step: int = 16  # pairs per optimizer step, over all ranks
    pairs_per_question: int = 4  # most pairs that one question's samples give
    passes: int = 0  # passes over the pairs, where --max-steps is 0; 0: one, and two over generated pairs
    # Bradley-Terry of chosen against rejected, or softmax of the best against all other candidates
    loss: Literal["pair", "best-of-n"] = "pair"
    margin: float = 0.0  # m: this times the difference of a pair's scores in the data, where it has scores
    centre: float = 0.0  # c: pulls the scores of a question's replies to a mean of 0, such as 0.01

    # ---- optimizer ----

    lr: float = 0.0  # AdamW's peak rate; 0: 3e-4 for the embedded model, 1e-5 with --full, else 1e-4
    warmup_steps: int = 10  # steps of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up
    weight_decay: float = 0.0  # AdamW's decoupled decay
    max_grad_norm: float = 1.0  # clip the gradient's norm to this

    # ---- evaluation ----

    eval_every: int = 100  # steps between evaluations; the first and the last are always made


def ranking_loss(scores, margins, *, loss, centre=0.0):
    """Loss of each question from its replies' scores, the best reply's in column 0.

    Shapes: scores [B, N], float32, -inf where a question has fewer than N replies; margins [B] -> [B].
    "pair", of the first two columns: -log sigma(chosen - rejected - margin) (arXiv 2307.09288 eq. 2), which
    no difference overflows; "best-of-n": -log softmax(scores)_0 (arXiv 1909.08593 eq. 1), without margins.
    Both add centre times the square of the sum of the scores (arXiv 2312.09244, for two replies).
    """
    if loss == "pair":
        scores = scores[:, :2]
        values = -F.logsigmoid(scores[:, 0] - scores[:, 1] - margins)
    else:
        values = -scores.log_softmax(1)[:, 0]
    return values + centre * scores.masked_fill(scores.isneginf(), 0).sum(1) ** 2


@dataclass
class Comparison:
    """A prompt's replies, the best one first, each as one row of token ids, prompt included."""

    preference: data.Preference
    rows: list[list[int]]

    def __len__(self):
        return max(map(len, self.rows))

    def padded(self):
        return len(self.rows) * len(self)


@dataclass
class State(RunState):
    """What a checkpoint holds beside weights, head and optimizer."""

    scale: tuple[float, float] = (0.0, 1.0)  # mean and deviation of the held-out scores


def load_comparisons(args, tokenizer, dropped):
    """(comparisons to train on, held out) of --pairs; what is left out, and why, is counted in `dropped`."""
    preferences = data.load_preferences(
        args.pairs, seed=args.seed, level=args.level or None, pairs_per_question=args.pairs_per_question,
        label_tokenizer=args.label_tokenizer, dropped=dropped)
    encoded = {c.preference.id: c for c in encode(tokenizer, preferences, args, dropped)}
    parts = data.carve([c.preference for c in encoded.values()], n_train=args.train_pairs, seed=args.seed,
                       name=f"{args.pairs} (--max-tokens {args.max_tokens} left out {dropped['too long']})",
                       n_validation=max(1, min(args.eval_pairs, len(encoded) // 10)))
    return tuple([encoded[p.id] for p in part] for part in parts)


def encode(tokenizer, preferences, args, dropped):
    """Comparisons of token ids, those longer than --max-tokens left out."""
    found = []
    for p in preferences:
        prompt = data.encode_prompt(tokenizer, p.prompt, args.system, args.prompt_template)
        replies = (p.chosen, p.rejected, *(p.others if args.loss == "best-of-n" else ()))
        found.append(Comparison(p, [prompt + data.encode_completion(tokenizer, reply, tokenizer.eos_token_id)
                                    for reply in replies]))
    kept = [c for c in found if not args.max_tokens or len(c) <= args.max_tokens]
    dropped["too long"] += len(found) - len(kept)
    return kept


def accumulate_gradients(model, head, comparisons, args, n_questions, tokens_per_batch, device):
    """The gradient of the step's mean loss over this rank's questions; returns sums for the metrics.

    A question's replies stay in one micro-batch: its loss couples them.
    """
    model.zero_grad()  # of an attempt that ran out of memory
    head.grad = None
    names, sums = ("loss", "accuracy", "margin", "chosen", "rejected"), Counter()
    batches = split_by_length([c.padded() for c in comparisons], tokens_per_batch)
    for picked in shard.micro_batches(model, batches, partial(no_scores, model, head)):
        batch = [comparisons[i] for i in picked]
        margins = torch.tensor([args.margin * c.preference.margin for c in batch]).to(device)
        flat = models.last_token_scores(model, head, [row for c in batch for row in c.rows])
        scores = side_by_side(flat.split([len(c.rows) for c in batch]))  # [B, N]
        loss = ranking_loss(scores, margins, loss=args.loss, centre=args.centre)
        (loss.sum() / n_questions).backward()
        chosen, rejected = scores.detach()[:, 0], scores.detach()[:, 1:].max(1).values  # the best other
        measured = loss, chosen > rejected, chosen - rejected, chosen, rejected
        sums.update(dict(zip(names, [value.detach().sum() for value in measured])))
    return {name: float(sums[name]) for name in names}


def side_by_side(scores):
    """[B, N] of B questions' scores, -inf where one has fewer than N replies."""
    padded = scores[0].new_full((len(scores), max(map(len, scores))), -math.inf)
    for i, values in enumerate(scores):
        padded[i, :len(values)] = values
    return padded


@torch.no_grad()
def score_all(model, head, comparisons, tokens_per_batch):
    """The scores of each comparison's replies, a tensor [N] for each, on the CPU."""
    rows = [row for c in comparisons for row in c.rows]
    scores = torch.zeros(len(rows))
    for picked in shard.micro_batches(model, split_by_length(list(map(len, rows)), tokens_per_batch),
                                      partial(no_scores, model, head)):
        scores[picked] = models.last_token_scores(model, head, [rows[i] for i in picked]).cpu()
    return scores.split([len(c.rows) for c in comparisons])


def evaluate(model, head, comparisons, args, state, fits, run):
    """Held-out loss, ranking, calibration, the scores' mean and deviation; each score goes to eval.csv."""
    mine = dist.share(comparisons)
    scored = [scores.tolist() for scores in fits(score_all, model, head, mine)]
    rows = dist.gather_rows([
        {"step": state.step, "id": c.preference.id, "sample": n - 1,
         "prompt": data.prompt_text(c.preference.prompt),
         "chosen": c.preference.chosen, "rejected": (c.preference.rejected, *c.preference.others)[n - 1],
         "score_chosen": scores[0], "score_rejected": scores[n], "correct": int(scores[0] > scores[n]),
         "tokens_chosen": len(c.rows[0]), "tokens_rejected": len(c.rows[n]), "margin": c.preference.margin}
        for c, scores in zip(mine, scored) for n in range(1, len(scores))], "id", "sample")
    run.write_rows(rows, "eval.csv")
    scored, margins = (list(itertools.chain(*dist.gather(part)))
                       for part in (scored, [args.margin * c.preference.margin for c in mine]))
    matrix = side_by_side([torch.tensor(scores, dtype=torch.float64) for scores in scored])
    ahead, longer = (torch.tensor([row[f"{name}_chosen"] - row[f"{name}_rejected"] for row in rows],
                                  dtype=torch.float64) for name in ("score", "tokens"))
    bins, scores = curves.calibration(ahead.tolist()), matrix[matrix.isfinite()]
    metrics = {"eval/loss": ranking_loss(matrix, torch.tensor(margins), loss=args.loss,
                                         centre=args.centre).mean().item(),
               "eval/ranking_accuracy": (ahead.sign() + 1).mean().item() / 2,
               "eval/margin": ahead.mean().item(),
               "eval/calibration_error": sum(n * abs(sure - right) for sure, right, n in bins) / len(rows),
               "eval/length_correlation": torch.corrcoef(
                   torch.stack([ahead, longer]))[0, 1].nan_to_num().item(),
               "eval/score": scores.mean().item(), "eval/score_std": scores.std().item(),
               "eval/pairs": len(rows)}
    state.scale = metrics["eval/score"], metrics["eval/score_std"]
    run.log_held_out(state.step, metrics)


def save_reward(model, head, tokenizer, adapter, args, state, folder, merge=False):
    """Write the reward model into a folder: adapter and head, or `merge`d into one; how it is asked."""
    if merge:
        models.save_plain(model, tokenizer, merged_state_dict(model) | {models.HEAD: head}, folder)
    else:
        models.save_trained(model, tokenizer, adapter, args, folder, head)
    if dist.is_main():
        Path(folder, models.REWARD_FILE).write_text(json.dumps(
            {"system": args.system, "prompt_template": args.prompt_template,
             "mean": state.scale[0], "std": max(state.scale[1], 1e-6)}))


def no_scores(model, head, input_ids, _):
    """A pass over nothing, for `shard.micro_batches`."""
    return models.last_token_scores(model, head, input_ids.tolist())


def check(args):
    """Refuse what cannot work with this method; what no script can do, `defaults` refuses."""
    if args.level and args.pairs and args.pairs not in data.GENERATED:
        raise ValueError(f"--level {args.level}: for generated pairs, not for --pairs {args.pairs}")
    if args.loss == "best-of-n" and args.margin:
        raise ValueError(f"--margin {args.margin}: only with --loss pair")


def main(args: Args) -> None:
    # ---- set up: whatever can be wrong is found before the model is loaded ----
    device = dist.setup(args.device)
    args = defaults(args, device, lr={"embedded": 3e-4, "full": 1e-5, "adapter": 1e-4}, system="")
    check(args)
    args.pairs = args.pairs or ("arithmetic" if models.is_embedded(args.model) else "ultrafeedback")
    args.passes = args.passes or (2 if args.pairs in data.GENERATED else 1)
    dtype, tokenizer = models.choose_dtype(args.dtype, device), models.tokenizer_of(args, args.model)
    train, held_out = load_comparisons(args, tokenizer, dropped := Counter())
    longest = max(map(len, train + held_out))
    args.max_steps = args.max_steps or math.ceil(args.passes * len(train) / args.pairs_per_step)
    if args.download_only:
        return models.download(args.model)
    if args.dry_run:
        train = sorted(train, key=Comparison.padded, reverse=True)[:args.pairs_per_step]

    # ---- model, head, optimizer ----
    torch.manual_seed(args.seed)
    model = models.load_model(args.model, torch.float32 if args.full else dtype, device, longest,
                              split=args.shard, quantize=args.quantize)
    models.check_token_ids(model, tokenizer)
    size = model.config.hidden_size
    head = nn.Parameter((torch.randn(1, size) / (size + 1) ** 0.5).to(device))  # arXiv 1909.08593's start
    params, adapter = trainable(model, "reward", args)
    if args.full:  # not an untied lm_head: scores do not come from it
        model.requires_grad_(False)
        params = [p.requires_grad_() for p in model.base_model.parameters()]
    params.append(head)
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay,
                                  **shard.optimizer_kernel(args, device))
    state = State(tokens_per_batch=args.tokens_per_batch or models.tokens_that_fit(model, params, dtype))
    fits = Fitting(state, device, smallest=2 * longest)

    # ---- the run directory, where --resume goes on, the self-check ----
    run = Run(args, __file__, device, tags=models.run_tags(args.model, args.pairs))
    run.print(models.describe(args, model, params, dtype))
    run.print(f"data: {args.pairs}, {len(train)} pairs to train on, {len(held_out)} held out, up to "
              f"{longest} tokens; left out: "
              f"{', '.join(f'{name} {n}' for name, n in dropped.items() if n) or 'none'}")
    save_weights = partial(save_reward, model, head, tokenizer, adapter, args, state)
    run.restore(state, partial(models.load_trained, model=model, adapter=adapter, head=head), save_weights,
                optimizer=optimizer)
    autocast = partial(models.autocast, device, dtype, args.full)
    with autocast():
        some = sorted(train, key=len)[:3]
        run.self_check(checks.before_reward_training(
            model, head, partial(score_all, model, head, some),
            partial(accumulate_gradients, model, head, some, args, len(some), device=device)))
        if state.step == 0 and not args.dry_run:
            evaluate(model, head, held_out, args, state, fits, run)

    last, stop = run.is_last(state), False
    while not (last or stop):
        state.step += 1
        rows = data.batch_indices(len(train), (state.step - 1) * args.pairs_per_step, args.pairs_per_step,
                                  args.seed)
        mine = dist.share([train[i] for i in rows])

        # ---- update ----
        with run.profile(state.step), autocast(), run.phase("update"):
            sums = fits(accumulate_gradients, model, head, mine, args, len(rows), device=device)
            dist.sum_gradients(params)
            norm = shard.clip_gradients(params, args.max_grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate(state.step, args)
            run.take_step(norm, optimizer)

        # ---- log ----
        sums = dist.sum_dict(sums, device)
        metrics = run.log(state.step, {name: value / len(rows) for name, value in sums.items()} | {
            "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_batch": state.tokens_per_batch}, args.max_steps,
            show=("loss", "accuracy", "margin", "grad_norm"))
        last = run.is_last(state)
        if args.dry_run:
            break

        # ---- evaluate ----
        if state.step % args.eval_every == 0 or last:
            with autocast():
                evaluate(model, head, held_out, args, state, fits, run)

        # ---- save ----
        stop = run.save(due=state.step % args.save_every == 0 or last)

    # ---- the end ----
    if args.dry_run:
        return run.dry_run_report(metrics, args.max_steps, sum(len(row) for c in mine for row in c.rows))
    if last:
        run.save_final(partial(save_weights, merge=args.merge))
        run.before_after("ranking accuracy")
        with suppress(ValueError):  # no matplotlib, which `run.finish` reports
            curves.draw_calibration(run.path, state.step)
    run.finish()


# ----------------------------------------------------------------------------------------------------------
# Shared blocks, word for word in every script that has them (tests/test_copies.py): LoRA, log-probs, sampler


# Copied from grpo.py::LoRALinear
class LoRALinear(nn.Module):
    """A frozen linear layer with low-rank adapters, one or none active: y = W x + b + (alpha / r) B A x.

    State: `A[name]` [R, in] and `B[name]` [out, R], float32 whatever the base's dtype (in bfloat16 AdamW's
    small steps would round to nothing); B starts at zero, so that a fresh adapter changes no output. `active`
    is the name of the adapter in use or None for the bare base; only `use_adapter` changes it.
    Source: LoRA, arXiv 2106.09685 eq. 3.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}
        self.in_features, self.out_features = models.linear_size(base)
        self.active: str | None = None

    def add(self, name: str, r: int, alpha: float) -> None:
        device = self.base.weight.device
        A = torch.empty(r, self.in_features)  # drawn on the CPU: the same start on every device
        nn.init.kaiming_uniform_(A, a=5**0.5)
        self.A[name] = nn.Parameter(A.to(device))
        self.B[name] = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.scale[name] = alpha / r

    def forward(self, x):
        if self.active is None:
            return self.base(x)
        rows = x.reshape(-1, self.in_features)
        y = self.base(rows)
        A, B = self.A[self.active].to(y.dtype), (self.scale[self.active] * self.B[self.active]).to(y.dtype)
        y.addmm_(rows.to(y.dtype) @ A.T, B.T)  # into the base's output: no copy of it
        return y.view(*x.shape[:-1], self.out_features)


# Copied from grpo.py::add_lora
def add_lora(model, name: str, r: int, alpha: float, targets, layers=None) -> list[nn.Parameter]:
    """Put adapter `name` on the projections `targets` of the decoder layers (all, or those in `layers`).

    Freezes every other parameter, activates the adapter, and returns its parameters in layer order.
    Errors: ValueError if a target does not exist or r < 1.
    """
    if r < 1:
        raise ValueError(f"--lora-r {r}: the rank must be 1 or more (or train all weights with --full)")
    model.requires_grad_(False)
    params, linear = [], models.linear_names(model)
    targets = linear if "all-linear" in targets else set(targets)
    if missing := targets - linear:
        raise ValueError(f"--lora-targets {' '.join(sorted(missing))}: no such linear layer in this model "
                         f"(it has {' '.join(sorted(linear))})")
    for i, layer in enumerate(models.decoder_layers(model)):
        if layers is not None and i not in layers:
            continue
        for path, module in list(layer.named_modules()):
            linear = models.linear_size(getattr(module, "base", module))
            if not linear or path.rpartition(".")[2] not in targets:
                continue
            if not isinstance(module, LoRALinear):
                module = LoRALinear(module)
                layer.set_submodule(path, module)
            module.add(name, r, alpha)
            module.active = name
            params += [module.A[name], module.B[name]]
    return params


# Copied from grpo.py::lora_modules
def lora_modules(model) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


# Copied from grpo.py::use_adapter
@contextmanager
def use_adapter(model, name: str | None):
    """Within the block the model runs with adapter `name` (None: the bare base); afterwards as it was."""
    modules = lora_modules(model).values()
    before = [module.active for module in modules]
    for module in modules:
        module.active = name if name in module.A else None
    try:
        yield
    finally:
        for module, active in zip(modules, before):
            module.active = active


# Copied from grpo.py::enable_checkpointing
def enable_checkpointing(model) -> None:
    """Recompute each layer in the backward pass, with the adapter of its forward, not one active by then."""

    def contexts():
        active = next((module.active for module in lora_modules(model).values() if module.active), None)
        return nullcontext(), use_adapter(model, active)

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


# Copied from grpo.py::adapter_tensors
def adapter_tensors(model, name: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of adapter `name` by its layer's path: what `models.save_adapter` and `load_adapter` take."""
    return {path: (module.A[name], module.B[name])
            for path, module in lora_modules(model).items() if name in module.A}


# Copied from grpo.py::trainable
def trainable(model, name: str, args):
    """(the parameters to train, the tensors of adapter `name`): all weights and None with --full."""
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    if args.full:
        return [p.requires_grad_() for p in model.parameters()], None
    params = add_lora(model, name, args.lora_r, args.lora_alpha, args.lora_targets,
                      models.layer_range(args.train_layers, model))
    return params, adapter_tensors(model, name)


# Copied from grpo.py::merged_state_dict
@torch.no_grad()
def merged_state_dict(model) -> dict[str, torch.Tensor]:
    """The weights of a plain model, the active adapter added in float32; the base itself is untouched."""
    state = {key.replace(".base.", "."): shard.gather(value) for key, value in model.state_dict().items()
             if ".A." not in key and ".B." not in key}
    for path, module in lora_modules(model).items():
        weight = state[f"{path}.weight"]
        if module.active is not None and weight is not None:
            delta = module.scale[module.active] * module.B[module.active] @ module.A[module.active]
            delta = models.as_weight(module.base, delta.to(weight.device))
            state[f"{path}.weight"] = (weight.float() + delta).to(weight.dtype)
    return state


# Copied from grpo.py::split_by_length
def split_by_length(lengths, tokens_per_batch):
    """Split rows into micro-batches of similar length: lists of row numbers, each row once.

    A micro-batch, padded to its longest row, holds at most tokens_per_batch tokens (one row may exceed it).
    Of all ways to cut the rows, sorted by length, it is the one with the fewest padded tokens, where each
    micro-batch counts tokens_per_batch / 8 more: a pass has a cost of its own, on a GPU launches.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best = [(0.0, [])]  # of the first n rows: the least cost, and how they are cut
    for n in range(1, len(rows) + 1):
        ways = []  # (cost, minus where the last micro-batch starts)
        for start in range(n - 1, -1, -1):
            padded = (n - start) * lengths[rows[start]]
            if padded > tokens_per_batch and ways:
                break
            ways.append((best[start][0] + padded + tokens_per_batch / 8, -start))
        cost, start = min(ways)
        best.append((cost, [*best[-start][1], rows[-start:n]]))
    return best[-1][1]


# Copied from grpo.py::learning_rate
def learning_rate(step, args):
    """Rate of step 1, 2, ...: linear warm-up to args.lr, then constant or linear/cosine to 0 past the end."""
    if step < args.warmup_steps:
        return args.lr * step / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps + 1)
    return args.lr * {"constant": 1.0, "linear": 1 - done,
                      "cosine": (1 + math.cos(math.pi * done)) / 2}[args.lr_schedule]


if __name__ == "__main__":
    cli(main, Args)
