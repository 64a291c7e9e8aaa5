"""Evaluation: how often a model is right, how sure that is, and whether a run made it better.

    pass@1   share of right greedy answers; 95% interval by Wilson (1927), over questions
    pass@k   chance that k samples hold a right one, unbiased (Codex, arXiv 2107.03374 eq. 1)
    maj@n    share of questions whose most frequent answer among n samples is right (arXiv 2203.11171)

    python eval.py                                                    # the embedded model
    python eval.py --model runs/a --data gsm8k --k 1 5 10             # greedy, and 10 samples for pass@k
    python eval.py --model base runs/a/checkpoints/step-* runs/a      # a row each, one base in memory
    python eval.py --model runs/a --preamble "" "Think logically."    # a row for each preamble
    python eval.py --model runs/a --prompt "Compute 3+4-5."           # one answer and its rewards
    python eval.py replay RUN --step 40 --row 3                       # one rollout, sampled once more
"""

import argparse
import importlib.util
import itertools
import json
import math
import sys
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import curves, data, dist, generic, models, rewards, shard, tables
from common.draws import Completion, StopTexts, draw, noise_key, uniform
from common.run import Run, RunArgs, check_args, cli, mean, retry_smaller, weights_before

# Shapes: B rows, V vocabulary, P prompts, D hidden size, H heads, K head size, R LoRA rank, N tokens in all.
EVALUATION = -1  # in noise keys, where training has a step's number


@dataclass
class Args(RunArgs):
    # ---- run ----
    resume: bool = False  # go on with the evaluation in --out: what it has measured is not measured again
    seed: int = 0  # seed of the choice of questions and of sampling noise
    dry_run: bool = False  # answer the longest questions at full length, project the time, keep nothing

    # ---- model ----

    # hub ids, folders, runs or checkpoints, a row of results for each; base: the base of the others
    model: tuple[str, ...] = ("",)
    tokenizer: str = ""  # hub id or folder of another tokenizer than the model's
    chat_template: tuple[str, ...] = ()  # file, another model's, or none; values (enable_thinking=false)
    # of the frozen weights and the computation; auto: bfloat16 on CUDA, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # keep the frozen decoder layers in 4 bits (bitsandbytes; QLoRA, arXiv 2305.14314)
    quantize: Literal["none", "nf4"] = "none"
    # split the weights over the ranks of torchrun (FSDP2): the frozen base, or with --full all there is
    shard: bool = False

    # ---- data ----

    # data set name, hub id, or local .jsonl/.csv/.parquet; empty: arithmetic (embedded model), else gsm8k
    data: str = ""
    split: str = "test"  # of a named data set or folder (a file is one); train: of a run, what it trained on
    limit: int = 0  # questions, drawn with the seed; 0: all, of a generated task 500
    level: str = ""  # difficulty of a generated task, such as 3 or 1-4; empty: the task's own default
    preamble: tuple[str, ...] = ("",)  # text in front of the question; a row of results for each
    system: str = ""  # system message, or none; empty: asks for <think>/<answer> (embedded model: none)
    prompt_template: str = "{prompt}"  # text around the question, {prompt} in it
    few_shot: int = 0  # worked examples of the train split before each question, as turns of the chat
    prompt: str = ""  # answer this question alone, print its rewards and leave nothing behind
    answer: str = ""  # gold answer of --prompt

    # ---- sampling ----
    max_new_tokens: int = 512  # longest completion; cut off there (not finished) it counts as truncated
    # report pass@k for these k, from --samples, and maj@n of all of them; 1 alone: the greedy answer only
    k: tuple[int, ...] = (1,)
    samples: int = 0  # samples per question beside the greedy answer; 0: the largest --k, none if that is 1
    slots: int = 256  # rows sampled at a time per rank; halved when memory runs out
    stop: tuple[str, ...] = ()  # texts that end an answer, or none; empty: a base model's next question

    # ---- method ----

    # with weights: correctness, partial, steps, format, digit, mark, math, model:RUN, or your file.py:name=1
    rewards: tuple[str, ...] = ("correctness=1", "format=0.2")
    reward_timeout: float = 30.0  # seconds for a call of your own reward; its row is left out and counted

    # ---- evaluation ----
    eval_temperature: float = 0.5  # of those samples


