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
    (arXiv 2305.18290); soft all rationales with the gold answer, weighed by exp(r) / sum exp(r); gain those
    that make the gold answer more probable than it is without them.

    python star.py                                                   # the embedded model, on two CPU cores
    python star.py --model Qwen/Qwen2.5-3B-Instruct --rationalize    # GSM8K on one GPU
    python star.py --model Qwen/Qwen2.5-3B-Instruct --data mmmlu/YO_NG --strategy dpo
    python star.py --generations runs/a/samples.csv runs/b/samples.csv --iterations 1
"""

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

from common import checks, data, dist, generic, models, rewards, shard
from common.curriculum import QuestionState
from common.data import HINT
from common.draws import Completion, StopTexts, draw, noise_key, uniform
from common.run import Fitting, QuestionArgs, Run, cli, defaults, retry_smaller

# Shapes: B rows, T tokens, V vocabulary, P prompts, G samples per prompt, D hidden size, H heads, K head
# size, R LoRA rank, N rows or tokens in all.

@dataclass
class Args(QuestionArgs):
    # ---- run ----
    max_steps: int = 0  # steps in all; 0: as many as the passes over the data take
    token_budget: int = 0  # tokens sampled for training after which the run ends; 0: no limit

    # ---- data ----
    generations: tuple[str, ...] = ()  # samples.csv of runs: the answers of the first iteration
    eval_generations: tuple[str, ...] = ()  # samples.csv of runs: evaluate by loss and ranking of these
    few_shot: int = 0  # worked examples before each question while the first iteration samples

    # ---- sampling ----
    questions: int = 256  # questions to sample answers to, in each iteration
    num_generations: int = 4  # G, samples per question
    max_new_tokens: int = 512  # longest completion; cut off there (not finished) it counts as truncated
    slots: int = 256  # rows sampled at a time per rank; halved when memory runs out
    stop: tuple[str, ...] = ()  # texts that end an answer, or none; empty: a base model's next question
    sample_temperature: float = 1.0  # of the samples to learn from (the log-probs are those of temperature 1)

    # ---- method ----

    # weighted: correctness, partial, steps, format, digit, mark, math, answer-prob, model:RUN, file.py:name
    rewards: tuple[str, ...] = ("correctness=1",)
    reward_timeout: float = 30.0  # seconds for a call of your own reward; its row is left out and counted
    batch_size: int = 64  # rows per step, over all ranks
    iterations: int = 3  # rounds of sampling from the present policy and training on what was kept
    # likelihood of right answers; of all by centred reward; right against wrong; by exp(reward); reward > 0
    strategy: Literal["sft", "reinforce", "dpo", "soft", "gain"] = "sft"
    # train an iteration from the start model (STaR) or the one before; auto: base with sft and soft
    restart: Literal["auto", "base", "previous"] = "auto"
    rationalize: bool = False  # ask again with the answer as a hint where no sample was right (sft, dpo)
    hint: str = HINT  # {prompt} and {answer} in it; or mark: (CORRECT) behind the right option of a choice
    per_question: int = 4  # most rows that one question gives (--strategy sft and dpo); 0: no limit
    epochs: float = 1.5  # passes over an iteration's rows; 0: sample and evaluate only
    first_steps: int = 0  # steps of the first iteration, in place of --epochs; 0: by --epochs (STaR: 40)
    step_growth: float = 1.0  # steps or passes of an iteration, over those of the one before (STaR: 1.2)
    beta: float = 0.1  # pull to the model that the iteration started from, with --strategy dpo

    # ---- optimizer ----

    lr: float = 0.0  # AdamW's peak rate; 0: by --strategy and the kind of model, printed at the start
    warmup_steps: int = 5  # steps of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    weight_decay: float = 0.0  # AdamW's decoupled decay
    max_grad_norm: float = 1.0  # clip the gradient's norm to this

    # ---- evaluation ----

    eval_every: int = 0  # steps between further evaluations than those at the start and of each iteration


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

    def row(self, state, seed):
        """Its line in samples.csv."""
        return {"step": state.first_step, "iteration": state.iteration, "source": self.source,
                "reward": self.reward, **{f"reward/{k}": v for k, v in self.rewards.items()},
                **rewards.answer_row(self.example, self.number, self.completion, self.response, self.correct),
                "seed": seed}


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


@dataclass
class State(QuestionState):
    """What a checkpoint holds beside weights, optimizer and the reference's log-probs of held-out pairs."""

    iteration: int = 0
    first_step: int = 1  # of the iteration
    rows: list[Row] = field(default_factory=list)  # of the iteration


