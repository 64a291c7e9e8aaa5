"""PPO: a critic tells how much better each token made the answer; clipped steps on policy and critic.

    J = E[min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)]    rho_t = p(y_t) / p_old(y_t), over all tokens
    A = GAE(gamma, lambda) of r_t = -beta (log p_old - log p_ref)_t + [t is the last token] R
    L_V = 1/2 E[max((V - ret)^2, (V_old + clip(V - V_old, +-eps_v) - ret)^2)]    ret = A + V_old

Papers: PPO, arXiv 1707.06347, eq. 7; GAE, arXiv 1506.02438, eq. 16; for language models arXiv 1909.08593 and
2203.02155. Four roles share one frozen base: the policy and the critic are an adapter each (the critic with
a linear head that starts at zero), the reference is the base with no adapter, the reward is a rule or the
adapter and head of reward_model.py. Differs from the papers in:
  - an answer that was cut off at --max-new-tokens is worth what the critic expects to follow, not its reward:
    paid both, it would beat the same answer brought to its end;
  - advantages are whitened over all tokens of the step and all ranks; returns are not;
  - --entropy-bonus is paid in the reward of each token, so that the critic sees it, too.
The first update's policy loss is near 0 and its clip shares are 0, by construction.

    python ppo.py                                                # the embedded model
    python ppo.py --model Qwen/Qwen2.5-3B-Instruct
    python ppo.py --model Qwen/Qwen2.5-3B-Instruct --rewards model:runs/rm --beta 0.05
    torchrun --nproc-per-node 8 ppo.py --model Qwen/Qwen2.5-3B-Instruct
"""

import hashlib
import itertools
import math
import random
from collections import Counter, deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import checks, data, dist, models, rewards, shard
from common.run import Fitting, Run, RunState, TrainArgs, cli, defaults, mean, retry_smaller

# Shapes: B rows, T tokens, V vocabulary, P prompts, G samples per prompt, D hidden size, L layers or a row's
# completion tokens, H heads, K head size, R LoRA rank, N rows or tokens in all.
EVALUATION = -1  # in noise keys, where training has a step's number


@dataclass
class Args(TrainArgs):
    # ---- run ----
    max_steps: int = 40  # steps in all
    token_budget: int = 0  # tokens sampled for training after which the run ends; 0: no limit

    # ---- data ----

    # data set name, hub id, or local .jsonl/.csv/.parquet; empty: arithmetic (embedded model), else gsm8k
    data: str = ""
    level: str = ""  # difficulty of a generated task, such as 3 or 1-4; empty: the task's own default
    train_questions: int = 0  # questions to train on; 0: all that are not held out
    eval_questions: int = 500  # questions held out of the training split (never of the test split)
    system: str = ""  # system message, or none; empty: asks for <think>/<answer> (embedded model: none)
    prompt_template: str = "{prompt}"  # text around the question, {prompt} in it
    max_prompt_tokens: int = 0  # leave out questions with a longer prompt; 0: none

    # ---- sampling ----
    prompts_per_step: int = 128  # questions per step, over all ranks
    num_generations: int = 1  # G, samples per question
    max_new_tokens: int = 512  # longest completion; a longer one counts as truncated
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    slots: int = 256  # rows sampled at a time per rank; halved when memory runs out

    # ---- method ----

    # with weights: correctness, format, digit, mark, math, answer-prob, model:RUN, or your file.py:name=1
    rewards: tuple[str, ...] = ("correctness=1", "format=0.2")
    reward_timeout: float = 30.0  # seconds for a call of your own reward; its row is left out and counted
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95  # 1: the plain return less the value, 0: one step ahead (arXiv 1506.02438)
    ppo_epochs: int = 2  # passes over a step's samples
    minibatches: int = 2  # optimizer steps per pass, each on as many rows
    target_kl: float = 0.0  # KL(old || new) per token that ends a step's updates, such as 0.02; 0: none
    clip_eps_low: float = 0.2  # lower clip: the ratio counts as at least 1 - this (arXiv 1707.06347 eq. 7)
    clip_eps_high: float = 0.2  # upper clip: the ratio counts as at most 1 + this; DAPO takes 0.28
    value_clip: float = 0.2  # the critic gains nothing by moving a value further than this; 0: off
    critic_warmup: int = 0  # first steps in which only the critic learns
    entropy_bonus: float = 0.0  # times -log p of each sampled token, in its reward
    beta: float = 0.0  # KL coefficient towards the start model; 0: no reference pass at all
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # estimator of the KL term
    kl_in: Literal["loss", "reward"] = "reward"  # KL as a loss term, or subtracted from the rewards
    kl_target: float = 0.0  # beta moves until a completion's KL is this, in nats (arXiv 1909.08593); 0: fixed
    recompute_old: bool = False  # old log-probs by a pass of the trainer, not the sampler's own

    # ---- optimizer ----

    lr: float = 0.0  # AdamW's peak rate; 0: 5e-4 for the embedded model, 1e-6 with --full, else 2e-5
    warmup_steps: int = 5  # steps of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    weight_decay: float = 0.0  # AdamW's decoupled decay
    max_grad_norm: float = 1.0  # clip the gradient's norm to this
    critic_lr: float = 0.0  # the critic's peak learning rate; 0: twice the policy's
    critic_max_grad_norm: float = 1.0  # clip the norm of the critic's gradient to this

    # ---- evaluation ----

    eval_every: int = 20  # steps between evaluations; the first and the last are always made
    eval_samples: int = 0  # samples per held-out question for pass@k, beside the greedy one; 0: none
    eval_temperature: float = 0.5  # of those samples
    eval_k: tuple[int, ...] = ()  # report pass@k for these k (each at most eval_samples)
    show_every: int = 10  # steps between printed samples


def clipped_loss(logprobs, old_logprobs, advantages, mask, clip_eps_low, clip_eps_high):
    """The clipped policy loss of each token (arXiv 1707.06347 eq. 7), and where lower and upper clip act.

    Shapes: all [B, T]; 0 outside the mask, whatever stands there.
    """
    logprobs, old_logprobs, A = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, advantages))
    rho = (logprobs - old_logprobs).exp()
    low, high = mask & (A < 0) & (rho < 1 - clip_eps_low), mask & (A > 0) & (rho > 1 + clip_eps_high)
    return -torch.minimum(rho * A, rho.clamp(1 - clip_eps_low, 1 + clip_eps_high) * A), low, high


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error of each token's value, clipped around the old value; where the clip acts.

    Shapes: all [B, T]; 0 outside the mask, whatever stands there. clip 0: none.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    plain = (values - returns) ** 2
    if not clip:
        return plain / 2, torch.zeros_like(mask)
    moved = values - old_values
    clipped = (old_values + moved.clamp(-clip, clip) - returns) ** 2
    # the sum above rounds: the second condition leaves out values that did not move
    return torch.maximum(plain, clipped) / 2, mask & (clipped > plain) & (moved.abs() > clip)


def generalized_advantages(rewards, values, bootstrap, lengths, gamma, gae_lambda):
    """GAE of each token, and the returns that the critic is to learn.

    Shapes: rewards, values [N, L], whatever stands beyond a row's length; bootstrap [N], the value of what
    follows the last token (0 where the answer ended); lengths [N] -> advantages, returns [N, L], 0 beyond.
    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lambda A_{t+1} (arXiv 1506.02438 eq. 16);
    returns A + V, before any whitening.
    """
    mask = torch.arange(rewards.shape[1]) < lengths[:, None]
    rewards, values = (torch.where(mask, x, 0.0) for x in (rewards, values))
    advantages, ahead = torch.zeros_like(rewards), torch.zeros(len(rewards), dtype=rewards.dtype)
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1, dtype=values.dtype)], 1)
    following = following.scatter(1, (lengths - 1)[:, None], bootstrap[:, None].to(values.dtype))
    delta = torch.where(mask, rewards + gamma * following - values, 0.0)
    for t in reversed(range(rewards.shape[1])):
        ahead = delta[:, t] + gamma * gae_lambda * ahead
        advantages[:, t] = ahead
    return advantages, torch.where(mask, advantages + values, 0.0)


