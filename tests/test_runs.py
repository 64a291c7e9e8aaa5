"""Whole runs of grpo.py and sft.py on a random model of two layers: what they write, refuse, survive and repeat.

Importing torch and transformers takes five seconds, a run here less than one. So most runs are forked from one process
that has imported them (FORK_SERVER): a run is then a process of its own that can be killed, like any other, but starts at
once. What matters across interpreters (resuming, torchrun, the hub's client) is run by a fresh one.
"""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo
import sft
from common import data, models
from common.run import retry_smaller

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data is not beside the repository")

# ------------------------------------------------------------------------------------------------------------
# Starting runs

FORK_SERVER = """
import atexit, gc, json, os, runpy, sys, tempfile, traceback
import torch, tyro, transformers.models.qwen2.modeling_qwen2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports half of torch
AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])  # fills caches
assert "wandb" not in sys.modules
gc.freeze()  # or each run's collections, and its end, would walk through all of transformers
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    sys.exit()
os.chdir(request["cwd"])
os.environ.update(request["env"])
for fd, name in enumerate((os.devnull, request["out"], request["err"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
tempfile.tempdir = None
sys.argv = request["argv"]
sys.path[0] = os.path.dirname(sys.argv[0])
sys.path[1:1] = request["path"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    code = 0
except SystemExit as end:
    code = end.code if isinstance(end.code, int | None) else print(end, file=sys.stderr) or 1
except BaseException:
    code = traceback.print_exc() or 1
atexit._run_exitfuncs()
sys.stdout.flush()
os._exit(code or 0)  # taking the interpreter down would last longer than the run
"""

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}


class Process:
    """A run that was forked; `out` and `err` are what it has written so far."""

    def __init__(self, ask, files, request):
        self.ask, self.files = ask, files
        self.pid = ask(request | {"out": f"{files}.out", "err": f"{files}.err"})
        self.code = None

    def poll(self):
        if self.code is None:
            self.code = self.ask({"poll": self.pid})
        return self.code

    def wait(self, seconds=90):
        wait_for(lambda: self.poll() is not None, seconds, lambda: f"the run goes on\n{self.out}\n{self.err}")
        return self

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    out = property(lambda self: Path(f"{self.files}.out").read_text())
    err = property(lambda self: Path(f"{self.files}.err").read_text())


def wait_for(condition, seconds=60, complaint=lambda: "nothing happened"):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint()
        time.sleep(0.01)


