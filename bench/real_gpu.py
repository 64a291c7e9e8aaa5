"""A real chat model learns on a real card in the minutes there are: accuracy before and after, and curves.

    python bench/real_gpu.py --model DIR --data train.jsonl --test test.jsonl --seconds 260 --out OUT
    python bench/real_gpu.py --small --out OUT       # the embedded model on any machine, a CPU too

DIR is a small chat model, such as SmolLM2-135M-Instruct; the two files are GSM8K's. eval.py answers every
question of --test greedily, then after --sft passes of sft.py over the worked solutions of --data, and again
after grpo.py has gone on from there until its share of the time is over. Then star.py and ppo.py do the same
for as many sampled tokens as GRPO had, each only if at least half of GRPO's seconds are left; a run that had
fewer tokens is called cut short.

The prompt is TEMPLATE: of six, each tried greedily on the same 32 training questions (float32, 256 tokens),
it is the one under which most of SmolLM2-135M-Instruct's answers can be read: 26, against 15 with the
scripts' own <think>/<answer> message, whose format it never wrote, and 12 with the question alone. 0 to 2 of
32 were right under any of them, 5 of 192 in all; sampled at temperature 1, none of 64 (200 tokens) and only
17 of these could be read. So rarely right, it has little to reinforce: hence --sft 2, and --temperature 0.8.

Needs torch and transformers alone, and no network. OUT gets at most eight files, each as soon as there is
something to write, also when SIGTERM comes: real_gpu.md, summary.json, compare.md, curves.png, metrics.jsonl,
samples.csv, answers.csv, log.txt. Exit code 1 if a phase failed; the other phases run all the same.
"""

import csv
import importlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import redirect_stdout, suppress
from pathlib import Path

BEGUN = time.monotonic()  # importing torch is part of --seconds
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a card must not start CUDA here

import torch
import transformers

import runs
from common import curves, dist, models
from common.run import Run
from common.tables import read_csv

TEMPLATE = '{prompt}\n\nSolve it step by step. End with "The answer is" and the number.'
REWARDS = ("correctness=1", "digit=0.1")
GRACE = 30  # seconds that a run has to save itself once its time is over
SHORTEST = 15  # seconds of training below which a run is not begun, nor a later one with half of the first's
CUT = 1_800_000  # characters that samples.csv and answers.csv hold at most


