"""A run out of memory, killed, or with a damaged checkpoint ends as if nothing had happened."""

import itertools
import json
import os
import random
import re
import signal
import time
from collections import Counter
from contextlib import suppress

import pytest

from common.run import damage
from tests.processes import (
    FLOAT64,
    assert_equal_bits,
    assert_same_runs,
    patched,
    timeless,
    wait_for,
    weights,
)
from tests.test_ranks import ALL, CASES, LINEAR

# ------------------------------------------------------------------------------------------------------------
# Out of memory

OUT_OF_MEMORY = """
calls = {"sample": 0, "accumulate_gradients": 0}

def count(home, name, within=None):
    def call(*inputs, **options):
        calls[name] += 1
        for inner in calls if within is None else ():
            calls[inner] = calls[inner] if inner in ("sample", "accumulate_gradients") else 0
        where = f"{within} {calls.get(within)} {name} {calls[name]}"
        if where in os.environ["FAIL"].split(",") and os.environ["RANK"] == "1":
            print("failed in", where, file=sys.stderr, flush=True)
            raise torch.OutOfMemoryError("injected")
        return original(*inputs, **options)

    original, calls[name] = getattr(home, name), 0
    setattr(home, name, call)

count(script, "accumulate_gradients")
for name in ("token_logprobs", "token_values", "last_token_scores"):
    home = script if hasattr(script, name) else script.models
    if hasattr(home, name):
        count(home, name, "accumulate_gradients")
if hasattr(script, "Sampler"):
    count(script.Sampler, "sample")
    count(script.Sampler, "_decode", "sample")
"""


# name -> which calls fail: the number of the outer one, and of the inner one within it. The self-check is the
# first that samples, the evaluation at step 0 the second; reward_model.py's self-check has a gradient, too.
FAILURES = {
    "sft": ["sample 2 _decode 3", "accumulate_gradients 1 token_logprobs 2"],
    "reward_model": ["accumulate_gradients 2 last_token_scores 2"],
    "dpo": ["sample 3 _decode 3", "accumulate_gradients 1 token_logprobs 2"],
    "grpo": ["sample 3 _decode 3", "accumulate_gradients 1 token_logprobs 2"],
    "ppo": ["sample 3 _decode 3", "accumulate_gradients 0 token_values 2"],  # old values
    "ppo update": ["sample 3 _decode 3", "accumulate_gradients 1 token_values 2"],
    "star": ["sample 3 _decode 3", "accumulate_gradients 1 token_logprobs 2"],
}
# what precedes the failure with another micro-batch, and so with other roundings, is switched off
MORE = {"dpo": {"loss": "simpo", "pairs_per_step": 14, "iterations": 1, "passes": 1}, "grpo": {"beta": 0},
        "star": {"rewards": "correctness", "batch_size": 14, "iterations": 1}}
TOKENS = {"sft": 40, "dpo": 120, "star": 75}  # in a micro-batch of half the size


@pytest.mark.parametrize("name", FAILURES)
def test_out_of_memory_on_one_of_two_ranks(go, tiny, tmp_path, name):
    """In the sampler and in the second micro-batch: the run of half the size on both, to the last bit.

    But for PPO's old values, computed before a failure in the update: there up to rounding, in float64.
    """
    script = name.split()[0]
    flags = {"model": tiny, "ranks": 2, "bare": True} | ALL | CASES[script] | MORE.get(script, {})
    if script == "reward_model":
        with open(tmp_path / "pairs.jsonl", "w") as file:
            for i in range(60):
                pair = {"prompt": f"{i}?", "chosen": "7", "rejected": "no" * (1 + i % 9)}
                print(json.dumps(pair), file=file)
    n = TOKENS.get(script, 61)
    small, large = {"tokens_per_batch": n}, {"tokens_per_batch": 2 * n}
    if script != "reward_model":
        small["slots"], large["slots"] = 4, 8
    exact = FLOAT64 if name == "ppo update" else ""
    half = go("half", script=patched(tmp_path, script, exact), **flags | small).folder
    oom = go("oom", script=patched(tmp_path, script, exact + OUT_OF_MEMORY),
             env={"FAIL": ",".join(FAILURES[name])}, **flags | large)
    said = [process.err for process in oom.group]
    assert said[1] == "".join(f"failed in {where}\n" for where in FAILURES[name])
    slots = {"reward_model": "", "sft": "out of memory: slots is now 1\n"}  # half of its 3 rows
    assert said[0] == slots.get(script, "out of memory: slots is now 4\n") + (
        f"out of memory: tokens per batch is now {n}\n")
    if name == "ppo update":
        return assert_same_runs(oom.folder, half)
    assert [line for line in timeless(oom.folder) if line["step"]] == [
        line for line in timeless(half) if line["step"]]
    if (half / "samples.csv").exists():
        assert (oom.folder / "samples.csv").read_bytes() == (half / "samples.csv").read_bytes()
    assert_equal_bits(weights(oom.folder), weights(half))