def training_rows(samples, prompt_ids, args, tokenizer, strategy):
    """The Rows that an iteration's Samples of all questions make, question by question.

    "sft" right answers, "dpo" right against wrong ones of the same question, none used twice: finished, equal
    ones once, at most --per-question. "reinforce" every sample whose reward differs from the mean of
    the question's others, that difference as its weight. "soft" every sample's rationale, closed by the gold
    answer, with the weight exp(r) / sum exp(r) over the question: with r = log p(answer | rationale) the
    chance that this rationale, of those sampled, was the one that led to the answer (EM's E-step). "gain" the
    same rows, unweighed, where r > 0: with r = log p(answer | rationale) - log p(answer).
    """
    rows = []
    for _, group in itertools.groupby(samples, key=lambda s: s.question):
        group = list(group)
        prompt, once = prompt_ids[group[0].example.id], {}
        for s in group:
            if s.completion.finished:
                once.setdefault(tuple(s.completion.ids), s)
        right = [s.completion.ids for s in once.values() if s.correct]
        wrong = [s.completion.ids for s in once.values() if not s.correct]
        known = [s for s in group if not math.isnan(s.reward)]
        if strategy == "sft":
            rows += [Row(prompt, ids) for ids in right[:args.per_question or None]]
        elif strategy == "dpo":
            rows += [Row(prompt, *pair) for pair in list(zip(right, wrong))[:args.per_question or None]]
        elif strategy == "reinforce":
            weights = rewards.leave_one_out([s.reward for s in known], [0] * len(known))
            rows += [Row(prompt, s.completion.ids, weight=w) for s, w in zip(known, weights) if w]
        else:
            r = torch.tensor([s.reward for s in known], dtype=torch.float64)
            weights = torch.softmax(r, 0) if strategy == "soft" else (r > 0).double()
            for s, w in zip(known, weights.tolist()):
                if not w:
                    continue
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


def load_samples(sources, tokenizer, dropped, side, left_out=()):
    """Samples out of samples.csv, encoded, not scored; `side`, 0 or 1, keeps the ids of two sets apart."""
    samples, places = [], {}
    for example, correct in data.load_generations(sources, dropped, left_out) if sources else ():
        place = places.setdefault(example.id, [len(places), 0])
        ids = data.encode_completion(tokenizer, example.completion, tokenizer.eos_token_id)
        example = replace(example, id=-1 - side - 2 * example.id)
        samples.append(Sample(*place, example, Completion(ids, [], True), example.completion, "loaded",
                              correct=float(correct)))
        place[1] += 1
    return sorted(samples, key=lambda s: (s.question, s.number))


def load_data(args, tokenizer, dropped):
    """(questions to train on, held out; answers to train on, held out; prompts' encoder, ids, longest; row).

    No question stands on both sides; what is left out is counted in `dropped`.
    """
    train, held_out, prompt_ids, _ = data.load_questions(args, tokenizer, args.batch_size)
    held_samples = load_samples(args.eval_generations, tokenizer, dropped, 0)
    shown = data.worked_examples(args.data, args.few_shot, held_out, level=args.level or None, seed=args.seed)
    held_out = [] if held_samples else held_out
    apart = {e.text for e in [*held_out, *(s.example for s in held_samples)]}
    loaded = load_samples(args.generations, tokenizer, dropped, 1, apart)
    apart |= {e.text for e in shown}
    train = [e for e in train if e.text not in apart]
    if args.data and not train:
        raise ValueError(f"--data {args.data}: no question is left to train on")
    encode = partial(encode_question, tokenizer, shown, args)
    prompt_ids |= {s.example.id: encode(s.example) for s in loaded + held_samples}
    longest = max(map(len, prompt_ids.values()))
    if shown or args.rationalize:  # the longest form, of the first iteration
        longest = max([longest, *(len(encode(e, 1, args.rationalize)) for e in train)])
    longest_row = max([longest + args.max_new_tokens] + [len(s.completion.ids) + len(prompt_ids[s.example.id])
                                                         for s in loaded + held_samples])
    return train, held_out, loaded, held_samples, encode, prompt_ids, longest, longest_row


