"""The run directory: arguments, metrics, samples and checkpoints on disk; terminal progress, resume, retry.

    runs/NAME/ config.json  SCRIPT.py  log.txt  metrics.jsonl  samples.csv  eval.csv  [git.diff]
               checkpoints/step-N/ (the saved weights, training.pt, state.json)  final/

Only rank 0 writes and prints; every rank may call everything here.
"""

import atexit
import csv
import dataclasses
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from common import curves, dist, memory, models, rewards


def cli(main, Args) -> None:
    """Read the command line into `Args` and call `main`; a user's mistake ends as one line on stderr.

    `--config FILE` (YAML or JSON, also a run's config.json) and `--resume` (the config.json of `--out`) give
    the values that the command line does not. UNROLLED_TRACEBACK=1 shows a mistake's traceback all the same.
    """
    import tyro

    try:
        main(tyro.cli(Args, default=_defaults(Args, sys.argv[1:]),
                      description=sys.modules["__main__"].__doc__))
    except ValueError as error:
        if os.environ.get("UNROLLED_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")  # exit code 1, as for any failed command
    finally:
        dist.finish()


def _defaults(Args, argv):
    def value_of(flag):
        for i, word in enumerate(argv):
            if word == flag and i + 1 < len(argv):
                return argv[i + 1]
            if word.startswith(flag + "="):
                return word[len(flag) + 1:]
        return ""

    path = value_of("--config")
    if "--resume" in argv:
        if not value_of("--out"):
            raise ValueError("--resume needs --out RUN, the run directory to go on with")
        path = path or f"{value_of('--out')}/config.json"
        if not os.path.exists(path):
            raise ValueError(f"--out {value_of('--out')} --resume: there is no run in that directory")
    if not path:
        return Args()
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"--config {path}: not valid YAML or JSON ({reason})") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: not a list of arguments with values, such as 'lr: 0.001'")
    values = {key.replace("-", "_"): value for key, value in values.get("args", values).items()}
    fields = {field.name: field for field in dataclasses.fields(Args)}
    if unknown := set(values) - set(fields):
        raise ValueError(f"--config {path}: unknown {', '.join(sorted(unknown))}; known: {', '.join(fields)}")
    for key, value in values.items():
        kind = fields[key].type
        many = typing.get_origin(kind) is tuple
        allowed = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else (value,)
        if value not in allowed:
            raise ValueError(f"--config {path}: {key} is {value!r}, but takes {', '.join(allowed)}")
        if many != isinstance(value, list | tuple) or (kind in (int, bool) and type(value) is not kind):
            wanted = "a list" if many else f"one value ({getattr(kind, '__name__', kind)})"
            raise ValueError(f"--config {path}: {key} is {value!r}, but takes {wanted}")
        try:  # YAML reads 1e-4 as text, and a level of 3 as a number
            values[key] = tuple(value) if many else kind(value) if kind in (float, str) else value
        except (TypeError, ValueError):
            raise ValueError(f"--config {path}: {key} is {value!r}, but takes a number") from None
    return Args(**values)


def check_out(args) -> None:
    """Refuse an `--out` that holds something or cannot be written, and negative limits. Writes nothing.

    Errors: ValueError.
    """
    for name in ("max_steps", "token_budget"):
        if getattr(args, name, 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: cannot be negative")
    path = Path(args.out or "runs")
    if args.resume or args.dry_run:
        return
    if args.out and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--out {path} exists and is not empty; "
                         "add --resume to go on with it, or choose another")
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {path}: cannot write in {parent}")