def wilson(share, n):
    """95% interval of a share of n questions (Wilson 1927, eq. 7 of Brown, Cai, DasGupta 2001): never empty.

    For means of pass@k, whose spread over questions is at most that of a coin, it is wider than needed.
    """
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    spread = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def majority(answers, correct):
    """Is the most frequent answer right? answers: as extracted, "" for none; correct: of each; 1.0 or 0.0.

    Answers count as one where `rewards.same_answer` says so ("1/2" and "0.5"); of equally frequent ones the
    first that was sampled counts; a row without an answer has no vote.
    """
    votes = []  # [answer, votes, correct]
    for answer, right in zip(answers, correct, strict=True):
        for vote in votes:
            if answer and rewards.same_answer(answer, vote[0]):
                vote[1] += 1
                break
        else:
            if answer:
                votes.append([answer, 1, right])
    return float(max(votes, key=lambda vote: vote[1])[2]) if votes else 0.0


def answer_all(sampler, questions, prompts, prompt_ids, reward_functions, args, tokenizer, run, label):
    """Every question's greedy answer (sample 0) and --samples more: rows of samples.csv, of all ranks.

    prompts, prompt_ids: by question id, as text and as tokens. Noise is keyed by (seed, question, sample).
    """
    mine, rows = dist.share(questions), []
    for temperature, n in ((0.0, 1), (args.eval_temperature, args.samples)):
        name = f"{label} T={temperature:g}"
        found = run.kept_answers(name)  # before a kill
        missing = [[g for g in range(n) if (e.id, g) not in found] for e in mine]
        keys = [[noise_key(args.seed, EVALUATION, e.id, g) for g in row] for e, row in zip(mine, missing)]
        completions = sample_all(sampler, [prompt_ids[e.id] for e in mine], keys, args.max_new_tokens,
                                 temperature, run, run.counter(name, mine, tokenizer, keep=missing))
        for e, row, of_row in zip(mine, missing, completions):
            found |= {(e.id, g): completion for g, completion in zip(row, of_row)}
        flat = [(e, g, found[e.id, g], found[e.id, g].text(tokenizer)) for e in mine for g in range(n)]
        for part in range(0, len(flat), 100):  # so that a reward that hangs has few rows to try one by one
            rows += scored_rows(flat[part:part + 100], prompts, reward_functions, args, temperature, run)
    return dist.gather_rows(rows, "id", "sample")


def scored_rows(flat, prompts, reward_functions, args, temperature, run):
    """Rows of samples.csv from (question, sample, Completion, text) of one temperature."""
    questions, texts, shown = zip(*((e, text, prompts[e.id]) for e, _, _, text in flat))
    scored = rewards.score(reward_functions, questions, texts, shown, args.reward_timeout,
                           [c.finished for _, _, c, _ in flat])
    if scored["error"]:
        run.print(scored["error"])
    columns, rows = scored["rewards"], []
    for i, (e, g, completion, text) in enumerate(flat):
        judge = columns.get("math", scored["correct"]) if e.task == "math" else scored["correct"]
        right = judge[i] == 1  # NaN where it hung: not right
        rows.append({
            "temperature": temperature, "reward": scored["total"][i],
            **{f"reward/{name}": values[i] for name, values in columns.items()},
            "format": rewards.format([""], [text], [""])[0],
            **rewards.answer_row(e, g + (temperature > 0), completion, text, right),
            "prompt": shown[i], "seed": args.seed})
    return rows


def best_by(rewards, correct):
    """Best-of-n: the share of right ones among the samples with the highest reward; NaN is the lowest."""
    rewards = [-math.inf if math.isnan(value) else value for value in rewards]
    best = [right for value, right in zip(rewards, correct) if value == max(rewards)]
    return sum(best) / len(best)


