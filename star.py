"""STaR: sample answers with their reasoning, keep those that are right, train on them, and begin again.

    iteration n:  z, y ~ M_{n-1}(. | x), kept where y is right; where none is, z, y ~ M_{n-1}(. | x, hint)
                  M_n = M_0 trained to give z, y for x, without the hint

Paper: STaR, arXiv 2203.14465, algorithm 1. Differs from it in:
  - an iteration takes the next --questions questions, not all there are;
  - a question gives at most --per-question answers, of which equal ones count once;
  - explaining a failed question from its answer (--rationalize) is a switch; such an answer counts only if it
    has a rationale and does not quote the hint;
  - --restart previous trains M_n from M_{n-1}, with its optimizer, and not from M_0: so by default where
    wrong answers are pushed down, which M_0 would not have given (--strategy reinforce and dpo);
  - --strategy: reinforce trains all samples, weighed by their centred reward; dpo right against wrong ones
    (arXiv 2305.18290); soft all rationales with the gold answer, weighed by exp(r) / sum exp(r).

    python star.py                                                   # the embedded model, on two CPU cores
    python star.py --model Qwen/Qwen2.5-3B-Instruct --rationalize    # GSM8K on one GPU
    python star.py --model Qwen/Qwen2.5-3B-Instruct --data mmmlu/YO_NG --strategy dpo
    python star.py --generations runs/a/samples.csv runs/b/samples.csv --iterations 1
    torchrun --nproc-per-node 8 star.py --model Qwen/Qwen2.5-3B-Instruct
"""

import copy
import hashlib
import itertools
import math
from collections import Counter, deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, models, rewards, shard
from common.data import HINT
from common.run import Fitting, Run, RunArgs, check_args, cli, retry_smaller

# Shapes: B rows, T tokens, V vocabulary, P prompts, G samples per prompt, D hidden size, H heads, K head
# size, R LoRA rank, N rows or tokens in all.


@dataclass
class Args(RunArgs):
    # ---- run ----
    max_steps: int = 0  # steps in all; 0: what the passes over the data make
    # end with the step or iteration in which so many tokens have been sampled for training; 0: no limit
    token_budget: int = 0
    # steps between checkpoints (one is always written at the end, and on SIGTERM or Ctrl-C)
    save_every: int = 50
    keep: int = 2  # newest checkpoints to keep
    profile: int = 0  # steps to trace with torch.profiler, from the first on

    # ---- data ----

    # data set name, hub id, or local .jsonl/.csv/.parquet; empty: arithmetic (embedded model), else gsm8k
    data: str = ""
    # runs' samples.csv, united: the first iteration's answers, in place of sampling
    generations: tuple[str, ...] = ()
    # runs' samples.csv, united: evaluate by loss and ranking of these, in place of held-out questions
    eval_generations: tuple[str, ...] = ()
    level: str = ""  # difficulty of a generated task, such as 3 or 1-4; empty: the task's own default
    train_questions: int = 0  # questions to train on; 0: all that are not held out
    # questions held out of the training split for evaluation (never the official test split)
    eval_questions: int = 500
    # worked examples before each question while the first iteration samples; never trained, nor evaluated
    few_shot: int = 0
    # system message, or none; empty: asks for the <think>/<answer> format (embedded model: none)
    system: str = ""
    prompt_template: str = "{prompt}"  # text around the question, {prompt} in it
    max_prompt_tokens: int = 0  # leave out questions with a longer prompt; 0: none

    # ---- model ----
    model: str = ""  # hub id, local folder or run directory; empty: the embedded model
    # of the frozen weights and the computation; auto: bfloat16 on CUDA, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    full: bool = False  # train all weights (kept in float32) instead of an adapter
    # keep the frozen decoder layers in 4 bits (bitsandbytes; QLoRA, arXiv 2305.14314)
    quantize: Literal["none", "nf4"] = "none"
    # recompute the layers in the backward pass: less memory, about a third more time
    gradient_checkpointing: bool = False
    # split the weights over the ranks of torchrun (FSDP2): the frozen base, or with --full all there is
    shard: bool = False
    # with --shard, gather them layer by layer while sampling too: slower, for what one GPU cannot hold
    reshard: bool = False
    # padded tokens per forward and backward pass and GPU, halved if out of memory; 0: what fits, CPU 2048
    tokens_per_batch: int = 0

    # ---- LoRA ----
    lora_r: int = 32  # rank
    lora_alpha: float = 64  # the adapter's output is scaled by lora_alpha / lora_r
    lora_targets: tuple[str, ...] = models.PROJECTIONS  # linear layers to adapt
    train_layers: str = ""  # decoder layers to adapt, such as 20-27; empty: all
    merge: bool = False  # write final/ as a plain model with the adapter merged in, not as an adapter

    # ---- sampling ----
    questions: int = 256  # questions to sample answers to, in each iteration
    num_generations: int = 4  # G, samples per question
    max_new_tokens: int = 512  # longest completion; a longer one counts as truncated
    slots: int = 256  # rows sampled at a time per rank; halved when memory runs out
    sample_temperature: float = 1.0  # of the samples to learn from (the log-probs are those of temperature 1)

    # ---- method ----

    # with weights: correctness, format, digit, mark, math, answer-prob, model:RUN, or your file.py:name=1
    rewards: tuple[str, ...] = ("correctness=1",)
    # seconds that a call of a reward of your own may take; its row is left out and counted
    reward_timeout: float = 30.0
    batch_size: int = 64  # rows per step, over all ranks
    iterations: int = 3  # rounds of sampling from the present policy and training on what was kept
    # likelihood of right answers; of all, by centred reward; right against wrong; of all, by exp(reward)
    strategy: Literal["sft", "reinforce", "dpo", "soft"] = "sft"
    # train an iteration from the start model (STaR) or the one before; auto: base with sft and soft
    restart: Literal["auto", "base", "previous"] = "auto"
    # ask again, with the answer as a hint, where no sample was right (--strategy sft and dpo)
    rationalize: bool = False
    # how: {prompt} and {answer} in it; or mark: (CORRECT) behind the right option of a choice
    hint: str = HINT
    per_question: int = 4  # most rows that one question gives (--strategy sft and dpo); 0: no limit
    epochs: float = 1.5  # passes over an iteration's rows; 0: sample and evaluate only
    # optimizer steps of the first iteration, in place of --epochs; 0: by --epochs (STaR: 40)
    first_steps: int = 0
    # each iteration makes so many times the steps or passes of the one before (STaR: 1.2)
    step_growth: float = 1.0
    beta: float = 0.1  # pull to the model that the iteration started from, with --strategy dpo

    # ---- optimizer ----

    # AdamW's peak learning rate; 0: by the kind of model and training (`resolve`), printed at the start
    lr: float = 0.0
    warmup_steps: int = 5  # steps of linear warm-up
    weight_decay: float = 0.0  # AdamW's decoupled decay
    max_grad_norm: float = 1.0  # clip the gradient's norm to this

    # ---- evaluation ----

    # steps between further evaluations; one before the first step and one after each iteration are made
    eval_every: int = 0