def encode_question(tokenizer, shown, args, e, iteration=0, hinted=False):
    """Prompt ids of an Example: as it is trained and evaluated, as the first iteration asks, or hinted."""
    prompt = with_hint(e.prompt, e.answer, args.hint) if hinted else e.prompt
    if iteration == 1:
        prompt = data.few_shot_messages(shown, prompt)
    return data.encode_prompt(tokenizer, prompt, args.system, args.prompt_template)


def ask(sampler, questions, encode, reward_functions, args, state, tokenizer, run, hinted=False):
    """--num-generations scored Samples of each (place, example), with a hint or without."""
    G = args.num_generations
    first = G if hinted else 0  # a hinted answer is one more, with noise of its own
    keys = [[noise_key(args.seed, state.iteration, i, first + g) for g in range(G)] for i, _ in questions]
    completions = sample_all(sampler, [encode(e, state.iteration, hinted) for _, e in questions], keys,
                             args.max_new_tokens, args.sample_temperature, run,
                             run.counter(f"iteration {state.iteration}"))
    samples = [Sample(i, first + g, e, c, c.text(tokenizer), "rationalized" if hinted else "sampled")
               for (i, e), row in zip(questions, completions) for g, c in enumerate(row)]
    return score_samples(samples, reward_functions, args, run)


def score_samples(samples, reward_functions, args, run):
    """The samples with their rewards, reward and correct; reports the first reward that failed."""
    scored = rewards.score(reward_functions, [s.example for s in samples], [s.response for s in samples],
                           timeout_s=args.reward_timeout, finished=[s.completion.finished for s in samples])
    right = scored["rewards"].get("math", scored["correct"])  # LaTeX; NaN where it hung: not right
    for i, s in enumerate(samples):
        s.rewards = {name: values[i] for name, values in scored["rewards"].items()}
        s.reward = scored["total"][i]
        if s.source != "loaded":  # whose own run has judged it, perhaps by other means
            s.correct = float(right[i] == 1)
    if scored["error"]:
        run.print(f"iteration {run.state.iteration}: {scored['error']}")
    return samples


def sample_iteration(sampler, train, encode, reward_functions, args, state, tokenizer, run):
    """(this rank's Samples of an iteration; counts: tokens, hinted, unexplained).

    Of the answers with a hint those that teach; unexplained: right, but without a rationale of their own.
    """
    state.position = (state.iteration - 1) * args.questions
    mine = dist.share(list(enumerate(state.draw(train, min(args.questions, len(train)), args))))
    samples = ask(sampler, mine, encode, reward_functions, args, state, tokenizer, run)
    failed, hinted = [], []
    if args.rationalize and not args.dry_run:
        solved = {s.question for s in samples if s.correct and s.completion.finished}
        failed = [(i, e) for i, e in mine if i not in solved]
        hinted = ask(sampler, failed, encode, reward_functions, args, state, tokenizer, run, hinted=True)
    right = [s for s in hinted if s.correct and s.completion.finished]
    taught = [s for s in right if explains(s.response, s.example.answer, args.hint)]
    return samples + taught, {"tokens": sum(len(s.completion.ids) for s in samples + hinted),
                              "hinted": len(failed), "unexplained": len(right) - len(taught)}