# Copied from grpo.py::kl_estimate
def kl_estimate(logprobs, ref_logprobs, kind):
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled, in nats; [...] -> [...].

    With d = logprob - ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, never negative (Schulman,
    "Approximating KL Divergence", 2020). As a loss term they pull differently: k1 not at all (its expected
    gradient is 0), k2 along KL(policy || ref), k3 along KL(ref || policy); k1 in the reward pulls along
    KL(policy || ref) again.
    """
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]


def adapted_beta(beta, kl, target):
    """The next KL coefficient: up where KL is above its target, by a tenth of the relative error, at most 2%.

    Source: arXiv 1909.08593 eq. 4, K_beta = 0.1.
    """
    return beta * (1 + 0.1 * min(0.2, max(-0.2, kl / target - 1)))


def moments(values, device):
    """(mean, variance over N) of this rank's values [N] and those of all others."""
    values = values.double()
    sums = dist.sum_dict({"n": len(values), "sum": values.sum().item()}, device)
    n = max(1, sums["n"])
    mean = sums["sum"] / n
    return mean, dist.sum_dict({"squares": ((values - mean) ** 2).sum().item()}, device)["squares"] / n


def explained_variance(values, returns, device):
    """1 - Var(returns - values) / Var(returns), over tokens [N] of all ranks; 0 where returns are equal."""
    _, left = moments(returns - values, device)
    _, whole = moments(returns, device)
    return 1 - left / whole if whole > 1e-12 else 0.0


# Adapted from grpo.py::Rollout: values, and an advantage for each token
@dataclass
class Rollout:
    """One sample of one question, and what is found out about it on the way to the loss."""

    example: data.Example
    group: int  # number of the question within the step, the same on every rank
    sample: int  # 0 .. G - 1
    prompt_ids: list[int]
    completion: "Completion"
    response: str = ""  # the text up to the stop token
    rewards: dict[str, float] = field(default_factory=dict)
    correct: float = 0.0
    reward: float = 0.0  # weighted sum; NaN where a reward function failed
    old_logprobs: torch.Tensor | None = None  # [L], as ref_logprobs, advantages and returns
    ref_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None  # [L + 1]: before each token, and after the last
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    kl: float = 0.0  # k1 summed over the completion, when it was sampled

    def __len__(self):
        return len(self.prompt_ids) + len(self.completion.ids)

    def row(self, step):
        """Its line in samples.csv: the mean advantage, the first value."""
        return {"step": step, "group": self.group, "reward": self.reward,
                **{f"reward/{k}": v for k, v in self.rewards.items()},
                "advantage": 0.0 if self.advantages is None else mean(self.advantages.tolist()),
                "value": 0.0 if self.values is None else self.values[0].item(),
                **rewards.answer_row(self.example, self.sample, self.completion, self.response, self.correct)}


@dataclass
class State(RunState):
    """What a checkpoint holds beside policy, critic and optimizers."""

    position: int = 0  # in the endless sequence of shuffled questions
    accumulated_reward: float = 0.0
    beta: float = 0.0


# Copied from grpo.py::sample_rollouts
def sample_rollouts(sampler, questions, prompt_ids, args, step, tokenizer, run):
    """G rollouts of each (group, example), group by group."""
    keys = [[noise_key(args.seed, step, group, g) for g in range(args.num_generations)]
            for group, _ in questions]
    completions = sample_all(sampler, [prompt_ids[e.id] for _, e in questions], keys, args.max_new_tokens,
                             args.temperature, run, run.counter(f"step {step}"))
    return [Rollout(example, group, g, prompt_ids[example.id], completion, completion.text(tokenizer))
            for (group, example), row in zip(questions, completions) for g, completion in enumerate(row)]


# Adapted from grpo.py::score_rollouts: no penalty for overlong answers, whose value goes on
def score_rollouts(rollouts, reward_functions, args, run):
    """Fill in rewards, correct and reward; report the first reward that failed."""
    scored = rewards.score(reward_functions, [r.example for r in rollouts], [r.response for r in rollouts],
                           timeout_s=args.reward_timeout)
    for i, r in enumerate(rollouts):
        r.rewards = {name: values[i] for name, values in scored["rewards"].items()}
        r.reward, r.correct = scored["total"][i], scored["correct"][i]
    if scored["error"]:
        run.print(f"step {run.state.step}: {scored['error']}")


# Adapted from grpo.py::collect: no further draws
def collect(sampler, train, prompt_ids, reward_functions, args, state, tokenizer, run):
    """This rank's scored rollouts of a step."""
    rows = data.batch_indices(len(train), state.position, args.prompts_per_step, args.seed)
    state.position += len(rows)
    questions = dist.share([(i, train[row]) for i, row in enumerate(rows)])
    with run.phase("sample"):
        rollouts = sample_rollouts(sampler, questions, prompt_ids, args, state.step, tokenizer, run)
    with run.phase("reward"):
        score_rollouts(rollouts, reward_functions, args, run)
    return rollouts


def shared_reward(path, name, args, model, device):
    """The LearnedReward of a reward_model.py run: on the policy's own base where it is an adapter on it.

    The adapter is then called `name`. With --shard it holds a base of its own: ranks score at their own pace.
    """
    make = partial(rewards.LearnedReward, path, models.choose_dtype(args.dtype, device), device,
                   args.tokens_per_batch or 8192)
    settings = models.adapter_settings(path)
    base = settings.get("base_model_name_or_path")
    if args.full or args.shard or models.absolute(args.model) != base:
        return make()
    add_lora(model, name, settings["r"], settings["lora_alpha"], settings["target_modules"],
             settings["layers_to_transform"])
    models.load_adapter(models.resolve(path), adapter_tensors(model, name))
    return make(body=model, switched_on=partial(use_adapter, model, name))


def policy_and_critic(model, load_model, head, args):
    """(the policy's parameters and adapter; the critic's model, what switches it on, its parameters)."""
    if args.full:
        params, adapter = trainable(model, "policy", args)
        critic = load_model()
        trainable(critic, "critic", args)
        return params, adapter, critic, nullcontext, [*critic.base_model.parameters(), head]
    critic_params = [*trainable(model, "critic", args)[0], head]
    params, adapter = trainable(model, "policy", args)
    for p in critic_params:  # which adding the next adapter has frozen
        p.requires_grad_()
    for module in lora_modules(model).values():  # a reward's adapter may stand on more layers
        module.active = "policy" if "policy" in module.A else None
    return params, adapter, model, partial(use_adapter, model, "critic"), critic_params


def token_values(model, head, input_ids, completion_mask):
    """The critic's value before each completion token, and after each row's last one.

    Shapes: input_ids, completion_mask [B, T] (right-padded) -> [B, T], 0 outside the mask, and [B]; float32.
    The value that goes with token t is read where token t is predicted, one place before it.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    after_each = (hidden.float() * head[0]).sum(-1)  # [B, T]; a matrix product would be rounded by autocast
    before_each = torch.cat([torch.zeros_like(after_each[:, :1]), after_each[:, :-1]], 1)
    last = completion_mask.shape[1] - 1 - completion_mask.flip(1).int().argmax(1)
    mask = completion_mask.to(input_ids.device)
    return (torch.where(mask, before_each, 0.0),
            after_each.gather(1, last[:, None].to(input_ids.device))[:, 0])


@torch.no_grad()
def completion_values(model, head, prompt_ids, completion_ids, tokens_per_batch, device):
    """Values [L + 1] of each row: before each token and after the last; a list in the rows' order."""
    found = [None] * len(prompt_ids)
    batches = pack([len(p) + len(c) for p, c in zip(prompt_ids, completion_ids)], tokens_per_batch)
    for rows in shard.micro_batches(model, batches, lambda *none: token_values(model, head, *none)[0]):
        input_ids, mask = make_batch([prompt_ids[i] for i in rows], [completion_ids[i] for i in rows], device)
        values, after = (x.cpu() for x in token_values(model, head, input_ids, mask))
        for i, row, of_row, end in zip(rows, values, mask, after):
            found[i] = torch.cat([row[of_row], end[None]])
    return found


def add_logprobs_and_values(rollouts, model, reference, critic, critic_on, head, args, fits, device):
    """Fill in the old log-probs, those of the reference with the KL, and the critic's values."""
    ids = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
    old = ref = [torch.tensor(r.completion.logprobs) for r in rollouts]
    if args.recompute_old:
        old = fits(completion_logprobs, model, *ids, args.temperature, device=device)
    with critic_on():
        values = fits(completion_values, critic, head, *ids, device=device)
    if args.beta:
        with use_adapter(model, None):
            ref = fits(completion_logprobs, reference or model, *ids, args.temperature, device=device)
    for i, r in enumerate(rollouts):
        r.old_logprobs, r.values, r.ref_logprobs = old[i], values[i], ref[i]
        r.kl = (old[i] - ref[i]).sum().item() if args.beta else 0.0