@dataclass
class Sample:
    """An answer to a question: sampled, sampled with the hint (rationalized), or read from --generations."""

    question: int  # its place in the iteration, the same on every rank
    number: int  # among the question's answers
    example: data.Example
    completion: "Completion"
    response: str  # the text up to the stop token
    source: str = "sampled"
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0  # weighted sum; NaN where a reward function failed
    correct: float = 0.0


@dataclass
class Row:
    """What a step learns from: an answer to a prompt and its weight, or (dpo) a better and a worse answer."""

    prompt_ids: list[int]
    chosen: list[int]
    rejected: list[int] = field(default_factory=list)
    weight: float = 1.0
    ref_chosen: float = math.nan  # summed log-probs under the model that the iteration starts from
    ref_rejected: float = math.nan

    def __len__(self):  # padded tokens, both answers of a pair
        longer = max(len(self.chosen), len(self.rejected))
        return (len(self.prompt_ids) + longer) * (2 if self.rejected else 1)


def training_rows(samples, prompt_ids, args, tokenizer, strategy):
    """The Rows that an iteration's Samples of all questions make, question by question.

    "sft" right answers, "dpo" right against wrong ones of the same question, none used twice: finished, equal
    ones once, at most --per-question. "reinforce" every sample whose reward differs from the mean of
    the question's others, that difference as its weight. "soft" every sample's rationale, closed by the gold
    answer, with the weight exp(r) / sum exp(r) over the question: with r = log p(answer | rationale) the
    chance that this rationale, of those sampled, was the one that led to the answer (EM's E-step).
    """
    rows = []
    for _, of in itertools.groupby(samples, key=lambda s: s.question):
        of = list(of)
        prompt, once = prompt_ids[of[0].example.id], {}
        for s in of:
            if s.completion.finished:
                once.setdefault(tuple(s.completion.ids), s)
        right = [s.completion.ids for s in once.values() if s.correct]
        wrong = [s.completion.ids for s in once.values() if not s.correct]
        known = [s for s in of if not math.isnan(s.reward)]
        if strategy == "sft":
            rows += [Row(prompt, ids) for ids in right[:args.per_question or None]]
        elif strategy == "dpo":
            rows += [Row(prompt, *pair) for pair in list(zip(right, wrong))[:args.per_question or None]]
        elif strategy == "reinforce":
            weights = rewards.leave_one_out([s.reward for s in known], [0] * len(known))
            rows += [Row(prompt, s.completion.ids, weight=w) for s, w in zip(known, weights) if w]
        else:
            weights = torch.softmax(torch.tensor([s.reward for s in known], dtype=torch.float64), 0).tolist()
            for s, w in zip(known, weights):
                parts = rewards.answered(tokenizer, s.response, s.example.answer, args.max_new_tokens)
                rows.append(Row(prompt, [*parts[0], *parts[1], tokenizer.eos_token_id], weight=w))
    return rows