def begin_iteration(sampler, train, loaded, encode, prompt_ids, reward_functions, args, state, tokenizer,
                    run):
    """What the next iteration trains on, into the state: by sampling or, at first, from the given answers.

    samples.csv has what was sampled, with the question alone as the prompt.
    """
    state.iteration, state.first_step = state.iteration + 1, state.step + 1
    given = state.iteration == 1 and loaded
    if given:
        samples, counts = score_samples(dist.share(loaded), reward_functions, args, run), {"tokens": 0}
    else:
        samples, counts = sample_iteration(
            sampler, train, encode, reward_functions, args, state, tokenizer, run)
    counts = {name: int(n) for name, n in dist.sum_dict(counts, run.device).items()}
    samples = sorted(itertools.chain(*dist.gather(samples)), key=lambda s: (s.question, s.number))
    if dist.is_main() and not given:
        run.write_rows([s.row(state, args.seed) for s in samples])
    state.sampled_tokens += counts["tokens"]
    state.rows = training_rows(samples, prompt_ids, args, tokenizer, args.strategy)
    if args.dry_run:  # at the largest sizes, right or wrong
        state.rows = [Row(prompt_ids[s.example.id], s.completion.ids,
                          s.completion.ids if args.strategy == "dpo" else []) for s in samples]
    answers = [(s.example.level, s.correct) for s in dist.share(samples) if s.source == "sampled"]
    run.log_iteration(state, rewards.iteration_metrics(samples, counts, state.rows)
                      | state.open_next(train, answers, args, run))
    if not state.rows and (args.epochs or args.first_steps):
        raise ValueError(f"iteration {state.iteration}: no question gave anything to learn from by "
                         f"--strategy {args.strategy}: take more --questions or --num-generations, "
                         "--rationalize, --few-shot or another --level")


def set_reference(pairs, model, fits, device):
    """Fill in the log-probs of the model as it stands."""
    for pair, *refs in zip(pairs, *summed_logprobs(model, pairs, fits, device)):
        pair.ref_chosen, pair.ref_rejected = refs


def restart(params, start, optimizer, run):
    """Go back to the weights of M_0, with a fresh optimizer."""
    run.begin_update()
    with torch.no_grad():
        for p, value in zip(params, start):
            p.copy_(value)
    optimizer.state.clear()


def accumulate_gradients(model, rows, beta, denominator, tokens_per_batch, device):
    """The gradient of the step's loss over this rank's rows; returns sums: loss, and dpo's accuracy.

    -weight log p(answer) over the step's completion tokens, or for pairs DPO's -log sigmoid(beta h) over
    their number (arXiv 2305.18290 eq. 7), both answers in one forward pass. denominator: that of all ranks.
    """
    model.zero_grad()  # of an attempt that ran out of memory
    sums = Counter()
    batches = split_by_length([len(row) for row in rows], tokens_per_batch)
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
            sums["accuracy"] += (margin.detach() > 0).sum()
        else:
            loss = -torch.tensor([row.weight for row in batch]).to(device) * logprobs
        (loss.sum() / denominator).backward()
        sums["loss"] += loss.detach().sum() / denominator
    return {name: float(sums[name]) for name in ("loss", "accuracy")}


def evaluate(model, sampler, questions, rows, pairs, prompt_ids, args, state, fits, tokenizer, run):
    """Greedy pass@1 of held-out questions; loss and ranking (a tie is half right) of held-out answers."""
    metrics, mine = {"iteration": state.iteration}, dist.share(questions)
    completions = sample_all(sampler, [prompt_ids[e.id] for e in mine], [[0]] * len(mine),
                             args.max_new_tokens, 0.0, run, run.counter("evaluation"))
    if rows:
        of_rank = dist.share(rows)
        logprobs = fits(completion_logprobs, model, [row.prompt_ids for row in of_rank],
                        [row.chosen for row in of_rank], 1.0, device=run.device)
        total = sum(dist.gather(-sum(row.sum().item() for row in logprobs)))
        metrics["eval/loss"] = total / sum(len(row.chosen) for row in rows)
    if pairs:
        gains = [chosen - pair.ref_chosen - rejected + pair.ref_rejected for pair, chosen, rejected in zip(
            pairs, *summed_logprobs(model, pairs, fits, run.device))]
        metrics["eval/ranking_accuracy"] = sum((gain > 0) + (gain == 0) / 2 for gain in gains) / len(gains)
    answers = [row | {"iteration": state.iteration, "seed": args.seed}
               for row in rewards.answer_rows(mine, completions, tokenizer)]
    run.log_evaluation(state.step, dist.gather_rows(answers, "id"), metrics)