def set_advantages(rollouts, args, beta, device):
    """Fill in the rollouts' advantages, whitened over the tokens of all ranks, and returns.

    The last token of a finished answer is paid its reward; a cut-off one goes on with the critic's value.
    """
    per_token = []
    for r in rollouts:
        each = -args.entropy_bonus * r.old_logprobs
        if beta and args.kl_in == "reward":
            each = each - beta * kl_estimate(r.old_logprobs, r.ref_logprobs, args.kl_estimator)
        if r.completion.finished:
            each[-1] += r.reward
        per_token.append(each)
    if not rollouts:
        moments(torch.zeros(0), device)  # the other ranks wait for this one
        return
    lengths = torch.tensor([len(each) for each in per_token])
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    bootstrap = torch.tensor([0.0 if r.completion.finished else r.values[-1].item() for r in rollouts])
    advantages, returns = generalized_advantages(
        pad(per_token), pad([r.values[:-1] for r in rollouts]), bootstrap, lengths, args.gamma,
        args.gae_lambda)
    mean, variance = moments(torch.cat([row[:n] for row, n in zip(advantages, lengths)]), device)
    for r, A, ret, n in zip(rollouts, (advantages - mean) / (variance + 1e-8) ** 0.5, returns, lengths):
        r.advantages, r.returns = A[:n].float(), ret[:n]


def draw_minibatches(rows, args, step):
    """The rows in --minibatches shuffled parts, for each of --ppo-epochs anew."""
    for epoch in range(args.ppo_epochs):
        order = random.Random(noise_key(args.seed, step, epoch)).sample(rows, len(rows))
        yield from filter(None, (order[part::args.minibatches] for part in range(args.minibatches)))


def set_rates(optimizer, critic_optimizer, step, args):
    """The step's learning rates: the policy's over its own steps, 0 as long as the critic alone learns."""
    own_step, own_steps = step - args.critic_warmup, args.max_steps - args.critic_warmup
    optimizer.param_groups[0]["lr"] = (
        learning_rate(own_step, replace(args, max_steps=own_steps)) if own_step > 0 else 0.0)
    critic_optimizer.param_groups[0]["lr"] = learning_rate(step, replace(args, lr=args.critic_lr))


def accumulate_gradients(model, critic, critic_on, head, rollouts, args, beta, n_tokens, tokens_per_batch,
                         device, train_policy=True):
    """Both losses' gradients over this rank's rollouts, over n_tokens; token sums for the metrics.

    critic: the policy's own model, on which critic_on() switches the critic's adapter on, or another one.
    """
    model.zero_grad()  # of an attempt that ran out of memory
    critic.zero_grad()
    head.grad = None
    names = ("loss", "value_loss", "approx_kl", "clip_low", "clip_high", "value_clip", "gap")
    sums = Counter()

    def policy_logprobs(input_ids, mask):  # [B, T]
        with nullcontext() if train_policy else torch.no_grad():
            return token_logprobs(model, input_ids, mask, args.temperature)

    def critic_values(input_ids, mask):  # [B, T]
        with critic_on():
            return token_values(critic, head, input_ids, mask)[0]

    batches = pack([len(r) for r in rollouts], tokens_per_batch)
    for rows in shard.micro_batches(model, batches, policy_logprobs, critic_values):
        batch = [rollouts[i] for i in rows]
        input_ids, cpu_mask = make_batch(
            [r.prompt_ids for r in batch], [r.completion.ids for r in batch], device)
        mask = cpu_mask.to(device)

        def padded(name):
            return pad_logprobs([getattr(r, name) for r in batch], cpu_mask).to(device)

        logprobs = policy_logprobs(input_ids, cpu_mask)
        old, advantages = padded("old_logprobs"), padded("advantages")
        loss, low, high = clipped_loss(
            logprobs, old, advantages, mask, args.clip_eps_low, args.clip_eps_high)
        if beta and args.kl_in == "loss":
            loss = loss + beta * torch.where(
                mask, kl_estimate(logprobs, padded("ref_logprobs"), args.kl_estimator), 0.0)
        if train_policy:
            (loss.sum() / n_tokens).backward()
        with critic_on():
            values = critic_values(input_ids, cpu_mask)
            old_values = pad_logprobs([r.values[:-1] for r in batch], cpu_mask).to(device)
            critic_loss, clipped = value_loss(
                values, old_values, padded("returns"), mask, args.value_clip)
            (critic_loss.sum() / n_tokens).backward()
        sampled = pad_logprobs([r.completion.logprobs for r in batch], cpu_mask).to(device)
        gap = torch.where(mask, (logprobs.detach() - sampled).abs(), 0.0)
        moved = torch.where(mask, kl_estimate(old, logprobs.detach(), "k3"), 0.0)
        measured = loss, critic_loss, moved, low, high, clipped, gap
        sums.update(dict(zip(names, [value.detach().sum() for value in measured])))
    return {name: float(sums[name]) for name in names}


def step_metrics(updates, rollouts, device):
    """(metrics of a step's updates and of what the critic foresaw, mean KL of a completion, all tokens)."""
    totals = dist.sum_dict({"kl": sum(r.kl for r in rollouts), "rows": len(rollouts),
                            "tokens": sum(len(r.completion.ids) for r in rollouts),
                            "value": sum(r.values[:-1].sum().item() for r in rollouts),
                            "return": sum(r.returns.sum().item() for r in rollouts)}, device)
    n_tokens, nothing = max(1, totals["tokens"]), torch.zeros(0)
    first = updates[0] if updates else dict.fromkeys(("clip_low", "clip_high", "gap"), 0.0)  # no rewards
    names = ("loss", "value_loss", "clip_low", "clip_high", "value_clip", "grad_norm", "critic_grad_norm")
    return {**{name: mean([update[name] for update in updates]) for name in names},
            "clip_first": first["clip_low"] + first["clip_high"], "sampler_gap": first["gap"],
            "updates": len(updates), "explained_variance": explained_variance(
                torch.cat([r.values[:-1] for r in rollouts] or [nothing]),
                torch.cat([r.returns for r in rollouts] or [nothing]), device),
            "value": totals["value"] / n_tokens, "return": totals["return"] / n_tokens,
            "kl": totals["kl"] / n_tokens}, totals["kl"] / max(1, totals["rows"]), totals["tokens"]


# Copied from grpo.py::evaluate
def evaluate(sampler, questions, prompt_ids, args, step, tokenizer, run):
    """Held-out questions, split over the ranks: a greedy answer to each, --eval-samples more; to eval.csv."""
    rows, mine = [], dist.share(questions)
    for temperature, n in ((0.0, 1), (args.eval_temperature, args.eval_samples)):
        keys = [[noise_key(args.seed, EVALUATION, e.id, g) for g in range(n)] for e in mine]
        completions = sample_all(sampler, [prompt_ids[e.id] for e in mine], keys, args.max_new_tokens,
                                 temperature, run, run.counter("evaluation"))
        rollouts = [Rollout(e, e.id, g, [], completion, completion.text(tokenizer))
                    for e, row in zip(mine, completions) for g, completion in enumerate(row)]
        score_rollouts(rollouts, [], args, run)
        rows += [r.row(step) | {"sample": r.sample + (temperature > 0), "temperature": temperature}
                 for r in rollouts]
    run.log_evaluation(step, dist.gather_rows(rows, "id", "sample"), ks=args.eval_k)


def check(args):
    """Refuse what cannot work with this method; what no script can do, `defaults` refuses."""
    if args.minibatches > args.prompts_per_step * args.num_generations:
        raise ValueError(f"--minibatches {args.minibatches}: a step has only "
                         f"{args.prompts_per_step * args.num_generations} samples")
    if args.kl_target and not (args.beta and args.kl_in == "reward"):
        raise ValueError(f"--kl-target {args.kl_target} adapts beta from its start: give --beta, "
                         "with --kl-in reward")
    if args.beta and args.kl_in == "loss" and args.kl_estimator == "k1":
        raise ValueError("--kl-estimator k1 in the loss has an expected gradient of 0; "
                         "use k2 or k3, or --kl-in reward")


