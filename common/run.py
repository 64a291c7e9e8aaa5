"""The run directory: arguments, metrics, samples and checkpoints on disk; terminal progress, resume, retry.

    runs/NAME/ config.json  SCRIPT.py  log.txt  metrics.jsonl  samples.csv  eval.csv  [git.diff]
               checkpoints/step-N/ (the saved weights, training.pt, state.json)  best/  final/

Only rank 0 writes and prints; all ranks make the same calls.
"""

import atexit
import csv
import dataclasses
import fcntl
import hashlib
import inspect
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from common import curves, data, dist, models, rewards, shard
from common.data import every_level
from common.draws import Completion
from common.tables import clock, read_config, read_csv, rollout_text


@dataclasses.dataclass
class RunArgs:
    """The arguments that every script has: of its run directory and its process."""

    out: str = ""  # run directory; empty: one of its own under runs/
    resume: bool = False  # go on with the run in --out from its newest checkpoint, with its arguments
    # YAML or JSON file of arguments (a run's config.json too); the command line overrides it
    config: str = ""
    seed: int = 0  # seed of data order, adapter initialisation and sampling noise
    wandb: bool = False  # also log to Weights & Biases
    # build all, run one step at the largest sizes, print peak memory and projected time, keep nothing
    dry_run: bool = False
    # fetch model and data into the hub's cache, then end: the run itself then needs no network
    download_only: bool = False
    device: str = ""  # cuda, mps or cpu; empty: the best there is


@dataclasses.dataclass
class TrainArgs(RunArgs):
    """Those of every script that trains."""

    # steps between checkpoints (one is always written at the end, and on SIGTERM or Ctrl-C)
    save_every: int = 50
    keep: int = 2  # newest checkpoints to keep
    profile: int = 0  # steps to trace with torch.profiler, from the first on

    # ---- model ----
    model: str = ""  # hub id, local folder or run directory; empty: the embedded model
    tokenizer: str = ""  # hub id or folder of another tokenizer than the model's
    chat_template: tuple[str, ...] = ()  # file, another model's, or none; values (enable_thinking=false)
    # of the frozen weights and the computation; auto: bfloat16 on CUDA, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    full: bool = False  # train all weights (kept in float32) instead of an adapter
    # keep the frozen decoder layers in 4 bits (bitsandbytes; QLoRA, arXiv 2305.14314)
    quantize: Literal["none", "nf4"] = "none"
    # recompute the layers in the backward pass: less memory, about a third more time
    gradient_checkpointing: bool = False
    # split the weights over the ranks of torchrun (FSDP2): the frozen base, or with --full all there is
    shard: bool = False
    # padded tokens per forward and backward pass and GPU, halved if out of memory; 0: what fits, CPU 2048
    tokens_per_batch: int = 0

    # ---- LoRA ----
    lora_r: int = 32  # rank
    lora_alpha: float = 64  # the adapter's output is scaled by lora_alpha / lora_r
    lora_targets: tuple[str, ...] = ("all-linear",)  # linear layers to adapt, by the ends of their names
    train_layers: str = ""  # decoder layers to adapt, such as 20-27; empty: all
    merge: bool = False  # write final/ as a plain model with the adapter merged in, not as an adapter


@dataclasses.dataclass
class QuestionArgs(TrainArgs):
    """Those of the scripts that sample answers to questions: which ones."""

    # ---- data ----

    # data set name, hub id, or local .jsonl/.csv/.parquet; empty: arithmetic (embedded model), else gsm8k
    data: str = ""
    level: str = ""  # difficulty of a generated task, such as 3 or 1-4; empty: the task's own default
    # open the levels (of --level, or all) one by one, the next at this accuracy on the newest; 0: all at once
    curriculum: float = 0.0
    curriculum_window: int = 256  # newest answers that this accuracy is measured over, at least
    curriculum_share: float = 0.25  # of the questions that are of the levels before the newest
    train_questions: int = 0  # questions to train on; 0: all that are not held out
    eval_questions: int = 500  # questions held out of the training split (never of the test split)
    system: str = ""  # system message, or none; empty: asks for <think>/<answer> (embedded model: none)
    prompt_template: str = "{prompt}"  # text around the question, {prompt} in it
    max_prompt_tokens: int = 0  # leave out questions with a longer prompt; 0: none


def cli(main, Args) -> None:
    """Read the command line into `Args` and call `main`; a user's mistake ends as one line on stderr.

    `--config FILE` (YAML or JSON, also a run's config.json) and `--resume` (the config.json of `--out`) give
    the values that the command line does not. UNROLLED_TRACEBACK=1 shows a mistake's traceback all the same.
    Exit codes: 0 the run is finished, 1 it failed, 75 a signal ended it and `--resume` goes on, 130 Ctrl-C.
    """
    def to_the_end():
        try:
            main(parse(Args, sys.argv[1:]))
        except dist.Stopped:
            dist.stop_signal = dist.stop_signal or "another rank's signal"
            Run.current.write_checkpoint()
            Run.current.finish()

    try:
        to_the_end()
    except KeyboardInterrupt:
        dist.leave_now(130)
    except Exception as error:
        if isinstance(error, ValueError) and not os.environ.get("UNROLLED_TRACEBACK"):
            dist.fail(str(error))
        if out_of_memory(error):  # outside of what `retry_smaller` tries again: loading, gathering weights
            dist.fail(f"out of memory where nothing can be made smaller ({dist.first_line(error)}); "
                      "MEMORY.md says what a model needs")
        if dist.world_size() == 1:
            raise
        if lost := dist.lost_rank(error):
            dist.fail(f"{lost}: {dist.first_line(error)}; --resume goes on from the last checkpoint")
        traceback.print_exc()
        dist.fail(f"{type(error).__name__}: {dist.first_line(error)}")
    dist.finish()
    if dist.stop_signal:
        sys.exit(dist.STOPPED)