def with_hint(prompt, answer, form):
    """The question with its answer as a hint: `form` around its (last) message, or "mark", as `Args.hint`.

    Errors: ValueError if an option is to be marked where there is none.
    """
    if not isinstance(prompt, str):
        return [*prompt[:-1], prompt[-1] | {"content": with_hint(prompt[-1]["content"], answer, form)}]
    if form != "mark":
        return form.replace("{answer}", answer).replace("{prompt}", prompt)
    lines = prompt.split("\n")
    at = [i for i, line in enumerate(lines) if line.startswith(f"{answer}) ")]
    if not at:
        raise ValueError(f"--hint mark: {prompt[:60]!r} has no option {answer}; write a hint with {{answer}}")
    lines[at[-1]] += " (CORRECT)"
    return "\n".join(lines)


def explains(response, answer, form):
    """Whether a right answer to a hinted question may teach: it has a rationale, which quotes no hint."""
    before = rewards.rationale(response)
    parts = ["(CORRECT)"] if form == "mark" else form.replace("{answer}", answer).split("{prompt}")
    quotes = any(part.strip() in before for part in parts if part.strip() not in ("", answer))
    return bool(before) and not quotes


def ask(sampler, questions, prompts, reward_functions, args, iteration, tokenizer, run, source="sampled"):
    """--num-generations scored Samples of each (place, example), asked as `prompts`; a reward's error."""
    G = args.num_generations
    first = 0 if source == "sampled" else G  # a hinted answer is one more, with noise of its own
    keys = [[noise_key(args.seed, iteration, i, first + g) for g in range(G)] for i, _ in questions]
    completions = sample_all(sampler, prompts, keys, args.max_new_tokens, args.sample_temperature, run,
                             f"iteration {iteration}")
    samples = [Sample(i, first + g, e, c, c.text(tokenizer), source)
               for (i, e), row in zip(questions, completions) for g, c in enumerate(row)]
    return samples, score_samples(samples, reward_functions, args)


def score_samples(samples, reward_functions, args):
    """Fill in rewards, reward and correct. Returns a line on the first failed reward, or ""."""
    scored = rewards.score(reward_functions, [s.example for s in samples], [s.response for s in samples],
                           timeout_s=args.reward_timeout)
    right = scored["rewards"].get("math", scored["correct"])  # LaTeX; NaN where it hung: not right
    for i, s in enumerate(samples):
        s.rewards = {name: values[i] for name, values in scored["rewards"].items()}
        s.reward = scored["total"][i]
        if s.source != "loaded":  # whose own run has judged it, perhaps by other means
            s.correct = float(right[i] == 1)
    return scored["error"]


def sample_iteration(sampler, questions, encode, reward_functions, args, iteration, step, tokenizer, run):
    """(Samples of an iteration, of all ranks, which go to samples.csv; counts: tokens, hinted, unexplained).

    encode(example, iteration, hinted) makes the prompt; samples.csv has the question alone in its place, and
    of the answers with a hint those that teach; unexplained: right, but without a rationale of their own.
    """
    mine = dist.share(list(enumerate(questions)))
    ask_all = partial(ask, sampler, reward_functions=reward_functions, args=args, iteration=iteration,
                      tokenizer=tokenizer, run=run)
    samples, error = ask_all(mine, [encode(e, iteration) for _, e in mine])
    counts = {"tokens": sum(len(s.completion.ids) for s in samples), "hinted": 0, "unexplained": 0}
    if args.rationalize and not args.dry_run:
        solved = {s.question for s in samples if s.correct and s.completion.finished}
        failed = [(i, e) for i, e in mine if i not in solved]
        hinted, problem = ask_all(failed, [encode(e, iteration, hinted=True) for _, e in failed],
                                  source="rationalized")
        right = [s for s in hinted if s.correct and s.completion.finished]
        kept = [s for s in right if explains(s.response, s.example.answer, args.hint)]
        counts = {"tokens": counts["tokens"] + sum(len(s.completion.ids) for s in hinted),
                  "hinted": len(failed), "unexplained": len(right) - len(kept)}
        samples, error = samples + kept, error or problem
    if error:
        run.print(f"iteration {iteration}: {error}")
    rows = [{"step": step, "iteration": iteration, "source": s.source, "reward": s.reward,
             **{f"reward/{name}": value for name, value in s.rewards.items()},
             **rewards.answer_row(s.example, s.number, s.completion, s.response, s.correct),
             "seed": args.seed} for s in samples]
    samples, rows = gather_samples(samples, rows)
    run.write_rows(rows)
    return samples, {name: int(n) for name, n in dist.sum_dict(counts, run.device).items()}


def gather_samples(samples, rows):
    """The Samples of all ranks, and a row of each, question by question."""
    found = sorted(itertools.chain(*dist.gather(list(zip(samples, rows)))),
                   key=lambda pair: (pair[0].question, pair[0].number))
    return [s for s, _ in found], [row for _, row in found]