def rows_to_train(n_rows, iteration, args):
    """Rows that an iteration's steps take in all, each counted as often as it is trained."""
    if iteration == 0 or not (args.epochs or args.first_steps):
        return 0
    growth = args.step_growth ** (iteration - 1)
    if args.first_steps:
        return math.ceil(args.first_steps * growth) * args.batch_size
    return max(1, round(args.epochs * growth * n_rows))


def last_of_iteration(state, args):
    """The last step of the present iteration."""
    rows = rows_to_train(len(state.rows), state.iteration, args)
    return state.first_step - 1 + math.ceil(rows / args.batch_size)


def is_last(state, args):
    """Whether the run ends here."""
    spent = state.iteration == args.iterations or 0 < args.token_budget <= state.sampled_tokens
    return state.step == last_of_iteration(state, args) and spent or 0 < args.max_steps == state.step


def fill(args, device):
    """The arguments with the defaults that depend on others."""
    lr, embedded_lr = {"dpo": (1e-5, 1e-3), "reinforce": (2e-5, 1e-4)}.get(args.strategy, (2e-4, 1e-3))
    asks = not args.generations or args.iterations > 1 or not args.eval_generations
    restart = "previous" if args.strategy in ("reinforce", "dpo") else "base"
    filled = defaults(args, device, lr={"embedded": embedded_lr, "full": lr / 20, "adapter": lr})
    return replace(filled, data=filled.data if asks else args.data,
                   restart=restart if args.restart == "auto" else args.restart,
                   epochs=args.epochs or float(args.dry_run))  # which makes a step in any case


def check(args):
    """Refuse what cannot work with this method; what no script can do, `defaults` refuses."""
    by_policy = [spec for spec in args.rewards if spec.startswith("answer-prob") and "exp" not in spec]
    if args.strategy == "soft" and not by_policy:
        raise ValueError("--strategy soft weighs rationales by exp(log p) of the gold answer after them: add "
                         "--rewards answer-prob (without exp)")
    if args.strategy == "gain" and not any("prior" in spec for spec in by_policy):
        raise ValueError("--strategy gain keeps rationales that make the gold answer more probable: add "
                         "--rewards answer-prob:prior (without exp)")
    if args.strategy not in ("sft", "gain") and args.num_generations < 2 and not args.generations:
        raise ValueError(f"--num-generations {args.num_generations}: --strategy {args.strategy} compares a "
                         "question's samples; use 2 or more")
    if args.rationalize and args.strategy in ("reinforce", "soft", "gain"):
        raise ValueError(f"--rationalize: --strategy {args.strategy} weighs what the policy itself samples; "
                         "use sft or dpo")
    if args.hint != "mark" and not ("{prompt}" in args.hint and "{answer}" in args.hint):
        raise ValueError(f"--hint {args.hint!r}: needs {{prompt}} and {{answer}} in it, or is mark")


def report_dry_run(metrics, args, n_questions, run):
    """Project the time of all iterations from one step and the sampling of `n_questions` questions."""
    steps = sum(math.ceil(rows_to_train(args.questions * args.num_generations, i + 1, args) / args.batch_size)
                for i in range(args.iterations))
    sampling = metrics["seconds/sample"] * args.questions / n_questions * args.iterations
    metrics["seconds"] = metrics["seconds/update"] + sampling / max(1, steps)
    run.dry_run_report(metrics, args.max_steps or steps, metrics["tokens"])