def main(args: Args) -> None:
    # ---- set up: whatever can be wrong is found before the model is loaded ----
    device = dist.setup(args.device)
    args = defaults(args, device, lr={"embedded": 5e-4, "full": 1e-6, "adapter": 2e-5})
    args.critic_lr = args.critic_lr or 2 * args.lr
    check(args)
    if args.dry_run:
        args.critic_warmup, args.target_kl = 0, 0.0
    dtype, tokenizer = models.choose_dtype(args.dtype, device), models.load_tokenizer(args.model)
    reward_functions = rewards.parse_rewards(
        args.rewards, models.check_reward_model,
        partial(rewards.AnswerProbability, tokenizer, args.max_new_tokens))
    train, held_out, prompt_ids, longest = data.load_questions(args, tokenizer, args.prompts_per_step)
    if args.download_only:
        return models.download(args.model)

    # ---- policy, reference, critic, reward, optimizers, sampler ----
    torch.manual_seed(args.seed)
    load_model = partial(models.load_model, args.model, torch.float32 if args.full else dtype, device,
                         longest, split=args.shard, quantize=args.quantize)
    model = load_model()
    reward_functions = [replace(f, function=shared_reward(f.function, f"reward{i}", args, model, device))
                        if isinstance(f.function, str) else f for i, f in enumerate(reward_functions)]
    head = nn.Parameter(torch.zeros(1, model.config.hidden_size, device=device))  # every value starts at 0
    params, adapter, critic, critic_on, critic_params = policy_and_critic(model, load_model, head, args)
    # of the KL: with --full a copy of the start, else the base with the adapter off
    reference = load_model().requires_grad_(False) if args.full and args.beta else None
    adamw = partial(torch.optim.AdamW, weight_decay=args.weight_decay, **shard.optimizer_kernel(args, device))
    optimizer, critic_optimizer = adamw(params, lr=args.lr), adamw(critic_params, lr=args.critic_lr)
    stop_ids = models.stop_ids(model, tokenizer, args.dry_run)
    sampler = Sampler(model, stop_ids, args.slots, dtype, by_layer=args.reshard)
    state = State(beta=args.beta, tokens_per_batch=args.tokens_per_batch or models.tokens_that_fit(
        model, [*params, *critic_params], dtype, sampler.cache_bytes(longest)))
    fits = Fitting(state, device, smallest=longest)
    rewards.ask_policy(reward_functions, prompt_ids,
                       partial(fits, completion_logprobs, model, temperature=1.0, device=device))

    # ---- the run directory, where --resume goes on, the self-check ----
    run = Run(args, __file__, device, tags=models.run_tags(args.model, args.data))
    run.print(models.describe(args, model, params + critic_params, dtype))
    run.print(f"data: {args.data}, {len(train)} questions to train on, {len(held_out)} held out, prompts "
              f"up to {longest - args.max_new_tokens} tokens; {args.prompts_per_step} x "
              f"{args.num_generations} samples a step")
    save_weights = partial(models.save_trained, model, tokenizer, adapter, args)
    run.restore(state, partial(models.load_trained, model=model, adapter=adapter), save_weights, sampler,
                optimizer=optimizer, critic_optimizer=critic_optimizer, critic=critic_params)
    autocast = partial(models.autocast, device, dtype, args.full)
    with autocast():
        run.self_check(checks.before_training(
            model, params, sampler, [prompt_ids[e.id] for e in train[:3]], args, args.temperature,
            token_logprobs, completion_logprobs, make_batch, use_adapter))
        if state.step == 0 and not args.dry_run:
            evaluate(sampler, held_out, prompt_ids, args, 0, tokenizer, run)

    last, stop = run.is_last(state), False
    while not (last or stop):
        state.step += 1
        with run.profile(state.step), autocast():
            # ---- sample and reward ----
            sampled = collect(sampler, train, prompt_ids, reward_functions, args, state, tokenizer, run)
            rollouts = [r for r in sampled if not math.isnan(r.reward)]
            with run.phase("logprobs"):
                add_logprobs_and_values(rollouts, model, reference, critic, critic_on, head, args, fits,
                                        device)

            # ---- advantage ----
            set_advantages(rollouts, args, state.beta, device)
            # minibatches are drawn from all ranks' rows: the number of ranks changes no update
            mine = {(r.group, r.sample): r for r in rollouts}
            everyone = sorted(itertools.chain(*dist.gather(
                [(*key, len(r.completion.ids)) for key, r in mine.items()])))
            finite = not dist.any_rank(any(math.isnan(sum(r.completion.logprobs)) for r in sampled), device)

            # ---- update ----
            train_policy, updates, approx_kl = state.step > args.critic_warmup, [], 0.0
            optimizers = [optimizer, critic_optimizer] if train_policy else [critic_optimizer]
            set_rates(optimizer, critic_optimizer, state.step, args)
            with run.phase("update"):
                for part in draw_minibatches(everyone, args, state.step):
                    batch = [mine[g, s] for g, s, _ in part if (g, s) in mine]
                    n_tokens = sum(n for *_, n in part)
                    sums = fits(accumulate_gradients, model, critic, critic_on, head, batch, args, state.beta,
                                n_tokens, device=device, train_policy=train_policy)
                    sums = {name: value / n_tokens for name, value in dist.sum_dict(sums, device).items()}
                    approx_kl = sums["approx_kl"]
                    if updates and 0 < args.target_kl < approx_kl:
                        break
                    dist.sum_gradients(params + critic_params)
                    norm = shard.clip_gradients(params, args.max_grad_norm)
                    critic_norm = shard.clip_gradients(critic_params, args.critic_max_grad_norm)
                    run.take_step(norm + critic_norm, *optimizers, finite=finite)
                    updates.append(sums | {"grad_norm": norm, "critic_grad_norm": critic_norm})
                model.zero_grad()  # of a minibatch that was left out
                critic.zero_grad()

        # ---- log ----
        metrics, kl, n_tokens = step_metrics(updates, rollouts, device)
        metrics = run.log_rollouts(state, [r.row(state.step) for r in sampled], metrics | {
            "approx_kl": approx_kl, "beta": state.beta, "lr": optimizer.param_groups[0]["lr"],
            "critic_lr": critic_optimizer.param_groups[0]["lr"], "tokens_per_batch": state.tokens_per_batch},
            show=("reward", "correct", "tokens", "kl", "approx_kl", "explained_variance", "grad_norm"))
        if args.kl_target:
            state.beta = adapted_beta(state.beta, kl, args.kl_target)
        last = run.is_last(state)
        if args.dry_run:
            break

        # ---- evaluate ----
        if state.step % args.eval_every == 0 or last:
            with autocast():
                evaluate(sampler, held_out, prompt_ids, args, state.step, tokenizer, run)

        # ---- save ----
        stop = run.save(due=state.step % args.save_every == 0 or last)

    # ---- the end ----
    if args.dry_run:
        return run.dry_run_report(metrics, args.max_steps, n_tokens * args.ppo_epochs)
    if last:
        run.save_final(partial(models.save_plain, model, tokenizer, merged_state_dict(model)) if args.merge
                       else save_weights)
        run.before_after()
    run.finish()


# ----------------------------------------------------------------------------------------------------------
# Shared blocks, word for word in every script that has them (tests/test_copies.py): LoRA, log-probs, sampler