def iteration_metrics(samples, counts, rows):
    """What an iteration sampled and kept: shares of questions are those with a right answer, by level too."""
    hinted = counts.get("hinted", 0)
    sampled = [s for s in samples if s.source != "rationalized"]
    solved = {s.question for s in sampled if s.correct and s.completion.finished}
    explained = {s.question for s in samples if s.source == "rationalized"}
    levels = {s.question: s.example.level for s in samples}
    metrics = {"questions": len(levels), "samples": len(sampled), "rows": len(rows),
               "correct": sum(s.correct for s in sampled) / max(1, len(sampled)),
               "solved": len(solved) / max(1, len(levels)), "hinted": hinted,
               "rationalized": len(explained) / max(1, hinted), "unexplained": counts.get("unexplained", 0)}
    for level in sorted(set(levels.values())) if len(set(levels.values())) > 1 else ():
        of = {q for q in levels if levels[q] == level}
        metrics |= {f"solved level {level}": len(of & solved) / len(of),
                    f"kept level {level}": len(of & (solved | explained)) / len(of)}
    return metrics


def load_samples(sources, tokenizer, dropped, below=0, left_out=()):
    """Samples from runs' samples.csv, less the questions whose text is in `left_out`; encoded, not scored.

    Ids are less than `below`, apart from those of other questions.
    """
    samples, places = [], {}
    for example, correct in data.load_generations(sources, dropped) if sources else ():
        if example.text in left_out:
            dropped["held out"] += 1
            continue
        place = places.setdefault(example.id, [len(places), 0])
        ids = data.encode_completion(tokenizer, example.completion, tokenizer.eos_token_id)
        samples.append(Sample(*place, replace(example, id=below - 1 - example.id), Completion(ids, [], True),
                              example.completion, "loaded", correct=float(correct)))
        place[1] += 1
    if sources and not samples:
        raise ValueError(f"{' '.join(sources)}: no answer is left; left out: {dict(dropped)}")
    return sorted(samples, key=lambda s: (s.question, s.number))


# Copied from dpo.py::summed_logprobs
def summed_logprobs(model, pairs, fits, device):
    """(chosen, rejected) log-probs of every pair, summed over tokens: lists, the same on all ranks."""
    mine = dist.share(list(range(len(pairs))))
    prompt_ids = [pairs[i].prompt_ids for i in mine] * 2
    completion_ids = [pairs[i].chosen for i in mine] + [pairs[i].rejected for i in mine]
    values = fits(completion_logprobs, model, prompt_ids, completion_ids, 1.0, device=device)
    sums = [row.sum().item() for row in values]
    rows = sorted(itertools.chain(*dist.gather(list(zip(mine, sums, sums[len(mine):])))))
    return [row[1] for row in rows], [row[2] for row in rows]