def main(args: Args) -> None:
    # ---- set up: whatever can be wrong is found before the model is loaded ----
    device = dist.setup(args.device)
    args = fill(args, device)
    check(args)
    dtype, tokenizer = models.choose_dtype(args.dtype, device), models.tokenizer_of(args, args.model)
    reward_functions = rewards.parse_rewards(
        args.rewards, partial(rewards.LearnedReward, dtype=dtype, device=device,
                              tokens_per_batch=args.tokens_per_batch or 8192),
        partial(rewards.AnswerProbability, tokenizer, args.max_new_tokens))
    train, held_out, loaded, held_samples, encode, prompt_ids, longest, longest_row = load_data(
        args, tokenizer, dropped := Counter())
    if args.download_only:
        return models.download(args.model)

    # ---- policy, optimizer, sampler ----
    torch.manual_seed(args.seed)
    model = models.load_model(args.model, torch.float32 if args.full else dtype, device, longest_row,
                              split=args.shard, quantize=args.quantize)
    params, adapter = trainable(model, "policy", args)
    start = [p.detach().cpu().clone() for p in params if args.restart == "base"]  # M_0
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay,
                                  **shard.optimizer_kernel(args, device))
    sampler = generic.sampler(Sampler, model, models.stop_ids(model, tokenizer, args.dry_run), args.slots,
                              dtype, StopTexts(tokenizer, args.stop, args.prompt_template, args.dry_run))
    state = State(tokens_per_batch=args.tokens_per_batch or models.tokens_that_fit(
        model, params, dtype, sampler.cache_bytes(longest + args.max_new_tokens)))
    fits = Fitting(state, device, smallest=longest_row * (2 if args.strategy == "dpo" else 1))
    rewards.ask_policy(reward_functions, prompt_ids,
                       partial(fits, completion_logprobs, model, temperature=1.0, device=device))

    # ---- the run directory, where --resume goes on, the self-check ----
    run = Run(args, __file__, device, tags=models.run_tags(args.model, args.data or args.generations[0]))
    run.print(models.describe(args, model, params, dtype))
    run.print(f"data: {args.data or 'given answers'}, {len(train)} questions to train on, {len(held_out)} "
              f"held out, prompts up to {longest} tokens; given answers: {len(loaded)} to train on, "
              f"{len(held_samples)} held out; left out: "
              f"{', '.join(f'{name} {n}' for name, n in dropped.items() if n) or 'none'}")
    for source in models.of_other_models(",".join(args.generations + args.eval_generations), args.model):
        run.print(f"{source}: another model's samples; what is learnt from them is not its own reasoning")
    held_rows, held_pairs = (training_rows(held_samples, prompt_ids, args, tokenizer, kind)
                             for kind in ("sft", "dpo"))
    save_weights = partial(models.save_trained, model, tokenizer, adapter, args)
    saved = run.restore(state, partial(models.load_trained, model=model, adapter=adapter), save_weights,
                        sampler, optimizer=optimizer)
    state.rows = [Row(**row) for row in state.rows]
    for pair, refs in zip(held_pairs, saved.get("held_refs", ())):
        pair.ref_chosen, pair.ref_rejected = refs
    autocast = partial(models.autocast, device, dtype, args.full)
    measure = partial(evaluate, model, sampler, held_out, held_rows, held_pairs, prompt_ids, args, state,
                      fits, tokenizer, run)
    with autocast():
        run.self_check(checks.before_training(
            model, params, sampler, list(prompt_ids.values())[:3], args, 1.0,
            token_logprobs, completion_logprobs, make_batch, use_adapter))
        if held_pairs and math.isnan(held_pairs[0].ref_chosen):
            set_reference(held_pairs, model, fits, device)
        if state.step == 0 and not args.dry_run:
            measure()

    last, stop = is_last(state, args), False
    while not (last or stop):
        if state.step == last_of_iteration(state, args):
            # ---- sample: what the next iteration learns from ----
            with run.phase("sample"), autocast():
                begin_iteration(sampler, train, loaded, encode, prompt_ids, reward_functions, args, state,
                                tokenizer, run)
            if not (args.epochs or args.first_steps):  # sample and evaluate only
                last, stop = is_last(state, args), dist.any_rank(bool(dist.stop_signal), device)
                continue
            if args.restart == "base":
                restart(params, start, optimizer, run)
            if args.strategy == "dpo":
                with run.phase("reference"), autocast():
                    set_reference(state.rows, model, fits, device)
        state.step += 1
        first = (state.step - state.first_step) * args.batch_size
        n = min(args.batch_size, rows_to_train(len(state.rows), state.iteration, args) - first)
        batch = [state.rows[i] for i in data.batch_indices(len(state.rows), first, n,
                                                           noise_key(args.seed, state.iteration))]
        n_tokens, ends = sum(len(row.chosen) for row in batch), last_of_iteration(state, args)

        # ---- update ----
        with run.profile(state.step), autocast(), run.phase("update"):
            sums = fits(accumulate_gradients, model, dist.share(batch), args.beta,
                        len(batch) if args.strategy == "dpo" else n_tokens, device=device)
            dist.sum_gradients(params)
            norm = shard.clip_gradients(params, args.max_grad_norm)
            begun = state.first_step - 1 if args.restart == "base" else 0
            optimizer.param_groups[0]["lr"] = learning_rate(
                state.step - begun, replace(args, max_steps=ends - begun))
            run.take_step(norm, optimizer)

        # ---- log ----
        sums = dist.sum_dict(sums, device)
        metrics = run.log(state.step, {
            "loss": sums["loss"], "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
            "iteration": state.iteration, "epoch": (first + n) / len(state.rows), "tokens": n_tokens,
            "sampled_tokens": state.sampled_tokens, "tokens_per_batch": state.tokens_per_batch,
            **({"accuracy": sums["accuracy"] / len(batch)} if args.strategy == "dpo" else {})},
            min(ends, args.max_steps or math.inf), show=("iteration", "loss", "accuracy", "grad_norm"))
        last = is_last(state, args)
        if args.dry_run:
            break

        # ---- evaluate ----
        if last or state.step == ends or (args.eval_every and state.step % args.eval_every == 0):
            with autocast():
                measure()

        # ---- save ----
        stop = run.save(due=last or state.step == ends or state.step % args.save_every == 0,
                        held_refs=[(pair.ref_chosen, pair.ref_rejected) for pair in held_pairs])

    # ---- the end ----
    if args.dry_run:
        return report_dry_run(metrics, args, len(train), run)
    if last:
        run.save_final(partial(models.save_plain, model, tokenizer, merged_state_dict(model)) if args.merge
                       else save_weights)
        run.before_after()
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