class Bench:
    """What was asked for, what has been found so far, and the files that say so."""

    def __init__(self, a):
        self.a, self.begun = a, BEGUN
        self.out, self.runs = Path(a.out), Path(tempfile.mkdtemp(prefix="unrolled-real-"))
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / "log.txt"
        self.method = "fork"
        self.phases, self.skipped, self.trained, self.evaluated = [], [], {}, {}
        self.saved = []  # runs whose weights are there to go on from
        self.samples, self.current = {}, None

    def left(self):
        return self.begun + self.a.seconds - time.monotonic()

    def say(self, text):
        text = f"[{time.monotonic() - self.begun:6.1f} s] {text}"
        print(text, flush=True)
        with open(self.log, "a") as file:
            print(text, file=file)

    # ---- a phase: one script in a process of its own, so that its memory goes with it ----

    def phase(self, name, script, values, seconds):
        """Run script.main(Args(**values)), which is to save and end after `seconds`. Did it end well?"""
        out = self.runs / name
        self.say(f"{name}: {script}.py, at most {seconds:.0f} s")
        begun = time.monotonic()
        code, stopped = self.process(script, values | {"out": str(out)}, seconds)
        if code and not self.phases and self.method == "fork":  # a card that was touched before the fork
            self.say(f"{name}: failed in a forked process; once more in a new interpreter")
            self.method, out = "spawn", self.runs / f"{name}-again"
            code, stopped = self.process(script, values | {"out": str(out)}, seconds)
        figures = self.runs / f"{out.name}.json"
        found = json.loads(figures.read_text()) if figures.exists() else {}
        self.phases.append({"phase": name, "script": script, "ok": code == 0, "stopped": stopped,
                            "seconds": round(time.monotonic() - begun, 1), "run": str(out),
                            "dtype": values.get("dtype", "auto")} | found)
        self.say(f"{name}: {'ok' if code == 0 else f'FAILED, exit code {code}'}"
                 f"{', stopped by the clock' * stopped}, {self.phases[-1]['seconds']} s")
        return code == 0

    def process(self, script, values, seconds):
        sys.stdout.flush()
        self.current = process = multiprocessing.get_context(self.method).Process(
            target=work, args=(script, values, str(self.log), self.a.device))
        process.start()
        process.join(max(1.0, seconds))
        stopped = process.is_alive()
        if stopped:
            process.terminate()
            process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        self.current = None
        return process.exitcode, stopped

    # ---- the phases ----

    def settings(self):
        """Of the prompt and the model, the same in training and evaluation."""
        a = self.a
        if not a.model:
            return {"device": a.device, "max_new_tokens": a.max_new_tokens}
        return {"device": a.device, "max_new_tokens": a.max_new_tokens, "system": "none",
                "prompt_template": TEMPLATE}

    def evaluate(self, name, model):
        """Accuracy of `model` on the test questions, as rows by question; kept in `evaluated`."""
        a, begun = self.a, time.monotonic()
        values = self.settings() | {"model": (model,), "data": a.test, "limit": a.questions, "slots": 256}
        limit = self.left() - 2  # the first one's: should a forked process hang, there is time for another
        well = self.phase(f"eval-{name}", "eval", values, limit if self.phases else min(limit, max(
            60, 0.35 * a.seconds)))
        self.seconds_of_eval = time.monotonic() - begun
        folder = Path(self.phases[-1]["run"])
        if well and (folder / "samples.csv").exists():
            self.evaluated[name] = folder
        self.write()

    def train(self, name, script, values, seconds, shortest=SHORTEST):
        """One training run and the evaluation of what it has saved, if there is room for it."""
        room = seconds - 1.5 * self.seconds_of_eval - 5  # it saves itself, too
        if room < (2 if self.a.small else shortest):
            self.skipped.append(name)
            return self.say(f"{name}: no time left for it")
        self.phase(name, script, self.settings() | {"dtype": self.a.dtype} | values, room)
        run = Path(self.phases[-1]["run"])
        if (run / "metrics.jsonl").exists():
            self.trained[name] = run
            self.write()
        if (run / "final").exists() or any(run.glob("checkpoints/step-*")):
            self.saved.append(name)
            self.evaluate(name, str(run))

    def everything(self):
        a = self.a
        self.seconds_of_eval = 0.0
        model = a.model
        self.evaluate("before", model)
        common = {"data": a.data, "eval_questions": a.held_out, "save_every": 10, "keep": 1, "seed": a.seed}
        if not a.model:
            common |= {"train_questions": 500}
        if a.sft:
            name = "sft"
            values = common | {"model": model, "epochs": a.sft, "merge": True}
            self.train(name, "sft", values, 0.45 * self.left())
            model = str(self.trained[name]) if name in self.saved else model
        common |= {"model": model, "rewards": REWARDS if a.model else ("correctness=1", "format=0.2")}
        rows = a.prompts * a.group
        steps = {"max_steps": a.max_steps or 100_000, "eval_every": a.eval_every}
        kinds = {
            "grpo": ("grpo", steps | {
                "prompts_per_step": a.prompts, "num_generations": a.group, "slots": min(512, rows),
                "lr": a.lr, "temperature": a.temperature}),
            "ppo": ("ppo", steps | {
                "prompts_per_step": rows, "num_generations": 1, "slots": min(512, rows), "lr": a.lr,
                "temperature": a.temperature}),
            "star": ("star", {
                "sample_temperature": a.temperature, "questions": 2 * rows, "num_generations": 4,
                "slots": min(512, 8 * rows), "iterations": a.max_steps or 1000,
                "rewards": ("correctness=1",)})}
        first, *later = a.methods
        script, values = kinds[first]
        self.train(first, script, common | values, (a.share if later else 1) * self.left())
        found = self.figures(first)
        for name in later:  # each may take all that is left: the tokens end it
            script, values = kinds[name]
            self.train(name, script, common | values | {"token_budget": found.get("sampled_tokens", 0)},
                       self.left(), max(SHORTEST, 30 * found.get("minutes", 0)))

    # ---- what came of it ----

    def figures(self, name):
        """Of a training run: its steps, tokens, rates and memory."""
        run = self.trained.get(name)
        if not run:
            return {}
        lines = curves.read_metrics(run)

        def of(metric):
            return [line[metric] for line in lines if isinstance(line.get(metric), int | float)]

        (phase,) = (phase for phase in self.phases if phase["run"] == str(run))
        tokens, sampling = max(of("sampled_tokens"), default=0), sum(of("seconds/sample"))
        rewards = of("reward")
        return {
            "run": name, "dtype": phase["dtype"], "ok": phase["ok"], "stopped": phase["stopped"],
            "minutes": round(phase["seconds"] / 60, 2),
            "steps": max((line["step"] for line in lines), default=0), "sampled_tokens": tokens,
            "sampled_tokens_per_s": round(tokens / sampling) if sampling else None,
            "tokens_per_s_of_the_run": round(tokens / phase["seconds"]) if tokens else None,
            "seconds_sampling": round(sampling, 1), "seconds_updating": round(sum(of("seconds/update")), 1),
            "reward_first": rewards[0] if rewards else None, "reward_last": rewards[-1] if rewards else None,
            "peak_gb": round(max([*of("memory_gb"), phase.get("peak_gb", 0)], default=0), 2),
            "reserved_gb": phase.get("reserved_gb")}

    def accuracy(self, name, first):
        """Share of right answers, and the paired difference from those of `first`."""
        right = {row["id"]: int(row["correct"]) for row in read_csv(self.evaluated[name] / "samples.csv")}
        base = {row["id"]: int(row["correct"]) for row in read_csv(self.evaluated[first] / "samples.csv")}
        share = sum(right.values()) / len(right)
        found = {"of": name, "questions": len(right), "pass@1": share,
                 "interval": runs.wilson(share, len(right))}
        if name != first:
            changes = [right[id] - base[id] for id in base]
            better, worse = changes.count(1), changes.count(-1)
            found |= {"from": first, "difference": sum(changes) / len(changes),
                      "difference_interval": runs.bootstrap(changes), "wrong_to_right": better,
                      "right_to_wrong": worse, "mcnemar_p": runs.mcnemar(better, worse)}
        return found

    def summary(self):
        a = self.a
        first = next(iter(self.evaluated), None)
        start = "sft" if "sft" in self.evaluated else first  # what GRPO and the others began with
        accuracies = [self.accuracy(name, first if name in (first, "sft") else start)
                      for name in self.evaluated]
        card = next((phase["card"] for phase in self.phases if "card" in phase), "not known")
        return {"card": card, "torch": torch.__version__, "transformers": transformers.__version__,
                "python": sys.version.split()[0], "arguments": vars(a),
                "template": TEMPLATE if a.model else "", "rewards": REWARDS if a.model else (),
                "seconds": round(time.monotonic() - self.begun, 1),
                "accuracy": accuracies, "runs": [self.figures(name) for name in self.trained],
                "phases": self.phases, "skipped": self.skipped}

    def write(self):
        """All files, from what there is; what cannot be written is said, and the others are."""
        for part in (self.write_summary, self.write_metrics, self.write_samples, self.write_answers,
                     self.write_compare, self.draw):
            try:
                part()
            except Exception as error:  # noqa: BLE001 (a figure less, not all of them)
                self.say(f"{part.__name__}: {type(error).__name__}: {error}")

    def write_summary(self):
        found = self.summary()
        (self.out / "summary.json").write_text(json.dumps(found, indent=1))
        (self.out / "real_gpu.md").write_text(table(found))

    def write_metrics(self):
        with open(self.out / "metrics.jsonl", "w") as file:
            evaluated = {f"eval-{name}": run for name, run in self.evaluated.items()}
            for name, run in (self.trained | evaluated).items():
                for line in curves.read_metrics(run):
                    print(json.dumps({"run": name} | line), file=file)

    def write_samples(self):
        """The first and the last step's samples of each run."""
        for name, run in self.trained.items():
            if name not in self.samples and (run / "samples.csv").exists():  # tens of megabytes: read once
                of_run = read_csv(run / "samples.csv")
                steps = [int(row["step"]) for row in of_run]
                ends = dict.fromkeys([min(steps), max(steps)]) if steps else ()
                self.samples[name] = [row for end in ends for row in cut(
                    [{"run": name} | row for row, step in zip(of_run, steps) if step == end], CUT // 6)]
        write_rows(self.out / "samples.csv", [row for rows in self.samples.values() for row in rows])

    def write_answers(self):
        """Each test question with the answers of before and after beside each other."""
        columns = ("id", "prompt", "answer", "completion", "extracted", "correct", "tokens", "finished")
        by_question = {}
        for name, folder in self.evaluated.items():
            for row in read_csv(folder / "samples.csv"):
                shown = {"of": name} | {column: row[column] for column in columns}
                by_question.setdefault(row["id"], []).append(shown)
        write_rows(self.out / "answers.csv", cut([row for rows in by_question.values() for row in rows], CUT))

    def write_compare(self):
        if len(self.evaluated) > 1:
            text = io.StringIO()
            with redirect_stdout(text):
                runs.compare([*map(str, self.evaluated.values())], examples=2)
            (self.out / "compare.md").write_text(text.getvalue().replace(str(self.runs) + "/", ""))

    def draw(self):
        """Reward and held-out accuracy against what was sampled: the only fair axis for three methods."""
        if not self.trained:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = (("reward", "mean reward of a step's samples"), ("correct", "share right, T = 1"),
                  ("eval/pass@1", f"held-out pass@1, {self.a.held_out} questions"))
        for ax, (metric, title) in zip(figure.subplots(1, 3), panels):
            for i, (name, run) in enumerate(self.trained.items()):
                points, tokens = [], 0
                for line in curves.read_metrics(run):
                    tokens = line.get("sampled_tokens") or tokens
                    if isinstance(line.get(metric), int | float):
                        points.append((tokens / 1e6, line[metric]))
                if points:
                    ax.plot(*zip(*points), label=name, color=curves.COLOURS[i], linestyle=curves.STYLES[i],
                            marker="o" if len(points) < 12 else None, markersize=3)
            ax.set(title=title, xlabel="million tokens sampled")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.25)
            if ax.has_data():
                ax.legend(frameon=False, fontsize=8)
        figure.savefig(self.out / "curves.png", dpi=110)


def work(script, values, log, device):
    """A phase's process: the script's main with these arguments, its output in the log, then its figures."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's, until the script listens
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module = importlib.import_module(script)
    try:
        module.main(module.Args(**values))
    except dist.Stopped:  # as common.run.cli ends it
        Run.current.write_checkpoint()
        Run.current.finish()
    except ValueError as error:
        traceback.print_exc()
        sys.exit(f"error: {error}")
    finally:
        sys.stdout.flush()
        found = {"card": "CPU"}
        if device != "cpu" and torch.cuda.is_initialized():
            found = {"card": torch.cuda.get_device_name(),
                     "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                     "reserved_gb": round(torch.cuda.max_memory_reserved() / 2**30, 2)}
        out = Path(values["out"])
        out.with_name(f"{out.name}.json").write_text(json.dumps(found))


def cut(rows, room):
    """The first rows that hold no more than `room` characters together."""
    kept = []
    for row in rows:
        room -= sum(len(str(value)) for value in row.values()) + len(row)
        if room < 0:
            break
        kept.append(row)
    return kept


def write_rows(path, rows):
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)


def table(found):
    """The summary as Markdown."""
    accuracy = {entry["of"]: entry for entry in found["accuracy"]}
    runs = {run["run"]: run for run in found["runs"]}
    lines = ["run", "pass@1 before", "after", "difference, 95%", "McNemar p", "minutes", "steps",
             "sampled tokens", "tokens/s sampling", "tokens/s of the run", "peak GB"]
    lines = [lines, ["---"] * len(lines)]

    def of(values, form):
        return "-" if values is None else format(values, form)

    for name, run in runs.items():
        after = accuracy.get(name)
        before = accuracy.get(after["from"] if after and "from" in after else "before")
        interval = after and after.get("difference_interval")
        cut_short = run["stopped"] and name != found["arguments"]["methods"][0]  # which ends by the clock
        lines.append([
            name + " (cut short)" * cut_short + " FAILED" * (not run["ok"]),
            f"{before['pass@1']:.1%}" if before else "-", f"{after['pass@1']:.1%}" if after else "-",
            f"{after['difference']:+.1%} [{interval[0]:+.1%}, {interval[1]:+.1%}]" if interval else "-",
            of(after and after.get("mcnemar_p"), ".2g"), of(run["minutes"], ".1f"), str(run["steps"]),
            of(run["sampled_tokens"], ","), of(run["sampled_tokens_per_s"], ","),
            of(run["tokens_per_s_of_the_run"], ","), of(run["peak_gb"], ".1f")])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    n = next((entry["questions"] for entry in found["accuracy"]), 0)
    failed = [phase["phase"] for phase in found["phases"] if not phase["ok"]]
    whole = [f"{name} {entry['pass@1']:.1%} [{entry['interval'][0]:.1%}, {entry['interval'][1]:.1%}]"
             for name, entry in accuracy.items()]
    notes = [f"pass@1: {', '.join(whole) or 'nothing was evaluated'}."]
    notes += [f"{n} test questions, greedy; {found['card']}, torch {found['torch']}, transformers "
             f"{found['transformers']}, Python {found['python']}; {found['seconds']:.0f} s in all."]
    notes += [f"No time was left for: {', '.join(found['skipped'])}."] * bool(found["skipped"])
    notes += [f"FAILED (see log.txt): {', '.join(failed)}."] * bool(failed)
    return f"{text}\n\n{' '.join(notes)}\n"


def arguments():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="", help="folder of the model")
    add("--data", default="", help="file of training questions")
    add("--test", default="", help="file of test questions")
    add("--seconds", type=float, default=260, help="in all; what is left out is said")
    add("--out", required=True, help="folder for the files that come out")
    add("--methods", nargs="+", choices=("grpo", "star", "ppo"), default=["grpo", "star", "ppo"],
        help="one after the other")
    add("--share", type=float, default=0.6, help="of the time, for the first method and its evaluation")
    add("--sft", type=float, default=None, help="passes of sft.py first; 0: none, as with --small (else: 2)")
    add("--questions", type=int, default=0, help="test questions; 0: all")
    add("--held-out", type=int, default=256, help="questions of --data kept apart, for the curve")
    add("--prompts", type=int, default=32, help="questions in a step of GRPO")
    add("--group", type=int, default=16, help="samples of each; PPO takes as many rows")
    add("--max-new-tokens", type=int, default=256)
    add("--max-steps", type=int, default=0, help="steps (STaR: iterations) of a run; 0: until time is over")
    add("--eval-every", type=int, default=10, help="steps between points of the held-out curve")
    add("--temperature", type=float, default=0.8, help="of the samples to learn from")
    add("--lr", type=float, default=1e-4, help="peak learning rate of GRPO and PPO (LoRA, rank 32)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of training; auto: bfloat16 on CUDA")
    add("--seed", type=int, default=0)
    add("--device", default="cuda")
    add("--small", action="store_true", help="the embedded model and generated arithmetic, on the CPU")
    a = parser.parse_args()
    a.sft = (0 if a.small else 2) if a.sft is None else a.sft
    if a.small:
        a.model, a.data, a.test, a.device, a.lr = "", "arithmetic", "arithmetic", "cpu", 0.0
        a.prompts, a.group, a.max_new_tokens = min(a.prompts, 8), min(a.group, 4), min(a.max_new_tokens, 48)
        a.questions, a.held_out = a.questions or 100, min(a.held_out, 32)
        a.seconds = min(a.seconds, 60)
    elif not (a.model and a.data and a.test):
        parser.error("--model, --data and --test are needed; --small runs the embedded model on any machine")
    return a


def main():
    a = arguments()

    def leave(*_):
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)
    with suppress(Exception), torch.device("meta"):  # imports the model's code once, before the forks
        transformers.AutoModelForCausalLM.from_config(models.load_config(a.model))
    bench = Bench(a)
    try:
        bench.everything()
    finally:
        if bench.current and bench.current.is_alive():
            bench.current.kill()
        bench.write()
        print(f"\n{(bench.out / 'real_gpu.md').read_text()}", flush=True)
    sys.exit(not all(phase["ok"] for phase in bench.phases))


if __name__ == "__main__":
    main()