# ------------------------------------------------------------------------------------------------------------
# Killed at any moment

MORTAL = """
# DIE: of the changes of files with that word in their path, how many; calls after the last
word, changes, later = os.environ.get("DIE", "killed 0 0").split()
changes, later = int(changes), int(later)

def die(*_):
    global later
    later -= 1
    if later < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def hook(event, args):
    global changes
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        path = os.path.abspath(os.fsdecode(args[0]))
        if "killed" in path and word in path:
            changes -= 1
            if changes == 0:
                sys.setprofile(die)
                die()

def save(value, file):
    original(value, file)
    time.sleep(float(os.environ.get("SLOW", 0)))

original, torch.save = torch.save, save
sys.addaudithook(hook)
"""

FLAGS = {"beta": 0.05, "dynamic_sampling": True, "eval_every": 2, "keep": 3, "lr": 1e-2, "max_new_tokens": 8}


@pytest.fixture
def start_and_kill(go, tmp_path):
    """start_and_kill(script, how, rng, flags, ranks) -> Process: start the run "killed", or go on with it and
    the flags that change, and kill it.

    how: "change": at one of the next changes of its files, or some calls later; "cut": at those by which it
    takes back what was logged after its checkpoint; "final": at those of final/; "time": some milliseconds
    after some lines of its log; "aside": while it writes a checkpoint; "": not at all. It may end before.
    Of several ranks one is killed, and the others end by themselves.
    """
    folder, scripts = tmp_path / "killed", {}
    cuts = itertools.cycle(["4 4", "5 0", "4 4", "7 0"])  # metrics open, to be renamed; samples, eval.csv

    def lines():
        return (folder / "log.txt").read_text().count("\n") if (folder / "log.txt").exists() else 0

    def aside():
        found = set()
        for path in folder.glob("checkpoints/.tmp-*"):
            with suppress(FileNotFoundError):  # renamed since
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def start(script, how, rng, flags, ranks=1):
        if script not in scripts:
            scripts[script] = patched(tmp_path, script, MORTAL)
        die = {"change": f"killed {rng.randint(1, 60)} {rng.choice([0, 0, 3, 30, 300, 3000])}",
               "final": f"tmp-final {rng.randint(1, 4)} {rng.choice([0, 3, 30])}"}
        if how == "cut":
            die["cut"] = f"killed {next(cuts)}"
        env = {"SLOW": "0.05"} if how == "aside" else {"DIE": die[how]} if how in die else {}
        wanted, before, pause = lines() + rng.randint(2, 9), aside(), rng.uniform(0, 0.05)
        begun = (folder / "config.json").exists()
        process = go("killed", script=scripts[script], ranks=ranks, wait=False, env=env,
                     bare=begun or "model" in flags, **flags | ({"resume": True} if begun else {}))
        if how in ("time", "aside"):
            wait_for(lambda: process.poll() is not None or (
                lines() >= wanted if how == "time" else aside() - before), process.said, every=0.005)
            time.sleep(pause)
            victim = rng.choice(process.group)
            if victim.poll() is None:
                os.kill(victim.pid, signal.SIGKILL)
        process.wait()
        codes = [of.code for of in process.group]
        assert -signal.SIGKILL in codes or set(codes) == {0}, process.said()
        return process

    return start


