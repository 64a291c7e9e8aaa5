"""GRPO: sample a group of answers per question, and raise the probability of those above the group's mean.

    J = E[ 1/N sum_i 1/L_i sum_t min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i) ]
        - beta KL(policy || reference)
    A_i = (R_i - mean of the group) / (deviation of the group + 1e-4)
    rho_it = p(token) now / p(token) when sampled

Paper: DeepSeekMath, arXiv 2402.03300, eqs. 3-4 and algorithm 1. Differs from it in:
  - the old log-probs are the sampler's own; no pass is made for them (--recompute-old makes it);
  - KL is off by default (beta 0), and then no reference pass is made;
  - switches turn it into Dr. GRPO, DAPO, GSPO, CISPO or RLOO: see the table in README.md.
With --aggregation sequence the loss is near 0 at every step, by construction: watch the reward.

    python grpo.py                                       # the embedded model, minutes on two CPU cores
    python grpo.py --model Qwen/Qwen2.5-3B-Instruct      # GSM8K on one GPU
    torchrun --nproc-per-node 8 grpo.py --model Qwen/Qwen2.5-3B-Instruct
    python grpo.py --out runs/a --resume                 # go on where it was killed
"""

import itertools
import math
from collections import Counter, deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import checks, data, dist, generic, models, rewards, shard
from common.curriculum import QuestionState
from common.draws import Completion, StopTexts, draw, noise_key, uniform
from common.run import Fitting, QuestionArgs, Run, cli, defaults, retry_smaller

# Shapes: B rows, T tokens, V vocabulary, P prompts, G samples per prompt, D hidden size, L layers or a row's
# completion tokens, H heads, K head size, R LoRA rank, N rows or tokens in all.
EVALUATION = -1  # in noise keys, where training has a step's number


@dataclass
class Args(QuestionArgs):
    # ---- run ----
    max_steps: int = 60  # steps in all
    token_budget: int = 0  # tokens sampled for training after which the run ends; 0: no limit

    # ---- data ----
    label_tokenizer: str = "openai-community/gpt2"  # of preferences that are token ids: hub id or folder

    # ---- sampling ----
    prompts_per_step: int = 16  # questions per step, over all ranks
    num_generations: int = 8  # G, samples per question
    max_new_tokens: int = 512  # longest completion; cut off there (not finished) it counts as truncated
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    slots: int = 256  # rows sampled at a time per rank; halved when memory runs out
    stop: tuple[str, ...] = ()  # texts that end an answer, or none; empty: a base model's next question

    # ---- method ----

    # weighted: correctness, partial, steps, format, digit, mark, math, answer-prob, model:RUN, file.py:name
    rewards: tuple[str, ...] = ("correctness=1", "format=0.2")
    reward_timeout: float = 30.0  # seconds for a call of your own reward; its row is left out and counted
    # reward - group mean: over the deviation (std, GRPO), as is (none, Dr. GRPO), leave-one-out (RLOO)
    group_scaling: Literal["std", "none", "loo"] = "std"
    # mean token loss: per row, then of rows (GRPO); of all tokens (DAPO); by max_new_tokens (Dr. GRPO)
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    ratio: Literal["token", "sequence"] = "token"  # of each token, or its geometric mean per row (GSPO)
    clip: Literal["min", "detach"] = "min"  # PPO's objective; or the ratio as a constant weight (CISPO)
    clip_eps_low: float = 0.2  # lower clip: the ratio counts as at least 1 - this (arXiv 1707.06347 eq. 7)
    clip_eps_high: float = 0.2  # upper clip: the ratio counts as at most 1 + this; DAPO takes 0.28
    dual_clip: float = 0.0  # a negative advantage counts at most so many times (arXiv 1912.09729); 0: off
    beta: float = 0.0  # KL coefficient towards the start model; 0: no reference pass at all
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # estimator of the KL term
    kl_in: Literal["loss", "reward"] = "loss"  # KL as a loss term, or subtracted from the rewards
    updates_per_batch: int = 1  # optimizer steps on each batch of samples (mu in arXiv 2402.03300 alg. 1)
    recompute_old: bool = False  # old log-probs by a pass of the trainer; always with --ratio sequence
    # weight tokens by trainer's over sampler's probability: capped, or dropped when outside [1/cap, cap]
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    sampler_correction_cap: float = 2.0  # cap of that weight
    dynamic_sampling: bool = False  # draw more questions for groups that are all right or all wrong (DAPO)
    max_refills: int = 4  # most further draws per step with --dynamic-sampling
    overlong_buffer: int = 0  # last tokens, over which the reward falls by up to 1 (DAPO); 0: off
    # leave truncated rows out of the loss and its denominators (their reward stays in the group's mean)
    mask_truncated: bool = False

    # ---- optimizer ----

    lr: float = 0.0  # AdamW's peak rate; 0: 1e-3 for the embedded model, 1e-6 with --full, else 2e-5
    warmup_steps: int = 5  # steps of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    weight_decay: float = 0.0  # AdamW's decoupled decay
    max_grad_norm: float = 1.0  # clip the gradient's norm to this

    # ---- evaluation ----

    eval_every: int = 20  # steps between evaluations; the first and the last are always made
    eval_samples: int = 0  # samples per held-out question for pass@k, beside the greedy one; 0: none
    eval_temperature: float = 0.5  # of those samples
    eval_k: tuple[int, ...] = ()  # report pass@k for these k (each at most eval_samples)
    show_every: int = 10  # steps between printed samples