OF_THE_PROCESS = {"out", "resume", "config", "dry_run", "profile"}  # not of what the run does
MAY_CHANGE = {"max_steps", "token_budget", "eval_every", "save_every", "keep", "show_every", "wandb", "slots",
              "tokens_per_batch"} | OF_THE_PROCESS


def parse(Args, argv):
    """The arguments of a command line, behind those of --config or --resume; --help shows them by headings.

    Errors: ValueError for a file that cannot be read, or a resumed run's argument that would change.
    """
    import tyro

    heading, headings = "run", {}
    for cls in reversed(Args.__mro__[:-1]):
        for line in inspect.getsource(cls).splitlines():
            if found := re.fullmatch(r"    # ---- (.+) ----", line):
                heading = found[1]
            elif found := re.match(r"    (\w+):", line):
                headings[found[1]] = headings.get(found[1], heading)
        heading = "run"
    fields = []
    for name in dict.fromkeys(headings.values()):  # to tyro: `Args` once more, with its fields alone
        own = {field.name: field for field in dataclasses.fields(Args) if headings[field.name] == name}
        part = type("Args", (Args,), {"__module__": Args.__module__, "__doc__": "",
                                      "__dataclass_fields__": own})
        fields.append((name, tyro.conf.OmitArgPrefixes[part], dataclasses.field(default_factory=part)))
    grouped = dataclasses.make_dataclass("Grouped", fields)

    def read(words):
        args = tyro.cli(grouped, args=words, description=sys.modules["__main__"].__doc__)
        return Args(**{name: getattr(getattr(args, heading), name) for name, heading in headings.items()})

    known, _ = tyro.cli(RunArgs, args=argv, return_unknown_args=True, add_help=False)
    given, path = _config_words(known, headings)
    try:
        args = read([*given, *argv])
        of_run = read(given) if known.resume else args
    except SystemExit as end:
        if end.code and given:
            print(f"given were the arguments of {path}, then the command line's", file=sys.stderr)
        raise
    for name in headings.keys() - MAY_CHANGE:
        if (now := getattr(args, name)) != (then := getattr(of_run, name)):
            raise ValueError(f"--resume: --{name.replace('_', '-')} is {now!r}, but the run began with "
                             f"{then!r}; for another run choose another --out, without --resume")
    return args


def _config_words(known, names):
    """What --config, or a resumed run's config.json, gives, as words of a command line; and the file.

    known: the RunArgs of the command line; names: the arguments that the script has.
    """
    path = known.config
    if known.resume:
        if not known.out:
            raise ValueError("--resume needs --out RUN, the run directory to go on with")
        path = path or f"{known.out}/config.json"
        if not os.path.exists(path):
            raise ValueError(f"--out {known.out} --resume: there is no run in that directory")
    if not path:
        return [], path
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"--config {path}: not valid YAML or JSON ({reason})") from None
    if isinstance(values, dict) and "args" in values:  # a run's: all but which run it is
        if not isinstance(values["args"], dict):
            raise ValueError(f"--config {path}: not a run's config.json: its args are {values['args']!r:.40}")
        if known.resume and "begun" in values:
            data.now = datetime.fromisoformat(values["begun"])
        script, values = values.get("argv", ["another script"])[0], values["args"]
        if known.resume and (strange := values.keys() - names):
            raise ValueError(f"--out {known.out} --resume: that run is {Path(script).name}'s; this script "
                             f"has no {', '.join(sorted(strange)[:3])}")
        values = {key: value for key, value in values.items() if key not in ("out", "resume", "config")}
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: not a list of arguments with values, such as 'lr: 0.001'")
    words = []
    for key, value in values.items():
        flag = str(key).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={'' if value is None else value}")
    return words, path


MAY_BE_0 = ("seed", "warmup_steps", "max_refills", "clip_eps_low", "clip_eps_high", "value_clip", "gamma",
            "gae_lambda", "simpo_gamma", "eval_temperature", "epochs")
AT_MOST_1 = ("gamma", "gae_lambda", "curriculum", "curriculum_share")
WAYS_OUT = {"lora_r": " (or train all weights with --full)", "max_grad_norm": " (inf: no clipping)",
            "temperature": " (training needs samples that differ)"}


def check_ranges(args) -> None:
    """Refuse numbers out of range, by one rule: positive, or 0 as well where 0 is the default or in MAY_BE_0.

    Errors: ValueError, naming the argument and its value; for NaN, too.
    """
    for field in dataclasses.fields(args):
        if field.type not in (int, float):
            continue
        name, value = field.name, getattr(args, field.name)
        if field.default == 0 or name in MAY_BE_0:
            right, wanted = value >= 0, "cannot be negative"
        else:
            right, wanted = value > 0, "must be 1 or more" if field.type is int else "must be more than 0"
        if name in AT_MOST_1:
            right, wanted = 0 <= value <= 1, "must be from 0 to 1"
        if not right:
            raise ValueError(f"--{name.replace('_', '-')} {value}: {wanted}{WAYS_OUT.get(name, '')}")