def assert_equal_runs(folder, whole):
    """Bit for bit, but for times."""
    assert timeless(folder) == timeless(whole)
    for path in whole.glob("*.csv"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert_equal_bits(weights(folder), weights(whole))


def spoil(folder, n):
    """Damage a file of the newest checkpoint: cut it, change a bit or remove it, the n-th of nine ways."""
    found = sorted(folder.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))
    if len(found) < 2 or damage(found[-1]):  # from the last time
        return False
    path = found[-1] / ("adapter_model.safetensors", "training.pt", "state.json")[n % 3]
    content = bytearray(path.read_bytes())
    if n // 3 % 3 == 0:
        os.truncate(path, len(content) // 2)
    elif n // 3 % 3 == 1:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    return True


def spoil_metrics(folder, n):
    """What a power cut leaves in metrics.jsonl: of lines after the checkpoint one cut in half, and NULs."""
    path, found = folder / "metrics.jsonl", [int(p.name[5:]) for p in folder.glob("checkpoints/step-*")]
    if not path.exists() or not found:
        return
    text = path.read_bytes()
    last = re.match(rb'{"step": (\d+)', text.splitlines()[-1])
    if n % 2 and last and int(last[1]) > max(found):
        text = text[:-9]
    path.write_bytes(text + b"\0" * 100 * (n % 3 > 0))


@pytest.mark.slow
def test_killed_35_times_and_damaged(go, start_and_kill, tmp_path):
    """At changes of its files, in the writing of checkpoints, by the clock: it ends as the whole run does."""
    flags, rng, folder = FLAGS | {"max_steps": 16, "save_every": 1}, random.Random(0), tmp_path / "killed"
    whole = go("whole", **flags).folder
    kills, spoiled = Counter(), 0
    while not (folder / "final").exists():
        n = sum(kills.values())
        how = ("change", "cut", "time", "cut", "aside")[n % 5] if n < 35 else ""
        process = start_and_kill("grpo", how, rng, {} if (folder / "config.json").exists() else flags)
        kills[how] += process.code != 0
        spoiled += n % 6 == 5 and n < 35 and spoil(folder, spoiled)
    print(f"killed {dict(kills)}, checkpoints damaged {spoiled}")
    assert sum(kills.values()) >= 25 and kills["aside"] >= 4 and spoiled >= 4, (kills, spoiled)
    assert (folder / "log.txt").read_text().count(" is damaged (") >= spoiled
    assert_equal_runs(folder, whole)
    assert {path.name for path in folder.glob("checkpoints/*") if "damaged" not in path.name} == {
        "step-14", "step-15", "step-16"}


MORE_KILLS = int(os.environ.get("MORE_KILLS", 0))  # of each, for a longer trial
STEPS = {"sft": (30, 40), "ppo": (8, 12), "grpo": (8, 12)}  # dpo and star: of their iterations


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "star", "grpo on 2 ranks"])
def test_killed_again_and_again(go, start_and_kill, tiny, tmp_path, name):
    """Each script, and one of two ranks: also in writing final/, before the first step is done again, after
    --max-steps was raised, with a damaged newest checkpoint, a cut metrics.jsonl and NULs at its end.
    """
    script, ranks, folder = name.split()[0], 1 + name.endswith("ranks"), tmp_path / "killed"
    flags = {"model": tiny} | ALL | CASES[script] | {"eval_every": 2, "keep": 3, "save_every": 2}
    flags |= {"lr_schedule": "constant"}
    flags |= {"max_steps": STEPS[script][1]} if script in STEPS else {"iterations": 3}
    whole = go("whole", script=patched(tmp_path, script, ""), ranks=ranks, bare=True, **flags).folder
    rng, kills, spoiled, more = random.Random(name), Counter(), 0, {}
    begin = flags | ({"max_steps": STEPS[script][0]} if script in STEPS else {})
    kinds = itertools.cycle(["time", "change", "cut", "aside", "change"])
    for raised in range(1 + (script in STEPS)):
        ways = [next(kinds) for _ in range((3 if script in STEPS else 6) + MORE_KILLS)] + ["final"]
        while not (folder / "final").exists():
            begun = (folder / "config.json").exists()
            if begun and ways:
                spoiled += len(ways) % 3 == 0 and spoil(folder, spoiled)
                spoil_metrics(folder, len(ways))
            how = ways.pop(0) if ways else ""
            process = start_and_kill(script, how, rng, more if begun else begin, ranks)
            kills[how] += any(of.code for of in process.group)
            args = json.loads((folder / "config.json").read_text())["args"]
            more = {name: value for name, value in more.items() if args[name] != value}  # else it has them
        if not raised and script in STEPS:
            more = {"max_steps": STEPS[script][1]}
            (folder / "final").rename(tmp_path / "shorter")
    print(f"{name}: killed {dict(kills)}, checkpoints damaged {spoiled}")
    assert sum(kills.values()) >= 5 and kills["final"], kills
    assert_equal_runs(folder, whole)