def policy_loss(logprobs, old_logprobs, advantages, mask, *, ratio, clip, clip_eps_low, clip_eps_high,
                dual_clip=0.0):
    """The clipped policy-gradient loss of each token, and where the lower and upper clip acts.

    Shapes: logprobs, old_logprobs, mask [B, T], advantages [B] -> loss [B, T], low [B, T], high [B, T]; 0
    outside the mask, whatever stands there. With rho = exp(logprob - old):
    ratio "token": rho of each token (PPO, arXiv 1707.06347 eq. 7); "sequence": the geometric mean of the
    row's rho at each of its tokens (GSPO, arXiv 2507.18071 eq. 7).
    clip "min": -min(rho A, clip(rho) A), and with dual_clip c > 0 at most -c A for A < 0 (arXiv 1912.09729);
    "detach": -sg(min(rho, 1 + high)) A logprob (CISPO, arXiv 2506.13585 eq. 4).
    """
    logprobs, old_logprobs = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs))
    log_ratio = logprobs - old_logprobs
    if ratio == "sequence":
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(log_ratio)
    A, rho = advantages[:, None], log_ratio.exp()
    low, high = mask & (A < 0) & (rho < 1 - clip_eps_low), mask & (A > 0) & (rho > 1 + clip_eps_high)
    if clip == "detach":
        return (-torch.where(mask, rho.detach().clamp(max=1 + clip_eps_high) * A * logprobs, 0.0),
                torch.zeros_like(low), high)
    objective = torch.minimum(rho * A, rho.clamp(1 - clip_eps_low, 1 + clip_eps_high) * A)
    if dual_clip:
        objective = torch.where(A < 0, torch.maximum(objective, dual_clip * A), objective)
    return -torch.where(mask, objective, 0.0), low, high


def group_advantages(rewards, groups, scaling):
    """How much better each sample was than the others of its prompt.

    Shapes: rewards [N] (NaN: the sample is left out of its group and gets 0), groups [N] ids -> [N], float64.
    scaling, with m and s the group's mean and standard deviation (N - 1): "std" (R - m) / (s + 1e-4), GRPO,
    arXiv 2402.03300 sec. 4.1.2; "none" R - m, Dr. GRPO, arXiv 2503.20783; "loo" R - mean of the others, RLOO,
    arXiv 2402.14740. A group of equal rewards gets exactly 0, whatever rounding makes of its mean.
    """
    advantages = torch.zeros(len(rewards), dtype=torch.float64)
    for group in groups.unique():
        rows = (groups == group) & ~rewards.isnan()
        R = rewards[rows].double()
        if len(R) and R.max() > R.min():
            centred = R - R.mean()
            advantages[rows] = {"std": centred / (R.std() + 1e-4), "none": centred,
                                "loo": centred * len(R) / (len(R) - 1)}[scaling]
    return advantages


def row_weights(aggregation, lengths, n_sequences, n_tokens, max_new_tokens):
    """Weight [B] of each row's sum of token losses; what the weighted sum over micro-batches and ranks is:

    "sequence": the mean over rows of the mean over their tokens (GRPO); "token": the mean over all tokens
    (DAPO, arXiv 2503.14476 eq. 8); "constant": the sum over n_sequences * max_new_tokens (Dr. GRPO).
    n_sequences and n_tokens count the whole optimizer step, the skipped rows and the other ranks included:
    micro-batching changes no gradient.
    """
    lengths = lengths.double()
    return {"sequence": 1 / (n_sequences * lengths.clamp(min=1)),
            "token": torch.full_like(lengths, 1 / max(1, n_tokens)),
            "constant": torch.full_like(lengths, 1 / (max(1, n_sequences) * max_new_tokens))
            }[aggregation].float()


def kl_estimate(logprobs, ref_logprobs, kind):
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled, in nats; [...] -> [...].

    With d = logprob - ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, never negative (Schulman,
    "Approximating KL Divergence", 2020). As a loss term they pull differently: k1 not at all (its expected
    gradient is 0), k2 along KL(policy || ref), k3 along KL(ref || policy); k1 in the reward pulls along
    KL(policy || ref) again.
    """
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]


def overlong_penalty(length, max_new_tokens, buffer):
    """0 up to max_new_tokens - buffer, falling to -1 at max_new_tokens (DAPO, arXiv 2503.14476 eq. 13)."""
    return -min(1.0, max(0.0, (length - (max_new_tokens - buffer)) / buffer)) if buffer else 0.0


def sampler_weights(old_logprobs, sampled_logprobs, mask, kind, cap):
    """Importance weight [B, T], trainer's over sampler's probability, without gradient: truncated or masked.

    Source: truncated importance sampling, as in verl's rollout correction; weights are per token.
    """
    weight = torch.where(mask, old_logprobs - sampled_logprobs, 0.0).exp()
    return (weight.clamp(max=cap) if kind == "truncate"
            else ((weight <= cap) & (weight >= 1 / cap)).to(weight.dtype))


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
    advantage: float = 0.0
    old_logprobs: torch.Tensor | None = None  # [L], as ref_logprobs
    ref_logprobs: torch.Tensor | None = None
    kl: float = 0.0  # the estimate summed over the completion, when it was sampled

    def __len__(self):
        return len(self.prompt_ids) + len(self.completion.ids)

    def row(self, step):
        """Its line in samples.csv."""
        return {"step": step, "group": self.group, "reward": self.reward,
                **{f"reward/{k}": v for k, v in self.rewards.items()}, "advantage": self.advantage,
                **rewards.answer_row(self.example, self.sample, self.completion, self.response, self.correct)}


@dataclass
class State(QuestionState):
    """What a checkpoint holds beside QuestionState's, random state, and what `run.restore` is given."""

    accumulated_reward: float = 0.0


def sample_rollouts(sampler, questions, prompt_ids, args, step, tokenizer, run):
    """G rollouts of each (group, example), group by group."""
    keys = [[noise_key(args.seed, step, group, g) for g in range(args.num_generations)]
            for group, _ in questions]
    completions = sample_all(sampler, [prompt_ids[e.id] for _, e in questions], keys, args.max_new_tokens,
                             args.temperature, run, run.counter(f"step {step}"))
    return [Rollout(example, group, g, prompt_ids[example.id], completion, completion.text(tokenizer))
            for (group, example), row in zip(questions, completions) for g, completion in enumerate(row)]