def defaults(args, device, lr, data="gsm8k", system=data.THINK_ANSWER_SYSTEM):
    """A copy of the arguments, those filled in whose default depends on others; `check_args` first.

    lr: the peak learning rate for the "embedded" model, "full" training and an "adapter". data, system: what
    stands for an empty --data and --system where the model is not the embedded one.
    """
    check_args(args)
    embedded = models.is_embedded(args.model)
    filled = {"lr": lr["embedded" if embedded else "full" if args.full else "adapter"],
              "tokens_per_batch": {"cpu": 2048, "cuda": 0}.get(device.type, 8192),  # a CPU's caches are small
              "data": "arithmetic" if embedded else data, "system": "" if embedded else system}
    if getattr(args, "curriculum", 0):
        filled["level"] = every_level(args.data or filled["data"])
    return dataclasses.replace(args, **{name: getattr(args, name) or value
                                        for name, value in filled.items() if hasattr(args, name)})


def check_args(args) -> None:
    """Refuse what no script can do. Writes nothing. Errors: ValueError.

    An `--out` that holds something or cannot be written, numbers out of range, ways of saving memory that
    exclude each other, pass@k of more samples than there are.
    """
    if getattr(args, "quantize", "none") != "none":
        reasons = {"full": "4 bits are too coarse to train", "shard": "FSDP2 splits plain weights",
                   "merge": "the adapter belongs to a base in 4 bits"}
        for other in [name for name in reasons if getattr(args, name, False)]:
            raise ValueError(f"--quantize {args.quantize} does not go with --{other}: {reasons[other]}")
    check_ranges(args)
    most = max(getattr(args, "eval_k", ()), default=0)
    if most and most > args.eval_samples:
        raise ValueError(f"--eval-k {most} needs --eval-samples {most} or more")
    path = Path(args.out or "runs")
    if args.resume or args.dry_run:
        return
    # what begins with a dot is left from a start that was killed
    if args.out and path.exists() and (not path.is_dir() or any(p.name[0] != "." for p in path.iterdir())):
        raise ValueError(f"--out {path} exists and is not empty; "
                         "add --resume to go on with it, or choose another")
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {path}: cannot write in {parent}")


@dataclasses.dataclass
class RunState:
    """What a checkpoint holds beside weights, optimizers and random numbers; a script adds its own fields.

    Plain values, tensors, and lists of dataclasses, which come back as dicts.
    """

    step: int = 0
    sampled_tokens: int = 0  # for training, by all ranks
    tokens_per_batch: int = 0  # --tokens-per-batch and --slots, as far as memory has allowed them
    slots: int = 0