# Copied from grpo.py::LoRALinear
class LoRALinear(nn.Module):
    """A frozen nn.Linear with low-rank adapters, one or none of them active: y = W x + b + (alpha / r) B A x.

    State: `A[name]` [R, in] and `B[name]` [out, R], float32 whatever the base's dtype (in bfloat16 AdamW's
    small steps would round to nothing); B starts at zero, so that a fresh adapter changes no output. `active`
    is the name of the adapter in use or None for the bare base; only `use_adapter` changes it.
    Source: LoRA, arXiv 2106.09685 eq. 3.
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}
        self.in_features, self.out_features = base.in_features, base.out_features
        self.active: str | None = None

    def add(self, name: str, r: int, alpha: float) -> None:
        device = self.base.weight.device
        A = torch.empty(r, self.base.in_features)  # drawn on the CPU: the same start on every device
        nn.init.kaiming_uniform_(A, a=5**0.5)
        self.A[name] = nn.Parameter(A.to(device))
        self.B[name] = nn.Parameter(torch.zeros(self.base.out_features, r, device=device))
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
    params, found = [], set()
    for i, layer in enumerate(model.base_model.layers):
        for path, module in list(layer.named_modules()):
            leaf = path.rpartition(".")[2]
            if leaf not in targets or not isinstance(module, nn.Linear | LoRALinear):
                continue
            found.add(leaf)
            if layers is not None and i not in layers:
                continue
            if isinstance(module, nn.Linear):
                module = LoRALinear(module)
                layer.set_submodule(path, module)
            module.add(name, r, alpha)
            module.active = name
            params += [module.A[name], module.B[name]]
    if missing := set(targets) - found:
        raise ValueError(f"--lora-targets {' '.join(sorted(missing))}: no such linear layer in this model "
                         f"(it has {' '.join(sorted(found)) or 'none of those asked for'})")
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
            state[f"{path}.weight"] = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    return state


# Copied from grpo.py::TokenLogprobs
class TokenLogprobs(torch.autograd.Function):
    """Log-probs of given tokens from hidden states, a chunk of tokens at a time: [N, V] never exists.

    The slope of a log-prob by its own hidden state is known in the forward pass: W[token] - sum_v p_v W[v],
    over the temperature. With a frozen `lm_head` that [N, D] is kept and the backward pass is one product
    with the incoming gradient; a trainable one needs the probabilities again: each chunk is recomputed, and
    its gradient is summed in the weight's own dtype (float32), whatever the products' is.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, chunk_tokens):
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        head = weight.to(hidden.dtype)
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if hidden_grad and not weight_grad else None
        buffer = hidden.new_empty(min(chunk_tokens, len(hidden)), len(head), dtype=torch.float32)
        for i in range(0, len(hidden), chunk_tokens):
            piece = slice(i, i + chunk_tokens)
            logits = head_logits(hidden[piece], head, buffer[:len(hidden[piece])])
            logprobs[piece], negative = chunk_logprobs(logits, targets[piece], temperature, softcap)
            if slope is not None:
                slope[piece] = negative.to(head.dtype) @ head
        ctx.save_for_backward(*((hidden, weight, targets) if weight_grad else (slope,)))
        ctx.settings = temperature, softcap, chunk_tokens
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        temperature, softcap, chunk_tokens = ctx.settings
        grad = grad[:, None] / -temperature
        if len(ctx.saved_tensors) == 1:
            slope = ctx.saved_tensors[0]
            return (grad * slope).to(slope.dtype), None, None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for i in range(0, len(hidden), chunk_tokens):
            piece = slice(i, i + chunk_tokens)
            logits = head_logits(hidden[piece], head)
            _, negative = chunk_logprobs(logits, targets[piece], temperature, softcap)
            slope = negative.mul_(grad[piece]).to(head.dtype)
            hidden_grad[piece] = slope @ head
            weight_grad += slope.T @ hidden[piece]
        return hidden_grad, weight_grad, None, None, None, None


# Copied from grpo.py::chunk_logprobs
def chunk_logprobs(logits, targets, temperature, softcap):
    """From raw logits [n, V]: log-probs [n] of the targets, and -temperature d log-prob / d logits [n, V].

    All float32 and in place: each pass over [n, V] costs as much as the products.
    """
    if softcap:
        logits.div_(softcap).tanh_()
        cap_slope = 1 - logits**2
        logits.mul_(softcap)
    if temperature != 1:
        logits.div_(temperature)
    top, at = logits.max(1, keepdim=True)
    chosen, targets = logits.gather(1, targets[:, None]), targets[:, None]
    probs = torch.softmax(logits, 1, out=logits)
    log_sum = top - probs.gather(1, at).log()  # the largest probability is never 0
    negative = probs.scatter_add_(1, targets, torch.full_like(chosen, -1.0))
    return (chosen - log_sum).squeeze(1), negative.mul_(cap_slope) if softcap else negative


# Copied from grpo.py::token_logprobs
def token_logprobs(model, input_ids, completion_mask, temperature=1.0, attention_mask=None, chunk_tokens=0):
    """Log-prob of each completion token given all before it, as the sampler at `temperature` sees it.

    Shapes: input_ids, completion_mask [B, T] -> [B, T], float32, nats, 0 outside the mask. Entry t belongs to
    token t: this is the one place that shifts. Right-padded rows need no attention_mask (a causal model
    never looks at what follows); left-padded rows pass theirs, [B, T], and positions count real tokens only.
    A row's first token has nothing before it and stays 0. A completion_mask on the CPU spares a CUDA sync.
    """
    rows, columns = completion_mask[:, 1:].nonzero(as_tuple=True)
    rows, columns = rows.to(input_ids.device), columns.to(input_ids.device)
    positions = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions,
                              use_cache=False).last_hidden_state[rows, columns]  # [N, D]
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype == torch.float32:
        # lm_head's products as the sampler's
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = shard.whole(model.get_output_embeddings().weight)
    chunk_tokens = chunk_tokens or max(16, (2**27 if weight.is_cuda else 2**24) // weight.shape[0])
    values = TokenLogprobs.apply(hidden, weight, input_ids[rows, columns + 1], temperature,
                                 getattr(model.config, "final_logit_softcapping", None), chunk_tokens)
    return torch.zeros(input_ids.shape, device=input_ids.device).index_put((rows, columns + 1), values)


# Copied from grpo.py::make_batch
def make_batch(prompt_ids, completion_ids, device):
    """Right-padded input_ids [B, T] on the device and completion_mask [B, T] on the CPU.

    The mask comes from the lengths: an end token that is also the padding token stays in it.
    """
    T = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids))
    input_ids = torch.zeros(len(prompt_ids), T, dtype=torch.int64)
    mask = torch.zeros(len(prompt_ids), T, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompt_ids, completion_ids)):
        input_ids[i, :len(p) + len(c)] = torch.tensor(p + c)
        mask[i, len(p):len(p) + len(c)] = True
    return input_ids.to(device, non_blocking=True), mask


# Copied from grpo.py::pad_logprobs
def pad_logprobs(values, mask):
    """Each row's [L] values at the places of its completion in a [B, T] tensor."""
    padded = torch.zeros(mask.shape)
    padded[mask] = torch.cat([torch.as_tensor(value, dtype=torch.float32) for value in values])
    return padded


# Copied from grpo.py::completion_logprobs
@torch.no_grad()
def completion_logprobs(model, prompt_ids, completion_ids, temperature, tokens_per_batch, device):
    """Log-probs [L] of each row's completion under the model as it stands, a list in the rows' order."""
    values = [None] * len(prompt_ids)
    batches = pack([len(p) + len(c) for p, c in zip(prompt_ids, completion_ids)], tokens_per_batch)
    for rows in shard.micro_batches(model, batches, partial(token_logprobs, model)):
        input_ids, mask = make_batch([prompt_ids[i] for i in rows], [completion_ids[i] for i in rows], device)
        logprobs = token_logprobs(model, input_ids, mask, temperature)
        for i, row, of_row in zip(rows, logprobs.cpu(), mask):
            values[i] = row[of_row]
    return values


# Copied from grpo.py::pack
def pack(lengths, tokens_per_batch):
    """Split rows into micro-batches of similar length: lists of row numbers, each row once.

    A micro-batch, padded to its longest row, holds at most tokens_per_batch tokens (one row may exceed it).
    Of all ways to cut the rows, sorted by length, it is the one with the fewest padded tokens, where each
    micro-batch counts tokens_per_batch / 8 more: a pass has a cost of its own, on a GPU launches.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    least, begin = [0.0], [0]  # of the first n rows: the least cost, and where their last micro-batch begins
    for n in range(1, len(rows) + 1):
        costs = {}
        for start in range(n - 1, -1, -1):
            padded = (n - start) * lengths[rows[start]]
            if padded > tokens_per_batch and costs:
                break
            costs[start] = least[start] + padded + tokens_per_batch / 8
        begin.append(min(costs, key=costs.get))
        least.append(costs[begin[n]])
    batches, end = [], len(rows)
    while end:
        batches.append(rows[begin[end]:end])
        end = begin[end]
    return batches[::-1]


# Copied from grpo.py::Completion
@dataclass
class Completion:
    """A sampled answer: token ids (stop token included), their log-probs, whether it stopped by itself."""

    ids: list[int]
    logprobs: list[float]
    finished: bool

    def text(self, tokenizer):
        """What it says, without the stop token and other special tokens."""
        ids = self.ids[:-1] if self.finished else self.ids
        return tokenizer.decode(ids, skip_special_tokens=True)


# Copied from grpo.py::noise_key
def noise_key(*parts: int) -> int:
    """A signed 64-bit key from integers like (seed, step, question, sample): the same on every machine."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# Copied from grpo.py::uniform