def score_rollouts(rollouts, reward_functions, args, run):
    """Fill in rewards, correct and reward; report the first reward that failed."""
    scored = rewards.score(reward_functions, [r.example for r in rollouts], [r.response for r in rollouts],
                           timeout_s=args.reward_timeout, finished=[r.completion.finished for r in rollouts])
    for i, r in enumerate(rollouts):
        r.rewards = {name: values[i] for name, values in scored["rewards"].items()}
        r.reward, r.correct = scored["total"][i], scored["correct"][i]
    if scored["error"]:
        run.print(f"step {run.state.step}: {scored['error']}")


def collect(sampler, train, prompt_ids, reward_functions, args, state, tokenizer, run):
    """This rank's scored rollouts of a step, and the groups (of all ranks) to train on.

    With dynamic sampling further questions are drawn until enough groups hold right and wrong samples (or,
    without the reward `correctness`, rewards that differ); the first prompts_per_step such groups are trained
    on, in the order of the questions whatever the number of ranks.
    """
    rollouts, mixed, drawn = [], [], 0
    while True:
        questions = dist.share(list(enumerate(state.draw(train, args.prompts_per_step, args), drawn)))
        drawn += args.prompts_per_step
        with run.phase("sample"):
            fresh = sample_rollouts(sampler, questions, prompt_ids, args, state.step, tokenizer, run)
        with run.phase("reward"):
            score_rollouts(fresh, reward_functions, args, run)
        for r in fresh if args.overlong_buffer else ():
            r.rewards["overlong"] = overlong_penalty(
                len(r.completion.ids), args.max_new_tokens, args.overlong_buffer)
            r.reward += r.rewards["overlong"]
        rollouts += fresh
        if not args.dynamic_sampling:
            return rollouts, set(range(drawn))
        scores = {g: {r.rewards.get("correctness", r.reward) for r in fresh
                      if r.group == g and not math.isnan(r.reward)} for g, _ in questions}
        mixed += sorted(itertools.chain(*dist.gather([g for g in scores if len(scores[g]) > 1])))
        if len(mixed) >= args.prompts_per_step or drawn > args.max_refills * args.prompts_per_step:
            return rollouts, set(mixed[:args.prompts_per_step])


def add_logprobs(rollouts, model, reference, args, fits, device):
    """Fill in the old log-probs, those of the reference, and the KL, which --kl-in reward subtracts."""
    ids = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
    old = ref = [torch.tensor(r.completion.logprobs) for r in rollouts]
    if args.recompute_old:
        old = fits(completion_logprobs, model, *ids, args.temperature, device=device)
    if args.beta:
        with use_adapter(model, None):
            ref = fits(completion_logprobs, reference or model, *ids, args.temperature, device=device)
    for i, r in enumerate(rollouts):
        r.old_logprobs, r.ref_logprobs = old[i], ref[i]
        r.kl = kl_estimate(old[i], ref[i], args.kl_estimator).sum().item() if args.beta else 0.0
        if args.kl_in == "reward":
            r.reward -= args.beta * r.kl


def accumulate_gradients(model, rollouts, args, n_sequences, n_tokens, tokens_per_batch, device):
    """The gradient of the step's loss over this rank's rollouts; returns token sums for the metrics."""
    model.zero_grad()  # of an attempt that ran out of memory
    sums, gap_max = Counter(), torch.zeros((), device=device)
    batches = split_by_length([len(r) for r in rollouts], tokens_per_batch)
    for rows in shard.micro_batches(model, batches, partial(token_logprobs, model)):
        batch = [rollouts[i] for i in rows]
        input_ids, cpu_mask = make_batch(
            [r.prompt_ids for r in batch], [r.completion.ids for r in batch], device)
        mask = cpu_mask.to(device)
        old = pad_logprobs([r.old_logprobs for r in batch], cpu_mask).to(device)
        sampled = pad_logprobs([r.completion.logprobs for r in batch], cpu_mask).to(device)
        advantages = torch.tensor([r.advantage for r in batch], dtype=torch.float32).to(device)
        logprobs = token_logprobs(model, input_ids, cpu_mask, args.temperature)  # [B, T]
        loss, low, high = policy_loss(
            logprobs, old, advantages, mask, ratio=args.ratio, clip=args.clip, clip_eps_low=args.clip_eps_low,
            clip_eps_high=args.clip_eps_high, dual_clip=args.dual_clip)
        if args.beta and args.kl_in == "loss":
            ref = pad_logprobs([r.ref_logprobs for r in batch], cpu_mask).to(device)
            kl = torch.where(mask, kl_estimate(logprobs, ref, args.kl_estimator), 0.0)
            loss = loss + args.beta * kl
            sums["kl"] += kl.detach().sum()
        if args.sampler_correction != "none":
            loss = loss * sampler_weights(
                old, sampled, mask, args.sampler_correction, args.sampler_correction_cap)
        weights = row_weights(args.aggregation, mask.sum(1), n_sequences, n_tokens, args.max_new_tokens)
        loss = (loss.sum(1) * weights).sum()
        loss.backward()
        gap = torch.where(mask, (logprobs.detach() - sampled).abs(), 0.0)
        gap_max = torch.maximum(gap_max, gap.max())
        sums.update(loss=loss.detach(), clip_low=low.sum(), clip_high=high.sum(), gap=gap.sum(),
                    tokens=mask.sum())
    names = "loss", "kl", "clip_low", "clip_high", "gap", "tokens"
    return {name: float(sums[name]) for name in names} | {"gap_max": gap_max.item()}


def loss_metrics(sums, rollouts, args, device):
    """Metrics of a step's update, over the tokens that all ranks have trained on."""
    gap_max = max(dist.gather(sums.pop("gap_max")))
    if args.kl_in == "reward":  # of rows that the loss leaves out, too
        sums |= {"kl": sum(r.kl for r in rollouts), "kl_tokens": sum(len(r.completion.ids) for r in rollouts)}
    sums = dist.sum_dict(sums, device)
    n_tokens = max(1, sums["tokens"])
    return {"loss": sums["loss"], "kl": sums["kl"] / max(1, sums.get("kl_tokens", n_tokens)),
            "clip_low": sums["clip_low"] / n_tokens, "clip_high": sums["clip_high"] / n_tokens,
            "sampler_gap": sums["gap"] / n_tokens, "sampler_gap/max": gap_max,
            "tokens_trained": sums["tokens"], "rows_trained": sums["rows"]}