class Run:
    """One run's directory and terminal.

    State: `path`; `step`, the last step logged; `seconds`, what each phase of the present step took; `stop`,
    true once SIGINT, SIGTERM or SIGUSR1 arrived (the loop then saves and leaves).
    Errors: ValueError if the directory holds a run already (and not `args.resume`), or cannot be written.
    """

    _utilisation = True  # of the GPU: false once asking for it has failed

    def __init__(self, args, script, device, *, tags=()):
        self.args, self.device, self.name = args, device, Path(script).stem
        self.seconds, self.stop, self._wandb, self._table = {}, False, None, []
        self._profiled = 0
        self._started, self._first_step, self._line = time.time(), None, 0
        self.path = Path(dist.broadcast(self._make_directory(script, tags) if dist.is_main() else None))
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._on_signal)
        if args.wandb and dist.is_main():
            import wandb

            self._wandb = wandb
            wandb.init(project="unrolled", name=self.path.name, dir=str(self.path),
                       config=dataclasses.asdict(args), resume="allow",
                       id=hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16])
        self.print(f"run: {self.path} ({dist.describe(device)})")

    def _make_directory(self, script, tags):
        args = self.args
        settings = json.dumps(dataclasses.asdict(args), sort_keys=True, default=str)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
        name = "-".join([self.name, *map(str, tags), f"s{args.seed}", digest, time.strftime("%m%d-%H%M%S")])
        path = Path(args.out or f"runs/{name}")
        try:
            if args.dry_run:
                path = Path(tempfile.mkdtemp(prefix="unrolled-"))
                atexit.register(shutil.rmtree, path, ignore_errors=True)
            elif args.resume:
                if not (path / "config.json").exists():
                    raise ValueError(f"--out {path} --resume: there is no run in that directory")
                return str(path)
            while not (args.out or args.dry_run) and path.exists():  # two runs started in the same second
                path = path.with_name(path.name + "x")
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            shutil.copy(script, path / Path(script).name)
            git = self._git()
            diff = git.pop("diff")
            if diff:
                (path / "git.diff").write_text(diff)
            packages = ("torch", "transformers", "numpy", "datasets", "tyro")
            named = [args.model] if isinstance(args.model, str) else [m for m in args.model if m != "base"]
            config = {"args": dataclasses.asdict(args), "id": digest, "argv": sys.argv, "git": git,
                      "models": [models.fingerprint(name) for name in named],
                      "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
                      "host": platform.node(), "world_size": dist.world_size(), "device": str(self.device)}
            (path / "config.json").write_text(json.dumps(config, indent=1, default=str))
        except OSError as error:
            raise ValueError(f"--out {path}: cannot write there ({error.strerror})") from None
        return str(path)

    @staticmethod
    def _git():
        def git(*words):
            done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
            return done.stdout if done.returncode == 0 else ""

        try:
            diff = git("diff", "HEAD")
            return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(diff), "diff": diff}
        except OSError:  # no git on this machine
            return {"commit": "", "dirty": False, "diff": ""}

    def _on_signal(self, number, frame):
        if self.stop:  # a second Ctrl-C means it
            raise KeyboardInterrupt
        self.stop = True
        if dist.is_main():  # not print: the signal may have come inside another
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving after this step (again to leave at once)\n".encode())

    # ---- terminal ----

    def print(self, text="") -> None:
        """A line on rank 0's terminal and in log.txt."""
        if dist.is_main():
            self._clear()
            print(text, flush=True)
            with open(self.path / "log.txt", "a") as file:
                print(text, file=file)

    def _clear(self):
        if self._line:
            sys.stderr.write("\r" + " " * self._line + "\r")
            self._line = 0

    def progress(self, text) -> None:
        """A line that the next one overwrites, on a terminal only."""
        if dist.is_main() and sys.stderr.isatty():
            self._clear()
            sys.stderr.write(text[:shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
            self._line = len(text)

    def self_check(self, checks: dict[str, tuple[float, float]]) -> None:
        """Print the measured step-0 checks as one line. Errors: ValueError naming the first that is off.

        checks: name -> (value, the largest value allowed).
        """
        for name, (value, limit) in checks.items():
            if not value <= limit:  # also catches NaN
                raise ValueError(f"self-check: {name} is {value:.3g}, at most {limit:.3g} is right; "
                                 "nothing was trained")
        self.print("self-check: "
                   + ", ".join(f"{name} {value:.1g}" for name, (value, _) in checks.items()) + "  ok")

    # ---- metrics and samples ----

    @contextmanager
    def phase(self, name):
        """Time a phase of the step: `seconds/NAME` in the step's metrics, the device's queue included."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def log(self, step, metrics, last_step=None, show=()) -> dict:
        """Append a line to metrics.jsonl (and wandb); with `last_step`, print `show` metrics and the ETA.

        Returns the metrics with what was added: the seconds of each phase, and memory.
        """
        if last_step is not None:
            metrics = (metrics | {f"seconds/{name}": value for name, value in self.seconds.items()}
                       | self._memory())
            metrics["seconds"] = sum(self.seconds.values())
            self.seconds = {}
        self._write_metrics({"step": step, **metrics, "time": time.time()})
        if last_step is not None:
            self._first_step = self._first_step or (step, time.time() - metrics["seconds"])
            rate = (time.time() - self._first_step[1]) / (step - self._first_step[0] + 1)
            values = "  ".join(f"{name} {metrics[name]:.3g}" for name in show if name in metrics)
            self.print(f"step {step:{len(str(last_step))}d}/{last_step}  {values}  "
                       f"{metrics['seconds']:.2f} s  ETA {clock(rate * (last_step - step))}")
        return metrics

    def _write_metrics(self, line):
        if dist.is_main():
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v
                                       for k, v in line.items()}) + "\n")
            if self._wandb:
                self._wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def _memory(self):
        if self.device.type == "cuda":
            found = {"memory_gb": torch.cuda.max_memory_allocated() / 2**30}
            if self._utilisation:
                try:  # percent of the last second or so; needs nvidia-ml-py
                    found["gpu_utilisation"] = torch.cuda.utilization(self.device)
                except Exception:  # not installed, no driver, not allowed: asked once
                    self._utilisation = False
            return found
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, kilobytes here
        return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}

    def write_rows(self, rows, file_name="samples.csv") -> None:
        """Append rows (dicts with the same keys, in order) to a CSV of the run; only rank 0's are written."""
        if not rows or not dist.is_main():
            return
        path = self.path / file_name
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
        if self._wandb and file_name == "samples.csv":
            self._table = (self._table + rows)[-200:]  # wandb tables are rewritten whole: keep the newest
            table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in self._table])
            self._wandb.log({"samples": table}, commit=False)

    def log_evaluation(self, step, rows, more) -> None:
        """Held-out answers (rows of `rewards.answer_row`, of all ranks) to eval.csv, and what they come to.

        The answer of sample 0 is the greedy one, which counts; `more`: further metrics.
        """
        self.write_rows([{"step": step} | row for row in rows], "eval.csv")
        metrics = rewards.answer_metrics([row for row in rows if row["sample"] == 0]) | more
        self.log(step, metrics)
        self.print(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def read_rows(self, file_name):
        return read_csv(self.path / file_name) if (self.path / file_name).exists() else []

    # ---- checkpoints ----

    def save(self, step, write_weights, training) -> None:
        """Write checkpoints/step-N whole or not at all: aside, then renamed; old ones beyond `args.keep` go.

        write_weights(folder) writes the model's part; `training`: tensors and plain values, the rest.
        """
        def write(folder):
            write_weights(folder)
            torch.save(training, folder / "training.pt")
            (folder / "state.json").write_text(json.dumps({"step": step, "complete": True}))

        self._write_whole(self.path / f"checkpoints/step-{step}", write)
        if dist.is_main():
            for old in self._checkpoints()[:-self.args.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def save_final(self, write_weights) -> None:
        """Write final/, whole or not at all: the trained model, for others to load."""
        self._write_whole(self.path / "final", write_weights)

    def _write_whole(self, folder, write):
        if dist.is_main():
            aside = folder.with_name(f".tmp-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write(aside)
            for file in aside.iterdir():  # on disk before the rename makes it the newest
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        dist.barrier()

    def _checkpoints(self):
        found = [p for p in self.path.glob("checkpoints/step-*") if (p / "state.json").exists()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def load(self):
        """(folder, training) of the newest checkpoint, or (None, None); later metrics and samples are cut.

        What was logged after the checkpoint will be logged again by the steps that are done again.
        """
        found = self._checkpoints()
        step = int(found[-1].name.removeprefix("step-")) if found else -1
        if dist.is_main():
            self._cut("metrics.jsonl", lambda line: json.loads(line)["step"] <= step)
            for name in ("samples.csv", "eval.csv"):
                rows = self.read_rows(name)
                kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= step]
                if len(kept) < len(rows):
                    (self.path / name).unlink()
                    self.write_rows(kept, name)
        dist.barrier()
        if not found:
            self.print("no checkpoint in that run: starting from step 0")
            return None, None
        self.print(f"resuming from {found[-1]}")
        return found[-1], torch.load(found[-1] / "training.pt", map_location="cpu", weights_only=True)

    def _cut(self, name, keep):
        path = self.path / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and keep(line)]  # a kill can leave half a line
        if len(kept) < len(lines):
            path.write_text("".join(kept))

    # ---- odds and ends ----

    def profile(self, step):
        """A context: the first `args.profile` steps of this process write trace-STEP.json, for Perfetto."""
        self._profiled += 1
        if self._profiled > self.args.profile or not dist.is_main():
            return nullcontext()
        target = str(self.path / f"trace-{step}.json")
        return torch.profiler.profile(on_trace_ready=lambda trace: trace.export_chrome_trace(target))

    def before_after(self, what="pass@1") -> None:
        """Print held-out accuracy at the first and the last evaluation, paired by question, from eval.csv."""
        rows = [row for row in self.read_rows("eval.csv") if row["sample"] == "0"]
        steps = sorted({int(row["step"]) for row in rows})
        if len(steps) < 2:
            return
        first, last = ({row["id"]: float(row["correct"]) for row in rows if int(row["step"]) == step}
                       for step in (steps[0], steps[-1]))
        before, after = ([scores[i] for i in first if i in last] for scores in (first, last))
        low, high = paired_interval(before, after)
        n = len(before)
        self.print(f"held-out {what} before {sum(before) / n:.3f}, after {sum(after) / n:.3f} "
                   f"(step {steps[-1]}): {sum(after) / n - sum(before) / n:+.3f}, "
                   f"95% [{low:+.3f}, {high:+.3f}], n = {n}")

    def dry_run_report(self, metrics, steps, tokens, config, row, sampler=None, context=0) -> None:
        """Print what the one step of a dry run measured; its directory goes when the process ends.

        config: the model's; row: tokens of the longest row trained on; context: of the longest prompt and
        completion sampled, if not `row`.
        """
        self.print(f"dry run: peak memory {metrics['memory_gb']:.2f} GB; one step at the largest sizes took "
                   f"{metrics['seconds']:.1f} s ({tokens:.0f} tokens trained), so {steps} steps take at most "
                   f"{clock(metrics['seconds'] * steps)} (h:mm:ss), evaluation apart; nothing was kept")
        self.print_memory(config, row, sampler, context)

    def print_memory(self, config, row, sampler=None, context=0) -> None:
        """Print the memory estimated, by part, beside the measured peak."""
        setup = partial(memory.of_run, self.args, self.name, config, self.device, row, context,
                        ranks=dist.world_size())
        samplers = [sampler, None] if row else [sampler]  # of this, and of a whole run
        self.print(memory.report(self._memory()["memory_gb"],
                                 *(memory.estimate(config, **setup(sampler=of)) for of in samplers)))

    def finish(self) -> None:
        """Draw curves.png, where matplotlib is installed, and say where the run lies."""
        if dist.is_main() and len({line["step"] for line in curves.read_metrics(self.path)}) > 1:
            try:
                curves.draw([self.path], self.path / "curves.png")
            except ValueError as error:
                self.print(str(error))
        self.print(f"done in {clock(time.time() - self._started)}: {self.path}")
        if self._wandb:
            self._wandb.finish()


def read_csv(path) -> list[dict]:
    """The rows of a CSV that `Run.write_rows` wrote, as text."""
    csv.field_size_limit(2**31 - 1)  # completions can be long
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paired_interval(before, after):
    """95% interval of the mean paired difference after - before: normal approximation over questions."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    error = (sum((d - mean) ** 2 for d in differences) / max(1, n - 1) / n) ** 0.5
    return mean - 1.96 * error, mean + 1.96 * error


def retry_smaller(attempt, size, device, smallest, note):
    """attempt(size), halving `size` on all ranks when one of them runs out of memory. Returns (result, size).

    The retry stands outside the `except`: inside it the traceback would keep the failed tensors alive.
    `attempt` must be repeatable (zero its own gradients). Errors: ValueError once `smallest` does not fit.
    """
    while True:
        result, failed = None, False
        try:
            result = attempt(size)
        except RuntimeError as error:  # CUDA's own kind, or what the CPU's allocator says
            failed = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if not failed:
                raise
        if not dist.any_rank(failed, device):
            return result, size
        if size <= smallest:
            raise ValueError(f"out of memory at the smallest size ({note} {size}); "
                             "use a smaller model or shorter texts")
        size = max(smallest, size // 2)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if dist.is_main():
            print(f"out of memory: {note} is now {size}", file=sys.stderr, flush=True)


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def clock(seconds) -> str:
    """1:02:03, or 2:03 under an hour."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