def uniform(keys, positions):
    """A number in (0, 1) per row from its key and position: a counter hash (splitmix64), no generator state.

    So a token's noise depends on neither its slot nor the batch, the number of ranks or a captured graph.
    """
    x = keys + positions * -7046029254386353131  # 2^64 / golden ratio; int64 products wrap around
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return ((x >> 41 & (1 << 23) - 1).float() + 0.5) / (1 << 23)  # 24 bits: exact in float32, never 0 or 1


# Copied from grpo.py::draw
def draw(logits, temperature, u):
    """Invert the distribution function of softmax(logits / temperature) at u; temperature 0 takes the top.

    Shapes: logits [B, V] float32, overwritten; u [B] -> tokens, log-probs [B] (at temperature 0: of 1).
    The sum runs over blocks, then inside one: faster and more exact in float32 than one long cumulative sum.
    """
    if temperature == 0:
        best, tokens = logits.max(-1)
        return tokens, best - logits.logsumexp(-1)
    probs = torch.softmax(logits.div_(temperature) if temperature != 1 else logits, -1, out=logits)
    width = math.gcd(probs.shape[1], 128)
    blocks = probs.view(len(probs), -1, width)  # [B, V / width, width]
    edges = F.pad(blocks.sum(-1).cumsum(-1), (1, 0))  # [B, V / width + 1]: the sum before each block, and all
    target = u[:, None] * edges[:, -1:]
    block = torch.searchsorted(edges, target, right=True).sub_(1).clamp_(max=blocks.shape[1] - 1)  # [B, 1]
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, width)).squeeze(1).cumsum(-1)  # [B, width]
    # rounding may leave the rest at or above the block's sum: stay below it, on a token that has probability
    rest = torch.minimum(target - edges.gather(1, block), inside[:, -1:] * (1 - 1e-6))
    tokens = torch.searchsorted(inside, rest, right=True).clamp_(max=width - 1).add_(block, alpha=width)
    return tokens.squeeze(1), probs.gather(1, tokens).log().squeeze(1)


# Copied from grpo.py::head_logits
def head_logits(hidden, weight, out=None):
    """hidden [N, D] @ weight [V, D].T in float32: bfloat16 logits would be off by hundredths of a nat."""
    if hidden.is_cuda and torch.version.cuda and hidden.dtype.itemsize < 4:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    return torch.mm(hidden, weight.T, out=out if hidden.dtype == torch.float32 else None).float()


# Copied from grpo.py::FusedLinear
class FusedLinear:
    """Projections of one input as one product, for the sampler: `weight` [out, in] holds theirs stacked.

    In float32 the active adapters are merged into it. In bfloat16 a merge would round small updates away, so
    they stay apart: A [n R, in] lies under W, so that one product gives both, and B [out, n R] is
    block-diagonal; `weight` becomes the storage of the modules' own weights: no second copy. `refresh` writes
    in place: a captured graph sees the new values. Quantized projections are called as they are.
    """

    def __init__(self, parts, dtype):
        self.parts, self.bases, self.dtype = parts, [getattr(part, "base", part) for part in parts], dtype
        self.split, self.quantized = False, hasattr(self.bases[0].weight, "quant_state")
        if self.quantized:
            return
        self.outs = [base.out_features for base in self.bases]
        adapted = [part for part in parts if isinstance(part, LoRALinear)]
        weights = [base.weight.detach() for base in self.bases]
        self.split = shard.is_split(weights[0])
        self.merge = bool(adapted) and dtype == torch.float32
        self.shared = not (self.merge or self.split) and all(weight.dtype == dtype for weight in weights)
        self.rank = 0 if self.merge else sum(  # of any adapter made active
            max(len(A) for A in part.A.values()) for part in adapted)
        new = partial(torch.zeros, dtype=dtype, device=weights[0].device)
        self.weight = None
        if not self.split:
            alone = self.shared and len(parts) == 1 and not self.rank
            self._hold(weights[0] if alone else torch.cat(
                [*weights, new(self.rank, self.bases[0].in_features)]).to(dtype))
        if self.shared:
            for base, rows in zip(self.bases, self.rows):
                base.weight.data = rows
        self.bias = new(sum(self.outs) + self.rank) if self.bases[0].bias is not None else None
        self.B = new(sum(self.outs), self.rank) if self.rank else None

    def _hold(self, weight):
        self.weight = weight
        *self.rows, self.A = weight.split([*self.outs, self.rank])  # each part's own, views

    def release(self):
        """Let go of weights that were gathered."""
        if self.split:
            self.weight = self.rows = self.A = None

    @torch.no_grad()
    def refresh(self):
        """Take over the present weights, biases and active adapters of the modules; gather split weights."""
        if self.quantized:
            return
        if self.weight is None:
            self._hold(torch.empty(sum(self.outs) + self.rank, self.bases[0].in_features,
                                   dtype=self.dtype, device=self.bases[0].weight.device))
            self.A.zero_()
        if self.bias is not None:
            self.bias[:sum(self.outs)] = torch.cat([base.bias for base in self.bases])
        if self.B is not None:
            self.B.zero_()
        out = rank = 0
        for part, base, rows in zip(self.parts, self.bases, self.rows):
            if not self.shared:
                rows.copy_(shard.whole(base.weight))
            if isinstance(part, LoRALinear) and part.active:
                A, B, scale = part.A[part.active], part.B[part.active], part.scale[part.active]
                if self.merge:
                    rows.addmm_(B, A, alpha=scale)
                else:
                    self.A[rank:rank + len(A)] = A
                    self.B[out:out + len(B), rank:rank + len(A)] = scale * B
                    rank += len(A)
            out += len(rows)

    def __call__(self, x):
        if self.quantized:
            return torch.cat([part(x) for part in self.parts], -1)
        y = F.linear(x, self.weight, self.bias)
        if self.B is None:
            return y
        y, low_rank = y.split([len(self.B), self.rank], -1)
        return y.addmm_(low_rank, self.B.T)