def accumulate_gradients(model, rows, beta, denominator, tokens_per_batch, device):
    """The gradient of the step's loss over this rank's rows; returns sums: loss, and dpo's accuracy.

    -weight log p(answer) over the step's completion tokens, or for pairs DPO's -log sigmoid(beta h) over
    their number (arXiv 2305.18290 eq. 7), both answers in one forward pass. denominator: that of all ranks.
    """
    model.zero_grad()  # of an attempt that ran out of memory
    sums = {name: torch.zeros((), device=device) for name in ("loss", "accuracy")}
    batches = pack([len(row) for row in rows], tokens_per_batch)
    for picked in shard.micro_batches(model, batches, partial(token_logprobs, model)):
        batch = [rows[i] for i in picked]
        answers = [row.chosen for row in batch] + [row.rejected for row in batch if row.rejected]
        prompts = [row.prompt_ids for row in batch] * (len(answers) // len(batch))
        input_ids, mask = make_batch(prompts, answers, device)
        logprobs = token_logprobs(model, input_ids, mask).sum(1)  # [B], pairs [2 B]
        if batch[0].rejected:
            chosen, rejected = logprobs.chunk(2)
            refs = torch.tensor([row.ref_chosen - row.ref_rejected for row in batch]).to(device)
            margin = beta * (chosen - rejected - refs)
            loss = -F.logsigmoid(margin)
            sums["accuracy"] = sums["accuracy"] + (margin.detach() > 0).sum()
        else:
            loss = -torch.tensor([row.weight for row in batch]).to(device) * logprobs
        (loss.sum() / denominator).backward()
        sums["loss"] = sums["loss"] + loss.detach().sum() / denominator
    return {name: value.item() for name, value in sums.items()}


def evaluate(sampler, questions, prompt_ids, args, iteration, step, tokenizer, run, more):
    """Greedy pass@1 on held-out questions; answers go to eval.csv."""
    mine = dist.share(questions)
    completions = sample_all(sampler, [prompt_ids[e.id] for e in mine], [[0]] * len(mine),
                             args.max_new_tokens, 0.0, run, "evaluation") if questions else []
    texts = [c.text(tokenizer) for (c,) in completions]
    rows = [rewards.answer_row(e, 0, c, text, right) | {"iteration": iteration, "seed": args.seed}
            for e, text, right, (c,) in zip(mine, texts, rewards.judge(mine, texts), completions)]
    run.log_evaluation(step, dist.gather_rows(rows, "id"), {"iteration": iteration} | more)


def held_out_metrics(model, rows, pairs, fits, device):
    """Of --eval-generations: loss per token of right answers; how often one gains more than a wrong one.

    Gains are over the start model's log-probs, as in dpo.py; a tie is half right.
    """
    metrics = {}
    if rows:
        mine = dist.share(rows)
        logprobs = fits(completion_logprobs, model, [row.prompt_ids for row in mine],
                        [row.chosen for row in mine], 1.0, device=device)
        total = sum(dist.gather(-sum(row.sum().item() for row in logprobs)))
        metrics["eval/loss"] = total / sum(len(row.chosen) for row in rows)
    if pairs:
        gains = [chosen - pair.ref_chosen - rejected + pair.ref_rejected for pair, chosen, rejected in zip(
            pairs, *summed_logprobs(model, pairs, fits, device))]
        metrics["eval/ranking_accuracy"] = sum((gain > 0) + (gain == 0) / 2 for gain in gains) / len(gains)
    return metrics


def rows_to_train(n_rows, iteration, args):
    """Rows that an iteration's steps take in all, each counted as often as it is trained."""
    if iteration == 0 or not (args.epochs or args.first_steps):
        return 0
    growth = args.step_growth ** (iteration - 1)
    if args.first_steps:
        return math.ceil(args.first_steps * growth) * args.batch_size
    return max(1, round(args.epochs * growth * n_rows))


def resolve(args, device):
    """Fill in the defaults that depend on others, and refuse what cannot work, before any load or write."""
    embedded = models.is_embedded(args.model)
    by_policy = [spec for spec in args.rewards if spec.startswith("answer-prob") and "exp" not in spec]
    if args.strategy == "soft" and not by_policy:
        raise ValueError("--strategy soft weighs rationales by exp(log p) of the gold answer after them: add "
                         "--rewards answer-prob (without exp)")
    if args.strategy != "sft" and args.num_generations < 2 and not args.generations:
        raise ValueError(f"--num-generations {args.num_generations}: --strategy {args.strategy} compares a "
                         "question's samples; use 2 or more")
    if args.rationalize and args.strategy in ("reinforce", "soft"):
        raise ValueError(f"--rationalize: --strategy {args.strategy} weighs what the policy itself samples; "
                         "use sft or dpo")
    if args.hint != "mark" and not ("{prompt}" in args.hint and "{answer}" in args.hint):
        raise ValueError(f"--hint {args.hint!r}: needs {{prompt}} and {{answer}} in it, or is mark")
    needs_data = not args.generations or args.iterations > 1 or not args.eval_generations
    lr, embedded_lr = {"sft": (2e-4, 1e-3), "soft": (2e-4, 1e-3), "dpo": (1e-5, 1e-3),
                       "reinforce": (2e-5, 1e-4)}[args.strategy]
    restart = "base" if args.strategy in ("sft", "soft") else "previous"
    return replace(
        args, data=args.data or (("arithmetic" if embedded else "gsm8k") if needs_data else ""),
        system=args.system or ("" if embedded else data.THINK_ANSWER_SYSTEM),
        # a CPU's caches are small
        tokens_per_batch=args.tokens_per_batch or {"cpu": 2048, "cuda": 0}.get(device.type, 8192),
        restart=restart if args.restart == "auto" else args.restart,
        lr=args.lr or (embedded_lr if embedded else lr / 20 if args.full else lr))


def main(args: Args) -> None:
    # ---- set up: whatever can be wrong is found here ----
    device = dist.setup(args.device)
    asked = args = resolve(args, device)
    if args.dry_run:
        args = replace(args, max_steps=1, iterations=1, first_steps=1, wandb=False, resume=False)
    check_args(args)
    tokenizer = models.load_tokenizer(args.model)
    dtype = models.choose_dtype(args.dtype, device)
    reward_functions = rewards.parse_rewards(
        args.rewards,
        partial(rewards.LearnedReward, dtype=dtype, device=device,
                tokens_per_batch=args.tokens_per_batch or 8192),
        partial(rewards.AnswerProbability, tokenizer, lambda e: prompt_ids[e.id],
                lambda *ids: fits(completion_logprobs, model, *ids, 1.0, device=device),  # as it is by then
                args.max_new_tokens))
    train, held_out, shown, dropped = [], [], [], Counter()
    if args.data:
        train, held_out = data.train_validation(args.data, n_train=args.train_questions,
                                                n_validation=args.eval_questions, level=args.level or None,
                                                seed=args.seed)
        shown = data.worked_examples(args.data, args.few_shot, held_out, level=args.level or None,
                                     seed=args.seed)
    held_samples = load_samples(args.eval_generations, tokenizer, dropped)
    if held_samples:
        held_out = []
    apart = {e.text for e in [*held_out, *(s.example for s in held_samples)]}
    loaded = load_samples(args.generations, tokenizer, dropped, min(
        [0, *(s.example.id for s in held_samples)]), apart)
    apart |= {e.text for e in shown}
    train = [e for e in train if e.text not in apart]

    def encode(e, iteration=0, hinted=False):
        prompt = with_hint(e.prompt, e.answer, args.hint) if hinted else e.prompt
        if iteration == 1:
            prompt = data.few_shot_messages(shown, prompt)
        return data.encode_prompt(tokenizer, prompt, args.system, args.prompt_template)

    if args.max_prompt_tokens:
        train, held_out = ([e for e in part if len(encode(e)) <= args.max_prompt_tokens]
                           for part in (train, held_out))
    if args.data and not (train and (held_out or held_samples)):
        raise ValueError(f"--data {args.data}, --max-prompt-tokens {args.max_prompt_tokens}: {len(train)} "
                         f"questions are left to train on and {len(held_out)} held out")
    given = {s.example.id: s.example for s in loaded + held_samples}.values()
    prompt_ids = {e.id: encode(e) for e in [*train, *held_out, *given]}
    if args.download_only:
        return models.download(args.model)
    longest = max(map(len, prompt_ids.values()))
    if shown or args.rationalize:  # the longest form, of the first iteration
        longest = max([longest, *(len(encode(e, 1, args.rationalize)) for e in train)])
    if args.dry_run:
        train = sorted(train, key=lambda e: -len(prompt_ids[e.id]))[:args.batch_size]
    torch.manual_seed(args.seed)
    longest_row = max([longest + args.max_new_tokens] + [len(s.completion.ids) + len(prompt_ids[s.example.id])
                                                         for s in loaded + held_samples])
    model = models.load_model(args.model, torch.float32 if args.full else dtype, device, longest_row,
                              split=args.shard, quantize=args.quantize)
    models.check_token_ids(model, tokenizer)
    if args.full:
        params = [p.requires_grad_() for p in model.parameters()]
    else:
        params = add_lora(model, "policy", args.lora_r, args.lora_alpha, args.lora_targets,
                          models.layer_range(args.train_layers, model))
    start = [p.detach().cpu().clone() for p in params if args.restart == "base"]  # M_0
    adapter = None if args.full else adapter_tensors(model, "policy")
    save_weights = partial(models.save_trained, model, tokenizer, adapter, args)
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    model.train()  # dropout is off (load_model); gradient checkpointing acts in this mode alone
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay,
                                  foreach=False if args.shard else None,
                                  fused=device.type == "cuda" and not args.shard)
    stop_ids = models.stop_ids(model, tokenizer)
    sampler = Sampler(model, () if args.dry_run else stop_ids, args.slots, dtype,  # dry run: full length
                      by_layer=args.reshard)
    if not args.tokens_per_batch:
        args = replace(args, tokens_per_batch=models.tokens_that_fit(
            model, params, dtype, sampler.cache_bytes(longest + args.max_new_tokens)))
    run = Run(args, __file__, device, tags=models.run_tags(args.model, args.data or args.generations[0]))
    optimizer.register_step_pre_hook(run.weights_move)
    compute = partial(torch.autocast, device.type, torch.bfloat16,
                      enabled=args.full and dtype == torch.bfloat16, cache_enabled=False)
    run.print(models.describe(args, model, params, dtype))
    run.print(f"data: {args.data or 'given answers'}, {len(train)} questions to train on, {len(held_out)} "
              f"held out, prompts up to {longest} tokens; given answers: {len(loaded)} to train on, "
              f"{len(held_samples)} held out; left out: "
              f"{', '.join(f'{name} {n}' for name, n in dropped.items()) or 'none'}")
    for source in models.of_other_models(",".join(args.generations + args.eval_generations), args.model):
        run.print(f"{source}: another model's samples; what is learnt from them is not its own reasoning")
    held_rows, held_pairs = (training_rows(held_samples, prompt_ids, args, tokenizer, kind)
                             for kind in ("sft", "dpo"))

    step, iteration, begun, bad_steps, sampled_tokens, rows = 0, 0, 0, 0, 0, []
    fits = Fitting(args.tokens_per_batch, device, longest_row * (2 if args.strategy == "dpo" else 1))
    if args.resume:
        folder, saved = run.load()
        if folder:
            models.load_trained(folder, model, adapter)
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
            step, iteration, begun, sampled_tokens = (saved[name] for name in (
                "step", "iteration", "begun", "sampled_tokens"))
            fits.tokens_per_batch = min(fits.tokens_per_batch, saved["tokens_per_batch"])
            sampler.slots = min(sampler.slots, saved.get("slots", sampler.slots))
            rows = [Row(*row) for row in saved["rows"]]
            for pair, refs in zip(held_pairs, saved["held_refs"]):
                pair.ref_chosen, pair.ref_rejected = refs

    def add_reference(pairs):
        """Fill in the log-probs of the model as it stands."""
        for pair, *refs in zip(pairs, *summed_logprobs(model, pairs, fits, device)):
            pair.ref_chosen, pair.ref_rejected = refs

    def measure():
        with compute():
            evaluate(sampler, held_out, prompt_ids, args, iteration, step, tokenizer, run,
                     held_out_metrics(model, held_rows, held_pairs, fits, device))

    def last_step():  # of the present iteration
        return begun + math.ceil(rows_to_train(len(rows), iteration, args) / args.batch_size)

    def finished():
        spent = iteration == args.iterations or 0 < args.token_budget <= sampled_tokens
        return step == last_step() and spent or 0 < args.max_steps == step

    with compute():
        run.self_check(self_check(model, params, sampler, list(prompt_ids.values())[:3], args, 1.0, device))
        if held_pairs and math.isnan(held_pairs[0].ref_chosen):
            add_reference(held_pairs)
    if step == 0 and not args.dry_run:
        measure()

    stop, trains = False, args.epochs > 0 or args.first_steps > 0
    while not (finished() or stop):
        if step == last_step():
            # ---- sample: what the next iteration learns from ----
            iteration += 1
            with run.phase("sample"), compute():
                if iteration == 1 and loaded:
                    mine, counts = dist.share(loaded), {"tokens": 0}
                    if error := score_samples(mine, reward_functions, args):
                        run.print(error)
                    samples, _ = gather_samples(mine, mine)
                else:
                    picked = data.batch_indices(len(train), (iteration - 1) * args.questions,
                                                min(args.questions, len(train)), args.seed)
                    samples, counts = sample_iteration(
                        sampler, [train[i] for i in picked], encode, reward_functions, args, iteration,
                        step + 1, tokenizer, run)
            rows = training_rows(samples, prompt_ids, args, tokenizer, args.strategy)
            if args.dry_run:
                rows = [Row(prompt_ids[s.example.id], s.completion.ids,
                            s.completion.ids if args.strategy == "dpo" else []) for s in samples]
            sampled_tokens += counts["tokens"]
            begun = step
            metrics = {"iteration": iteration, "sampled_tokens": sampled_tokens} | iteration_metrics(
                samples, counts, rows)
            run.log(step + 1, metrics)
            run.print(f"iteration {iteration}: " + "  ".join(
                f"{name} {value:.4g}" for name, value in metrics.items() if name != "iteration"))
            if not trains:
                stop = dist.any_rank(bool(dist.stop_signal), device)
                continue
            if not rows:
                raise ValueError(
                    f"iteration {iteration}: no question gave anything to learn from by --strategy "
                    f"{args.strategy}: take more --questions or --num-generations, --rationalize, --few-shot "
                    "or another --level")
            if args.restart == "base":
                run.weights_move()
                with torch.no_grad():
                    for p, value in zip(params, start):
                        p.copy_(value)
                optimizer.state.clear()
            if args.strategy == "dpo":
                with run.phase("reference"), compute():
                    add_reference(rows)
            continue

        # ---- update ----
        step += 1
        first = (step - 1 - begun) * args.batch_size
        n = min(args.batch_size, rows_to_train(len(rows), iteration, args) - first)
        batch = [rows[i] for i in data.batch_indices(len(rows), first, n, noise_key(args.seed, iteration))]
        n_tokens = sum(len(row.chosen) for row in batch)
        with run.profile(step), compute(), run.phase("update"):
            sums = fits(accumulate_gradients, model, dist.share(batch), args.beta,
                        len(batch) if args.strategy == "dpo" else n_tokens, device=device)
            dist.sum_gradients(params)
            norm = shard.clip_gradients(params, args.max_grad_norm)
            warm = step - begun if args.restart == "base" else step
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, warm / max(1, args.warmup_steps))
            if math.isfinite(norm):
                optimizer.step()
                bad_steps = 0
            else:
                bad_steps += 1
                run.print(f"step {step}: the gradient is not finite; the update is skipped "
                          f"({bad_steps} in a row)")
            optimizer.zero_grad()

        # ---- log ----
        sums = dist.sum_dict(sums, device)
        metrics = {"loss": sums["loss"], "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
                   "iteration": iteration, "epoch": (first + n) / len(rows), "tokens": n_tokens,
                   "sampled_tokens": sampled_tokens, "tokens_per_batch": fits.tokens_per_batch}
        if args.strategy == "dpo":
            metrics["accuracy"] = sums["accuracy"] / len(batch)
        metrics = run.log(step, metrics, min(last_step(), args.max_steps or math.inf),
                          show=("iteration", "loss", "accuracy", "grad_norm"))
        if args.dry_run:
            break

        # ---- evaluate ----
        last = step == last_step() or step == args.max_steps
        if last or (args.eval_every and step % args.eval_every == 0):
            measure()

        # ---- save ----
        due = step % args.save_every == 0 or last or bad_steps >= 5
        stop = run.remember(step, due, save_weights, {
            "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "step": step,
            "iteration": iteration, "begun": begun, "sampled_tokens": sampled_tokens,
            "tokens_per_batch": fits.tokens_per_batch, "slots": sampler.slots,
            "rows": lambda rows=rows: [tuple(vars(row).values()) for row in rows],
            "held_refs": [(pair.ref_chosen, pair.ref_rejected) for pair in held_pairs]})
        if bad_steps >= 5:
            raise ValueError(f"the gradient was not finite in {bad_steps} updates in a row; "
                             f"the state is in {run.path}: lower --lr")

    # ---- the end ----
    if args.dry_run:
        n_samples, iterations = asked.questions * asked.num_generations, range(1, asked.iterations + 1)
        steps = [math.ceil(rows_to_train(n_samples, i, asked) / asked.batch_size) for i in iterations]
        seconds = metrics["seconds/update"] + metrics["seconds/sample"] * (  # the sampling of an iteration
            asked.questions / len(train) * asked.iterations / max(1, sum(steps)))
        run.dry_run_report(metrics | {"seconds": seconds}, asked.max_steps or sum(steps), metrics["tokens"],
                           model.config, longest_row, sampler)
        return
    if finished():
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
def sample_all(sampler, prompt_ids, keys, max_new_tokens, temperature, run, doing):
    """`Sampler.sample` with progress shown; memory that runs out on one rank halves the slots of all."""
    most_rows = max(1, *dist.gather(sum(map(len, keys))))  # of a rank: only fewer slots save memory

    def attempt(slots):
        if slots < min(sampler.slots, most_rows):
            sampler.slots, sampler.cache, sampler.graphs = slots, None, {}
        return sampler.sample(prompt_ids, keys, max_new_tokens, temperature,
                              lambda done, total, _: run.progress(f"{doing}: sampled {done}/{total}"))

    return retry_smaller(attempt, min(sampler.slots, most_rows), run.device, 1, "slots")[0]