def summarise(rows, ks, temperature, mixed=None, learned=()):
    """(metrics of one model's rows, ids of its mixed questions): those with right and with wrong samples.

    Rows of sample 0, greedy, give pass@1 and all but pass@k and maj@n, which the others give. mixed: ids from
    an earlier model, to be kept. learned: names of reward models, which get a best@n each.
    """
    first, samples = [row for row in rows if row["sample"] == 0], {}
    for row in rows:
        if row["sample"] > 0:
            samples.setdefault(row["id"], []).append(row)
    metrics = {"questions": len(first)}

    def report(name, values):
        metrics[name] = mean(values)
        metrics[f"{name}/low"], metrics[f"{name}/high"] = wilson(metrics[name], len(first))

    report("pass@1", [row["correct"] for row in first])
    if samples:
        right = {id: [row["correct"] for row in group] for id, group in samples.items()}
        n, at = len(samples[first[0]["id"]]), f"T={temperature:g}"
        for k in ks:
            report(f"pass@{k} {at}", [rewards.pass_at_k(n, sum(correct), k) for correct in right.values()])
        report(f"maj@{n} {at}", [
            majority([row["extracted"] for row in group], right[id]) for id, group in samples.items()])
        for name in learned:
            report(f"best@{n} by {name} {at}", [
                best_by([row[f"reward/{name}"] for row in samples[id]], right[id]) for id in samples])
        if mixed is None:
            mixed = [id for id, correct in right.items() if 0 < sum(correct) < n]
        metrics["acc_mixed"] = mean([row["correct"] for row in first if row["id"] in set(mixed)])
    metrics |= {
        "format": mean([row["format"] == 1 for row in first]),
        "truncated": mean([not row["finished"] for row in first]),
        "no_answer": mean([not row["extracted"] for row in first]),
        **rewards.text_metrics(first),
        "reward_failed": sum(math.isnan(value) for row in rows for name, value in row.items()
                             if name.startswith("reward/"))}
    return metrics, mixed


class OneBase:
    """Models by name, of which those on the same base share its weights: only the adapter is exchanged."""

    def __init__(self, names, dtype, device, args):
        bases = [models.absolute(models.base_of(name)) for name in names if name != "base"]
        if "base" in names and len(set(bases)) != 1:
            raise ValueError("--model base: the base of which model? The others stand on "
                             f"{len(set(bases))} different ones")
        self.names = {name: bases[0] if name == "base" else name for name in names}
        self.dtype, self.device, self.args, self.base, self.model = dtype, device, args, None, None

    def sampler(self, name, tokenizer, max_tokens):
        """A Sampler of the named model."""
        folder = models.resolve(self.names[name])
        settings = models.adapter_settings(folder)
        base = models.absolute(settings["base_model_name_or_path"] if settings else folder)
        if base != self.base:
            self.model = None  # the old one goes before the next comes
            self.model, self.base = models.load_model(
                base, self.dtype, self.device, max_tokens, split=self.args.shard,
                quantize=self.args.quantize), base
        for path, module in lora_modules(self.model).items():  # off with the last one's adapter
            self.model.set_submodule(path, module.base)
        for path, A, B, factor in models.adapter_pairs(self.model, folder):
            module = LoRALinear(self.model.get_submodule(path))
            module.A["adapter"], module.B["adapter"] = (nn.Parameter(part.to(self.device)) for part in (A, B))
            module.scale["adapter"], module.active = factor, "adapter"
            self.model.set_submodule(path, module)
        return generic.sampler(Sampler, self.model, models.stop_ids(self.model, tokenizer), self.args.slots,
                               self.dtype, StopTexts(tokenizer, self.args.stop, self.args.prompt_template))


def check_and_fill(args):
    """The arguments with the defaults of the run that is measured; what cannot work is refused."""
    named = [name for name in args.model if name != "base"]
    embedded = all(models.is_embedded(name) for name in named)
    of_run = next(filter(None, map(models.run_arguments, named)), {})  # asked as it was trained
    most = max(args.k, default=0)
    if min(args.k, default=0) < 1:
        raise ValueError(f"--k {' '.join(map(str, args.k))}: each k must be 1 or more")
    samples = args.samples or (most if most > 1 else 0)
    if most > max(1, samples):
        raise ValueError(f"--k {most} needs --samples {most} or more, not {samples}")
    for name, twice in (("model", args.model), ("preamble", args.preamble)):
        if len(set(twice)) < len(twice):
            raise ValueError(f"--{name}: {Counter(twice).most_common(1)[0][0]!r} is there twice")
    if samples and not args.eval_temperature > 0:
        raise ValueError(f"--eval-temperature {args.eval_temperature}: samples must differ; use more than 0")
    trained_on = of_run.get("data", "")
    if Path(trained_on).exists() or trained_on.startswith("mmmlu/"):  # these have no test split
        trained_on = ""
    template, dry_run = args.prompt_template, args.dry_run or bool(args.prompt)  # these leave nothing behind
    return replace(
        args, samples=samples, dry_run=dry_run, resume=args.resume and not dry_run,
        level=args.level or ("" if args.data else of_run.get("level", "")),
        stop=args.stop or tuple(of_run.get("stop", ())),
        prompt_template=of_run.get("prompt_template", template) if template == "{prompt}" else template,
        data=args.data or trained_on or ("arithmetic" if embedded else "gsm8k"),
        system=args.system or of_run.get("system", "" if embedded else data.THINK_ANSWER_SYSTEM))