@pytest.fixture(scope="session")
def start(tmp_path_factory, tiny):
    """start("grpo.py", *words, cwd=folder) -> Process."""
    folder = tmp_path_factory.mktemp("processes")
    env = ENV | {"HF_HOME": str(folder / "hf")}  # an empty hub cache
    server = subprocess.Popen([sys.executable, "-c", FORK_SERVER, tiny], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=env, cwd=ROOT)
    assert server.stdout.readline() == "ready\n"
    started = []

    def ask(request):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def start(script, *words, cwd, env=None, path=()):
        argv = [str(ROOT / script), *map(str, words)]  # a script elsewhere has an absolute path
        files = folder / str(len(started))
        started.append(Process(ask, files, {"argv": argv, "cwd": str(cwd), "env": env or {}, "path": [*map(str, path)]}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def run(start):
    """run("grpo.py", *words, cwd=folder, ranks=1) -> the Process (of rank 0), ended; it must have succeeded."""

    def run(script, *words, cwd, ranks=1, env=None, fails=False, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
        processes = [start(script, *words, cwd=cwd, **options,
                           env=(env or {}) | group | ({"RANK": str(i), "LOCAL_RANK": str(i)} if group else {}))
                     for i in range(ranks)]
        for process in processes:
            process.wait()
            assert (process.code != 0) == fails, f"exit code {process.code}\n{process.out}\n{process.err}"
        assert all(not process.out for process in processes[1:])  # only rank 0 speaks
        return processes[0]

    return run


def fresh(*words, cwd, env=None, seconds=240):
    """A run in an interpreter of its own, with another hash seed than the forked ones."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=ENV | {"PYTHONHASHSEED": "7"} | (env or {}),
                          capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# ------------------------------------------------------------------------------------------------------------
# What runs read and leave behind


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Qwen2 under the embedded model's tokenizer.

    Wide weights, and more weight on the end token and the marks: rows end, and earn `mark`, differently.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(models.TINY)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 32, 64
    config.layer_types = config.layer_types[:2]
    tokenizer = AutoTokenizer.from_pretrained(models.TINY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        marks = tokenizer("<think></think><answer></answer>")["input_ids"]
        model.get_input_embeddings().weight[marks] *= 2
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 4
    folder = tmp_path_factory.mktemp("model") / "random"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(model, **flags):
    """The words of a small GRPO run: 3 prompts of 5 samples of up to 12 tokens, 4 held-out questions."""
    flags = {"model": model, "data": "arithmetic", "level": "1", "train_questions": 20, "eval_questions": 4,
             "prompts_per_step": 3, "num_generations": 5, "max_new_tokens": 12, "max_steps": 3, "lr": 1e-3,
             "rewards": "mark=1", "lora_r": 4, "warmup_steps": 0} | flags
    words = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is None else [flag, *str(value).split(" ")]
    return words


def small_sft(model, **flags):
    only_grpo = dict.fromkeys(("prompts_per_step", "num_generations", "rewards"))
    return small(model, **only_grpo | {"batch_size": 5} | flags)


REWARDS = """
import os, time
from pathlib import Path

HERE, calls = Path(__file__).parent, 0

def letters(prompts, responses, answers):  # differs from row to row
    global calls
    calls += 1
    with open(HERE / "calls.txt", "a") as file:
        file.write(f"{len(prompts)}\\n")
    while calls > int(os.environ.get("PAUSE_AFTER", 10**9)) and (HERE / "pause").exists():
        time.sleep(0.01)
    return [sum(c.isascii() and c.isalpha() for c in r) / max(1, len(r)) for r in responses]

def first_two_calls(prompts, responses, answers):  # then every row earns the same
    global calls
    calls += 1
    return [float(len(r)) if calls <= 2 else 1.0 for r in responses]

def odd_raises(prompts, responses, answers):
    if any(len(r) % 2 for r in responses):
        raise KeyError("odd\\nlength")
    return [1.0 + len(r) % 3 for r in responses]

def hangs_once(prompts, responses, answers):  # on the whole batch, and again on one row of it
    if not (HERE / "hung").exists():
        if len(prompts) == 1:
            (HERE / "hung").touch()
        time.sleep(1000)
    return [float(len(r)) for r in responses]

def always_raises(prompts, responses, answers):
    raise RuntimeError("no")
"""


@pytest.fixture
def rewards_py(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path / "rewards.py"


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    """metrics.jsonl without what two equal runs may differ in."""
    def kept(name):
        return name not in ("time", "memory_gb") and not name.startswith("seconds")

    return [{name: value for name, value in line.items() if kept(name)} for line in metrics(folder)]


def train_lines(folder):
    return [line for line in metrics(folder) if "lr" in line]


def eval_lines(folder):
    return [line for line in metrics(folder) if "eval/questions" in line]


def rows(folder, name="samples.csv"):
    with open(Path(folder) / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def known_advantages(of_group):
    R = [float(row["reward"]) for row in of_group]
    known = [r for r in R if not math.isnan(r)]
    if len(set(known)) < 2:
        return [0.0] * len(R)
    return [0.0 if math.isnan(r) else (r - statistics.mean(known)) / (statistics.stdev(known) + 1e-4) for r in R]


def adapter(folder, part="final"):
    return load_file(Path(folder) / part / "adapter_model.safetensors")


def assert_equal_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# ------------------------------------------------------------------------------------------------------------
# One run, looked at from all sides

WEIGHTS = {"mark": 0.5, "letters": 2.0, "correctness": 0.0}


@pytest.fixture(scope="module")
def looked_at(run, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked-at")
    (folder / "rewards.py").write_text(REWARDS)
    rewards = f"mark=0.5 {folder}/rewards.py:letters=2 correctness=0"
    words = small(tiny, out="run", rewards=rewards, max_steps=5, eval_every=2, eval_samples=3, eval_k="1 2", profile=1,
                  save_every=1, aggregation="token", beta=0.05, overlong_buffer=4, warmup_steps=4, show_every=1)
    return SimpleNamespace(folder=folder / "run", process=run("grpo.py", *words, cwd=folder), calls=folder / "calls.txt")


def test_files_of_a_run(looked_at):
    files = set(listing(looked_at.folder))
    assert {"config.json", "grpo.py", "log.txt", "metrics.jsonl", "samples.csv", "eval.csv", "trace-1.json"} <= files
    assert not any("tmp" in name for name in files)
    for part in ("checkpoints/step-4", "checkpoints/step-5", "final"):  # the newest two, and the last step is one of them
        assert {f"{part}/adapter_config.json", f"{part}/adapter_model.safetensors", f"{part}/tokenizer.json"} <= files
    assert {"checkpoints/step-4/training.pt", "checkpoints/step-4/state.json"} <= files
    assert len([name for name in files if name.count("/") == 1 and name.startswith("checkpoints")]) == 2
    saved = torch.load(looked_at.folder / "checkpoints/step-4/training.pt", weights_only=True)
    assert {"optimizer", "rng", "step", "position"} <= saved.keys() and saved["step"] == 4
    assert_equal_bits(adapter(looked_at.folder), adapter(looked_at.folder, "checkpoints/step-5"))


def test_config_json(looked_at):
    config = json.loads((looked_at.folder / "config.json").read_text())
    assert {"args", "id", "argv", "git", "versions", "host", "world_size"} <= config.keys()
    assert {"commit", "dirty"} <= config["git"].keys() and {"python", "torch", "transformers"} <= config["versions"].keys()
    assert config["argv"][1:3] == ["--model", config["args"]["model"]] and config["host"] == socket.gethostname()
    assert config["args"]["recompute_old"] is False  # what was left open is resolved
    assert (looked_at.folder / "grpo.py").read_text() == (ROOT / "grpo.py").read_text()


def test_log_txt_is_what_the_terminal_showed(looked_at):
    log = (looked_at.folder / "log.txt").read_text()
    assert log == looked_at.process.out
    assert "self-check: " in log and "step-0 KL 0" in log and "held-out pass@1 before" in log and "ETA" in log
    assert "reward/" not in log and "gold " in log and "mark " in log  # samples with their reward parts


def test_reward_columns_are_raw_and_add_up(looked_at):
    """Each value is a float's shortest text: the sums are those of the run, up to their order."""
    for row in rows(looked_at.folder):
        parts = sum(weight * float(row[f"reward/{name}"]) for name, weight in WEIGHTS.items())
        assert float(row["reward"]) == pytest.approx(parts + float(row["reward/overlong"]), abs=1e-12)
        text = row["completion"]
        assert float(row["reward/letters"]) == sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text))
        assert float(row["reward/overlong"]) == grpo.overlong_penalty(int(row["tokens"]), 12, 4)
    assert len({row["reward/overlong"] for row in rows(looked_at.folder)}) > 2
    assert len({row["reward/mark"] for row in rows(looked_at.folder)}) > 1


def test_a_reward_is_called_once_per_batch(looked_at):
    assert looked_at.calls.read_text().split() == ["15"] * 5


def test_metrics_recomputed_from_samples(looked_at):
    """Means of the same numbers: 1e-9. The loss, of ratios within 1e-5 of one (the sampler's gap in float32): 1e-5."""
    accumulated, everything = 0.0, rows(looked_at.folder)
    assert [line["step"] for line in train_lines(looked_at.folder)] == [1, 2, 3, 4, 5]
    for line in train_lines(looked_at.folder):
        step = [row for row in everything if int(row["step"]) == line["step"]]
        assert len(step) == 15 and {(int(r["group"]), int(r["sample"])) for r in step} == set(
            itertools.product(range(3), range(5)))
        column = {name: [float(row[name]) for row in step] for name in step[0] if name.split("/")[0] in (
            "reward", "correct", "tokens", "finished", "logprob", "advantage")}

        def mean(name):
            return sum(column[name]) / 15

        accumulated += sum(column["reward"])
        spread = [(x - mean("reward")) ** 2 for x in column["reward"]]
        expected = {
            "reward": mean("reward"), "reward/std": math.sqrt(sum(spread) / 15), "reward/min": min(column["reward"]),
            "reward/max": max(column["reward"]), "correct": mean("correct"), "tokens": mean("tokens"),
            "tokens/max": max(column["tokens"]), "truncated": 1 - mean("finished"),
            "entropy": -sum(column["logprob"]) / sum(column["tokens"]), "reward_failed": 0,
            "accumulated_reward": accumulated, "questions_drawn": 3, "tokens_trained": sum(column["tokens"]),
            **{name: mean(name) for name in column if name.startswith("reward/")}}
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
        policy = -sum(a * n for a, n in zip(column["advantage"], column["tokens"])) / sum(column["tokens"])
        assert line["loss"] == pytest.approx(policy + 0.05 * line["kl"], abs=1e-5) and abs(policy) > 1e-3
        assert line["clip_low"] == line["clip_high"] == 0 and line["sampler_gap/max"] < 1e-4
    kl = [line["kl"] for line in train_lines(looked_at.folder)]
    assert kl[0] == pytest.approx(0, abs=1e-7) and min(kl[1:]) > 1e-7  # the first step starts from the reference


def test_advantages_in_samples_are_those_of_their_group(looked_at):
    step = [row for row in rows(looked_at.folder) if row["step"] == "2"]
    for group in range(3):
        of_group = [row for row in step if int(row["group"]) == group]
        assert [float(row["advantage"]) for row in of_group] == pytest.approx(known_advantages(of_group), abs=1e-9)
        assert len({row["prompt"] for row in of_group}) == 1


def test_learning_rate_is_logged_and_peaks_at_the_end_of_the_warm_up(looked_at):
    assert [line["lr"] for line in train_lines(looked_at.folder)] == pytest.approx(
        [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3], rel=1e-12)
    args = grpo.Args(lr=1.0, warmup_steps=45, max_steps=100)
    assert grpo.learning_rate(45, args) == 1.0 == max(grpo.learning_rate(step, args) for step in range(1, 101))
    for schedule in ("linear", "cosine"):
        args = grpo.Args(lr=1.0, warmup_steps=45, max_steps=100, lr_schedule=schedule)
        assert grpo.learning_rate(45, args) == 1.0 > grpo.learning_rate(46, args) > grpo.learning_rate(100, args) > 0


def test_seconds_of_every_phase_and_a_trace(looked_at):
    for line in train_lines(looked_at.folder):
        phases = [line[f"seconds/{phase}"] for phase in ("sample", "reward", "logprobs", "update")]
        assert min(phases) > 0 and sum(phases) == pytest.approx(line["seconds"]) and line["memory_gb"] > 0
    trace = json.loads((looked_at.folder / "trace-1.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])


def test_eval_rows_and_pass_at_k(looked_at):
    everything = rows(looked_at.folder, "eval.csv")
    lines = eval_lines(looked_at.folder)
    assert [line["step"] for line in lines] == [0, 2, 4, 5]  # before the first step, every second, and after the last
    for line in lines:
        step = [row for row in everything if int(row["step"]) == line["step"]]
        assert len(step) == 4 * (1 + 3) and line["eval/questions"] == 4
        greedy = [row for row in step if row["sample"] == "0"]
        assert len({row["id"] for row in greedy}) == 4 and {row["temperature"] for row in greedy} == {"0.0"}
        assert line["eval/pass@1"] == sum(int(row["correct"]) for row in greedy) / 4
        assert line["eval/tokens"] == sum(int(row["tokens"]) for row in greedy) / 4
        for k in (1, 2):
            chances = []
            for id in {row["id"] for row in step}:
                right = [int(row["correct"]) for row in step if row["id"] == id and row["sample"] != "0"]
                assert len(right) == 3
                chances.append(sum(map(any, itertools.combinations(right, k))) / math.comb(3, k))
            assert line[f"eval/pass@{k} T=0.5"] == pytest.approx(sum(chances) / 4)
    assert {row["id"] for row in everything}.isdisjoint(row["id"] for row in rows(looked_at.folder))
    assert {row["prompt"] for row in everything}.isdisjoint(row["prompt"] for row in rows(looked_at.folder))


def test_the_samples_of_one_group_differ(looked_at):
    first = [row["completion"] for row in rows(looked_at.folder) if row["step"] == "1"]
    assert len(set(first)) > 10


# ------------------------------------------------------------------------------------------------------------
# Repeating, killing, resuming


def test_a_run_repeats_from_its_config(run, looked_at, tmp_path):
    """A4.5 and A2.15: config.json is all it takes, and the command line overrides it."""
    config = looked_at.folder / "config.json"
    run("grpo.py", "--config", config, "--out", "again", "--profile", "0", cwd=tmp_path)
    assert timeless(tmp_path / "again") == timeless(looked_at.folder)
    assert (tmp_path / "again/samples.csv").read_bytes() == (looked_at.folder / "samples.csv").read_bytes()
    assert_equal_bits(adapter(tmp_path / "again"), adapter(looked_at.folder))
    run("grpo.py", f"--config={config}", "--out", "other", "--seed", "1", "--max-steps", "1", cwd=tmp_path)
    assert rows(tmp_path / "other")[0]["completion"] != rows(looked_at.folder)[0]["completion"]


@pytest.mark.parametrize("lr", ["0.0001", pytest.param("1e-4", marks=pytest.mark.xfail(
    strict=True, reason="YAML 1.1 reads a number without a point and with an exponent as text"))])
def test_arguments_from_a_yaml_file(run, tiny, tmp_path, lr):
    flags = small(tiny, max_steps=None, rewards=None, lr=None)
    (tmp_path / "a.yaml").write_text(
        f"max-steps: 2\nrewards: [mark=1, format=0.5]\nlr: {lr}\nout: here\nmax_new_tokens: 3\n")
    run("grpo.py", *flags, "--config", "a.yaml", cwd=tmp_path)
    assert [line["lr"] for line in train_lines(tmp_path / "here")] == [1e-4, 1e-4]
    assert {"reward/mark", "reward/format"} <= rows(tmp_path / "here")[0].keys()
    assert max(int(row["tokens"]) for row in rows(tmp_path / "here")) == 12  # as the command line says, not the file


RESUMED = {
    "adapter": {"beta": 0.05, "updates_per_batch": 2, "lr_schedule": "cosine", "eval_every": 2},
    "full": {"full": True, "beta": 0.05, "lr": 1e-4},
    "dynamic sampling": {"dynamic_sampling": True, "weight_decay": 0.1},
}


def weights(folder):
    path = Path(folder) / "final"
    return load_file(next(path.glob("*model.safetensors")))


@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED)
def test_killed_after_step_3_and_resumed(start, run, tiny, tmp_path, rewards_py, flags):
    """6 steps = 3 steps, kill -9 in the fourth, --resume: metrics, samples, weights and optimizer bit for bit."""
    flags = small(tiny, **{"rewards": f"{rewards_py}:letters=1 mark=1", "max_steps": 6, "save_every": 2, "lr": 1e-2,
                           "eval_questions": 20} | flags)  # more held-out rows than a step has: another cache size
    run("grpo.py", *flags, "--out", "whole", cwd=tmp_path)
    calls = (tmp_path / "calls.txt").read_text().count("\n")
    (tmp_path / "calls.txt").unlink()

    (tmp_path / "pause").touch()
    pause_after = 3 if calls == 6 else calls // 2  # dynamic sampling calls more than once a step
    killed = start("grpo.py", *flags, "--out", "killed", cwd=tmp_path, env={"PAUSE_AFTER": str(pause_after)})
    folder = tmp_path / "killed"
    wait_for(lambda: (tmp_path / "calls.txt").exists() and
             (tmp_path / "calls.txt").read_text().count("\n") > pause_after, complaint=lambda: killed.out + killed.err)
    assert len(train_lines(folder)) >= 3 and (folder / "checkpoints/step-2").is_dir()
    killed.kill()
    assert killed.wait().code == -signal.SIGKILL
    (tmp_path / "pause").unlink()

    # what a kill in the middle of writing would have left
    (folder / "checkpoints/.tmp-step-4").mkdir(exist_ok=True)
    (folder / "checkpoints/.tmp-step-4/training.pt").write_bytes(b"half")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward": 0.1')
    with open(folder / "samples.csv", "a") as file:
        file.write('4,17,0,2,Compute 1+1.,"half an ans')

    if "--updates-per-batch" in flags:  # another interpreter, another hash seed
        fresh(ROOT / "grpo.py", "--out", "killed", "--resume", cwd=tmp_path)
    else:
        run("grpo.py", "--out", "killed", "--resume", cwd=tmp_path)
    assert timeless(folder) == timeless(tmp_path / "whole")
    for name in ("samples.csv", "eval.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert_equal_bits(weights(folder), weights(tmp_path / "whole"))
    assert listing(folder / "checkpoints") == listing(tmp_path / "whole/checkpoints")  # .tmp-step-4 is gone
    saved, expected = (torch.load(path / "checkpoints/step-6/training.pt", weights_only=True)
                       for path in (folder, tmp_path / "whole"))
    assert saved["position"] == expected["position"] and saved["accumulated_reward"] == expected["accumulated_reward"]
    for one, other in zip(saved["optimizer"]["state"].values(), expected["optimizer"]["state"].values(), strict=True):
        assert_equal_bits(one, other)
    assert distance(weights(folder), load_file(next((folder / "checkpoints/step-4").glob("*.safetensors")))) > 1e-4


KILLED_INSIDE_SAVE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, grpo
from common.run import cli

def save(value, path, saves=[]):
    saves.append(path)
    if len(saves) == 2:
        open(path, "wb").write(b"PK half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    original(value, path)

original, torch.save = torch.save, save
cli(grpo.main, grpo.Args)
"""


def test_killed_inside_the_writing_of_a_checkpoint(start, run, tiny, tmp_path):
    flags = small(tiny, max_steps=4, save_every=1)
    run("grpo.py", *flags, "--out", "whole", cwd=tmp_path)
    (tmp_path / "killed.py").write_text(KILLED_INSIDE_SAVE)
    killed = start(tmp_path / "killed.py", *flags, "--out", "killed", cwd=tmp_path).wait()
    assert killed.code == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed/checkpoints").iterdir() if "tmp" not in path.name] == ["step-1"]
    resumed = run("grpo.py", "--out", "killed", "--resume", cwd=tmp_path)
    assert "resuming from" in resumed.out and "step-1" in resumed.out
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    assert_equal_bits(adapter(tmp_path / "killed"), adapter(tmp_path / "whole"))
    assert listing(tmp_path / "killed") == listing(tmp_path / "whole")


def test_killed_before_the_first_checkpoint(start, run, tiny, tmp_path, rewards_py):
    flags = small(tiny, rewards=f"{rewards_py}:letters=1", max_steps=2)
    run("grpo.py", *flags, "--out", "whole", cwd=tmp_path)
    (tmp_path / "pause").touch()
    killed = start("grpo.py", *flags, "--out", "killed", cwd=tmp_path, env={"PAUSE_AFTER": "1"})
    wait_for(lambda: (tmp_path / "killed/metrics.jsonl").exists() and len(metrics(tmp_path / "killed")) == 2,
             complaint=lambda: killed.err)
    killed.kill()
    killed.wait()
    (tmp_path / "pause").unlink()
    assert "starting from step 0" in run("grpo.py", "--out", "killed", "--resume", cwd=tmp_path).out
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    assert (tmp_path / "killed/samples.csv").read_bytes() == (tmp_path / "whole/samples.csv").read_bytes()


def test_sigterm_saves_a_checkpoint(start, run, tiny, tmp_path, rewards_py):
    flags = small(tiny, rewards=f"{rewards_py}:letters=1", max_steps=3)
    run("grpo.py", *flags, "--out", "whole", cwd=tmp_path)
    (tmp_path / "calls.txt").unlink()
    (tmp_path / "pause").touch()
    stopped = start("grpo.py", *flags, "--out", "stopped", cwd=tmp_path, env={"PAUSE_AFTER": "1"})
    wait_for(lambda: (tmp_path / "calls.txt").exists() and (tmp_path / "calls.txt").read_text().count("\n") == 2)
    stopped.kill(signal.SIGTERM)  # inside step 2
    wait_for(lambda: "SIGTERM" in stopped.out)
    (tmp_path / "pause").unlink()
    assert stopped.wait().code == 0
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-2"]
    assert not (tmp_path / "stopped/final").exists()
    run("grpo.py", "--out", "stopped", "--resume", cwd=tmp_path)
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")
    assert_equal_bits(adapter(tmp_path / "stopped"), adapter(tmp_path / "whole"))


def test_resumed_at_another_number_of_ranks(run, tiny, tmp_path):
    """To 1e-6: the ranks' gradients are added in another order, and AdamW's steps are 1e-4 long."""
    flags = small(tiny, lr=1e-4, rewards="mark=1 format=1")
    run("grpo.py", *flags, "--max-steps", 4, "--out", "whole", cwd=tmp_path)
    run("grpo.py", *flags, "--max-steps", 2, "--out", "a", cwd=tmp_path)
    run("grpo.py", "--out", "a", "--resume", "--max-steps", 4, cwd=tmp_path, ranks=2)
    assert [row["completion"] for row in sorted(rows(tmp_path / "a"), key=place)] == [
        row["completion"] for row in sorted(rows(tmp_path / "whole"), key=place)]
    assert distance(adapter(tmp_path / "a"), adapter(tmp_path / "whole")) <= 1e-6


def place(row):
    return [int(row[name]) for name in ("step", "group", "sample")]


def test_sft_killed_and_resumed(start, run, tiny, tmp_path):
    flags = small_sft(tiny, max_steps=4, save_every=1, train_questions=9, lr=1e-2)  # the fourth step is in another epoch
    run("sft.py", *flags, "--out", "whole", cwd=tmp_path)
    (tmp_path / "killed.py").write_text(KILLED_INSIDE_SAVE.replace("grpo", "sft"))
    assert start(tmp_path / "killed.py", *flags, "--out", "killed", cwd=tmp_path).wait().code == -signal.SIGKILL
    run("sft.py", "--out", "killed", "--resume", cwd=tmp_path)
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    assert_equal_bits(adapter(tmp_path / "killed"), adapter(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------------------
# Two ranks are one


def assert_same_runs(one, other):
    """Weights to 1e-6, rows exactly but for log-probs (1e-4: float32 sums of 12 in another batch shape)."""
    of_one, of_other = (sorted(rows(folder), key=place) for folder in (one, other))
    exact = [name for name in of_one[0] if name != "logprob" and name != "advantage"]
    assert [[row[name] for name in exact] for row in of_one] == [[row[name] for name in exact] for row in of_other]
    for name in ("logprob", "advantage"):
        assert [float(row[name]) for row in of_one] == pytest.approx([float(row[name]) for row in of_other], abs=1e-4)
    evals = [sorted((row["step"], row["id"], row["sample"], row["completion"]) for row in rows(folder, "eval.csv"))
             for folder in (one, other)]
    assert evals[0] == evals[1]
    for line, expected in zip(timeless(one), timeless(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert distance(adapter(one), adapter(other)) <= 1e-6


@pytest.mark.slow
def test_torchrun_with_two_ranks_equals_one(run, tiny, tmp_path):
    """3 prompts of 5 samples, 7 held-out questions: nothing divides by 2."""
    flags = small(tiny, eval_questions=7, lr=1e-4, rewards="mark=1 format=1", beta=0.05)
    run("grpo.py", *flags, "--out", "one", cwd=tmp_path)
    fresh("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), ROOT / "grpo.py", *flags,
          "--out", "two", cwd=tmp_path)
    assert_same_runs(tmp_path / "two", tmp_path / "one")
    assert json.loads((tmp_path / "two/config.json").read_text())["world_size"] == 2
    assert [line["eval/questions"] for line in eval_lines(tmp_path / "two")] == [7, 7]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


TWO_RANKS = {
    "dynamic sampling": {"dynamic_sampling": True, "aggregation": "token", "beta": 0.05},
    "an idle rank": {"prompts_per_step": 1, "eval_questions": 1, "rewards": "mark=1 digit=1"},
    "several micro-batches and updates": {"tokens_per_batch": 200, "updates_per_batch": 2, "clip_eps_high": 1e-3},
}


@pytest.mark.parametrize("flags", TWO_RANKS.values(), ids=TWO_RANKS)
def test_two_ranks_equal_one(run, tiny, tmp_path, flags):
    flags = small(tiny, **{"lr": 1e-4} | flags)
    run("grpo.py", *flags, "--out", "one", cwd=tmp_path)
    run("grpo.py", *flags, "--out", "two", cwd=tmp_path, ranks=2)
    assert_same_runs(tmp_path / "two", tmp_path / "one")
    assert max(tensor.abs().max() for name, tensor in adapter(tmp_path / "two").items() if "lora_B" in name) > 1e-5


def test_two_ranks_equal_one_where_all_rewards_are_equal(run, tiny, tmp_path, rewards_py):
    """Steps 3 and 4 have no gradient; AdamW's momentum goes on all the same, on any number of ranks."""
    flags = small(tiny, rewards=f"{rewards_py}:first_two_calls=1", max_steps=4, lr=1e-4, weight_decay=0.1)
    run("grpo.py", *flags, "--out", "one", cwd=tmp_path)
    run("grpo.py", *flags, "--out", "two", cwd=tmp_path, ranks=2)
    assert [line["rows_trained"] > 0 for line in train_lines(tmp_path / "one")] == [True, True, False, False]
    assert_same_runs(tmp_path / "two", tmp_path / "one")


def test_sft_with_two_ranks_equals_one(run, tiny, tmp_path):
    flags = small_sft(tiny, lr=1e-4, eval_questions=7, max_steps=2)
    run("sft.py", *flags, "--out", "one", cwd=tmp_path)
    run("sft.py", *flags, "--out", "two", cwd=tmp_path, ranks=2)
    for line, expected in zip(timeless(tmp_path / "two"), timeless(tmp_path / "one"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert distance(adapter(tmp_path / "two"), adapter(tmp_path / "one")) <= 1e-6


@pytest.mark.parametrize("questions, ranks", [(1, 1), (7, 3), (13, 2)])
def test_every_held_out_question_is_answered_once(run, tiny, tmp_path, questions, ranks):
    run("grpo.py", *small(tiny, eval_questions=questions, max_steps=1, slots=4, max_new_tokens=4), "--out", "run",
        cwd=tmp_path, ranks=ranks)
    for step in ("0", "1"):
        ids = [row["id"] for row in rows(tmp_path / "run", "eval.csv") if row["step"] == step]
        assert len(ids) == len(set(ids)) == questions
    assert [line["eval/questions"] for line in eval_lines(tmp_path / "run")] == [questions] * 2


# ------------------------------------------------------------------------------------------------------------
# Bad input: one line, and nothing written


@pytest.fixture(scope="session")
def bad(tmp_path_factory, tiny):
    """Folders and files with one thing wrong in each."""
    folder = tmp_path_factory.mktemp("bad")

    def model(name, leave_out=(), **config):
        shutil.copytree(tiny, folder / name, ignore=shutil.ignore_patterns(*leave_out))
        path = folder / name / "config.json"
        if config:
            path.write_text(json.dumps(json.loads(path.read_text()) | config))

    model("no-tokenizer", leave_out=("tokenizer*", "chat_template*"))
    model("no-weights", leave_out=("*.safetensors",))
    model("no-config", leave_out=("config.json", "generation_config.json"))
    model("half-weights")
    (folder / "half-weights/model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    model("gpt", model_type="gpt2")
    model("short", max_position_embeddings=100)
    model("window", sliding_window=16, use_sliding_window=True, max_window_layers=0,
          layer_types=["sliding_attention", "sliding_attention"])
    (folder / "nothing").mkdir()
    (folder / "run-without-model/checkpoints").mkdir(parents=True)
    question = json.dumps({"prompt": "Compute 1+1.", "answer": "2"}) + "\n"
    (folder / "empty.jsonl").write_text("")
    (folder / "column.jsonl").write_text(question + json.dumps({"prompt": "Compute 1+2."}) + "\n")
    (folder / "malformed.jsonl").write_text(question * 2 + '{"prompt": "Comp\n')
    (folder / "answers.jsonl").write_text("".join(
        json.dumps({"prompt": f"Compute {i}+1.", "answer": str(i + 1)}) + "\n" for i in range(30)))
    (folder / "wrong.csv").write_text("prompt,completion,answer,correct\n1+1,3,2,0\n1+2,4,3,0\n")
    (folder / "taken").mkdir()
    (folder / "taken/thesis.txt").write_text("years of work")
    (folder / "file.txt").write_text("not a folder")
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "rewards.py").write_text("def f(prompts, responses, answers):\n    return [0.0] * len(prompts)\n")
    (folder / "unknown.yaml").write_text("learning_rate: 1\n")
    (folder / "broken.yaml").write_text("lr: [1\n")
    (folder / "list.yaml").write_text("- lr\n")
    (folder / "broken.json").write_text("{")
    return folder


traceback = pytest.mark.xfail(strict=True, reason="ends in a traceback")

# script, words ({tiny}: the model, {bad}: the folder of bad things), what the line must say
BAD = [
    ("grpo.py", "--model {bad}/nowhere", "nowhere; no such folder"),
    ("grpo.py", "--model ./nowhere", "nowhere; no such folder"),
    ("grpo.py", "--model {bad}/nothing", "{bad}/nothing"),
    ("grpo.py", "--model {bad}/no-tokenizer", "no-tokenizer; tokenizer"),
    ("grpo.py", "--model {bad}/no-weights", "no-weights; weights"),
    ("grpo.py", "--model {bad}/no-config", "no-config; configuration"),
    ("grpo.py", "--model {bad}/half-weights", "half-weights; weights"),
    ("grpo.py", "--model {bad}/gpt", "gpt2; not supported; qwen2"),
    ("grpo.py", "--model {bad}/run-without-model", "neither final/ nor a checkpoint"),
    ("grpo.py", "--model {bad}/short", "context; 100; --max-new-tokens"),
    ("grpo.py", "--model {bad}/window", "window; 16"),
    ("grpo.py", "--model Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct; hub; folder"),
    ("grpo.py", "--data {bad}/empty.jsonl", "empty.jsonl; no rows"),
    ("grpo.py", "--data {bad}/column.jsonl", "column.jsonl: line 2; prompt; known schemas"),
    ("grpo.py", "--data {bad}/malformed.jsonl", "malformed.jsonl: line 3; not a JSON line"),
    ("grpo.py", "--data {bad}/nowhere.jsonl", "no file; nowhere.jsonl"),
    ("grpo.py", "--data arithmetics", "unknown data; arithmetics"),
    ("grpo.py", "--data gsm8k", "gsm8k; hub; --data"),
    ("grpo.py", "--data arithmetic --level 99", "levels 1 to 8; 99"),
    ("grpo.py", "--data {bad}/answers.jsonl --eval-questions 30", "30; rows"),
    ("grpo.py", "--max-prompt-tokens 2", "--max-prompt-tokens 2; leaves 0"),
    ("grpo.py", "--prompt-template Q:", "Q:; {{prompt}}"),
    ("grpo.py", "--num-generations 1", "--num-generations 1; 2 or more"),
    ("grpo.py", "--prompts-per-step 0", "--prompts-per-step 0; 1 or more"),
    ("grpo.py", "--temperature 0", "--temperature 0; more than 0"),
    ("grpo.py", "--eval-k 5 --eval-samples 3", "--eval-samples 5"),
    ("grpo.py", "--beta 0.1 --kl-estimator k1", "k1; --kl-in reward"),
    ("grpo.py", "--sampler-correction mask", "--recompute-old"),
    ("grpo.py", "--lora-r 0", "--lora-r 0; --full"),
    ("grpo.py", "--lora-targets q_proj qkv_proj", "qkv_proj; q_proj"),
    ("grpo.py", "--train-layers 1-2", "--train-layers 1-2; 0-1"),
    ("grpo.py", "--device tpu", "--device tpu"),
    ("grpo.py", "--rewards corectness=1", "corectness; correctness"),
    ("grpo.py", "--rewards mark=much", "mark=much"),
    ("grpo.py", "--rewards {bad}/nowhere.py:f=1", "no file; nowhere.py"),
    ("grpo.py", "--rewards {bad}/rewards.py:g=1", "rewards.py; no function; g"),
    ("grpo.py", "--rewards {bad}/syntax.py:f=1", "syntax.py; SyntaxError"),
    ("grpo.py", "--out {bad}/taken", "{bad}/taken; not empty; --resume"),
    ("grpo.py", "--out {bad}/file.txt", "file.txt"),
    ("grpo.py", "--out {bad}/file.txt/run", "file.txt; cannot write"),
    ("grpo.py", "--out /proc/no/run", "/proc/no/run; cannot write"),
    ("grpo.py", "--resume", "--resume; --out"),
    ("grpo.py", "--out {bad}/nowhere --resume", "nowhere; no run"),
    ("grpo.py", "--config {bad}/nowhere.yaml", "nowhere.yaml; No such file"),
    ("grpo.py", "--config {bad}/unknown.yaml", "unknown.yaml; learning_rate"),
    pytest.param("grpo.py", "--config {bad}/broken.yaml", "broken.yaml", marks=traceback),
    ("grpo.py", "--config {bad}/broken.json", "broken.json"),
    pytest.param("grpo.py", "--config {bad}/list.yaml", "list.yaml", marks=traceback),
    ("sft.py", "--model {bad}/nowhere", "nowhere; no such folder"),
    ("sft.py", "--data {bad}/malformed.jsonl", "malformed.jsonl: line 3"),
    ("sft.py", "--data {bad}/answers.jsonl", "answers.jsonl; no row has a completion"),
    ("sft.py", "--data {bad}/wrong.csv --filter correct", "wrong.csv; correct = 1"),
    ("sft.py", "--filter right", "right; correct"),
    ("sft.py", "--max-tokens 3", "--max-tokens 3"),
    ("sft.py", "--epochs 0", "--epochs 0"),
    ("sft.py", "--batch-size 0", "--batch-size 0"),
    ("sft.py", "--out {bad}/taken", "{bad}/taken; not empty; --resume"),
]


@pytest.mark.parametrize("script, words, said", BAD)
def test_bad_input_is_one_line(run, tiny, bad, tmp_path, script, words, said):
    if words.startswith("--out /proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc on this system")
    before = listing(bad)
    given = [word.format(tiny=tiny, bad=bad) for word in words.split()]
    defaults = ["--model", tiny, "--data", "arithmetic", "--max-steps", "1"]
    if script == "sft.py" and "--epochs" in given:
        defaults = defaults[:-2]
    process = run(script, *defaults, *given, cwd=tmp_path, fails=True)  # the last of two equal flags counts
    assert process.err.startswith("error: ") and process.err.count("\n") == 1, process.err
    assert process.out == ""
    for part in said.format(tiny=tiny, bad=bad).split("; "):
        assert part in process.err
    assert listing(tmp_path) == [] and listing(bad) == before


@pytest.mark.slow
def test_hub_out_of_reach(tmp_path):
    """No network rather than HF_HUB_OFFLINE: the hub's address refuses connections."""
    env = ENV | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, ROOT / "grpo.py", "--model", "Qwen/Qwen2.5-3B-Instruct"], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=240)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1 and "Traceback" not in done.stderr
    for part in ("Qwen/Qwen2.5-3B-Instruct", "cannot reach the hub", "pass --model that folder"):
        assert part in said[0]
    assert set(listing(tmp_path)) <= {"hf"} | {name for name in listing(tmp_path) if name.startswith("hf/")}


def test_a_tokenizer_larger_than_the_embedding_is_refused(run, tiny, tmp_path):
    """A3.12: on the host, with a message, and not as an index out of bounds on the device."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "model")
    process = run("grpo.py", *small(tmp_path / "model"), cwd=tmp_path, fails=True)
    assert process.err.startswith("error: ") and process.err.count("\n") == 1 and "only 100 rows" in process.err
    assert listing(tmp_path) == sorted({"model"} | {f"model/{name}" for name in listing(tmp_path / "model")})


def test_an_adapter_of_another_rank_names_the_tensor(run, tiny, tmp_path):
    """A3.11, for --resume and for --model."""
    run("grpo.py", *small(tiny, max_steps=1), "--out", "a", cwd=tmp_path)
    process = run("grpo.py", "--out", "a", "--resume", "--max-steps", 2, "--lora-r", 3, cwd=tmp_path, fails=True)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert process.err.count("\n") == 1 and all(part in process.err for part in (first, "(4, 32)", "(3, 32)"))

    config = json.loads((tiny / "config.json").read_text()) | {"intermediate_size": 48}
    shutil.copytree(tiny, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "other")).save_pretrained(tmp_path / "other")
    of_a = tmp_path / "a/final/adapter_config.json"
    of_a.write_text(json.dumps(json.loads(of_a.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}))
    process = run("grpo.py", *small(tmp_path / "a"), cwd=tmp_path, fails=True)
    assert process.err.count("\n") == 1
    assert all(part in process.err for part in ("mlp.down_proj", "(32, 64)", "(32, 48)"))


# ------------------------------------------------------------------------------------------------------------
# What goes wrong on the way


def test_a_reward_that_raises_costs_its_rows(run, tiny, tmp_path, rewards_py):
    process = run("grpo.py", *small(tiny, rewards=f"{rewards_py}:odd_raises=1 mark=0"), "--out", "run", cwd=tmp_path)
    assert "KeyError" in process.out and "odd" in process.out
    for line in train_lines(tmp_path / "run"):
        step = [row for row in rows(tmp_path / "run") if int(row["step"]) == line["step"]]
        failed = [len(row["completion"]) % 2 == 1 for row in step]
        assert [math.isnan(float(row["reward"])) for row in step] == failed and any(failed) and not all(failed)
        assert line["reward_failed"] == sum(failed)
        assert line["reward"] == pytest.approx(sum(float(r["reward"]) for r, no in zip(step, failed) if not no) /
                                               (15 - sum(failed)))
        for group in ("0", "1", "2"):
            of_group = [row for row in step if row["group"] == group]
            assert [float(row["advantage"]) for row in of_group] == pytest.approx(known_advantages(of_group), abs=1e-9)


def test_a_reward_that_hangs_costs_one_row(run, tiny, tmp_path, rewards_py):
    flags = small(tiny, rewards=f"{rewards_py}:hangs_once=1", reward_timeout=1, max_steps=1)
    began = time.monotonic()
    process = run("grpo.py", *flags, "--out", "run", cwd=tmp_path)
    assert time.monotonic() - began < 30 and "no result within 1 s" in process.out
    (line,) = train_lines(tmp_path / "run")
    assert line["reward_failed"] == 1 and line["rows_trained"] >= 5
    assert [math.isnan(float(row["reward"])) for row in rows(tmp_path / "run")] == [True] + [False] * 14


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_reward_that_always_raises(run, tiny, tmp_path, rewards_py, dynamic):
    """No group holds anything to learn from: with dynamic sampling all refills are drawn, and none is kept."""
    flags = small(tiny, rewards=f"{rewards_py}:always_raises=1", max_steps=1, dynamic_sampling=dynamic or None, max_refills=2)
    run("grpo.py", *flags, "--out", "run", cwd=tmp_path)
    (line,) = train_lines(tmp_path / "run")
    assert line["rows_trained"] == 0 and line["questions_drawn"] == (9 if dynamic else 3)
    assert line["reward_failed"] == 5 * line["questions_drawn"]
    assert all(not tensor.any() for name, tensor in adapter(tmp_path / "run").items() if "lora_B" in name)


NOT_A_NUMBER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import grpo
from common.run import cli

def policy_loss(*inputs, **options):
    calls.append(1)
    loss, low, high = original(*inputs, **options)
    return loss * (float("nan") if len(calls) in BAD_CALLS else 1.0), low, high

BAD_CALLS = range(FIRST, LAST + 1)
calls, original, grpo.policy_loss = [], grpo.policy_loss, policy_loss
cli(grpo.main, grpo.Args)
"""


def test_one_nan_loss_is_skipped(run, tiny, tmp_path):
    (tmp_path / "nan.py").write_text(NOT_A_NUMBER.replace("FIRST", "2").replace("LAST", "2"))
    flags = small(tiny, max_steps=4, beta=0.01, rewards="mark=1 format=1")
    process = run(tmp_path / "nan.py", *flags, "--out", "run", cwd=tmp_path)
    assert process.out.count("not finite") == 1 and "step 2: the gradient is not finite" in process.out
    assert [line["grad_norm"] is None for line in train_lines(tmp_path / "run")] == [False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "run").values())
    state = torch.load(tmp_path / "run/checkpoints/step-4/training.pt", weights_only=True)["optimizer"]["state"]
    assert {value["step"].item() for value in state.values()} == {3}


def test_nan_loss_in_a_row_stops_the_run_with_its_state_saved(run, tiny, tmp_path):
    (tmp_path / "nan.py").write_text(NOT_A_NUMBER.replace("FIRST", "2").replace("LAST", "1000"))
    flags = small(tiny, max_steps=20, beta=0.01)
    process = run(tmp_path / "nan.py", *flags, "--out", "run", cwd=tmp_path, fails=True)
    assert process.err.startswith("error: ") and process.err.count("\n") == 1
    assert "not finite" in process.err and "--lr" in process.err and "run" in process.err
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    saved = adapter(tmp_path / "run", "checkpoints/step-6")  # step 1's weights
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert max(tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("beta", [0, 0.01])
def test_a_learning_rate_that_destroys_the_model_stops_grpo(run, tiny, tmp_path, beta):
    """Without a KL term too, where all the samples of a broken model are alike and no row has an advantage."""
    process = run("grpo.py", *small(tiny, max_steps=20, lr=1e30, beta=beta), "--out", "run", cwd=tmp_path, fails=True)
    assert process.err.startswith("error: ") and process.err.count("\n") == 1 and "--lr" in process.err
    assert len(train_lines(tmp_path / "run")) < 10 and list((tmp_path / "run/checkpoints").glob("step-*"))


def test_a_learning_rate_that_destroys_the_model_stops_sft(run, tiny, tmp_path):
    process = run("sft.py", *small_sft(tiny, max_steps=20, lr=1e30), "--out", "run", cwd=tmp_path, fails=True)
    assert process.err.startswith("error: ") and process.err.count("\n") == 1 and "--lr" in process.err
    assert len(train_lines(tmp_path / "run")) < 10 and list((tmp_path / "run/checkpoints").glob("step-*"))


def test_retry_smaller():
    sizes = []

    def attempt(size):
        sizes.append(size)
        if size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size * 10

    assert retry_smaller(attempt, 32, torch.device("cpu"), 3, "rows") == (40, 4) and sizes == [32, 16, 8, 4]
    with pytest.raises(ValueError, match="smallest size .rows 7."):  # 28, 14, and 7 once only
        sizes.clear()
        retry_smaller(attempt, 28, torch.device("cpu"), 7, "rows")
    assert sizes == [28, 14, 7]
    with pytest.raises(RuntimeError, match="shape"):  # not a matter of memory
        retry_smaller(lambda size: torch.zeros(2).view(3), 8, torch.device("cpu"), 1, "rows")


def test_retry_smaller_lets_go_of_the_failed_attempt():
    class Big:
        pass

    held = []

    def attempt(size):
        big = Big()
        if not held:
            held.append(weakref.ref(big))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        return held[0]() is None

    assert retry_smaller(attempt, 2, torch.device("cpu"), 1, "rows") == (True, 1)


OUT_OF_MEMORY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, grpo, sft
from common.run import cli

def once_out_of_memory(*inputs, **options):
    if torch.is_grad_enabled() and os.environ.get("RANK", "1") == "1":
        calls.append(1)
        if len(calls) == int(os.environ["FAILS_AT"]):
            raise torch.OutOfMemoryError("injected")
    return original(*inputs, **options)

script = grpo if os.environ["SCRIPT"] == "grpo" else sft
calls, original, script.token_logprobs = [], grpo.token_logprobs, once_out_of_memory
cli(script.main, script.Args)
"""


@pytest.mark.parametrize("script, ranks", [("grpo", 1), ("grpo", 2), ("sft", 1)])
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(run, tiny, tmp_path, script, ranks):
    """C-36: out of memory in step 1's second micro-batch (of the second rank): bit-equal to a run at half the size."""
    flags = small(tiny, beta=0.01) if script == "grpo" else small_sft(tiny, batch_size=15)
    (tmp_path / "oom.py").write_text(OUT_OF_MEMORY)
    run(f"{script}.py", *flags, "--tokens-per-batch", 200, "--out", "half", cwd=tmp_path, ranks=ranks)
    # the first call is the self-check's
    process = run(tmp_path / "oom.py", *flags, "--tokens-per-batch", 400, "--out", "oom", cwd=tmp_path, ranks=ranks,
                  env={"FAILS_AT": "3", "SCRIPT": script})
    assert "out of memory: tokens per batch is now 200" in process.err
    assert timeless(tmp_path / "oom") == timeless(tmp_path / "half")
    assert {line["tokens_per_batch"] for line in train_lines(tmp_path / "oom")} == {200}
    assert_equal_bits(adapter(tmp_path / "oom"), adapter(tmp_path / "half"))


SAMPLER_OUT_OF_MEMORY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, grpo
from common.run import cli

def decode(self, n, length, temperature):
    if n > 4:
        raise torch.OutOfMemoryError("injected")
    original(self, n, length, temperature)

original, grpo.Sampler._decode = grpo.Sampler._decode, decode
cli(grpo.main, grpo.Args)
"""


def test_out_of_memory_in_the_sampler_halves_the_slots(run, tiny, tmp_path):
    """The noise is keyed: fewer slots, the same samples. Log-probs to 1e-4: float32 in another batch shape."""
    (tmp_path / "oom.py").write_text(SAMPLER_OUT_OF_MEMORY)
    flags = small(tiny, lr=1e-4)
    run("grpo.py", *flags, "--out", "clean", cwd=tmp_path)
    process = run(tmp_path / "oom.py", *flags, "--slots", 16, "--out", "oom", cwd=tmp_path)
    assert "out of memory: slots is now 4" in process.err
    assert_same_runs(tmp_path / "oom", tmp_path / "clean")


# ------------------------------------------------------------------------------------------------------------
# Flags


def test_weight_decay_shrinks_a_parameter_without_gradient(run, tiny, tmp_path):
    """A1.26: exactly lr * decay of it per step (float32 rounds each of 3 products: 1e-6 relative)."""
    for decay in (0, 0.1):
        flags = small(tiny, rewards="correctness=1", weight_decay=decay, lr=0.01)  # a random model is never right
        run("grpo.py", *flags, "--out", f"decay-{decay}", cwd=tmp_path)
        assert {line["rows_trained"] for line in train_lines(tmp_path / f"decay-{decay}")} == {0}
    start, end = (adapter(tmp_path / f"decay-{decay}") for decay in (0, 0.1))
    for name in start:
        torch.testing.assert_close(end[name], start[name] * (1 - 0.01 * 0.1) ** 3, rtol=1e-6, atol=0)
        assert start[name].any() == ("lora_A" in name)


def test_dynamic_sampling_keeps_groups_that_differ(run, tiny, tmp_path):
    flags = small(tiny, dynamic_sampling=True, prompts_per_step=4, num_generations=2, max_new_tokens=6, max_refills=3)
    run("grpo.py", *flags, "--out", "run", cwd=tmp_path)
    drawn = [line["questions_drawn"] for line in train_lines(tmp_path / "run")]
    assert max(drawn) > 4 and all(n % 4 == 0 and n <= 16 for n in drawn)
    for line in train_lines(tmp_path / "run"):
        step = [row for row in rows(tmp_path / "run") if int(row["step"]) == line["step"]]
        by_group = [[float(row["advantage"]) for row in step if row["group"] == group] for group in {r["group"] for r in step}]
        trained = [advantages for advantages in by_group if any(advantages)]
        assert 0 < len(trained) <= 4 and (len(trained) == 4 or line["questions_drawn"] == 16)
        assert line["rows_trained"] == 2 * len(trained)
        assert len(step) == 2 * line["questions_drawn"]  # every rollout is in samples.csv, also those not kept
        assert line["reward"] == pytest.approx(sum(float(row["reward"]) for row in step) / len(step))


def test_kl_in_the_reward(run, tiny, tmp_path):
    """Total = weighted columns - beta * KL, and the logged kl is its mean over tokens (float32 log-probs: 1e-6)."""
    flags = small(tiny, beta=0.5, kl_in="reward", kl_estimator="k1", lr=1e-2, group_scaling="loo")
    run("grpo.py", *flags, "--out", "run", cwd=tmp_path)
    for line in train_lines(tmp_path / "run"):
        step = [row for row in rows(tmp_path / "run") if int(row["step"]) == line["step"]]
        kl = [(float(row["reward/mark"]) - float(row["reward"])) / 0.5 for row in step]
        assert (max(map(abs, kl)) > 1e-3) == (line["step"] > 1)
        assert line["kl"] == pytest.approx(sum(kl) / sum(int(row["tokens"]) for row in step), abs=1e-6)


def test_full(run, tiny, tmp_path):
    """All weights: final/ is a plain model, of which transformers reads every weight, and a start for the next run."""
    from transformers import AutoModelForCausalLM

    flags = small(tiny, full=True, beta=0.05, lr=1e-4, lora_r=None)
    process = run("grpo.py", *flags, "--out", "run", cwd=tmp_path)
    assert "(all)" in process.out and not (tmp_path / "run/final/adapter_config.json").exists()
    model, begun = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final"), AutoModelForCausalLM.from_pretrained(tiny)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), begun.parameters(), strict=True)]
    assert all(moved) and train_lines(tmp_path / "run")[0]["kl"] == pytest.approx(0, abs=1e-7)
    next_run = run("grpo.py", *small(tmp_path / "run", max_steps=1), "--out", "next", cwd=tmp_path)
    assert "step-0 KL 0" in next_run.out
    assert models.base_of(str(tmp_path / "next")) == str(tmp_path / "run/final")


def test_updates_per_batch_and_recompute_old(run, tiny, tmp_path):
    """Two steps of the optimizer a batch; old log-probs recomputed are the sampler's, to 1e-5 in float32."""
    for name, more in {"plain": {}, "recomputed": {"recompute_old": "True", "sampler_correction": "truncate"}}.items():
        run("grpo.py", *small(tiny, updates_per_batch=2, max_steps=2, lr=1e-4, **more), "--out", name, cwd=tmp_path)
        saved = torch.load(tmp_path / name / "checkpoints/step-2/training.pt", weights_only=True)
        assert {state["step"].item() for state in saved["optimizer"]["state"].values()} == {4}
    for one, other in zip(train_lines(tmp_path / "plain"), train_lines(tmp_path / "recomputed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert [row["completion"] for row in rows(tmp_path / "plain")] == [row["completion"] for row in rows(tmp_path / "recomputed")]


def test_gradient_checkpointing_changes_nothing(run, tiny, tmp_path):
    for name, on in {"off": None, "on": True}.items():
        run("grpo.py", *small(tiny, gradient_checkpointing=on, lr=1e-4, beta=0.05), "--out", name, cwd=tmp_path)
    assert_same_runs(tmp_path / "on", tmp_path / "off")


def test_mask_truncated(run, tiny, tmp_path):
    run("grpo.py", *small(tiny, mask_truncated=True, max_new_tokens=8), "--out", "run", cwd=tmp_path)
    for line in train_lines(tmp_path / "run"):
        step = [row for row in rows(tmp_path / "run") if int(row["step"]) == line["step"]]
        finished = [row for row in step if row["finished"] == "1" and float(row["advantage"])]
        assert line["rows_trained"] == len(finished) and line["tokens_trained"] == sum(int(row["tokens"]) for row in finished)
        assert any(row["finished"] == "0" and float(row["advantage"]) for row in step)  # it stays in its group's mean


def test_train_layers(run, tiny, tmp_path):
    """A3.16: one layer's adapters alone, and their number printed."""
    process = run("grpo.py", *small(tiny, train_layers=1, lora_r=64, rewards="mark=1 format=1"), "--out", "run", cwd=tmp_path)
    saved = adapter(tmp_path / "run")
    assert all(".layers.1." in name for name in saved) and len(saved) == 14
    assert f"{sum(tensor.numel() for tensor in saved.values()) / 1e6:.2f} M trained" in process.out
    assert all(tensor.any() for tensor in saved.values())
    assert json.loads((tmp_path / "run/final/adapter_config.json").read_text())["layers_to_transform"] == [1]


def test_system_and_prompt_template(run, tiny, tmp_path):
    """A3.15: the longest prompt printed is the one that they make; by default a request for the answer's format."""
    tokenizer = models.load_tokenizer(str(tiny))
    train, held_out = data.train_validation("arithmetic", n_train=20, n_validation=4, level="1", seed=0)

    def longest(system, template="{prompt}"):
        return max(len(data.encode_prompt(tokenizer, e.prompt, system, template)) for e in train + held_out)

    for name, flags, expected in (("default", [], longest(data.THINK_ANSWER_SYSTEM)),
                                  ("own", ["--system", "Be brief.", "--prompt-template", "Q {prompt} {ok}"],
                                   longest("Be brief.", "Q {prompt} {ok}"))):
        process = run("grpo.py", *small(tiny, max_steps=1), *flags, "--out", name, cwd=tmp_path)
        assert f"prompts up to {expected} tokens" in process.out
    assert longest("Be brief.", "Q {prompt} {ok}") not in (longest("Be brief."), longest(data.THINK_ANSWER_SYSTEM))


def test_split_sizes(run, tiny, tmp_path):
    """A2.13: exactly 30 and 20 questions, disjoint, and the same for the same seed; every one of the 30 is used."""
    flags = small(tiny, train_questions=30, eval_questions=20, level="2", prompts_per_step=10, num_generations=2,
                  max_new_tokens=2)
    process = run("grpo.py", *flags, "--out", "run", cwd=tmp_path)
    assert "30 questions to train on, 20 held out" in process.out
    asked = {row["prompt"] for row in rows(tmp_path / "run")}
    held_out = {row["prompt"] for row in rows(tmp_path / "run", "eval.csv")}
    assert len(asked) == 30 and len(held_out) == 20 and not asked & held_out
    run("grpo.py", *flags, "--lr", 0.1, "--max-steps", 1, "--out", "again", cwd=tmp_path)
    assert {row["prompt"] for row in rows(tmp_path / "again", "eval.csv")} == held_out


def test_runs_never_share_a_directory(start, tiny, tmp_path):
    """A1.27: four runs started at once, two of them with the same arguments, in the default place."""
    flags = small(tiny, max_steps=1, eval_questions=1, max_new_tokens=2)
    runs = [start("grpo.py", *flags, *more, cwd=tmp_path) for more in ([], [], ["--lr", "1e-5"], ["--seed", "1"])]
    assert [process.wait().code for process in runs] == [0] * 4, [process.err for process in runs]
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 4 and all(len(train_lines(folder)) == 1 for folder in folders)
    assert all(folder.name.startswith("grpo-random-arithmetic-s") for folder in folders)


FAKE_WANDB = """
import json, os
def note(what, value):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([what, value], default=str) + "\\n")
note("imported", None)
def init(**options): note("init", options)
def log(values, **options): note("log", values | options)
def finish(): note("finish", None)
class Table:
    def __init__(self, columns, data): self.columns, self.data = columns, data
    def __str__(self): return f"table of {len(self.data)} x {len(self.columns)}"
"""


def test_wandb(run, tiny, tmp_path):
    """A2.12, with a fake one: rank 0 logs what metrics.jsonl holds, and a table of samples; without --wandb no import."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(FAKE_WANDB)
    flags = small(tiny, eval_samples=2, eval_k=2, max_steps=2)
    for name, more, ranks in (("without", [], 1), ("with", ["--wandb"], 2)):
        run("grpo.py", *flags, *more, "--out", name, cwd=tmp_path, ranks=ranks, path=[tmp_path / "fake"],
            env={"NOTES": str(tmp_path / f"{name}.notes")})
    assert not (tmp_path / "without.notes").exists()
    notes = [json.loads(line) for line in (tmp_path / "with.notes").read_text().splitlines()]
    assert [what for what, _ in notes if what != "log"] == ["imported", "init", "finish"]
    assert notes[1][1]["config"]["max_steps"] == 2
    logged = [value for what, value in notes if what == "log"]
    assert [line for line in logged if "samples" not in line] == metrics(tmp_path / "with")
    columns = len(rows(tmp_path / "with")[0])
    assert [line["samples"] for line in logged if "samples" in line] == [f"table of {n} x {columns}" for n in (15, 30)]
    keys = set().union(*logged)
    assert {"loss", "reward", "reward/std", "reward/max", "reward/min", "time", "eval/pass@1", "eval/pass@2 T=0.5",
            "accumulated_reward", "samples"} <= keys


@pytest.mark.parametrize("script, ranks", [("grpo.py", 1), ("sft.py", 1), ("grpo.py", 2)])
def test_dry_run_leaves_nothing(run, tiny, tmp_path, script, ranks):
    """A4.13, also where it ends in a mistake."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    small_flags = small if script == "grpo.py" else small_sft
    options = {"cwd": tmp_path / "here", "env": {"TMPDIR": str(tmp_path / "temporary")}, "ranks": ranks}
    process = run(script, *small_flags(tiny, max_steps=100), "--dry-run", **options)
    assert "dry run: peak memory" in process.out and "100 steps" in process.out
    run(script, *small_flags(tiny, max_steps=100, out="run", data="nowhere.jsonl"), "--dry-run", fails=True, **options)
    assert listing(tmp_path) == ["here", "temporary"]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_difference_to_the_commit_is_kept(run, tiny, tmp_path):
    """A4.6, in a copy of the scripts that is a repository of its own."""
    repo = tmp_path / "repo"
    shutil.copytree(ROOT / "common", repo / "common", ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    shutil.copy(ROOT / "grpo.py", repo)

    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=repo, check=True,
                              capture_output=True, text=True).stdout

    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    flags = small(tiny, max_steps=1, max_new_tokens=2)
    run(repo / "grpo.py", *flags, "--out", "clean", cwd=tmp_path)
    with open(repo / "grpo.py", "a") as file:
        file.write("# a changed line\n")
    run(repo / "grpo.py", *flags, "--out", "dirty", cwd=tmp_path)
    clean, dirty = (json.loads((tmp_path / name / "config.json").read_text())["git"] for name in ("clean", "dirty"))
    assert clean["commit"] == dirty["commit"] == git("rev-parse", "HEAD").strip()
    assert (clean["dirty"], dirty["dirty"]) == (False, True)
    assert not (tmp_path / "clean/git.diff").exists()
    assert "+# a changed line" in (tmp_path / "dirty/git.diff").read_text()


# ------------------------------------------------------------------------------------------------------------
# From run to run


def test_a_run_as_model_merges_its_adapter(run, tiny, tmp_path):
    """Merged once in float32: logits equal base and adapter to 1e-5 of their size, and the next run starts at KL 0."""
    run("grpo.py", *small(tiny, lr=1e-2), "--out", "a", cwd=tmp_path)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))

    def plain(name):
        return models.load_model(str(name), torch.float32, torch.device("cpu"))

    base, adapted, merged = plain(tiny), plain(tiny), plain(tmp_path / "a")
    grpo.add_lora(adapted, "policy", 4, 64, models.PROJECTIONS)
    models.load_adapter(tmp_path / "a/final", grpo.adapter_tensors(adapted, "policy"))
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert (base(ids).logits - expected).abs().max() > 0.1
    process = run("grpo.py", *small(tmp_path / "a", beta=0.1, max_steps=2, lr=1e-2), "--out", "b", cwd=tmp_path)
    assert "step-0 KL 0" in process.out
    kl = [line["kl"] for line in train_lines(tmp_path / "b")]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] > 1e-5  # the reference is the merged start, not the plain base
    first, last = (rows(tmp_path / name, "eval.csv") for name in ("a", "b"))
    assert [row["completion"] for row in first if row["step"] == "3"] == [row["completion"] for row in last if row["step"] == "0"]
    # a run on a run: both adapters are merged
    both = plain(tmp_path / "b")
    assert_equal_bits(both.state_dict(), plain(tmp_path / "b/final").state_dict())
    assert (both(ids).logits - merged(ids).logits).abs().max() > 0.1


@pytest.fixture(scope="module")
def by_heart(run, tiny, tmp_path_factory):
    """sft.py --single-batch on 12 sums, 100 steps, and then grpo.py from that run on the same sums."""
    folder = tmp_path_factory.mktemp("by-heart")
    with open(folder / "sums.jsonl", "w") as file:
        for i in range(14):
            completion = f"<think>{i}+{i % 5}</think><answer>{i + i % 5}</answer>"
            file.write(json.dumps({"prompt": f"{i}+{i % 5}?", "answer": str(i + i % 5), "completion": completion}) + "\n")
    common = {"data": folder / "sums.jsonl", "level": None, "train_questions": 12, "eval_questions": 2, "max_new_tokens": 24}
    run("sft.py", *small_sft(tiny, **common, single_batch=True, batch_size=12, max_steps=100, full=True, lr=1e-2),
        "--out", "sft", cwd=folder)
    run("grpo.py", *small(folder / "sft", **common, lr=1e-5, max_steps=2), "--out", "grpo", cwd=folder)
    return folder


def test_a_single_batch_is_learnt_by_heart(by_heart):
    """A1.24."""
    lines = train_lines(by_heart / "sft")
    assert lines[0]["loss"] > 1 and lines[-1]["loss"] < 0.05 and lines[-1]["step"] == 100


def test_samples_of_a_run_are_data_for_sft(run, tiny, by_heart, tmp_path):
    """A1.17: what GRPO sampled and got right, once each."""
    samples = rows(by_heart / "grpo")
    right = {(row["prompt"], row["completion"]) for row in samples if row["correct"] == "1"}
    assert 4 <= len(right) < len(samples) and sum(row["correct"] == "1" for row in samples) > len(samples) / 2
    flags = small_sft(tiny, data=by_heart / "grpo/samples.csv", filter="correct", level=None, train_questions=None,
                      eval_questions=1, max_steps=2)
    process = run("sft.py", *flags, "--out", "run", cwd=tmp_path)
    held_out = {row["prompt"] for row in rows(tmp_path / "run", "eval.csv")}
    kept = [prompt for prompt, _ in right if prompt not in held_out]
    assert f"{len(kept)} rows to train on" in process.out


def test_sft_held_out_loss_is_that_of_transformers(run, tiny, tmp_path):
    """Per token, over all of them (float32 sums: 1e-5)."""
    run("sft.py", *small_sft(tiny, max_steps=1, system="Sum."), "--out", "run", cwd=tmp_path)
    tokenizer, model = models.load_tokenizer(str(tiny)), models.load_model(str(tiny), torch.float32, torch.device("cpu"))
    _, held_out = data.train_validation("arithmetic", n_train=20, n_validation=4, level="1", seed=0)
    loss = count = 0
    for example in held_out:
        prompt = data.encode_prompt(tokenizer, example.prompt, "Sum.")
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            mean = model(torch.tensor([prompt + completion]), labels=torch.tensor([[-100] * len(prompt) + completion])).loss
        loss, count = loss + mean.item() * len(completion), count + len(completion)
    line, after = eval_lines(tmp_path / "run")
    assert line["eval/loss"] == pytest.approx(loss / count, rel=1e-5) and after["eval/loss"] < line["eval/loss"]
    greedy = rows(tmp_path / "run", "eval.csv")
    assert line["eval/questions"] == 4 and len(greedy) == 8
    assert line["eval/pass@1"] == sum(row["correct"] == "1" for row in greedy[:4]) / 4


def test_sft_from_scratch(run, tiny, tmp_path):
    process = run("sft.py", *small_sft(tiny, from_scratch=True, max_steps=1), "--out", "run", cwd=tmp_path)
    assert "(all)" in process.out
    fresh_weights, begun = weights(tmp_path / "run"), load_file(tiny / "model.safetensors")
    assert distance(fresh_weights, begun) > 0.1  # not the weights of the folder, its shape alone


# ------------------------------------------------------------------------------------------------------------
# Real input


@pytest.mark.slow
@needs_data
def test_real_tokenizer_and_gsm8k(run, tmp_path):
    """A random Qwen2 of two layers and Qwen2.5's vocabulary, Qwen2.5-Instruct's template, GSM8K as published."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

    template = (SHARED / "tokenizers/chat_templates/qwen2_5.jinja").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5", eos_token="<|im_end|>", chat_template=template)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True))
    model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], do_sample=True, temperature=0.7, top_k=20,
                                               top_p=0.8, repetition_penalty=1.1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert models.stop_ids(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tokenizer) == [151643, 151645]
    run("grpo.py", "--model", tmp_path / "model", "--data", SHARED / "gsm8k/train.jsonl", "--max-steps", 2, "--out", "run",
        "--eval-questions", 5, "--prompts-per-step", 2, "--num-generations", 3, "--max-new-tokens", 16, cwd=tmp_path)
    config = json.loads((tmp_path / "run/config.json").read_text())["args"]
    assert config["system"] == data.THINK_ANSWER_SYSTEM and config["lr"] == 2e-5
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2]
    assert [line["eval/questions"] for line in eval_lines(tmp_path / "run")] == [5, 5]
    published = {json.loads(line)["question"] for line in open(SHARED / "gsm8k/train.jsonl", encoding="utf-8")}
    sampled = rows(tmp_path / "run") + rows(tmp_path / "run", "eval.csv")
    assert all(row["prompt"] in published and float(row["answer"]) == float(row["answer"]) for row in sampled)
    assert "7468 questions to train on, 5 held out" in (tmp_path / "run/log.txt").read_text()