def test_killed_and_resumed_at_other_numbers_of_ranks(go, tmp_path):
    """In float64, and steps linear in the gradient (tests/test_ranks.py says why)."""
    flags = FLAGS | LINEAR | {"max_steps": 6, "save_every": 2}
    script = patched(tmp_path, "grpo", FLOAT64)
    dying = patched(tmp_path, "grpo", FLOAT64 + """
def learning_rate(number, args):
    if number == int(os.environ["LAST"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(number, args)
step, script.learning_rate = script.learning_rate, learning_rate
""")
    whole = go("whole", script=script, **flags).folder
    for ranks, last, more in ((1, 3, flags), (2, 5, {"resume": True}), (3, 6, {"resume": True})):
        killed = go("killed", script=dying, ranks=ranks, bare="resume" in more, fails=True,
                    env={"LAST": str(last)}, **more)
        assert -signal.SIGKILL in [process.code for process in killed.group], killed.said()
    go("killed", script=script, resume=True, bare=True)
    assert_same_runs(killed.folder, whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_that_is_killed_asks_no_question_twice(go, tiny, tmp_path, ranks):
    """L11: an answer is on disk from its end on; whole, half a line and a dead rank's are told apart."""
    count = patched(tmp_path, "eval", FLOAT64 + """
def sample(self, prompts, keys, *more):
    with open(f"asked-{os.environ.get('RANK', 0)}", "a") as file:
        print(sum(map(len, keys)), file=file)
    return original(self, prompts, keys, *more)
original, script.Sampler.sample = script.Sampler.sample, sample
""")
    flags = {"model": tiny, "data": "arithmetic", "level": 1, "limit": 12, "k": [1, 2], "max_new_tokens": 12,
             "slots": 2}
    whole = go("whole", script=patched(tmp_path, "eval", FLOAT64), bare=True, **flags).folder
    folder = tmp_path / "killed"
    slow = patched(tmp_path, "eval", FLOAT64 + """
def counter(self, *names, **more):
    progress = original(self, *names, **more)
    def slowly(*state):
        progress(*state)
        time.sleep(0.05)
    return slowly
original, script.Run.counter = script.Run.counter, counter
""")
    process = go("killed", script=slow, ranks=ranks, bare=True, wait=False, **flags)

    def kept():
        return [line for path in folder.glob("answers-*.jsonl") for line in path.read_text().splitlines()]

    wait_for(lambda: len(kept()) >= 7 and len(list(folder.glob("answers-*"))) == ranks, process.said)
    process.kill()
    found = len(kept())
    assert found < 36 and not (folder / "samples.csv").exists()
    with open(folder / "answers-0.jsonl", "a") as file:
        file.write('["half a li')
    go("killed", script=count, bare=True, resume=True)
    asked = [*map(int, (tmp_path / "asked-0").read_text().split())]
    assert sum(asked) == 36 - found
    assert_same_runs(folder, whole)
    assert not list(folder.glob("answers-*"))