def choose_questions(args, tokenizer):
    """(questions, in a dry run the longest; worked examples for --few-shot; the number of all questions)."""
    if args.prompt:
        return [data.Example(0, args.prompt, args.answer, task="math")], [], 1
    level, seed = args.level or None, args.seed
    runs = [models.run_arguments(name) for name in args.model if args.split == "train" and name != "base"]
    questions = data.questions_of_runs(runs, args.data, tokenizer)[:args.limit or None] or data.load_examples(
        args.data, args.split, level=level, limit=args.limit, seed=seed)
    if data.is_generated(args.data) and not args.limit:
        questions = questions[:500]
    if not all(e.answer for e in questions):
        raise ValueError(f"--data {args.data}: some of its questions have no gold answer")
    shown = data.worked_examples(args.data, args.few_shot, questions, level=level, seed=seed)
    longest = sorted(questions, key=lambda e: -len(e.text))[:args.slots * dist.world_size()]
    return longest if args.dry_run else questions, shown, len(questions)


def main(args: Args) -> None:
    # ---- set up: whatever can be wrong is found here ----
    device = dist.setup(args.device)
    args = check_and_fill(args)
    check_args(args)
    dtype = models.choose_dtype(args.dtype, device)
    reward_functions = rewards.parse_rewards(args.rewards, partial(
        rewards.LearnedReward, dtype=dtype, device=device, tokens_per_batch=16384))
    family = OneBase(args.model, dtype, device, args)
    tokenizers = {name: models.tokenizer_of(args, next(n for n in (name, *args.model) if n != "base"))
                  for name in args.model}  # the base is asked by the others' template
    questions, examples, n_all = choose_questions(args, tokenizers[args.model[-1]])
    if args.download_only:
        for name in args.model:
            models.download(family.names[name])
        return
    judged = any(e.task == "math" for e in questions) and all(r.name != "math" for r in reward_functions)
    judge = judged and importlib.util.find_spec("math_verify")
    if judge:
        reward_functions += rewards.parse_rewards(["math=0"])  # LaTeX answers: judged by it, not rewarded
    if any(spec.partition("=")[0].endswith(":math") for spec in args.rewards):
        raise ValueError("--rewards: a reward of your own cannot be named math, which judges LaTeX answers")
    learned = [r.name for r in reward_functions if isinstance(r.function, rewards.LearnedReward)]
    only_measure = args.dry_run and not args.prompt
    run = Run(args, __file__, device, tags=models.run_tags(args.model[-1], args.data))
    if judged and not judge:
        run.print("math_verify is not installed: LaTeX answers are compared as text")
    results = dist.broadcast(curves.read_metrics(run.path) if args.resume else [])
    done, mixed = {(row["model"], row["preamble"]) for row in results}, None
    if args.resume:
        run.keep_only(results, "model", "preamble")
    if results and (run.path / "mixed.json").exists():
        mixed = json.loads((run.path / "mixed.json").read_text())

    dist.stoppable = True
    for name, preamble in itertools.product(args.model, args.preamble):
        if (name, preamble) in done:
            continue
        begun, tokenizer = time.monotonic(), tokenizers[name]
        label = " ".join(filter(None, [name or "embedded", repr(preamble) if preamble else ""]))
        messages = {e.id: data.few_shot_messages(examples, e.prompt, preamble) for e in questions}
        prompts = {id: data.prompt_text(message) for id, message in messages.items()}
        prompt_ids = {id: data.encode_prompt(tokenizer, message, args.system, args.prompt_template)
                      for id, message in messages.items()}
        sampler = None  # the last one's weights and cache go before the next come
        sampler = family.sampler(name, tokenizer, max(map(len, prompt_ids.values())) + args.max_new_tokens)
        if only_measure:
            sampler.stop_ids, sampler.stop_texts, started = set(), None, time.monotonic()
        rows = answer_all(sampler, questions, prompts, prompt_ids, reward_functions, args, tokenizer,
                          run, label)
        if args.prompt:
            for row in rows:
                run.print(f"{label}, T={row['temperature']:g}: {row['completion']}\n"
                          f"{tables.reward_text(row)}, extracted {row['extracted']!r}")
            continue
        step = models.step_of(family.names[name])
        run.write_rows([{"model": name, "step": step, "preamble": preamble} | row for row in rows])
        metrics, mixed = summarise(rows, args.k, args.eval_temperature, mixed, learned)
        if mixed is not None and dist.is_main():
            (run.path / "mixed.json").write_text(json.dumps(mixed))
        results.append({"step": step, "model": name, "preamble": preamble} | metrics
                       | {"seconds": time.monotonic() - begun})
        run.log(step, {key: value for key, value in results[-1].items() if key != "step"})
        run.forget_answers()
        run.print(f"{label}: " + "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))

    # ---- the end ----
    if only_measure:
        seconds = time.monotonic() - started
        run.print(f"dry run: {run.memory_text()}; {len(questions)} questions at full length took "
                  f"{seconds:.1f} s, so {n_all} take at most "
                  f"{seconds * n_all / len(questions) / 3600:.3g} hours; nothing was kept")
    elif not args.prompt:
        run.print("\n" + tables.table([{k: v for k, v in row.items() if k != "time"} for row in results]))
        run.finish()


def replay(run, step, row):
    """Sample a row of a GRPO run once more, from the weights of its step, and print it token by token.

    ratio: the trainer's probability (transformers' forward pass) over the sampler's, at the same weights.
    Errors: ValueError if those weights were not kept, or what comes out is not what was recorded.
    """
    path, row = Path(run), tables.rollout(run, step, row)
    print(tables.rollout_text(row))
    if "group" not in row:
        raise ValueError(f"{path} has no rollouts; only those of grpo.py can be replayed")
    config = tables.read_config(path)
    older = {"quantize": "none", "tokenizer": "", "chat_template": ()}
    args = argparse.Namespace(**older | config["args"] | {"shard": False})
    data.now = datetime.fromisoformat(config.get("begun", str(data.now)))
    folder = weights_before(path, step) or args.model
    device = dist.setup(config["device"].partition(":")[0])
    dtype, tokenizer = models.choose_dtype(args.dtype, device), models.tokenizer_of(args, args.model)
    all_ids, longest = data.load_questions(args, tokenizer, 1, rewards.need_gold(args.rewards))[2:]
    prompt_ids = all_ids.get(int(row["id"]))
    if prompt_ids is None:
        raise ValueError(f"question {row['id']} is not in {args.data} any more")
    sampler = OneBase([folder], dtype, device, args).sampler(folder, tokenizer, longest)
    key = noise_key(args.seed, step, int(row["group"]), int(row["sample"]))
    ((completion,),) = sampler.sample([prompt_ids], [[key]], args.max_new_tokens, args.temperature)
    ids = torch.tensor([prompt_ids + completion.ids], device=device)
    with torch.no_grad():
        logits = sampler.model(ids).logits[0, len(prompt_ids) - 1:-1].float() / args.temperature
    trainer = logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids):, None])[:, 0].tolist()
    print(f"\n{'token':>24}  log-prob     ratio   advantage {float(row['advantage']):.4g}")
    for token, logprob, other in zip(completion.ids, completion.logprobs, trainer):
        print(f"{tokenizer.decode([token])!r:>24}  {logprob:8.4f}  {math.exp(other - logprob):8.5f}")
    total, recorded = sum(completion.logprobs), float(row["logprob"])
    same = (completion.text(tokenizer), str(len(trainer))) == (row["completion"], row["tokens"])
    if not same or abs(total - recorded) > 1e-3 * len(trainer):
        raise ValueError(f"sampled again it has {len(trainer)} tokens and log-prob {total:.4f}, but "
                         f"{row['tokens']} and {recorded:.4f} are recorded: other weights, data or machine")
    print(f"equal to what was recorded: {row['tokens']} tokens, log-prob {total:.4f}")


def replay_command(words):
    """`eval.py replay RUN --step N --row N`; a user's mistake ends as one line."""
    parser = argparse.ArgumentParser(prog="eval.py replay", description=replay.__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--row", type=int, default=0, help="number of the row in the step, from 0")
    try:
        replay(**vars(parser.parse_args(words)))
    except ValueError as error:
        sys.exit(f"error: {error}")


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


if __name__ == "__main__":
    if sys.argv[1:2] == ["replay"]:
        replay_command(sys.argv[2:])
    else:
        cli(main, Args)