def evaluate(sampler, questions, prompt_ids, reward_functions, args, step, tokenizer, run):
    """Held-out questions, split over the ranks: a greedy answer to each, --eval-samples more; to eval.csv."""
    rows, mine = [], dist.share(questions)
    judges = [] if questions[0].answer else reward_functions  # a gold answer needs none
    for temperature, n in ((0.0, 1), (args.eval_temperature, args.eval_samples)):
        keys = [[noise_key(args.seed, EVALUATION, e.id, g) for g in range(n)] for e in mine]
        completions = sample_all(sampler, [prompt_ids[e.id] for e in mine], keys, args.max_new_tokens,
                                 temperature, run, run.counter("evaluation"))
        rollouts = [Rollout(e, e.id, g, [], completion, completion.text(tokenizer))
                    for e, row in zip(mine, completions) for g, completion in enumerate(row)]
        score_rollouts(rollouts, judges, args, run)
        rows += [r.row(step) | {"sample": r.sample + (temperature > 0), "temperature": temperature}
                 for r in rollouts]
    run.log_evaluation(step, dist.gather_rows(rows, "id", "sample"), ks=args.eval_k)


def check(args):
    """Refuse what cannot work with this method; what no script can do, `defaults` refuses."""
    if args.num_generations < 2:
        raise ValueError(f"--num-generations {args.num_generations}: "
                         "a group of one has no mean to beat; use 2 or more")
    if args.beta and args.kl_in == "loss" and args.kl_estimator == "k1":
        raise ValueError("--kl-estimator k1 in the loss has an expected gradient of 0; "
                         "use k2 or k3, or --kl-in reward")
    if args.sampler_correction != "none" and not args.recompute_old:
        raise ValueError("--sampler-correction compares the trainer's old log-probs with the sampler's: "
                         "add --recompute-old")


def main(args: Args) -> None:
    # ---- set up: whatever can be wrong is found before the model is loaded ----
    device = dist.setup(args.device)
    args = defaults(args, device, lr={"embedded": 1e-3, "full": 1e-6, "adapter": 2e-5})
    args.recompute_old |= args.ratio == "sequence"  # whose clip is finer than bfloat16's gap
    check(args)
    dtype, tokenizer = models.choose_dtype(args.dtype, device), models.tokenizer_of(args, args.model)
    reward_functions = rewards.parse_rewards(
        args.rewards, partial(rewards.LearnedReward, dtype=dtype, device=device,
                              tokens_per_batch=args.tokens_per_batch or 8192),
        partial(rewards.AnswerProbability, tokenizer, args.max_new_tokens))
    train, held_out, prompt_ids, longest = data.load_questions(
        args, tokenizer, args.prompts_per_step, gold=rewards.need_gold(args.rewards))
    if args.download_only:
        return models.download(args.model)

    # ---- policy, reference, optimizer, sampler ----
    torch.manual_seed(args.seed)
    load_model = partial(models.load_model, args.model, torch.float32 if args.full else dtype, device,
                         longest, split=args.shard, quantize=args.quantize)
    model = load_model()
    params, adapter = trainable(model, "policy", args)
    # of the KL: with --full a copy of the start, else the base with the adapter off
    reference = load_model().requires_grad_(False) if args.full and args.beta else None
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay,
                                  **shard.optimizer_kernel(args, device))
    sampler = generic.sampler(Sampler, model, models.stop_ids(model, tokenizer, args.dry_run), args.slots,
                              dtype, StopTexts(tokenizer, args.stop, args.prompt_template, args.dry_run))
    state = State(tokens_per_batch=args.tokens_per_batch or models.tokens_that_fit(
        model, params, dtype, sampler.cache_bytes(longest)))
    fits = Fitting(state, device, smallest=longest)
    rewards.ask_policy(reward_functions, prompt_ids,
                       partial(fits, completion_logprobs, model, temperature=1.0, device=device))

    # ---- the run directory, where --resume goes on, the self-check ----
    run = Run(args, __file__, device, tags=models.run_tags(args.model, args.data))
    run.print(models.describe(args, model, params, dtype))
    run.print(f"data: {args.data}, {len(train)} questions to train on, {len(held_out)} held out, prompts "
              f"up to {longest - args.max_new_tokens} tokens; {args.prompts_per_step} x "
              f"{args.num_generations} samples a step")
    save_weights = partial(models.save_trained, model, tokenizer, adapter, args)
    run.restore(state, partial(models.load_trained, model=model, adapter=adapter), save_weights, sampler,
                optimizer=optimizer)
    autocast = partial(models.autocast, device, dtype, args.full)
    with autocast():
        run.self_check(checks.before_training(
            model, params, sampler, [prompt_ids[e.id] for e in train[:3]], args, args.temperature,
            token_logprobs, completion_logprobs, make_batch, use_adapter))
        if state.step == 0 and not args.dry_run:
            evaluate(sampler, held_out, prompt_ids, reward_functions, args, 0, tokenizer, run)

    last, stop = run.is_last(state), False
    while not (last or stop):
        state.step += 1
        with run.profile(state.step), autocast():
            # ---- sample and reward ----
            first = state.position
            sampled, groups = collect(
                sampler, train, prompt_ids, reward_functions, args, state, tokenizer, run)
            rollouts = [r for r in sampled if r.group in groups]
            with run.phase("logprobs"):
                add_logprobs(rollouts, model, reference, args, fits, device)

            # ---- advantage ----
            advantages = group_advantages(
                torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
                torch.tensor([r.group for r in rollouts], dtype=torch.int64), args.group_scaling)
            for r, advantage in zip(rollouts, advantages.tolist()):
                r.advantage = advantage
            counted = [r for r in rollouts if not math.isnan(r.reward)
                       and (r.completion.finished or not args.mask_truncated)]
            # rows of advantage 0 are skipped but stay in the denominators: the gradient is the same
            live = [r for r in counted if r.advantage or (args.beta and args.kl_in == "loss")]
            if args.dry_run:  # whose rows all run to full length and earn about the same
                counted = live = rollouts
            counts = dist.sum_dict({"sequences": len(counted),
                                    "tokens": sum(len(r.completion.ids) for r in counted),
                                    "broken": sum(math.isnan(sum(r.completion.logprobs)) for r in sampled)},
                                   device)

            # ---- update ----
            with run.phase("update"):
                for update in range(args.updates_per_batch):
                    sums = fits(accumulate_gradients, model, live, args, counts["sequences"],
                                counts["tokens"], device=device)
                    first_sums = sums if update == 0 else first_sums
                    dist.sum_gradients(params)
                    norm = shard.clip_gradients(params, args.max_grad_norm)
                    optimizer.param_groups[0]["lr"] = learning_rate(state.step, args)
                    run.take_step(norm, optimizer, finite=not counts["broken"])

        # ---- log ----
        metrics = run.log_rollouts(state, [r.row(state.step) for r in sampled], {
            **loss_metrics(first_sums | {"rows": len(live)}, rollouts, args, device),
            "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
            "questions_drawn": state.position - first, "tokens_per_batch": state.tokens_per_batch,
            **state.open_next(train, [(r.example.level, r.correct) for r in sampled], args, run)},
            show=("reward", "correct", "tokens", "kl", "sampler_gap", "grad_norm"))
        last = run.is_last(state)
        if args.dry_run:
            break

        # ---- evaluate ----
        if state.step % args.eval_every == 0 or last:
            with autocast():
                evaluate(sampler, held_out, prompt_ids, reward_functions, args, state.step, tokenizer, run)

        # ---- save ----
        stop = run.save(due=state.step % args.save_every == 0 or last)

    # ---- the end ----
    if args.dry_run:
        return run.dry_run_report(metrics, args.max_steps, metrics["tokens_trained"])
    if last:
        run.save_final(partial(models.save_plain, model, tokenizer, merged_state_dict(model)) if args.merge
                       else save_weights)
        run.before_after()
    run.finish()


