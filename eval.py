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
import hashlib
import importlib.util
import itertools
import json
import math
import sys
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import curves, data, dist, models, rewards, shard, tables
from common.run import Run, RunArgs, check_args, cli, mean, replace_text, retry_smaller, weights_before

# Shapes: B rows, V vocabulary, P prompts, D hidden size, H heads, K head size, R LoRA rank, N tokens in all.
EVALUATION = -1  # in noise keys, where training has a step's number


@dataclass
class Args(RunArgs):
    # ---- run ----
    resume: bool = False  # go on with the evaluation in --out: what it has measured is not measured again
    seed: int = 0  # seed of the choice of questions and of sampling noise
    dry_run: bool = False  # answer the longest questions at full length, project the time, keep nothing

    # ---- data ----

    # data set name, hub id, or local .jsonl/.csv/.parquet; empty: arithmetic (embedded model), else gsm8k
    data: str = ""
    split: str = "test"  # of a named data set or folder; a single file is taken whole
    limit: int = 0  # questions, drawn with the seed; 0: all, of a generated task 500
    level: str = ""  # difficulty of a generated task, such as 3 or 1-4; empty: the task's own default
    few_shot: int = 0  # worked examples of the train split before each question, as turns of the chat
    preamble: tuple[str, ...] = ("",)  # text in front of the question; a row of results for each
    system: str = ""  # system message, or none; empty: asks for <think>/<answer> (embedded model: none)
    prompt_template: str = "{prompt}"  # text around the question, {prompt} in it
    prompt: str = ""  # answer this question alone, print its rewards and leave nothing behind
    answer: str = ""  # gold answer of --prompt

    # ---- model ----

    # hub ids, folders, runs or checkpoints, a row of results for each; base: the base of the others
    model: tuple[str, ...] = ("",)
    # of the frozen weights and the computation; auto: bfloat16 on CUDA, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # keep the frozen decoder layers in 4 bits (bitsandbytes; QLoRA, arXiv 2305.14314)
    quantize: Literal["none", "nf4"] = "none"
    # split the weights over the ranks of torchrun (FSDP2): the frozen base, or with --full all there is
    shard: bool = False
    # with --shard, gather them layer by layer while sampling too: slower, for what one GPU cannot hold
    reshard: bool = False

    # ---- sampling ----
    max_new_tokens: int = 512  # longest completion; a longer one counts as truncated
    # report pass@k for these k, from --samples, and maj@n of all of them; 1 alone: the greedy answer only
    k: tuple[int, ...] = (1,)
    samples: int = 0  # samples per question beside the greedy answer; 0: the largest --k, none if that is 1
    slots: int = 256  # rows sampled at a time per rank; halved when memory runs out

    # ---- method ----

    # with weights: correctness, format, digit, mark, math, model:RUN, or your file.py:name=1
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

    prompts, prompt_ids: by question id, as text and as tokens. Noise is keyed by (seed, question, sample):
    the same for all models, slots and ranks.
    """
    mine, rows = dist.share(questions), []
    for temperature, n in ((0.0, 1), (args.eval_temperature, args.samples)):
        keys = [[noise_key(args.seed, EVALUATION, e.id, g) for g in range(n)] for e in mine]
        completions = sample_all(
            sampler, [prompt_ids[e.id] for e in mine], keys, args.max_new_tokens, temperature, run,
            run.counter(f"{label} T={temperature:g}", mine, tokenizer))
        flat = [(e, g, c, c.text(tokenizer)) for e, row in zip(mine, completions) for g, c in enumerate(row)]
        for part in range(0, len(flat), 100):  # so that a reward that hangs has few rows to try one by one
            rows += scored_rows(flat[part:part + 100], prompts, reward_functions, args, temperature, run)
    return dist.gather_rows(rows, "id", "sample")


def scored_rows(flat, prompts, reward_functions, args, temperature, run):
    """Rows of samples.csv from (question, sample, Completion, text) of one temperature."""
    questions, texts = [e for e, *_ in flat], [text for *_, text in flat]
    asked = [prompts[e.id] for e in questions]
    scored = rewards.score(reward_functions, questions, texts, asked, args.reward_timeout)
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
            "prompt": asked[i], "seed": args.seed})
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
        right = {id: [row["correct"] for row in of] for id, of in samples.items()}
        n, at = len(samples[first[0]["id"]]), f"T={temperature:g}"
        for k in ks:
            report(f"pass@{k} {at}", [rewards.pass_at_k(n, sum(correct), k) for correct in right.values()])
        report(f"maj@{n} {at}", [
            majority([row["extracted"] for row in of], right[id]) for id, of in samples.items()])
        for name in learned:
            report(f"best@{n} by {name} {at}", [
                best_by([row[f"reward/{name}"] for row in of], right[id]) for id, of in samples.items()])
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
        if settings:
            r, alpha = settings["r"], settings["lora_alpha"]
            if settings.get("use_rslora"):
                alpha *= r**0.5
            add_lora(self.model, "adapter", r, alpha, settings["target_modules"],
                     settings.get("layers_to_transform"))
            models.load_adapter(folder, adapter_tensors(self.model, "adapter"))
        return Sampler(self.model, models.stop_ids(self.model, tokenizer), self.args.slots, self.dtype,
                       by_layer=self.args.reshard)


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
        prompt_template=of_run.get("prompt_template", template) if template == "{prompt}" else template,
        data=args.data or trained_on or ("arithmetic" if embedded else "gsm8k"),
        system=args.system or of_run.get("system", "" if embedded else data.THINK_ANSWER_SYSTEM))


def choose_questions(args):
    """(questions, in a dry run the longest; worked examples for --few-shot; the number of all questions)."""
    if args.prompt:
        return [data.Example(0, args.prompt, args.answer, task="math")], [], 1
    level, seed = args.level or None, args.seed
    questions = data.load_examples(args.data, args.split, level=level, limit=args.limit, seed=seed)
    if args.data in data.GENERATED and not args.limit:
        questions = questions[:500]
    n, examples = len(questions), data.worked_examples(args.data, args.few_shot, questions, level=level,
                                                       seed=seed)
    if args.dry_run:
        questions = sorted(questions, key=lambda e: -len(e.text))[:args.slots * dist.world_size()]
    return questions, examples, n


def forget_unfinished(run, results, done):
    """Leave in metrics.jsonl and samples.csv what belongs to a finished row: a kill can come between."""
    if dist.is_main():
        run.replace_rows("samples.csv", [row for row in run.read_rows("samples.csv")
                                         if (row["model"], row["preamble"]) in done])
        replace_text(run.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in results))
    dist.barrier()


def main(args: Args) -> None:
    # ---- set up: whatever can be wrong is found here ----
    device = dist.setup(args.device)
    args = check_and_fill(args)
    check_args(args)
    dtype = models.choose_dtype(args.dtype, device)
    reward_functions = rewards.parse_rewards(args.rewards, partial(
        rewards.LearnedReward, dtype=dtype, device=device, tokens_per_batch=16384))
    family = OneBase(args.model, dtype, device, args)
    tokenizers = {name: models.load_tokenizer(family.names[name]) for name in args.model}
    questions, examples, n_all = choose_questions(args)
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
        forget_unfinished(run, results, done)
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
            sampler.stop_ids, started = set(), time.monotonic()
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
        run.print(f"{label}: " + "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))

    # ---- the end ----
    if only_measure:
        seconds = time.monotonic() - started
        run.print(f"dry run: {run.memory_text()}; {len(questions)} questions at full length took "
                  f"{seconds:.1f} s, so {n_all} take at most "
                  f"{tables.clock(seconds * n_all / len(questions))}; nothing was kept")
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
    config = json.loads((path / "config.json").read_text())
    given = {"quantize": "none"} | config["args"] | {"shard": False, "reshard": False}
    args = argparse.Namespace(**given)
    folder = weights_before(path, step) or args.model
    device = dist.setup(config["device"].partition(":")[0])
    dtype, tokenizer = models.choose_dtype(args.dtype, device), models.load_tokenizer(args.model)
    train, _ = data.train_validation(
        args.data, n_train=args.train_questions, n_validation=args.eval_questions,
        level=args.level or None, seed=args.seed)
    question = next((e for e in train if str(e.id) == row["id"]), None)
    if question is None:
        raise ValueError(f"question {row['id']} is not in {args.data} any more")
    prompt_ids = data.encode_prompt(tokenizer, question.prompt, args.system, args.prompt_template)
    sampler = OneBase([folder], dtype, device, args).sampler(folder, tokenizer, 0)
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


# Copied from grpo.py::adapter_tensors
def adapter_tensors(model, name: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of adapter `name` by its layer's path: what `models.save_adapter` and `load_adapter` take."""
    return {path: (module.A[name], module.B[name])
            for path, module in lora_modules(model).items() if name in module.A}


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


if __name__ == "__main__":
    if sys.argv[1:2] == ["replay"]:
        replay_command(sys.argv[2:])
    else:
        cli(main, Args)