class Run:
    """One run's directory and terminal.

    State: `path`; `seconds`, what each phase of the present step took; `bad_steps`, the updates in a row that
    were skipped; `unrewarded`, the steps in a row without a row whose rewards worked; what `restore` was
    given, and the state that is not written yet.
    Errors: ValueError if the directory holds a run already (and not `args.resume`), or cannot be written.
    """

    current = None  # the one of this process, for `cli` to save when a signal comes
    _utilisation = True  # of the GPU: false once asking for it has failed

    def __init__(self, args, script, device, *, tags=()):
        self.args, self.device, self.name = args, device, Path(script).stem
        self.seconds, self._wandb, self._table, self._unsaved = {}, None, [], None
        self._profiled = self.bad_steps = self.unrewarded = 0
        self._started, self._first_step, self._line = time.time(), None, 0
        if Run.current and Run.current._lock:
            Run.current._lock.close()
        Run.current, self._lock = self, None
        self.path = Path(dist.broadcast(self._make_directory(script, tags) if dist.is_main() else None))
        dist.listen()
        if args.wandb and not args.dry_run and dist.is_main():
            import wandb

            try:
                wandb.init(project=os.environ.get("WANDB_PROJECT", "unrolled"), name=self.path.name,
                           dir=str(self.path), config=dataclasses.asdict(args), resume="allow",
                           id=hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16])
            except Exception as error:  # no key, no network: of many kinds
                if not args.resume:  # nothing is in it yet
                    shutil.rmtree(self.path, ignore_errors=True)
                raise ValueError(f"--wandb: {dist.first_line(error)} (wandb login, WANDB_MODE=offline, or "
                                 "leave it out)") from None
            self._wandb = wandb
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
                dist.at_exit.append(partial(shutil.rmtree, path, ignore_errors=True))
            elif args.resume:
                if not (path / "config.json").exists():
                    raise ValueError(f"--out {path} --resume: there is no run in that directory")
                self._take(path)
                config = read_config(path)
                config["args"] |= {name: value for name, value in dataclasses.asdict(args).items()
                                   if name in MAY_CHANGE - OF_THE_PROCESS}
                replace_text(path / "config.json", json.dumps(config, indent=1, default=str))
                return str(path)
            while not (args.out or args.dry_run) and path.exists():  # two runs started in the same second
                path = path.with_name(path.name + "x")
            path.mkdir(parents=True, exist_ok=True)
            self._take(path)
            if (path / "config.json").exists():
                raise ValueError(f"--out {path}: another run has just begun there")
            git = self._git()
            diff = git.pop("diff")
            packages = ("torch", "transformers", "numpy", "datasets", "tyro")
            named = [args.model] if isinstance(args.model, str) else [m for m in args.model if m != "base"]
            config = {"args": dataclasses.asdict(args), "id": digest, "argv": sys.argv,
                      "begun": data.now.isoformat(), "git": git,
                      "models": [models.fingerprint(name) for name in named],
                      "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
                      "host": platform.node(), "world_size": dist.world_size(), "device": str(self.device)}
            # first of all: a run that is killed from here on can be resumed
            replace_text(path / "config.json", json.dumps(config, indent=1, default=str))
            (path / "checkpoints").mkdir(exist_ok=True)
            shutil.copy(script, path / Path(script).name)
            if diff:
                (path / "git.diff").write_text(diff)
        except OSError as error:
            raise ValueError(f"--out {path}: cannot write there ({error.strerror})") from None
        return str(path)

    def _take(self, path):
        """Lock the directory for as long as this process lives: by a file that is never replaced."""
        self._lock = open(path / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {path}: another process is at work on that run") from None
        except OSError:  # not on every file system
            pass

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

    # ---- terminal ----

    def print(self, text="") -> None:
        """A line on rank 0's terminal and in log.txt."""
        if dist.is_main():
            self._clear()
            print(text, flush=True)
            with suppress(OSError), open(self.path / "log.txt", "a") as file:  # a full disk is said elsewhere
                print(text, file=file)

    def _clear(self):
        if self._line:
            sys.stderr.write("\r" + " " * self._line + "\r")
            self._line = 0

    def counter(self, doing, examples=None, tokenizer=None, keep=None):
        """For a sampler to call as answers end: how many have; with `examples`, how many of them are right.

        keep: the numbers of the samples of each example: each is on disk from its end on (`kept_answers`).
        Errors: dist.Stopped if a signal asks to leave.
        """
        started, right = time.monotonic(), {}

        def progress(done, total, ended):
            if keep:
                with self._append(f"answers-{dist.rank()}.jsonl") as file:
                    for p, g, c in ended:
                        answer = doing, examples[p].id, keep[p][g], dataclasses.asdict(c)
                        file.write(json.dumps(answer) + "\n")
            dist.check_stop()
            if not sys.stderr.isatty():
                return
            left = (time.monotonic() - started) / done * (total - done)
            text = f"{doing}: {done}/{total} answers, ETA {clock(left)}"
            if examples:
                right.update({(p, g): rewards.judge([examples[p]], [c.text(tokenizer)], [c.finished])[0]
                              for p, g, c in ended})
                text += f", {sum(right.values()) / done:.1%} right"
            self.progress(text)

        return progress

    def kept_answers(self, doing) -> dict:
        """Completions by (question's id, sample) that a `counter` of that name has kept, on all ranks."""
        found = {}
        for path in self.path.glob("answers-*.jsonl"):
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # half a line, from a kill
                    name, question, sample, values = json.loads(line)
                    if name == doing:
                        found[question, sample] = Completion(**values)
        return found

    def forget_answers(self) -> None:
        """They are in samples.csv."""
        dist.barrier()
        for path in self.path.glob("answers-*.jsonl") if dist.is_main() else ():
            path.unlink()
        dist.barrier()

    def progress(self, text) -> None:
        """A line that the next one overwrites, on a terminal only. Errors: Stopped if a signal came."""
        dist.check_stop()
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
        dist.stoppable = True
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
            with self._append("metrics.jsonl") as file:
                file.write(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v
                                       for k, v in line.items()}) + "\n")
            if self._wandb:
                self._wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def _memory(self):
        if self.device.type == "cuda":
            found = {"memory_gb": torch.cuda.max_memory_allocated() / 2**30,  # of tensors,
                     "memory_reserved_gb": torch.cuda.max_memory_reserved() / 2**30}  # with gaps and graphs
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
        with self._append(file_name) as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
        if self._wandb and file_name == "samples.csv":
            self._table = (self._table + rows)[-200:]  # wandb tables are rewritten whole: keep the newest
            table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in self._table])
            self._wandb.log({"samples": table}, commit=False)

    @contextmanager
    def _append(self, name):
        try:
            with open(self.path / name, "a", newline="", encoding="utf-8") as file:
                yield file
        except OSError as error:
            raise ValueError(f"{self.path / name}: cannot write ({error.strerror}); make room, then go on "
                             f"from the last checkpoint with --out {self.path} --resume") from None

    def log_rollouts(self, state, rows, more, show=()) -> dict:
        """Log a step that sampled: this rank's rows of samples.csv, and `more` metrics; returns all metrics.

        Means are over the rows of all ranks; a reward that is NaN is left out of its mean. Counts what was
        sampled into `state` (sampled_tokens, accumulated_reward). show: metrics for the terminal.
        """
        args, rows = self.args, dist.gather_rows(rows, "group", "sample")
        self.write_rows(rows)
        names = [name for name in rows[0] if name.startswith("reward")]
        known = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in names}
        self.unrewarded = 0 if known["reward"] else self.unrewarded + 1
        n, n_tokens, average = len(rows), sum(row["tokens"] for row in rows), mean(known["reward"])
        state.sampled_tokens += n_tokens
        state.accumulated_reward += sum(known["reward"])
        metrics = self.log(state.step, {
            **{name: mean(values) for name, values in known.items()},
            "reward/std": mean([(value - average) ** 2 for value in known["reward"]]) ** 0.5,
            "reward/min": min(known["reward"], default=0.0), "reward/max": max(known["reward"], default=0.0),
            "accumulated_reward": state.accumulated_reward, "sampled_tokens": state.sampled_tokens,
            **({"correct": mean([row["correct"] for row in rows])} if any(r["answer"] for r in rows) else {}),
            "tokens": n_tokens / n,
            "tokens/max": max(row["tokens"] for row in rows),
            "truncated": 1 - mean([row["finished"] for row in rows]),
            "entropy": -sum(row["logprob"] for row in rows) / n_tokens,
            "reward_failed": n - len(known["reward"]), **more}, self._last_step(state), show)
        if metrics["truncated"] > 0.5 and not getattr(args, "pay_truncated", False):
            self.print(f"  {metrics['truncated']:.0%} of the answers hit --max-new-tokens "
                       f"{args.max_new_tokens}")
        if state.step % args.show_every == 0:
            self.print(rollout_text(rows[0]))
        return metrics

    def log_iteration(self, state, metrics) -> None:
        """What an iteration begins with, as of its first step."""
        metrics = {"iteration": state.iteration, "sampled_tokens": state.sampled_tokens} | metrics
        self.log(state.first_step, metrics)
        self.print(f"iteration {state.iteration}: " + "  ".join(
            f"{name} {value:.4g}" for name, value in metrics.items() if name != "iteration"))

    def _last_step(self, state):
        """--max-steps, or fewer where --token-budget ends the run before, at the present pace."""
        budget = self.args.token_budget
        last = math.ceil(state.step * budget / state.sampled_tokens) if budget else math.inf
        return max(state.step, min(self.args.max_steps, last))

    def log_evaluation(self, step, rows, more=None, ks=()) -> None:
        """Held-out answers (rows of `rewards.answer_row`, of all ranks) to eval.csv, and what they come to.

        The answer of sample 0 is the greedy one, which counts; the others give pass@k for each of `ks`.
        `more`: further metrics.
        """
        self.write_rows([{"step": step} | row for row in rows], "eval.csv")
        metrics = rewards.answer_metrics([row for row in rows if row["sample"] == 0]) | (more or {})
        metrics |= rewards.pass_at_ks([row for row in rows if row["sample"] > 0], ks)
        self.log_held_out(step, metrics)

    def log_held_out(self, step, metrics) -> None:
        """Log and print held-out metrics; where they are the best so far, also than step 0's, write best/.

        By pass@1, else the reward, else ranking accuracy, else the loss, the lower the better.
        """
        self.log(step, metrics)
        self.print(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        scores = ("eval/pass@1", "eval/reward", "eval/ranking_accuracy", "eval/loss")
        name = next((name for name in scores if name in metrics), None)
        if name is None or step == 0 or self.args.dry_run:
            return
        sign, better = -1 if name == "eval/loss" else 1, False
        if dist.is_main():
            start = [line[name] for line in curves.read_metrics(self.path)
                     if line["step"] == 0 and line.get(name) is not None]
            better = math.isfinite(metrics[name]) and all(sign * metrics[name] > sign * score
                         for score in [*start, *(best["score"] for best in [self.best()] if best)])
        if dist.broadcast(better):
            note = json.dumps({"step": step, "metric": name[5:], "score": metrics[name]})
            error = self._write_whole(self.path / "best", None, self._save_weights, partial(_note, note))
            if error:
                self.print(f"step {step}: best/ cannot be written ({error}); going on")

    def best(self) -> dict:
        """Step, metric and score of best/; {} where there is none."""
        path = self.path / "best/best.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def read_rows(self, file_name):
        return read_csv(self.path / file_name) if (self.path / file_name).exists() else []

    def replace_rows(self, file_name, rows) -> None:
        """Write a CSV of the run anew, whole or not at all; without rows there is none."""
        if not rows:
            (self.path / file_name).unlink(missing_ok=True)
            return
        (self.path / f".{file_name}").unlink(missing_ok=True)
        self.write_rows(rows, f".{file_name}")
        os.replace(self.path / f".{file_name}", self.path / file_name)

    def keep_only(self, results, *names) -> None:
        """Keep `results` in metrics.jsonl and their rows in samples.csv, alike in `names`."""
        done = {tuple(row[name] for name in names) for row in results}
        if dist.is_main():
            self.replace_rows("samples.csv", [row for row in self.read_rows("samples.csv")
                                              if tuple(row[name] for name in names) in done])
            replace_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in results))
        dist.barrier()

    # ---- checkpoints ----

    def restore(self, state, load_weights, save_weights, sampler=None, **parts) -> dict:
        """Take note of what a checkpoint is made of and, with --resume, fill it from the newest one.

        load_weights(folder), save_weights(folder): the model's part. parts: optimizers, and lists of
        parameters beside the model's part, by name. Returns what `save` was given more, {} at a fresh start.
        Errors: ValueError if something is missing in the checkpoint.
        """
        self.state, self.sampler, self._parts, self._save_weights = state, sampler, parts, save_weights
        folder, saved = self.load() if self.args.resume and not self.args.dry_run else (None, None)
        if not folder:
            return {}
        fields = [field.name for field in dataclasses.fields(state)]
        if missing := sorted({*parts, *fields, "rng"} - saved.keys()):
            raise ValueError(f"{folder}: no {', '.join(missing)} in it (another version of {self.name}.py "
                             f"wrote it): start another run with --model {folder}")
        load_weights(folder)
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                part.load_state_dict(saved.pop(name))
            else:
                with torch.no_grad():
                    for p, value in zip(part, saved.pop(name), strict=True):
                        p.copy_(value)
        torch.set_rng_state(saved.pop("rng"))
        most_tokens = state.tokens_per_batch
        for name in fields:
            setattr(state, name, saved.pop(name))
        state.tokens_per_batch = min(most_tokens, state.tokens_per_batch)
        if sampler:
            sampler.slots = min(sampler.slots, state.slots or sampler.slots)
        return saved

    def is_last(self, state) -> bool:
        """Whether the run ends here: after --max-steps, or --token-budget; a dry run after its first step."""
        spent = 0 < getattr(self.args, "token_budget", 0) <= state.sampled_tokens
        return spent or state.step >= self.args.max_steps or (self.args.dry_run and state.step > 0)

    def take_step(self, norm, *optimizers, finite=True) -> None:
        """A step of each optimizer; skipped and reported where a number is not finite. No gradient is left.

        norm: of the gradient; finite: whether what was sampled was. `save` ends the run after five in a row.
        """
        if math.isfinite(norm) and finite:
            self.begin_update()
            for optimizer in optimizers:
                optimizer.step()
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            self.print(f"step {self.state.step}: the {'gradient' if finite else 'model'} is not finite; the "
                       f"update is skipped ({self.bad_steps} in a row)")
        for optimizer in optimizers:
            optimizer.zero_grad()

    def begin_update(self) -> None:
        """From here to the next `save` no signal gives up the step: the weights are the last ones no more."""
        self._unsaved, dist.stoppable = None, False

    def save(self, due, **more) -> bool:
        """The state after a whole step, written if it is `due` or a signal came. True: leave the loop.

        more: further values by name, or functions that make them when they are written. A signal that comes
        in the next step, before `begin_update`, gives that step up and writes this state.
        Errors: ValueError after five updates in a row that were not finite, or three steps whose rewards
        failed on every row; the state is written before.
        """
        if self.sampler:
            self.state.slots = self.sampler.slots
        self._unsaved = dataclasses.replace(self.state), {"rng": torch.get_rng_state(), **more}
        dist.stoppable = True
        stop, wrong = dist.any_rank(bool(dist.stop_signal), self.device), ""
        if self.bad_steps >= 5:
            wrong = f"the loss was not finite in {self.bad_steps} updates in a row: lower --lr"
        if self.unrewarded >= 3:
            wrong = f"--rewards: one failed on every row in {self.unrewarded} steps (why stands above)"
        if stop:
            dist.stop_signal = dist.stop_signal or "another rank's signal"
        if due or stop or wrong:
            self.write_checkpoint()
        if wrong:
            raise ValueError(f"{wrong}; the state is in {self.path}")
        return stop

    def write_checkpoint(self) -> None:
        """Write checkpoints/step-N whole or not at all, then let old ones beyond `args.keep` go.

        Written aside, hashed, renamed and verified before an older one is deleted. If it cannot be written
        (a full disk), the run reports it and goes on: the next one may succeed.
        Errors: ValueError if it cannot be written and the run is about to end.
        """
        if self._unsaved is None:  # nothing new since the last one
            return
        state, more = self._unsaved
        values = dataclasses.asdict(state)
        values |= {name: value() if callable(value) else value for name, value in more.items()}
        values |= {name: part.state_dict() if isinstance(part, torch.optim.Optimizer)
                   else [p.detach() for p in part] for name, part in self._parts.items()}
        values, step = shard.take_out(values, split := {}), state.step

        def write_split(folder):
            if split:
                shard.save(folder / "training", split)

        def write_values(folder):
            if dist.is_main():
                with open(folder / "training.pt", "wb") as file:  # whose errors say more than torch's own
                    torch.save(values, file)

        error = self._write_whole(self.path / f"checkpoints/step-{step}", step,
                                  self._save_weights, write_split, write_values)
        if error:
            kept = self._checkpoints()
            said = (f"step {step}: the checkpoint cannot be written ({error}); the last one is "
                    f"{kept[-1].name if kept else 'none'}")
            if dist.stop_signal:
                raise ValueError(f"{said}: make room, then --out {self.path} --resume")
            self.print(f"{said}; going on")
            return
        self._unsaved = None
        if dist.is_main():
            for old in self._checkpoints()[:-self.args.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def save_final(self, write_weights) -> None:
        """Write final/, whole or not at all: the trained model, for others to load. Errors: ValueError."""
        if error := self._write_whole(self.path / "final", None, write_weights):
            raise ValueError(f"{self.path}/final cannot be written ({error}): make room, then "
                             f"--out {self.path} --resume")
        dist.ignore_signals()

    def _write_whole(self, folder, step, *writes):
        """Returns what went wrong, or "", on all ranks.

        writes: called one after the other with the folder, on all ranks: the next only if none has failed.
        """
        aside = folder.with_name(f".tmp-{folder.name}")

        def make():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

        def seal():
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            for file in files:  # on disk before the rename makes it the newest
                sync(file)
            if step is not None:
                for name in ("metrics.jsonl", "samples.csv", "eval.csv"):  # what it goes with
                    if (self.path / name).exists():
                        sync(self.path / name)
                names = [str(file.relative_to(aside)) for file in files]
                replace_text(aside / "state.json", json.dumps({
                    "step": step, "complete": True, "sha256": dict(zip(names, all_sha256(files)))}))
            old = folder.with_name(f".old-{folder.name}")
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            aside.rename(folder)
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
            return damage(folder) if step is not None else ""

        for work in (make, *(partial(write, aside) for write in writes), seal):
            error = ""
            try:
                if dist.is_main() or work not in (make, seal):
                    error = work() or ""
            except (OSError, RuntimeError, SafetensorError) as failed:  # torch.save's and safetensors' own
                error = getattr(failed, "strerror", None) or dist.first_line(failed)
            if error := next(filter(None, dist.gather(error)), ""):
                if dist.is_main():
                    shutil.rmtree(aside, ignore_errors=True)
                return error
        return ""

    def _checkpoints(self):
        found = [p for p in self.path.glob("checkpoints/step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def load(self):
        """(folder, training) of the newest whole checkpoint, or (None, None); what was logged later is cut.

        What was logged after the checkpoint will be logged again by the steps that are done again. One that
        is cut short or changed is named, set aside as damaged-step-N, and the one before it is taken.
        """
        folder = None
        if dist.is_main():
            found = self._checkpoints()
            for left in self.path.glob("checkpoints/.*"):  # of a save that was killed
                shutil.rmtree(left, ignore_errors=True)
            while found and (wrong := damage(found[-1])):
                bad = found.pop()
                self.print(f"{bad} is damaged ({wrong}); using "
                           f"{found[-1].name if found else 'none: starting from step 0'}")
                shutil.rmtree(bad.with_name(f"damaged-{bad.name}"), ignore_errors=True)
                bad.rename(bad.with_name(f"damaged-{bad.name}"))
            folder = found[-1] if found else None
            step, damaged = int(folder.name[5:]) if folder else -1, []
            if (self.path / "metrics.jsonl").exists():
                lines = curves.read_metrics(self.path, damaged)
                replace_text(self.path / "metrics.jsonl", "".join(
                    json.dumps(line) + "\n" for line in lines if line["step"] <= step))
            for name in ("samples.csv", "eval.csv"):
                if (self.path / name).exists():
                    rows = read_csv(self.path / name, damaged)
                    self.replace_rows(name, [row for row in rows if int(row["step"]) <= step])
            for place, text in damaged:  # by a power cut
                self.print(f"{place} is not what was written: it is set aside in damaged.txt")
                with open(self.path / "damaged.txt", "a", encoding="utf-8") as file:
                    file.write(f"{place}: {text}\n")
        folder = dist.broadcast(folder and str(folder))
        if not folder:
            self.print("no checkpoint in that run: starting from step 0")
            return None, None
        self.print(f"resuming from {folder}")
        saved = torch.load(Path(folder) / "training.pt", map_location="cpu", weights_only=True)
        saved = shard.put_back(saved, self.device, split := {})
        if split:
            shard.load(Path(folder) / "training", split)
        return Path(folder), saved

    # ---- odds and ends ----

    def profile(self, step):
        """A context: the first `args.profile` steps of this process write trace-STEP.json, for Perfetto."""
        self._profiled += 1
        if self._profiled > self.args.profile or not dist.is_main():
            return nullcontext()
        target = str(self.path / f"trace-{step}.json")
        return torch.profiler.profile(on_trace_ready=lambda trace: trace.export_chrome_trace(target))

    def before_after(self, what="pass@1") -> None:
        """Print held-out accuracy at the first and the last evaluation, paired by question, from eval.csv.

        The reward instead where no question has a gold answer.
        """
        rows = [row for row in self.read_rows("eval.csv") if row["sample"] == "0"]
        steps = sorted({int(row["step"]) for row in rows})
        if len(steps) < 2:
            return
        column = "correct"
        if not any(row.get("answer", "pairs have none") for row in rows):
            what = column = "reward"
        first, last = ({row["id"]: float(row[column]) for row in rows if row[column] != "nan"
                        and int(row["step"]) == step} for step in (steps[0], steps[-1]))
        before, after = ([scores[i] for i in first if i in last] for scores in (first, last))
        low, high = paired_interval(before, after)
        n = len(before)
        self.print(f"held-out {what} before {sum(before) / n:.3f}, after {sum(after) / n:.3f} "
                   f"(step {steps[-1]}): {sum(after) / n - sum(before) / n:+.3f}, "
                   f"95% [{low:+.3f}, {high:+.3f}], n = {n}")

    def dry_run_report(self, metrics, steps, tokens) -> None:
        """Print what the one step of a dry run measured; its directory goes when the process ends."""
        self.print(f"dry run: {self.memory_text()}; one step at the largest sizes took "
                   f"{metrics['seconds']:.1f} s ({tokens:.0f} tokens trained), so {steps} steps take at most "
                   f"{metrics['seconds'] * steps / 3600:.3g} hours, evaluation apart; nothing was kept")

    def memory_text(self) -> str:
        """The peak measured so far beside what the card, or for a CPU the machine, has in all."""
        if self.device.type == "cuda":
            peak, total = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info(self.device)[1]
        else:
            peak = self._memory()["memory_gb"] * 2**30
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak, total = peak / 2**30, total / 2**30
        verdict = f"it fits, {total - peak:.2f} GB are left" if peak < total else "it does not fit"
        return f"peak memory {peak:.2f} of {total:.2f} GB: {verdict}"

    def finish(self) -> None:
        """Draw curves.png, where matplotlib is installed, and say where the run lies."""
        if dist.stop_signal:
            self.print(f"{dist.stop_signal}: stopped; --out {self.path} --resume goes on")
        else:
            if dist.is_main() and len({line["step"] for line in curves.read_metrics(self.path)}) > 1:
                try:
                    curves.draw([self.path], self.path / "curves.png")
                except ValueError as error:
                    self.print(str(error))
            if best := self.best():
                self.print(f"best held-out {best['metric']} {best['score']:.3f} at step {best['step']}: "
                           f"{self.path}/best (final/ is the last step)")
            self.print(f"done in {clock(time.time() - self._started)}: {self.path}")
        if self._wandb:
            self._wandb.finish()


def _note(text, folder):
    if dist.is_main():
        (folder / "best.json").write_text(text)


def replace_text(path, text) -> None:
    """Write a file whole or not at all: aside, then renamed."""
    aside = path.with_name(f".{path.name}")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sync(path) -> None:
    """Have a file or a folder on disk, not in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def all_sha256(paths) -> list[str]:
    """Of several files at a time: a large model's are hundreds of gigabytes."""
    def sha256(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(sha256, paths))


def damage(folder) -> str:
    """What is wrong with a checkpoint, by the hashes in its state.json and by opening it; "" if nothing is.

    One from before there were hashes is taken as it is. Errors: ValueError if the disk cannot be read.
    """
    file = folder / "state.json"
    try:
        hashes = json.loads(file.read_text()).get("sha256", {})
        found = all_sha256([folder / name for name in hashes])
        for name, now in zip(hashes, found):
            if now != hashes[name]:
                return f"{name} is not what was written"
        for file in (folder / "training.pt", *folder.glob("*.safetensors")):
            if file.suffix == ".pt":
                torch.load(file, weights_only=True, mmap=True)
            else:
                with safe_open(file, "pt"):
                    pass
        return ""
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except OSError as error:  # perhaps for a moment only
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except Exception as error:  # noqa: BLE001 (what unpickling garbage raises is of any kind)
        return f"{file.name} is not what was written ({dist.first_line(error)})"


def weights_before(run, step) -> str:
    """The checkpoint from which a run sampled a step; "" for its first, which the start model sampled.

    Errors: ValueError if it was not kept, with the steps whose weights were.
    """
    folder = Path(run) / f"checkpoints/step-{step - 1}"
    if step == 1 or folder.is_dir():
        return str(folder) if step > 1 else ""
    kept = sorted(int(path.name[5:]) + 1 for path in folder.parent.glob("step-*"))
    raise ValueError(f"step {step} was sampled from the weights of step {step - 1}, which were not kept; "
                     f"those of steps {', '.join(map(str, [1, *kept]))} were (see --keep)")


def paired_interval(before, after):
    """95% interval of the mean paired difference after - before: normal approximation over questions."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    error = (sum((d - mean) ** 2 for d in differences) / max(1, n - 1) / n) ** 0.5
    return mean - 1.96 * error, mean + 1.96 * error


def out_of_memory(error) -> bool:
    """Whether an error means that memory ran out: torch's kind, or the words of the CPU's allocator, CUDA,
    Triton, cuBLAS and cuDNN.
    """
    words = ("can't allocate memory", "CUDA error: out of memory", "[CUDA]: out of memory",
             "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def retry_smaller(attempt, size, device, smallest, note):
    """attempt(size), halving `size` on all ranks when one of them runs out of memory. Returns (result, size).

    The retry stands outside the `except`: inside it the traceback would keep the failed tensors alive.
    `attempt` must be repeatable (zero its own gradients). Errors: ValueError once `smallest` does not fit;
    Stopped, on all ranks, if a signal asks one of them to leave.
    """
    while True:
        result, failed = None, False
        try:
            result = attempt(size)
        except dist.Stopped:
            pass
        except RuntimeError as error:
            failed = out_of_memory(error)
            if not failed:
                raise
        if failed and dist.lockstep:  # the other ranks wait for this one inside the pass
            raise ValueError(f"out of memory ({note} {size}), which --shard cannot mend within a step: go on "
                             "with --resume and a smaller --tokens-per-batch or --slots")
        failed, stop = dist.any_ranks([failed, dist.stoppable and bool(dist.stop_signal)], device)
        if stop:
            raise dist.Stopped
        if not failed:
            return result, size
        if size <= smallest:
            raise ValueError(f"out of memory at the smallest size ({note} {size}); "
                             "use a smaller model or shorter texts")
        size = max(smallest, size // 2)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if dist.is_main():
            print(f"out of memory: {note} is now {size}", file=sys.stderr, flush=True)


class Fitting:
    """fits(function, *args, ...): function's result, its micro-batches of at most `state.tokens_per_batch`.

    That number, which the function takes by name, is halved on all ranks once memory runs out on one of them,
    down to `smallest`, and stays so. The function must be repeatable.
    """

    def __init__(self, state, device, smallest):
        self.state, self.device, self.smallest = state, device, smallest

    def __call__(self, function, *args, **more):
        result, self.state.tokens_per_batch = retry_smaller(
            lambda size: function(*args, tokens_per_batch=size, **more), self.state.tokens_per_batch,
            self.device, self.smallest, "tokens per batch")
        return result


def mean(values) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