# Copied from grpo.py::gap_in_float64
@torch.no_grad()
def gap_in_float64(model, prompt_ids, args, temperature, device):
    """Largest gap of sampler and trainer on a cut-out of the model in float64, where rounding hides no error.

    It has two decoder layers (the first that have an adapter, if any do) and the first 1024 tokens; prompts
    are made of those. The head and the adapters' B are drawn anew: the model's own head may be so sure of the
    next token that its log-prob is 0 whatever the sampler does, and a B of zero would hide an adapter that
    the sampler leaves out.
    """
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    base, embedding, head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()
    layers = nn.ModuleList(sorted(base.layers, key=lambda layer: not lora_modules(layer))[:2])
    generator = torch.Generator().manual_seed(args.seed)

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
    copies |= {id(B): drawn(0.02, *B.shape) for module in lora_modules(layers).values()
               for B in module.B.values()}
    copies[id(base.layers)] = copy.deepcopy(layers, copies)
    small = copy.deepcopy(model, copies)
    small.get_input_embeddings().padding_idx = None
    prompts = [[i % 1024 for i in ids[:8 + 8 * p]] for p, ids in enumerate(prompt_ids)]
    keys = [[noise_key(args.seed, -3, p)] for p in range(len(prompts))]
    samples = [c for (c,) in Sampler(small, ()).sample(prompts, keys, 12, temperature)]
    logprobs = completion_logprobs(small, prompts, [c.ids for c in samples], temperature, 10**9, device)
    return (torch.stack(logprobs) - torch.tensor([c.logprobs for c in samples])).abs().max().item()