# ----------------------------------------------------------------------------------------------------------
# Shared blocks, word for word in every script that has them (tests/test_copies.py): LoRA, log-probs, sampler


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


def lora_modules(model) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


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


def enable_checkpointing(model) -> None:
    """Recompute each layer in the backward pass, with the adapter of its forward, not one active by then."""

    def contexts():
        active = next((module.active for module in lora_modules(model).values() if module.active), None)
        return nullcontext(), use_adapter(model, active)

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def adapter_tensors(model, name: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of adapter `name` by its layer's path: what `models.save_adapter` and `load_adapter` take."""
    return {path: (module.A[name], module.B[name])
            for path, module in lora_modules(model).items() if name in module.A}


def trainable(model, name: str, args):
    """(the parameters to train, the tensors of adapter `name`): all weights and None with --full."""
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    if args.full:
        return [p.requires_grad_() for p in model.parameters()], None
    params = add_lora(model, name, args.lora_r, args.lora_alpha, args.lora_targets,
                      models.layer_range(args.train_layers, model))
    return params, adapter_tensors(model, name)


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


class TokenLogprobs(torch.autograd.Function):
    """Log-probs of given tokens from hidden states, a chunk of tokens at a time: [N, V] never exists.

    The slope of a log-prob by its own hidden state is known in the forward pass: W[token] - sum_v p_v W[v],
    over the temperature. With a frozen `lm_head` that [N, D] is kept and the backward pass is one product
    with the incoming gradient; a trainable one needs the probabilities again: each chunk is recomputed, and
    its gradient is summed in the weight's own dtype (float32), whatever the products' is.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, *settings):
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        head, logprobs = weight.to(hidden.dtype), hidden.new_empty(len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if hidden_grad and not weight_grad else None
        for piece, values, negative in logprob_chunks(hidden, head, targets, *settings):
            logprobs[piece] = values
            if slope is not None:
                slope[piece] = negative.to(head.dtype) @ head
        ctx.save_for_backward(*((hidden, weight, targets) if weight_grad else (slope,)))
        ctx.settings = settings
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        grad = grad[:, None] / -ctx.settings[0]  # the temperature
        if len(ctx.saved_tensors) == 1:
            slope = ctx.saved_tensors[0]
            return (grad * slope).to(slope.dtype), *[None] * 5
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for piece, _, negative in logprob_chunks(hidden, head, targets, *ctx.settings):
            slope = negative.mul_(grad[piece]).to(head.dtype)
            hidden_grad[piece] = slope @ head
            weight_grad += slope.T @ hidden[piece]
        return hidden_grad, weight_grad, *[None] * 4


def logprob_chunks(hidden, head, targets, temperature, softcap, chunk_tokens):
    """By chunks: the slice of tokens, their log-probs [n], and -temperature d log-prob / d logits [n, V].

    All float32 and in place, until the next chunk: each pass over [n, V] costs as much as the products.
    """
    buffer = hidden.new_empty(min(chunk_tokens, len(hidden)), len(head), dtype=torch.float32)
    for i in range(0, len(hidden), chunk_tokens):
        piece = slice(i, i + chunk_tokens)
        logits = models.head_logits(hidden[piece], head, buffer[:len(hidden) - i])
        if softcap:
            logits.div_(softcap).tanh_()
            cap_slope = 1 - logits**2
            logits.mul_(softcap)
        if temperature != 1:
            logits.div_(temperature)
        (top, at), tokens = logits.max(1, keepdim=True), targets[piece, None]
        chosen = logits.gather(1, tokens)
        probs = torch.softmax(logits, 1, out=logits)
        log_sum = top - probs.gather(1, at).log()  # the largest probability is never 0
        negative = probs.scatter_add_(1, tokens, torch.full_like(chosen, -1.0))
        yield piece, (chosen - log_sum).squeeze(1), negative.mul_(cap_slope) if softcap else negative


def token_logprobs(model, input_ids, completion_mask, temperature=1.0, attention_mask=None, chunk_tokens=0):
    """Log-prob of each completion token given all before it, as the sampler at `temperature` sees it.

    Shapes: input_ids, completion_mask [B, T] -> [B, T], float32, nats, 0 outside the mask. Entry t belongs to
    token t: this is the one place that shifts. Right-padded rows need no attention_mask (a causal model
    never looks at what follows); left-padded rows pass theirs, [B, T], and positions count real tokens only.
    A row's first token has nothing before it and stays 0. A completion_mask on the CPU spares a CUDA sync.
    """
    if not models.is_fast(model):
        return generic.token_logprobs(model, input_ids, completion_mask, temperature, attention_mask)
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


def make_batch(prompt_ids, completion_ids, device):
    """Right-padded input_ids [B, T] on the device and completion_mask [B, T] on the CPU.

    The mask comes from the lengths: an end token that is also the padding token stays in it.
    """
    pad, rows = partial(nn.utils.rnn.pad_sequence, batch_first=True), list(zip(prompt_ids, completion_ids))
    input_ids = pad([torch.tensor(p + c) for p, c in rows])
    mask = pad([torch.arange(len(p) + len(c)) >= len(p) for p, c in rows])
    return input_ids.to(device, non_blocking=True), mask


def pad_logprobs(values, mask):
    """Each row's [L] values at the places of its completion in a [B, T] tensor."""
    values = torch.cat([torch.as_tensor(value, dtype=torch.float32) for value in values])
    return torch.zeros(mask.shape).masked_scatter(mask, values)


@torch.no_grad()
def completion_logprobs(model, prompt_ids, completion_ids, temperature, tokens_per_batch, device):
    """Log-probs [L] of each row's completion under the model as it stands, a list in the rows' order."""
    values = [None] * len(prompt_ids)
    batches = split_by_length([len(p) + len(c) for p, c in zip(prompt_ids, completion_ids)], tokens_per_batch)
    for rows in shard.micro_batches(model, batches, partial(token_logprobs, model)):
        input_ids, mask = make_batch([prompt_ids[i] for i in rows], [completion_ids[i] for i in rows], device)
        logprobs = token_logprobs(model, input_ids, mask, temperature)
        for i, row, of_row in zip(rows, logprobs.cpu(), mask):
            values[i] = row[of_row]
    return values


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


class FusedLinear:
    """Projections of one input as one product, for the sampler: `weight` [out, in] holds theirs stacked.

    In float32 the active adapters are merged into it, a copy. In bfloat16, where a merge would round small
    updates away, they stay apart: A [R, in] lies under W, so that one product gives both, B [out, R] is
    block-diagonal; the modules' weights become views of `weight`: no second copy. `refresh` writes in place:
    a captured graph sees the new values. Weights that cannot be stacked, in 4 bits or split over ranks, stay
    where they are: `apart`, the modules are called one after the other.
    """

    def __init__(self, parts, dtype):
        self.parts, self.bases = parts, [getattr(part, "base", part) for part in parts]
        first, adapters = self.bases[0], [part.A for part in parts if isinstance(part, LoRALinear)]
        self.apart = hasattr(first.weight, "quant_state") or shard.is_split(first.weight)
        if self.apart:
            return
        self.merge = bool(adapters) and dtype == torch.float32
        self.shared = not self.merge and first.weight.dtype == dtype
        # of any adapter that is made active
        self.rank = 0 if self.merge else sum(max(map(len, A.values())) for A in adapters)
        weights = [base.weight.detach() for base in self.bases]
        self.weight = torch.cat([*weights, first.weight.new_zeros(self.rank, first.in_features)]).to(dtype)
        if self.merge:  # a copy may lie in memory as [in, out]: CPUs multiply few rows by it faster
            self.weight = self.weight.T.contiguous().T
        *self.rows, self.A = self.weight.split([*map(len, weights), self.rank])  # each part's own, views
        if self.shared:
            for base, rows in zip(self.bases, self.rows):
                base.weight.data = rows
        self.B = self.weight.new_zeros(len(self.weight) - self.rank, self.rank)
        self.bias = None if first.bias is None else self.weight.new_zeros(len(self.weight))

    @torch.no_grad()
    def refresh(self):
        """Take over the present weights, biases and active adapters of the modules."""
        if self.apart:
            self.weight = self.bases[0].weight  # the head's is read
            return
        if self.bias is not None:
            self.bias[:len(self.B)] = torch.cat([base.bias for base in self.bases])
        self.B.zero_()
        out = rank = 0
        for part, base, rows in zip(self.parts, self.bases, self.rows):
            if not self.shared:
                rows.copy_(base.weight)
            if active := getattr(part, "active", None):
                A, B, scale = part.A[active], part.B[active], part.scale[active]
                if self.merge:
                    rows.addmm_(B, A, alpha=scale)
                else:
                    self.A[rank:rank + len(A)] = A
                    self.B[out:out + len(B), rank:rank + len(A)] = scale * B
                    rank += len(A)
            out += len(rows)

    def __call__(self, x):
        if self.apart:
            return torch.cat([part(x) for part in self.parts], -1)
        y = F.linear(x, self.weight, self.bias)
        if not self.rank:
            return y
        y, low_rank = y.split([len(self.B), self.rank], -1)
        return y.addmm_(low_rank, self.B.T)


class SamplerLayer:
    """One decoder layer of the Llama family, written out for one token of each row: x [N, D] -> [N, D].

    Covers grouped-query attention, q/k norms (Qwen3), norms around blocks and (1 + weight) norms (Gemma).
    """

    def __init__(self, layer, dtype):
        attn, mlp = layer.self_attn, layer.mlp
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
        self.kernels = models.decode_kernels(self, dtype, self.attn_norm.weight.device)

    def refresh(self):
        for part in (self.qkv, self.out, self.gate_up, self.down):
            part.refresh()

    def __call__(self, x, y, cache, *where):
        """x, y -> x, y [N, D]: the residual stream, and the last block's output that is not yet added to it.

        cache: keys and values [2, slots, Hkv, length, K]; where: as `attend` takes it.
        """
        x, normed = self.add_norm(x, y, self.attn_norm)
        qkv = self.qkv(normed).view(len(x), -1, self.head_dim)  # [N, H + 2 Hkv, K]
        if self.q_norm:
            q, k = qkv[:, :self.heads], qkv[:, self.heads:-self.kv_heads]
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        y = self.out(self.attend(qkv, cache, *where))
        x, normed = self.add_norm(x, self.attn_out_norm(y) if self.attn_out_norm else y, self.mlp_norm)
        y = self.down(self.swiglu(self.gate_up(normed)))
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

    def attend(self, qkv, cache, rows, positions, cos, sin, bias):
        """Turn q and k by their positions (RoFormer, arXiv 2104.09864 eq. 34), keep k and v: -> [N, H K].

        cos, sin: of all positions for the kernels, else [N, 1, K], sine signed as the rotated half; bias
        [N, 1, 1, S] on scores, 0 or -inf: the S first columns of the cache are read.
        """
        if self.kernels:
            return self.kernels.attend(qkv, cos, sin, positions, *cache, self.scale)
        n, Hkv, K, qk = len(qkv), self.kv_heads, self.head_dim, qkv[:, :-self.kv_heads]
        torch.addcmul(qk * cos, qk.roll(K // 2, -1), sin, out=qk)
        cache[:, rows, :, positions] = qkv[:, -2 * Hkv:].view(n, 2, Hkv, K)
        q = qkv[:, :self.heads].view(n, Hkv, -1, K)  # heads of one key: as queries
        k, v = cache[:, :n, :, :bias.shape[-1]]
        if q.is_cuda and not self.softcap:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale).reshape(n, -1)
        scores = (q * self.scale) @ k.transpose(-1, -2)  # CPU: two plain products beat the fused kernel here
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return (scores.add_(bias).softmax(-1, dtype=torch.float32).to(q.dtype) @ v).reshape(n, -1)


class Sampler:
    """Samples completions by continuous batching in a static KV cache of `slots` rows, one token a step each.

    The state of a row is on the device: token ids, log-probs and noise by position, the position of its last
    token and that of its end. A row that has ended stands still; when the host looks, every `sync_every`
    steps, the last live rows move into the slots of those that ended, so that the live ones are always the
    first, and waiting rows come in behind them. A prompt is prefilled by the model's own pass, once for the
    samples of it that begin together. Attention reads the cache up to the longest live row, in blocks, or, by
    the kernels for CUDA, each row's own keys. There a step is a captured graph for each block of rows.
    """

    def __init__(self, model, stop_ids, slots=256, dtype=None, stop_texts=None, sync_every=None, graphs=None):
        self.model, self.stop_ids, self.stop_texts, self.slots = model, set(stop_ids), stop_texts, slots
        head = model.get_output_embeddings()
        self.device, self.dtype = head.weight.device, dtype or head.weight.dtype
        on_gpu = self.device.type == "cuda"
        self.sync_every = sync_every or (8 if on_gpu else 1)
        self.block, self.row_block = (256, 32) if on_gpu else (16, 1)
        self.layers = [SamplerLayer(layer, self.dtype) for layer in model.base_model.layers]
        self.head = FusedLinear([head], self.dtype)
        self.kernels = self.layers[0].kernels
        self.use_graphs = (on_gpu if graphs is None else graphs) and not self.layers[0].qkv.apart
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.cache, self.graphs = None, {}

    def cache_bytes(self, length):
        """What the keys and values of all slots take, for prompts and completions of `length` tokens."""
        columns, layer = length + 1 + self.block, self.layers[0]
        return (2 * len(self.layers) * self.slots * layer.kv_heads * columns * layer.head_dim
                * self.dtype.itemsize)

    def _allocate(self, rows, length):
        """Make cache and state large enough for so many rows, in whole row blocks, of `length` tokens."""
        slots = min(self.slots, math.ceil(rows / self.row_block) * self.row_block)
        if self.cache is not None and slots <= len(self.ids) <= self.slots and length < self.ids.shape[1]:
            return
        self.cache = self.graphs = self.pool = None  # free the old ones before the new are made
        columns, new = math.ceil((length + 1) / self.block) * self.block, partial(
            torch.zeros, device=self.device)
        self.cache = new(len(self.layers), 2, slots, self.layers[0].kv_heads, columns,
                         self.layers[0].head_dim, dtype=self.dtype)
        self.ids = new(slots, columns, dtype=torch.int64)
        self.logprobs, self.noise = new(slots, columns), new(slots, columns)
        self.state = new(2, slots, dtype=torch.int64)
        self.positions, self.ends = self.state
        self.rows, self.columns = (torch.arange(n, device=self.device) for n in (slots, columns))
        self.stops, self.graphs = new(len(self.head.weight), dtype=torch.bool), {}
        cos, sin = self.model.base_model.rotary_emb(self.cache, self.columns[None])  # [1, columns, K]
        self.cos, self.sin = cos[0, :, None], sin[0, :, None].clone()
        self.sin[..., :sin.shape[-1] // 2].neg_()

    def _logits(self, hidden):
        logits = models.head_logits(hidden.to(self.dtype), self.head.weight.to(self.dtype))
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def _append(self, rows, logits, temperature):
        """Draw a token for each of the slots `rows`, a slice; in place, as all in a step: graph-safe.

        A row that has ended draws as well, but does not move on: its token is not read.
        """
        positions, ends = self.positions[rows], self.ends[rows]
        at = positions[:, None] + 1
        tokens, logprobs = draw(logits, temperature, self.noise[rows].gather(1, at).squeeze(1))
        self.ids[rows].scatter_(1, at, tokens[:, None])
        self.logprobs[rows].scatter_(1, at, logprobs[:, None])
        positions += positions < ends
        torch.where(self.stops[tokens], positions, ends, out=ends)

    def _decode(self, n, length, temperature):
        """One token for each of the first n slots, reading `length` columns of the cache."""
        positions, cos, sin, bias = self.positions[:n], self.cos, self.sin, None
        ids = self.ids[:n].gather(1, positions[:, None]).squeeze(1)
        x = self.model.get_input_embeddings()(ids).to(self.dtype)  # [n, D]
        y = torch.zeros_like(x)
        if not self.kernels:
            cos, sin, ahead = cos[positions], sin[positions], self.columns[:length] > positions[:, None]
            bias = torch.where(ahead, -torch.inf, 0.0).to(self.dtype)[:, None, None]
        for layer, cache in zip(self.layers, self.cache):
            x, y = layer(x, y, cache, self.rows[:n], positions, cos, sin, bias)
        self._append(slice(n), self._logits(self.model.base_model.norm(x + y)), temperature)

    def _run(self, n, length, temperature):
        """`sync_every` times `_decode`, from a graph where there is one."""
        key = n, length, temperature
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

    def _admit(self, first, prompts, keys, max_new_tokens, temperature):
        """Prefill the prompts; each key of each begins a row, from slot `first` on, by its first token."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        lasts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        which, keys = torch.tensor([(p, key) for p, row in enumerate(keys) for key in row],
                                   device=self.device).T  # prompt and noise key of each row
        with models.not_training(self.model):
            output = self.model.base_model(input_ids=ids.to(self.device), use_cache=True)
        rows, T = slice(first, first + len(which)), ids.shape[1]
        for cache, layer in zip(self.cache, output.past_key_values.layers):
            cache[0, rows, :, :T] = layer.keys.index_select(0, which)
            cache[1, rows, :, :T] = layer.values.index_select(0, which)
        self.noise[rows] = uniform(keys[:, None], self.columns)
        self.positions[rows], self.ends[rows] = lasts[which], lasts[which] + max_new_tokens
        logits = self._logits(output.last_hidden_state[self.rows[:len(prompts)], lasts])
        self._append(rows, logits[which], temperature)

    def _leave(self, ended, live, positions):
        """Ids and log-probs of the rows that ended, by position; the last live rows move into their slots."""
        slots = torch.tensor(ended, device=self.device)
        rows = self.ids[slots].cpu(), self.logprobs[slots].cpu()
        n = len(live) - len(ended)
        for slot, start in zip(ended, [slot for slot in range(n, len(live)) if slot not in ended]):
            filled = positions[start] + 1
            self.cache[:, :, slot, :, :filled] = self.cache[:, :, start, :, :filled]
            for of_rows in (self.ids, self.logprobs, self.noise, self.state.T):
                of_rows[slot] = of_rows[start]
            live[slot] = live[start]
        self.state[:, n:] = 0  # a free slot inside the row block still steps: at the first position
        del live[n:]
        return rows

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
        done = [[None] * len(row) for row in keys]
        waiting = deque((p, g) for p, row in enumerate(keys) for g in range(len(row)))
        if not waiting:
            return done
        total, live, longest = len(waiting), [], 0  # live: (p, g) of the first slots; longest: its positions
        for part in (*self.layers, self.head):
            part.refresh()
        self._allocate(total, max(map(len, prompts)) + max_new_tokens)
        self.state.zero_()
        self.stops.zero_()[[token for token in self.stop_ids if token < len(self.stops)]] = True
        slots, columns = self.ids.shape
        at_once = max(1, 16384 // max(map(len, prompts)))  # prompts to prefill in one pass
        while waiting or live:
            if waiting and slots - len(live) >= max(1, min(slots // 4, len(waiting))):
                first, new = len(live), {}  # new: the keys of each prompt
                while waiting and len(live) < slots and (len(new) < at_once or waiting[0][0] in new):
                    p, g = waiting.popleft()
                    new.setdefault(p, []).append(keys[p][g])
                    live.append((p, g))
                self._admit(first, [prompts[p] for p in new], new.values(), max_new_tokens, temperature)
            else:
                n = min(slots, math.ceil(len(live) / self.row_block) * self.row_block)
                length = math.ceil((longest + 1 + self.sync_every) / self.block) * self.block
                self._run(n, columns if self.kernels else min(columns, length), temperature)
            positions, ends = self.state[:, :len(live)].tolist()  # the host looks
            if self.stop_texts:
                for slot in self.stop_texts.found(self.ids, positions, prompts, live, self.sync_every):
                    ends[slot] = positions[slot]
            ended = [slot for slot, end in enumerate(ends) if positions[slot] == end]
            longest = max((at for at, end in zip(positions, ends) if at < end), default=0)
            if not ended:
                continue
            left = [live[slot] for slot in ended]
            for slot, (p, g), ids, logprobs in zip(ended, left, *self._leave(ended, live, positions)):
                row = slice(len(prompts[p]), positions[slot] + 1)
                ids, logprobs = ids[row].tolist(), logprobs[row].tolist()
                n, cut = self.stop_texts.end(ids) if self.stop_texts else (None, None)
                finished = cut is not None or ids[-1] in self.stop_ids
                done[p][g] = Completion(ids[:n], logprobs[:n], finished, cut)
            if progress:
                progress(total - len(waiting) - len(live), total, [(p, g, done[p][g]) for p, g in left])
        return done


def sample_all(sampler, prompt_ids, keys, max_new_tokens, temperature, run, progress):
    """`Sampler.sample` on all ranks; memory that runs out on one of them halves the slots of all."""
    most_rows = max(dist.gather(sum(map(len, keys))))  # of a rank: only fewer slots save memory
    if not most_rows:
        return [[] for _ in keys]

    def attempt(slots):
        if slots < min(sampler.slots, most_rows):
            sampler.slots, sampler.cache, sampler.graphs = slots, None, {}
        return sampler.sample(prompt_ids, keys, max_new_tokens, temperature, progress)

    with shard.whole_model(sampler.model):
        return retry_smaller(attempt, min(sampler.slots, most_rows), run.device, 1, "slots")[0]


def learning_rate(step, args):
    """Rate of step 1, 2, ...: linear warm-up to args.lr, then constant or linear/cosine to 0 past the end."""
    if step < args.warmup_steps:
        return args.lr * step / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps + 1)
    return args.lr * {"constant": 1.0, "linear": 1 - done,
                      "cosine": (1 + math.cos(math.pi * done)) / 2}[args.lr_schedule]


if __name__ == "__main__":
    cli(main, Args)