# Copied from grpo.py::SamplerLayer
class SamplerLayer:
    """One decoder layer of the Llama family, written out: x [N, D] -> [N, D], for any N tokens of any rows.

    Covers grouped-query attention, q/k norms (Qwen3), norms around blocks and (1 + weight) norms (Gemma).
    by_layer: split weights are gathered at each call and let go after it.
    """

    def __init__(self, layer, dtype, by_layer=False):
        attn, mlp, self.by_layer = layer.self_attn, layer.mlp, by_layer
        self.qkv = FusedLinear([attn.q_proj, attn.k_proj, attn.v_proj], dtype)
        self.out = FusedLinear([attn.o_proj], dtype)
        self.gate_up = FusedLinear([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = FusedLinear([mlp.down_proj], dtype)
        self.act = mlp.act_fn
        gemma2 = hasattr(layer, "pre_feedforward_layernorm")
        after, self.attn_norm = layer.post_attention_layernorm, layer.input_layernorm
        self.attn_out_norm = after if gemma2 else None
        self.mlp_norm = layer.pre_feedforward_layernorm if gemma2 else after
        self.mlp_out_norm = layer.post_feedforward_layernorm if gemma2 else None
        self.q_norm, self.k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        self.head_dim = attn.head_dim
        self.heads = attn.q_proj.out_features // self.head_dim
        self.kv_heads = attn.k_proj.out_features // self.head_dim
        self.scale, self.softcap = attn.scaling, getattr(attn, "attn_logit_softcapping", None)
        self.kernels = None  # on CUDA: common/kernels.py

    def refresh(self):
        for part in (self.qkv, self.out, self.gate_up, self.down):
            part.refresh()

    def release(self):
        for part in (self.qkv, self.out, self.gate_up, self.down):
            part.release()

    def __call__(self, x, y, attend):
        """x, y -> x, y [N, D]: the residual stream, and the last block's output that is not yet added to it.

        attend(qkv [N, H + 2 Hkv, K]) -> [N, H K] turns q and k by their positions and keeps k and v.
        """
        if self.by_layer:
            self.refresh()
        x, normed = self.add_norm(x, y, self.attn_norm)
        qkv = self.qkv(normed).view(len(x), -1, self.head_dim)
        if self.q_norm:
            q, k = qkv[:, :self.heads], qkv[:, self.heads:-self.kv_heads]
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        y = self.out(attend(qkv))
        x, normed = self.add_norm(x, self.attn_out_norm(y) if self.attn_out_norm else y, self.mlp_norm)
        y = self.down(self.swiglu(self.gate_up(normed)))
        if self.by_layer:
            self.release()
        return x, self.mlp_out_norm(y) if self.mlp_out_norm else y

    def add_norm(self, x, y, norm):
        if self.kernels:
            return self.kernels.add_norm(x, y, norm)
        x = x + y
        return x, norm(x).to(x.dtype)

    def swiglu(self, x):
        if self.kernels:
            return self.kernels.swiglu(x)
        gate, up = x.chunk(2, -1)
        return self.act(gate) * up


# Copied from grpo.py::rotate
def rotate(qkv, kv_heads, cos, sin):
    """Turn q and k in place by rotary embedding: qkv [N, H + 2 Hkv, K] -> q [N, H, K], kv [N, 2, Hkv, K].

    cos, sin [N, 1, K], sine signed as the rotated half. Source: RoFormer, arXiv 2104.09864 eq. 34.
    """
    qk = qkv[:, :-kv_heads]
    torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin, out=qk)
    return qk[:, :-kv_heads], qkv[:, -2 * kv_heads:].unflatten(1, (2, kv_heads))


# Copied from grpo.py::attention
def attention(q, k, v, bias, scale, softcap):
    """Softmax attention. Shapes: q [B, H, Q, K]; k, v [B, H, S, K]; bias [.., S] on scores, 0 or -inf."""
    if q.is_cuda and not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scores = (q * scale) @ k.transpose(-1, -2)  # CPU: two plain products beat the fused kernel at this size
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.add_(bias).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


# Copied from grpo.py::Sampler
class Sampler:
    """Samples completions by continuous batching in a static KV cache of `slots` rows, one token a step each.

    A row that ends leaves at once: the last live row moves into its slot, so that the live ones are always
    the first, and the next waiting row is admitted behind them. A prompt is prefilled once for all its
    samples. Attention reads the cache only up to the longest live row, in blocks, or, by the kernels for
    CUDA, each row's own keys. There a step is a captured graph for each block of rows, and the host looks at
    the tokens only every `sync_every` steps; what a row drew past its end is thrown away. The weights of a
    model that is split over ranks are gathered for the time of `sample`, or, `by_layer`, each layer's for its
    turn in each pass; no graph is captured then, for it would hold their addresses.
    """

    def __init__(self, model, stop_ids, slots=256, dtype=None, sync_every=None, graphs=None, by_layer=False):
        self.model, self.stop_ids, self.slots = model, set(stop_ids), slots
        self.device = model.get_input_embeddings().weight.device
        self.dtype = dtype or model.get_input_embeddings().weight.dtype
        on_gpu = self.device.type == "cuda"
        self.sync_every = sync_every or (8 if on_gpu else 1)
        self.split = shard.is_split(model.get_input_embeddings().weight)
        self.by_layer = by_layer and self.split
        self.block, self.row_block = (256, 32) if on_gpu else (16, 1)
        self.layers = [SamplerLayer(layer, self.dtype, self.by_layer) for layer in model.base_model.layers]
        self.use_graphs = (on_gpu if graphs is None else graphs) and not (
            self.split or self.layers[0].qkv.quantized)
        self.kernels = models.decode_kernels(self.layers[0], self.dtype) if on_gpu else None
        for layer in self.layers:
            layer.kernels = self.kernels
        self.head = FusedLinear([model.get_output_embeddings()], self.dtype)
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.cache = None
        self.graphs = {}

    def _gather(self):
        """Take over the present weights; what is split is gathered, which all ranks do together."""
        dist.lockstep = self.split
        for part in (self.head,) if self.by_layer else (*self.layers, self.head):
            part.refresh()
        if self.split:
            embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            self.embedding = (self.head.weight if embedding.weight is head.weight
                              else shard.whole(embedding.weight).to(self.dtype))
        dist.lockstep = self.by_layer

    def _release(self):
        """Let go of gathered weights."""
        if self.split:
            self.embedding = None
            for part in (*self.layers, self.head):
                part.release()

    def _leave_together(self):
        """Join in the passes of ranks that still sample: none of them waits for this one's weights."""
        while self.by_layer and dist.any_rank(False, self.device):
            for layer in self.layers:
                layer.refresh()
                layer.release()
        dist.lockstep = False

    def _embed(self, ids):
        module = self.model.get_input_embeddings()
        if not self.split:
            return module(ids).to(self.dtype)
        if self.by_layer:  # a pass begins: those in `_leave_together` join in
            dist.any_rank(True, self.device)
        x, scale = F.embedding(ids, self.embedding), getattr(module, "embed_scale", None)  # Gemma's
        return x if scale is None else x * scale.to(x.dtype)

    def _rounded(self, rows):
        """Rows of a step: whole row blocks, or all slots; they do not depend on what was sampled before."""
        return min(self.slots, -(-rows // self.row_block) * self.row_block)

    def cache_bytes(self, length):
        """What the keys and values of all slots take, for prompts and completions of `length` tokens."""
        layer = self.layers[0]
        return (len(self.layers) * 2 * self.slots * layer.kv_heads * layer.head_dim
                * (length + self.sync_every + self.block) * self.dtype.itemsize)

    def _allocate(self, slots, length):
        """Make the cache [L, 2, slots, Hkv, length, K] and the buffers of a step large enough."""
        if (self.cache is not None and slots <= self.cache.shape[2] <= self.slots
                and length <= self.cache.shape[4]):
            return
        self.cache = self.graphs = self.pool = None  # free the old ones before the new are made
        layer, new = self.layers[0], partial(torch.zeros, device=self.device)
        length = -(-length // self.block) * self.block
        self.cache = new(len(self.layers), 2, slots, layer.kv_heads, length, layer.head_dim, dtype=self.dtype)
        self.graphs, self.rows = {}, torch.arange(slots, device=self.device)
        self.tokens, self.positions = (new(slots, dtype=torch.int64) for _ in range(2))
        self.noise = new(slots, length)
        self.drawn = new(self.sync_every, slots, dtype=torch.int64), new(self.sync_every, slots)
        self.count = new(1, dtype=torch.int64)
        self.columns = torch.arange(length, device=self.device)
        cos, sin = self.model.base_model.rotary_emb(  # [1, length, K]
            new(1, dtype=self.dtype), self.columns[None])
        half = cos.shape[-1] // 2
        self.cos = cos[0, :, None]
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)[:, None]

    def _logits(self, x):
        logits = head_logits(self.model.base_model.norm(x).to(x.dtype), self.head.weight)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def _prefill(self, prompts):
        """Keys and values of right-padded prompts [L, 2, P, Hkv, T, K], and the logits after each [P, V]."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        P, T = len(prompts), int(lengths.max())
        ids = torch.zeros(P, T, dtype=torch.int64)
        for row, prompt in zip(ids, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        x = self._embed(ids.to(self.device)).flatten(0, 1)  # [P T, D]
        cos, sin = self.cos[:T].repeat(P, 1, 1), self.sin[:T].repeat(P, 1, 1)
        kept = x.new_empty(len(self.layers), 2, P, self.layers[0].kv_heads, T, self.layers[0].head_dim)
        ahead = self.columns[:T] > self.columns[:T, None]
        bias = torch.zeros(T, T, dtype=self.dtype, device=self.device).masked_fill(ahead, -torch.inf)
        y = torch.zeros_like(x)
        for i, layer in enumerate(self.layers):

            def attend(qkv):
                q, kv = rotate(qkv, layer.kv_heads, cos, sin)
                q, k, v = (t.unflatten(0, (P, T)).transpose(1, 2) for t in (q, kv[:, 0], kv[:, 1]))
                kept[i, 0], kept[i, 1] = k, v
                if self.kernels:
                    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True,
                                                       scale=layer.scale)
                else:
                    k, v = (t.repeat_interleave(layer.heads // layer.kv_heads, 1) for t in (k, v))
                    y = attention(q, k, v, bias, layer.scale, layer.softcap)
                return y.transpose(1, 2).reshape(P * T, -1)

            x, y = layer(x, y, attend)
        last = torch.arange(P) * T + lengths - 1
        return kept, self._logits((x + y)[last.to(self.device)])

    def _decode(self, n, length, temperature):
        """One token for each of the first n slots, reading `length` cache columns; in place: graph-safe."""
        positions, rows = self.positions[:n], self.rows[:n]
        x = self._embed(self.tokens[:n])  # [n, D]
        y = torch.zeros_like(x)
        if not self.kernels:
            cos, sin = self.cos[positions], self.sin[positions]
            ahead = self.columns[:length] > positions[:, None]
            bias = torch.zeros(n, length, dtype=self.dtype, device=self.device).masked_fill(
                ahead, -torch.inf)[:, None, None]
        for layer, cache in zip(self.layers, self.cache):  # [2, slots, Hkv, length, K]

            def attend(qkv):
                if self.kernels:
                    return self.kernels.attend(qkv, self.cos, self.sin, positions, *cache, layer.scale)
                q, kv = rotate(qkv, layer.kv_heads, cos, sin)
                cache[:, rows, :, positions] = kv
                keys, values = cache[:, :n, :, :length]
                q = q.reshape(n, layer.kv_heads, -1, layer.head_dim)  # heads of one key: as if a query each
                return attention(q, keys, values, bias, layer.scale, layer.softcap).reshape(n, -1)

            x, y = layer(x, y, attend)
        positions += 1
        tokens, logprobs = draw(self._logits(x + y), temperature,
                                self.noise[:n].gather(1, positions[:, None]).squeeze(1))
        self.tokens[:n] = tokens
        self.drawn[0][:, :n].index_copy_(0, self.count, tokens[None])
        self.drawn[1][:, :n].index_copy_(0, self.count, logprobs[None])
        self.count += 1

    def _run(self, n, length, temperature):
        """`sync_every` steps; returns their tokens and log-probs as lists [n][steps]."""
        self.count.zero_()
        key = (n, length, temperature)
        for _ in range(self.sync_every):
            if key in self.graphs:
                self.graphs[key].replay()
                continue
            self._decode(n, length, temperature)
            if self.use_graphs:  # the step just run was the warm-up
                self.pool, graph = self.pool or torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    self._decode(n, length, temperature)
                self.graphs[key] = graph  # here, not before: half a graph would draw nonsense
        return [drawn[:, :n].T.tolist() for drawn in self.drawn]

    @torch.inference_mode()
    def sample(self, prompts, keys, max_new_tokens, temperature=1.0, progress=None):
        """Sample len(keys[p]) completions of each prompt p, of at most `max_new_tokens` tokens.

        prompts: lists of token ids. keys: for each prompt one `noise_key` per sample; equal keys give equal
        samples of equal prompts, whatever else is sampled beside them. Returns lists of Completion shaped
        like `keys`. progress(rows done, rows in all, [(p, g, Completion) of those that just ended]) is called
        as rows end. Errors: ValueError: a prompt without tokens.
        """
        if not all(prompts):
            raise ValueError("a prompt has no tokens; there is nothing to continue")
        done = [[Completion([], [], False) for _ in row] for row in keys]
        waiting = deque((p, g) for p, row in enumerate(keys) for g in range(len(row)))
        if not waiting and not self.split:
            return done
        total, live, prefilled = len(waiting), [], {}
        self._gather()
        if waiting:
            self._allocate(self._rounded(total), max(map(len, prompts)) + max_new_tokens + self.sync_every)
            slots = self.cache.shape[2]

        def record(slot_rows, tokens, logprobs):
            """Append draws [slots][steps], up to each row's end; returns the slots whose row has ended."""
            ended = []
            for slot, ((p, g), ids, of_ids) in enumerate(zip(slot_rows, tokens, logprobs)):
                row = done[p][g]
                ids = ids[:max_new_tokens - len(row.ids)]
                row.finished = not self.stop_ids.isdisjoint(ids)
                if row.finished:  # what it drew after its end is thrown away
                    ids = ids[:1 + next(i for i, token in enumerate(ids) if token in self.stop_ids)]
                row.ids += ids
                row.logprobs += of_ids[:len(ids)]
                if row.finished or len(row.ids) == max_new_tokens:
                    ended.append(slot)
            return ended

        def leave(ended):
            rows = [(p, g, done[p][g]) for p, g in (live[slot] for slot in ended)]
            for slot in sorted(ended, reverse=True):
                last = len(live) - 1
                if slot != last:
                    p, g = live[last]
                    filled = len(prompts[p]) + len(done[p][g].ids)
                    self.cache[:, :, slot, :, :filled] = self.cache[:, :, last, :, :filled]
                    for buffer in (self.tokens, self.positions, self.noise):
                        buffer[slot] = buffer[last]
                    live[slot] = live[last]
                live.pop()
            if progress and rows:
                progress(total - len(waiting) - len(live), total, rows)

        def admit():
            new = [waiting.popleft() for _ in range(min(slots - len(live), len(waiting)))]
            fresh = [p for p in dict.fromkeys(p for p, _ in new) if p not in prefilled]
            while fresh:  # a bounded number of prompt tokens at a time
                size = max(1, 16384 // max(len(prompts[p]) for p in fresh))
                part, fresh = fresh[:size], fresh[size:]
                kept, logits = self._prefill([prompts[p] for p in part])
                prefilled.update((p, (kept[:, :, j, :, :len(prompts[p])], logits[j]))
                                 for j, p in enumerate(part))
            first = len(live)
            for p, samples in itertools.groupby(new, key=lambda row: row[0]):
                n, kept = len(list(samples)), prefilled[p][0]
                self.cache[:, :, first:first + n, :, :kept.shape[-2]] = kept[:, :, None]
                first += n
            slot = slice(len(live), first)
            row_keys = torch.tensor([keys[p][g] for p, g in new], device=self.device)
            self.noise[slot] = uniform(row_keys[:, None], self.columns)
            self.positions[slot] = torch.tensor([len(prompts[p]) for p, _ in new], device=self.device)
            logits = torch.stack([prefilled[p][1] for p, _ in new])
            u = self.noise[slot].gather(1, self.positions[slot, None]).squeeze(1)
            tokens, logprobs = draw(logits, temperature, u)
            self.tokens[slot] = tokens
            ended = [len(live) + j for j in record(new, tokens[:, None].tolist(), logprobs[:, None].tolist())]
            live.extend(new)
            still = {p for p, _ in waiting}
            for p in [p for p in prefilled if p not in still]:
                del prefilled[p]
            leave(ended)

        while waiting or live:
            while waiting and slots - len(live) >= max(1, min(slots // 8, len(waiting))):
                admit()
            if not live:
                continue
            n = self._rounded(len(live))
            self.positions[len(live):n] = 0  # a free slot inside the row block still steps: keep it in bounds
            longest = max(len(prompts[p]) + len(done[p][g].ids) for p, g in live) + self.sync_every
            columns = self.cache.shape[4]  # the kernels take all: they read what is live
            length = columns if self.kernels else min(columns, -(-longest // self.block) * self.block)
            leave(record(live, *self._run(n, length, temperature)))
        self._leave_together()
        self._release()
        return done


# Copied from grpo.py::sample_all
def sample_all(sampler, prompt_ids, keys, max_new_tokens, temperature, run, progress):
    """`Sampler.sample` on all ranks; memory that runs out on one of them halves the slots of all."""
    most_rows = max(dist.gather(sum(map(len, keys))))  # of a rank: only fewer slots save memory
    if not most_rows:
        return [[] for _ in keys]

    def attempt(slots):
        if slots < min(sampler.slots, most_rows):
            sampler.slots, sampler.cache, sampler.graphs = slots, None, {}
        return sampler.sample(prompt_ids, keys, max_new_tokens, temperature, progress)

    return retry_smaller(attempt, min(sampler.slots, most_rows), run.device, 1, "slots")[0]


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