# Copied from grpo.py::self_check
def self_check(model, params, sampler, prompt_ids, args, temperature, device):
    """Measure on a few short samples what must hold before training: name -> (value, largest right value).

    The sampler agrees with the trainer (in bfloat16 roughly, and exactly on two layers in float64); a row's
    padding changes nothing; a fresh adapter equals the base; the stop token is in the mask; every adapter
    gets gradient; no frozen weight does.
    """
    exact = device.type == "cpu" and sampler.dtype == torch.float32
    measure, limit = (torch.max, 1e-4) if exact else (torch.mean, 0.3)  # rounding to bfloat16 makes up to 0.1
    samples = sampler.sample(prompt_ids, [[noise_key(args.seed, -2, p)] for p in range(len(prompt_ids))],
                             16, temperature)
    # a row that did not stop by itself gets a stop token, so that each has one to look for
    completion_ids = [c.ids if c.finished else c.ids + [min(sampler.stop_ids, default=0)] for (c,) in samples]
    input_ids, mask = make_batch(prompt_ids, completion_ids, device)
    logprobs = token_logprobs(model, input_ids, mask, temperature)
    logprobs.sum().backward()
    gap = torch.cat([row[of_row][:len(c.logprobs)] - torch.tensor(c.logprobs)
                     for row, of_row, (c,) in zip(logprobs.detach().cpu(), mask, samples)]).abs()
    under = partial(completion_logprobs, model, prompt_ids, completion_ids, temperature)
    alone, padded = torch.cat(under(1, device)), torch.cat(under(10**9, device))
    adapters = [module for module in lora_modules(model).values() if module.active]
    checks = {
        "sampler-trainer": (measure(gap).item(), limit),
        "padding": (measure((alone - padded).abs()).item(), limit),
        "stop tokens left out": (sum(not row[len(p) + len(c) - 1]
                                     for row, p, c in zip(mask, prompt_ids, completion_ids)), 0),
        "adapters without gradient": (sum(not module.B[module.active].grad.any() for module in adapters), 0),
        "frozen weights with gradient": (sum(p.grad is not None for p in model.parameters()
                                             if not p.requires_grad), 0)}
    if not (exact or sampler.split or sampler.layers[0].qkv.quantized):
        checks["in float64"] = gap_in_float64(model, prompt_ids, args, temperature, device), 1e-4
    if adapters and not args.resume:
        with use_adapter(model, None):
            checks["step-0 KL"] = ((torch.cat(under(10**9, device)) - padded).abs().max().item(), 0)
    for p in params:
        p.grad = None
    return checks


if __name__ == "__main__":
    cli(main, Args)