# Copied from grpo.py::TokenLogprobs
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


# Copied from grpo.py::logprob_chunks
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


# Copied from grpo.py::token_logprobs
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


# Copied from grpo.py::make_batch
def make_batch(prompt_ids, completion_ids, device):
    """Right-padded input_ids [B, T] on the device and completion_mask [B, T] on the CPU.

    The mask comes from the lengths: an end token that is also the padding token stays in it.
    """
    pad, rows = partial(nn.utils.rnn.pad_sequence, batch_first=True), list(zip(prompt_ids, completion_ids))
    input_ids = pad([torch.tensor(p + c) for p, c in rows])
    mask = pad([torch.arange(len(p) + len(c)) >= len(p) for p, c in rows])
    return input_ids.to(device, non_blocking=True), mask


# Copied from grpo.py::pad_logprobs
def pad_logprobs(values, mask):
    """Each row's [L] values at the places of its completion in a [B, T] tensor."""
    values = torch.cat([torch.as_tensor(value, dtype=torch.float32) for value in values])
    return torch.zeros(mask.shape).masked_scatter(mask, values)


# Copied from grpo.py::completion_logprobs
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


# Copied from grpo.py::FusedLinear
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


# Copied from grpo.py::SamplerLayer
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


# Copied from grpo.py::Sampler
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

    with shard.whole_model(sampler.model):
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
