"""Whole runs of grpo.py and sft.py on a random model of two layers: what they write, refuse, survive."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo
from common import data, models
from common.run import retry_smaller
from tests.processes import (
    ENV,
    FLOAT64,
    ROOT,
    assert_equal_bits,
    assert_same_runs,
    column,
    distance,
    eval_lines,
    fresh,
    launcher,
    listing,
    metrics,
    patched,
    place,
    rows,
    small,
    timeless,
    train_lines,
    wait_for,
    weights,
)

SHARED = ROOT.parent / "shared" / "data"

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


def n_calls(folder):
    """How often `letters` has been called."""
    return (folder / "calls.txt").read_text().count("\n") if (folder / "calls.txt").exists() else 0


def group_advantages(of_group):
    """GRPO's, by the textbook, from the rows of one group."""
    rewards = column(of_group, "reward")
    known = [r for r in rewards if not math.isnan(r)]
    if len(set(known)) < 2:
        return [0.0] * len(rewards)
    mean, deviation = statistics.mean(known), statistics.stdev(known)
    return [0.0 if math.isnan(r) else (r - mean) / (deviation + 1e-4) for r in rewards]


# ------------------------------------------------------------------------------------------------------------
# One run, looked at from all sides

WEIGHTS = {"mark": 0.5, "letters": 2.0, "correctness": 0.0}


@pytest.fixture(scope="module")
def looked_at(start, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked-at")
    (folder / "rewards.py").write_text(REWARDS)
    return launcher(start, tiny, folder)(
        "run", rewards=["mark=0.5", f"{folder}/rewards.py:letters=2", "correctness=0"], overlong_buffer=4,
        max_steps=5, warmup_steps=4, eval_every=2, eval_samples=3, eval_k=[1, 2], aggregation="token",
        beta=0.05, profile=1, save_every=1, show_every=1)


def test_files_of_a_run(looked_at):
    folder, files = looked_at.folder, set(listing(looked_at.folder))
    assert {"config.json", "grpo.py", "log.txt", "metrics.jsonl", "samples.csv", "eval.csv"} <= files
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-5"]  # keep 2
    saved_model = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert saved_model <= set(listing(folder / "final"))
    assert saved_model | {"training.pt", "state.json"} <= set(listing(folder / "checkpoints/step-4"))
    saved = torch.load(folder / "checkpoints/step-4/training.pt", weights_only=True)
    assert {"optimizer", "rng", "step", "position"} <= saved.keys() and saved["step"] == 4
    assert_equal_bits(weights(folder), weights(folder, "checkpoints/step-5"))


def test_config_json(looked_at):
    config = json.loads((looked_at.folder / "config.json").read_text())
    assert {"id", "argv", "git", "versions", "host", "world_size"} <= config.keys()
    assert {"commit", "dirty"} <= config["git"].keys()
    assert {"python", "torch", "transformers"} <= config["versions"].keys()
    assert config["argv"][1:3] == ["--model", config["args"]["model"]]
    assert config["host"] == socket.gethostname()
    assert config["args"]["recompute_old"] is False  # what was left open is resolved
    assert (looked_at.folder / "grpo.py").read_text() == (ROOT / "grpo.py").read_text()


def test_log_txt_is_what_the_terminal_showed(looked_at):
    log = (looked_at.folder / "log.txt").read_text()
    assert log == looked_at.out
    for said in ("self-check: ", "step-0 KL 0", "ETA", "gold ", "mark ", "held-out pass@1 before"):
        assert said in log


def test_reward_columns_are_raw_and_add_up(looked_at):
    """Each cell is a float's shortest text: equal up to the order of a sum."""
    samples = rows(looked_at.folder)
    for row in samples:
        total = sum(weight * float(row[f"reward/{name}"]) for name, weight in WEIGHTS.items())
        assert float(row["reward"]) == pytest.approx(total + float(row["reward/overlong"]), abs=1e-12)
        text = row["completion"]
        letters = sum(c.isascii() and c.isalpha() for c in text)
        assert float(row["reward/letters"]) == letters / max(1, len(text))
        assert float(row["reward/overlong"]) == grpo.overlong_penalty(int(row["tokens"]), 12, 4)
    assert all(len(set(column(samples, f"reward/{name}"))) > 1 for name in ("mark", "letters", "overlong"))


def test_a_reward_is_called_once_per_batch(looked_at):
    assert (looked_at.folder.parent / "calls.txt").read_text().split() == ["15"] * 5


def test_metrics_recomputed_from_samples(looked_at):
    """Means of the same numbers: 1e-9. The loss: 1e-5, for ratios off one by the sampler's float32 gap."""
    accumulated = 0.0
    assert [line["step"] for line in train_lines(looked_at.folder)] == [1, 2, 3, 4, 5]
    for line in train_lines(looked_at.folder):
        step = rows(looked_at.folder, step=line["step"])
        assert sorted(place(row)[1:] for row in step) == [[group, g] for group in range(3) for g in range(5)]
        reward, tokens = column(step, "reward"), column(step, "tokens")
        accumulated += sum(reward)
        expected = {
            "reward": sum(reward) / 15, "reward/std": statistics.pstdev(reward), "reward/min": min(reward),
            "reward/max": max(reward), "reward_failed": 0, "accumulated_reward": accumulated,
            "correct": sum(column(step, "correct")) / 15, "truncated": 1 - sum(column(step, "finished")) / 15,
            "tokens": sum(tokens) / 15, "tokens/max": max(tokens),
            "entropy": -sum(column(step, "logprob")) / sum(tokens), "questions_drawn": 3, "rows_trained": 15,
            "tokens_trained": sum(tokens),
            **{name: sum(column(step, name)) / 15 for name in step[0] if name.startswith("reward/")}}
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
        policy = -sum(a * n for a, n in zip(column(step, "advantage"), tokens)) / sum(tokens)
        assert abs(policy) > 1e-3 and line["loss"] == pytest.approx(policy + 0.05 * line["kl"], abs=1e-5)
        assert line["clip_low"] == line["clip_high"] == 0 and line["sampler_gap/max"] < 1e-4
    kl = [line["kl"] for line in train_lines(looked_at.folder)]
    assert kl[0] == pytest.approx(0, abs=1e-7) and min(kl[1:]) > 1e-7  # it starts from the reference


def test_advantages_in_samples_are_those_of_their_group(looked_at):
    for group in range(3):
        of_group = [row for row in rows(looked_at.folder, step=2) if int(row["group"]) == group]
        assert column(of_group, "advantage") == pytest.approx(group_advantages(of_group), abs=1e-9)
        assert any(column(of_group, "advantage")) and len({row["prompt"] for row in of_group}) == 1


def test_the_samples_of_a_step_differ(looked_at):
    assert len(set(column(rows(looked_at.folder, step=1), "completion", str))) > 10


def test_the_learning_rate_peaks_at_the_end_of_the_warm_up(looked_at):
    logged = [line["lr"] for line in train_lines(looked_at.folder)]
    assert logged == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3], rel=1e-12)
    for schedule in ("constant", "linear", "cosine"):
        args = grpo.Args(lr=1.0, warmup_steps=45, max_steps=100, lr_schedule=schedule)
        rates = [grpo.learning_rate(step, args) for step in range(1, 101)]
        assert rates[44] == 1.0 == max(rates) and sorted(rates[:45]) == rates[:45] and min(rates) > 0
        assert (rates[99] < 0.1) == (schedule != "constant")


def test_seconds_of_every_phase_and_a_trace(looked_at):
    for line in train_lines(looked_at.folder):
        phases = [line[f"seconds/{phase}"] for phase in ("sample", "reward", "logprobs", "update")]
        assert min(phases) > 0 and sum(phases) == pytest.approx(line["seconds"]) and line["memory_gb"] > 0
    trace = json.loads((looked_at.folder / "trace-1.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])


def test_eval_rows(looked_at):
    lines = eval_lines(looked_at.folder)
    assert [line["step"] for line in lines] == [0, 2, 4, 5]  # and after the last step
    for line in lines:
        step = rows(looked_at.folder, "eval.csv", line["step"])
        greedy = [row for row in step if row["sample"] == "0"]
        assert len(step) == 4 * (1 + 3) and line["eval/questions"] == len({row["id"] for row in greedy}) == 4
        assert set(column(greedy, "temperature")) == {0}
        assert line["eval/pass@1"] == sum(column(greedy, "correct")) / 4
        assert line["eval/tokens"] == sum(column(greedy, "tokens")) / 4


# ------------------------------------------------------------------------------------------------------------
# Repeating, killing, resuming


def test_a_run_repeats_from_its_config(go, looked_at):
    """A4.5 and A2.15: config.json is all it takes, and the command line overrides it."""
    config = looked_at.folder / "config.json"
    again = go("again", config=config, profile=0, bare=True).folder
    assert timeless(again) == timeless(looked_at.folder)
    assert (again / "samples.csv").read_bytes() == (looked_at.folder / "samples.csv").read_bytes()
    assert_equal_bits(weights(again), weights(looked_at.folder))
    go(None, f"--config={config}", seed=1, max_steps=1, bare=True)  # not in that run's directory
    (other,) = (again.parent / "runs").iterdir()
    assert column(rows(other), "completion", str) != column(rows(again, step=1), "completion", str)


@pytest.mark.parametrize("lr", ["0.0001", "1e-4"])  # YAML 1.1 reads the second as text
def test_arguments_from_a_yaml_file(go, tmp_path, lr):
    (tmp_path / "a.yaml").write_text(
        f"max-steps: 2\nrewards: [mark=1, format=0.5]\nlr: {lr}\nout: here\nmax_new_tokens: 3\n")
    go(None, config="a.yaml", max_steps=None, rewards=None, lr=None)
    assert [line["lr"] for line in train_lines(tmp_path / "here")] == [1e-4, 1e-4]
    samples = rows(tmp_path / "here")
    assert {"reward/mark", "reward/format"} <= samples[0].keys()
    assert max(column(samples, "tokens")) == 12  # as the command line says, not the file


RESUMED = {
    "adapter": {"beta": 0.05, "updates_per_batch": 2, "lr_schedule": "cosine", "eval_every": 2},
    "full": {"full": True, "beta": 0.05, "lr": 1e-4},
    "dynamic sampling": {"dynamic_sampling": True, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", RESUMED)
def test_killed_after_step_3_and_resumed(go, tmp_path, rewards_py, name):
    """6 steps = 3 steps, kill -9 in the fourth, --resume: metrics, samples, weights, state bit for bit."""
    flags = {"rewards": [f"{rewards_py}:letters=1", "mark=1"], "max_steps": 6, "save_every": 2, "lr": 1e-2,
             "eval_questions": 20} | RESUMED[name]  # more held-out rows than a step has: another cache size
    whole = go("whole", **flags).folder
    pause_after = n_calls(tmp_path) // 2  # dynamic sampling may call more than once a step
    (tmp_path / "calls.txt").unlink()

    (tmp_path / "pause").touch()
    killed = go("killed", **flags, env={"PAUSE_AFTER": str(pause_after)}, wait=False)
    folder = killed.folder
    wait_for(lambda: n_calls(tmp_path) > pause_after, lambda: killed.out + killed.err)
    assert [line["step"] for line in train_lines(folder)] == [1, 2, 3]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait().code == -signal.SIGKILL
    (tmp_path / "pause").unlink()

    # what a kill in the middle of writing would have left
    (folder / "checkpoints/.tmp-step-4").mkdir()
    (folder / "checkpoints/.tmp-step-4/training.pt").write_bytes(b"half")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward": 0.1')
    with open(folder / "samples.csv", "a") as file:
        file.write('4,17,0,2,Compute 1+1.,"half an ans')

    if name == "adapter":  # another interpreter, another hash seed
        fresh(ROOT / "grpo.py", "--out", "killed", "--resume", cwd=tmp_path)
    else:
        go("killed", resume=True, bare=True)
    assert timeless(folder) == timeless(whole)
    for file in ("samples.csv", "eval.csv"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()
    assert_equal_bits(weights(folder), weights(whole))
    assert listing(folder / "checkpoints") == listing(whole / "checkpoints")  # .tmp-step-4 is gone
    saved, expected = (torch.load(path / "checkpoints/step-6/training.pt", weights_only=True)
                       for path in (folder, whole))
    assert saved["position"] == expected["position"]
    for index, state in expected["optimizer"]["state"].items():
        assert_equal_bits(saved["optimizer"]["state"][index], state)
    assert distance(weights(folder), weights(folder, "checkpoints/step-4")) > 1e-4  # there was much to lose


KILLED_INSIDE_SAVE = """
def save(value, file, saves=[]):
    saves.append(file)
    if len(saves) == 2:
        file.write(b"PK half a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    original(value, file)

original, torch.save = torch.save, save
"""


def test_killed_inside_the_writing_of_a_checkpoint_of_sft(go, tmp_path):
    """Of grpo.py: tests/test_faults.py."""
    flags = {"max_steps": 4, "save_every": 1, "train_questions": 9, "lr": 1e-2}  # over two epochs
    whole = go("whole", script="sft.py", **flags).folder
    killed = go("killed", script=patched(tmp_path, "sft", KILLED_INSIDE_SAVE), fails=True, **flags)
    folder = killed.folder
    assert killed.code == -signal.SIGKILL
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name[0] != "."] == ["step-1"]
    resumed = go("killed", script="sft.py", resume=True, bare=True)
    assert "resuming from" in resumed.out and "step-1" in resumed.out
    assert timeless(folder) == timeless(whole)
    assert_equal_bits(weights(folder), weights(whole))
    assert listing(folder) == listing(whole)


def test_killed_before_the_first_checkpoint(go, tmp_path, rewards_py):
    flags = {"rewards": f"{rewards_py}:letters=1", "max_steps": 2}
    whole = go("whole", **flags).folder
    (tmp_path / "calls.txt").unlink()
    (tmp_path / "pause").touch()
    killed = go("killed", **flags, env={"PAUSE_AFTER": "1"}, wait=False)
    wait_for(lambda: n_calls(tmp_path) == 2, lambda: killed.out + killed.err)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (tmp_path / "pause").unlink()
    assert len(train_lines(killed.folder)) == 1
    assert "starting from step 0" in go("killed", resume=True, bare=True).out
    assert timeless(killed.folder) == timeless(whole)
    assert (killed.folder / "samples.csv").read_bytes() == (whole / "samples.csv").read_bytes()


def test_rows_that_a_kill_has_cut_short_are_not_kept(go, looked_at, tmp_path):
    """Whatever is left of the row, be it the first digit of its step."""
    shutil.copytree(looked_at.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    whole = {name: (tmp_path / "run" / name).read_bytes() for name in ("samples.csv", "eval.csv")}
    for name, more in (("samples.csv", "5,0,1"), ("eval.csv", "1")):
        with open(tmp_path / "run" / name, "a") as file:
            file.write(more)
    go("run", resume=True, bare=True)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in whole} == whole


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
    model("t5", model_type="t5")
    model("short", max_position_embeddings=50)
    model("window", sliding_window=16, use_sliding_window=True, max_window_layers=0,
          layer_types=["sliding_attention", "sliding_attention"])
    (folder / "nothing").mkdir()
    (folder / "run-without-model/checkpoints").mkdir(parents=True)
    question = json.dumps({"prompt": "Compute 1+1.", "answer": "2"}) + "\n"
    (folder / "empty.jsonl").write_text("")
    (folder / "column.jsonl").write_text(question + json.dumps({"prompt": "Compute 1+2.", "anwser": "3"}) + "\n")
    (folder / "malformed.jsonl").write_text(question * 2 + '{"prompt": "Comp\n')
    sums = [{"prompt": f"Compute {i}+1.", "answer": str(i + 1), "level": 1} for i in range(30)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "wrong.csv").write_text("prompt,completion,answer,correct\n1+1,3,2,0\n1+2,4,3,0\n")
    (folder / "taken").mkdir()
    (folder / "taken/thesis.txt").write_text("years of work")
    (folder / "file.txt").write_text("not a folder")
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "rewards.py").write_text("def f(prompts, responses, answers):\n    return [0] * len(prompts)\n")
    (folder / "broken.yaml").write_text("lr: [1\n")
    (folder / "list.yaml").write_text("- lr\n")
    (folder / "broken.json").write_text("{")
    (folder / "args.json").write_text('{"args": []}')
    return folder


# what is wrong, and what the line must say ({bad}: the folder of bad things)
BAD_FOR_GRPO = [
    ("--model {bad}/nowhere", "{bad}/nowhere; no such folder"),
    ("--model ./nowhere", "./nowhere; no such folder"),
    ("--model {bad}/nothing", "{bad}/nothing"),
    ("--model {bad}/no-tokenizer", "no-tokenizer; tokenizer"),
    ("--model {bad}/no-weights", "no-weights; weights"),
    ("--model {bad}/no-config", "no-config; configuration"),
    ("--model {bad}/half-weights", "half-weights; weights"),
    ("--model {bad}/t5", "t5; no causal language model"),
    ("--model {bad}/run-without-model", "neither final/ nor a checkpoint"),
    ("--model {bad}/short", "context; 50; --max-new-tokens"),
    ("--model {bad}/window --quantize nf4", "--quantize; window"),
    ("--model Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct; hub; pass --model that folder"),
    ("--data {bad}/empty.jsonl", "empty.jsonl; no rows"),
    ("--data {bad}/column.jsonl", "column.jsonl: line 2; prompt; known schemas"),
    ("--data {bad}/malformed.jsonl", "malformed.jsonl: line 3; not a JSON line"),
    ("--data {bad}/nowhere.jsonl", "no file; nowhere.jsonl"),
    ("--data arithmetics", "unknown data; arithmetics"),
    ("--data gsm8k", "gsm8k; hub; --data"),
    ("--level 99", "levels 1 to 8; 99"),
    ("--data {bad}/answers.jsonl --eval-questions 30", "30; rows"),
    ("--max-prompt-tokens 2", "--max-prompt-tokens 2; leaves 0"),
    ("--prompt-template Q:", "Q:; {{prompt}}"),
    ("--num-generations 1", "--num-generations 1; 2 or more"),
    ("--prompts-per-step 0", "--prompts-per-step 0; 1 or more"),
    ("--temperature 0", "--temperature 0; more than 0"),
    ("--eval-k 5 --eval-samples 3", "--eval-samples 5"),
    ("--beta 0.1 --kl-estimator k1", "k1; --kl-in reward"),
    ("--sampler-correction mask", "--recompute-old"),
    ("--lora-r 0", "--lora-r 0; --full"),
    ("--lora-targets q_proj qkv_proj", "qkv_proj; q_proj"),
    ("--train-layers 1-2", "--train-layers 1-2; 0-1"),
    ("--device tpu", "--device tpu"),
    ("--rewards corectness=1", "corectness; correctness"),
    ("--rewards mark=much", "mark=much"),
    ("--rewards {bad}/nowhere.py:f=1", "no file; nowhere.py"),
    ("--rewards {bad}/rewards.py:g=1", "'g'"),
    ("--rewards {bad}/syntax.py:f=1", "SyntaxError; syntax.py"),
    ("--out {bad}/taken", "{bad}/taken; not empty; --resume"),
    ("--out {bad}/file.txt", "file.txt"),
    ("--out {bad}/file.txt/run", "file.txt; cannot write"),
    ("--out /proc/no/run", "/proc/no/run; cannot write"),
    ("--resume", "--resume; --out"),
    ("--out {bad}/nowhere --resume", "nowhere; no run"),
    ("--config {bad}/nowhere.yaml", "nowhere.yaml; No such file"),
    ("--config {bad}/broken.yaml", "broken.yaml"),
    ("--config {bad}/broken.json", "broken.json"),
    ("--config {bad}/list.yaml", "list.yaml"),
    ("--config {bad}/args.json", "args.json; its args are []"),
]
BAD_FOR_SFT = [
    ("--model {bad}/nowhere", "{bad}/nowhere; no such folder"),
    ("--data {bad}/malformed.jsonl", "malformed.jsonl: line 3"),
    ("--data {bad}/answers.jsonl", "answers.jsonl; no completion"),
    ("--data {bad}/wrong.csv --filter correct", "wrong.csv; correct = 1"),
    ("--data {bad}/wrong.csv --filter right", "right; correct"),
    ("--data arithmetic --filter correct", "arithmetic; filter"),
    ("--max-tokens 3", "--max-tokens 3"),
    ("--epochs 0 --max-steps 0", "--epochs 0"),
    ("--batch-size 0", "--batch-size 0"),
    ("--out {bad}/taken", "{bad}/taken; not empty; --resume"),
]


@pytest.mark.parametrize("script, wrong, said", [
    pytest.param(script, wrong, said, id=f"{script} {wrong}")
    for script, cases in (("grpo.py", BAD_FOR_GRPO), ("sft.py", BAD_FOR_SFT)) for wrong, said in cases])
def test_bad_input_is_one_line(go, bad, tmp_path, script, wrong, said):
    if "/proc" in wrong and not Path("/proc").is_dir():
        pytest.skip("no /proc on this system")
    before = listing(bad)
    given = wrong.format(bad=bad).split()  # of two equal flags the last counts
    process = go(None, *given, script=script, fails=True)
    assert process.err.startswith("error: ") and process.err.count("\n") == 1, process.err
    assert process.out == ""
    for part in said.format(bad=bad).split("; "):
        assert part in process.err
    assert listing(tmp_path) == [] and listing(bad) == before


@pytest.mark.parametrize("text, flag", [
    ("learning_rate: 1", "--learning-rate"), ("save_every: many", "--save-every"), ("shard: maybe", "maybe"),
    ("lr: [1, 2]", "2"), ("dtype: float16", "--dtype"), ("max_steps:", "--max-steps"), ("lr: {a: 1}", "--lr")])
def test_a_config_is_checked_as_the_command_line_is(go, tmp_path, text, flag):
    (tmp_path / "a.yaml").write_text(text)
    process = go(None, config="a.yaml", fails=True, bare=True)
    assert process.code == 2 and flag in process.err and "a.yaml" in process.err and process.out == ""
    assert "Traceback" not in process.err and listing(tmp_path) == ["a.yaml"]


WITHOUT_WAITING = """
import runpy, sys, time
time.sleep = lambda seconds: None  # the hub's client tries again for most of a minute
sys.argv.pop(0)
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_hub_out_of_reach(tmp_path):
    """No network, rather than HF_HUB_OFFLINE: the hub's address refuses connections."""
    env = ENV | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", WITHOUT_WAITING, ROOT / "grpo.py", "--model", "Qwen/Qwen2.5-3B-Instruct"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for part in ("Qwen/Qwen2.5-3B-Instruct", "cannot reach the hub", "pass --model that folder"):
        assert part in said
    assert all(name.split("/")[0] == "hf" for name in listing(tmp_path))


def test_a_tokenizer_larger_than_the_embedding_is_refused(go, tiny, tmp_path):
    """A3.12: on the host, with a message, and not as an index out of bounds on the device."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "model")
    process = go(None, model=tmp_path / "model", fails=True)
    assert process.err.startswith("error: ") and process.err.count("\n") == 1
    assert "only 100 rows" in process.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_adapter_that_does_not_fit_names_the_tensor(go, tiny, tmp_path):
    """A3.11: of another model with --model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = go("run", max_steps=1).folder
    shutil.copytree(tiny, tmp_path / "other")
    config = AutoConfig.from_pretrained(tiny, intermediate_size=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    adapter_config = folder / "final/adapter_config.json"
    changed = json.loads(adapter_config.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}
    adapter_config.write_text(json.dumps(changed))
    process = go("next", model=folder, fails=True)
    assert process.err.count("\n") == 1
    assert all(part in process.err for part in ("layers.0.mlp.down_proj", "(32, 64)", "(32, 48)"))


# ------------------------------------------------------------------------------------------------------------
# What goes wrong on the way


def test_a_reward_that_raises_costs_its_rows(go, rewards_py):
    process = go("run", rewards=[f"{rewards_py}:odd_raises=1", "mark=0"])
    assert "KeyError" in process.out and "odd" in process.out
    for line in train_lines(process.folder):
        step = rows(process.folder, step=line["step"])
        failed = [len(row["completion"]) % 2 == 1 for row in step]
        assert [math.isnan(reward) for reward in column(step, "reward")] == failed and 0 < sum(failed) < 15
        assert line["reward_failed"] == sum(failed)
        assert line["reward"] == pytest.approx(statistics.mean(
            reward for reward in column(step, "reward") if not math.isnan(reward)))
        for group in range(3):
            of_group = [row for row in step if int(row["group"]) == group]
            assert column(of_group, "advantage") == pytest.approx(group_advantages(of_group), abs=1e-9)


def test_a_reward_that_hangs_costs_one_row(go, rewards_py):
    process = go("run", rewards=f"{rewards_py}:hangs_once=1", reward_timeout=1, max_steps=1)
    assert "no result within 1 s" in process.out
    (line,) = train_lines(process.folder)
    assert line["reward_failed"] == 1 and line["rows_trained"] >= 5
    assert [math.isnan(reward) for reward in column(rows(process.folder), "reward")] == [True] + [False] * 14


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_reward_that_always_raises(go, rewards_py, dynamic):
    """No group holds anything to learn from: with dynamic sampling all refills are drawn, none is kept."""
    flags = {"max_steps": 1, "dynamic_sampling": dynamic, "max_refills": 2}
    folder = go("run", rewards=f"{rewards_py}:always_raises=1", **flags).folder
    (line,) = train_lines(folder)
    assert line["rows_trained"] == 0 and line["questions_drawn"] == (9 if dynamic else 3)
    assert line["reward_failed"] == 5 * line["questions_drawn"]
    assert not any(tensor.any() for name, tensor in weights(folder).items() if "lora_B" in name)


NOT_A_NUMBER = """
def policy_loss(*inputs, **options):
    calls.append(1)
    loss, low, high = original(*inputs, **options)
    ranges = [map(int, part.split("-")) for part in os.environ["NAN_CALLS"].split()]
    wrong = any(first <= len(calls) <= last for first, last in ranges)
    return loss * (float("nan") if wrong else 1.0), low, high

calls, original, script.policy_loss = [], script.policy_loss, policy_loss
"""


def test_one_nan_loss_is_skipped(go, tmp_path):
    process = go("run", script=patched(tmp_path, "grpo", NOT_A_NUMBER), env={"NAN_CALLS": "2-2"}, max_steps=4,
                 beta=0.01)
    assert [line[:7] for line in process.out.splitlines() if "not finite" in line] == ["step 2:"]
    assert [line["grad_norm"] is None for line in train_lines(process.folder)] == [False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in weights(process.folder).values())
    saved = torch.load(process.folder / "checkpoints/step-4/training.pt", weights_only=True)
    assert {state["step"].item() for state in saved["optimizer"]["state"].values()} == {3}


def test_nan_losses_in_a_row_stop_the_run_with_its_state_saved(go, tmp_path):
    flags = {"max_steps": 20, "beta": 0.01, "fails": True}
    process = go("run", script=patched(tmp_path, "grpo", NOT_A_NUMBER), env={"NAN_CALLS": "2-1000"}, **flags)
    assert process.err.startswith("error: ") and process.err.count("\n") == 1
    assert "not finite" in process.err and "--lr" in process.err and "run" in process.err
    assert [line["step"] for line in train_lines(process.folder)] == [1, 2, 3, 4, 5, 6]
    saved = weights(process.folder, "checkpoints/step-6")
    largest = max(tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name)
    assert largest == pytest.approx(1e-3, rel=1e-2)  # AdamW's first step is lr long, and it was the only one


def test_nan_losses_that_are_not_in_a_row_stop_nothing(go, tmp_path):
    process = go("run", script=patched(tmp_path, "grpo", NOT_A_NUMBER), env={"NAN_CALLS": "1-4 6-7"},
                 max_steps=8, beta=0.01)
    assert re.findall(r"\((\d) in a row\)", process.out) == ["1", "2", "3", "4", "1", "2"]


@pytest.mark.parametrize("script, beta", [
    ("grpo.py", 0.01), ("sft.py", None), ("grpo.py", 0)])  # 0: samples all alike, no gradient
def test_a_learning_rate_that_destroys_the_model_stops_the_run(go, script, beta):
    process = go("run", script=script, max_steps=20, lr=1e30, beta=beta, fails=True)
    assert process.err.startswith("error: ") and process.err.count("\n") == 1 and "--lr" in process.err
    assert len(train_lines(process.folder)) < 10 and list((process.folder / "checkpoints").glob("step-*"))


def test_retry_smaller():
    sizes = []

    def attempt(size):
        sizes.append(size)
        if size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size * 10

    assert retry_smaller(attempt, 32, torch.device("cpu"), 3, "rows") == (40, 4) and sizes == [32, 16, 8, 4]
    sizes.clear()
    with pytest.raises(ValueError, match="smallest size .rows 7."):
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


# ------------------------------------------------------------------------------------------------------------
# Flags


def test_weight_decay_shrinks_a_parameter_without_gradient(go):
    """A1.26: by lr * decay of it per step (float32 rounds each of three products: 1e-6 relative)."""
    def run(decay):
        folder = go(f"decay-{decay}", rewards="correctness=1", weight_decay=decay, lr=0.01).folder
        assert {line["rows_trained"] for line in train_lines(folder)} == {0}  # a random model is never right
        return weights(folder)

    begun, end = run(0), run(0.1)
    for name in begun:
        torch.testing.assert_close(end[name], begun[name] * (1 - 0.01 * 0.1) ** 3, rtol=1e-6, atol=0)
        assert begun[name].any() == ("lora_A" in name)


def test_dynamic_sampling_keeps_groups_that_differ(go):
    flags = {"prompts_per_step": 4, "num_generations": 2, "max_new_tokens": 6, "max_refills": 3}
    folder = go("run", dynamic_sampling=True, **flags).folder
    drawn = [line["questions_drawn"] for line in train_lines(folder)]
    assert max(drawn) > 4 and all(n % 4 == 0 and n <= 16 for n in drawn)
    for line in train_lines(folder):
        step = rows(folder, step=line["step"])
        assert len(step) == 2 * line["questions_drawn"]  # those not kept stand in samples.csv as well
        assert line["reward"] == pytest.approx(statistics.mean(column(step, "reward")))
        trained = {row["group"] for row in step if float(row["advantage"])}
        assert 0 < len(trained) <= 4 and (len(trained) == 4 or line["questions_drawn"] == 16)
        assert line["rows_trained"] == 2 * len(trained)


def test_kl_in_the_reward(go):
    """Total = weighted columns - beta * KL, whose mean over tokens is logged (float32 log-probs: 1e-6)."""
    folder = go("run", beta=0.5, kl_in="reward", kl_estimator="k1", lr=1e-2, group_scaling="loo").folder
    for line in train_lines(folder):
        step = rows(folder, step=line["step"])
        kl = [(float(row["reward/mark"]) - float(row["reward"])) / 0.5 for row in step]
        assert (max(map(abs, kl)) > 1e-3) == (line["step"] > 1)
        assert line["kl"] == pytest.approx(sum(kl) / sum(column(step, "tokens")), abs=1e-6)


def test_full(go, tiny):
    """All weights: final/ is a plain model that transformers reads, and a start for the next run."""
    from transformers import AutoModelForCausalLM

    process = go("run", full=True, beta=0.05, lr=1e-4)
    assert "(all)" in process.out and not (process.folder / "final/adapter_config.json").exists()
    begun, end = (AutoModelForCausalLM.from_pretrained(name) for name in (tiny, process.folder / "final"))
    assert not any(torch.equal(p, q) for p, q in zip(begun.parameters(), end.parameters(), strict=True))
    kl = [line["kl"] for line in train_lines(process.folder)]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] > 1e-7
    assert "step-0 KL 0" in go("next", model=process.folder, max_steps=1).out
    assert models.base_of(str(process.folder.parent / "next")) == str(process.folder / "final")


def test_updates_per_batch(go):
    """Two steps of the optimizer on each batch, and the second is off policy."""
    folder = go("run", updates_per_batch=2, max_steps=2).folder
    saved = torch.load(folder / "checkpoints/step-2/training.pt", weights_only=True)
    assert {state["step"].item() for state in saved["optimizer"]["state"].values()} == {4}
    once = go("once", max_steps=2).folder
    assert distance(weights(folder), weights(once)) > 1e-4


def test_recompute_old(go, tmp_path):
    """Old log-probs by a pass of the trainer are the sampler's, up to rounding: so are loss and gradient."""
    flags = {"script": patched(tmp_path, "grpo", FLOAT64), "max_steps": 2, "lr": 1e-4}
    plain = go("plain", **flags).folder
    again = go("again", "--sampler-correction", "truncate", "--recompute-old", **flags).folder
    assert column(rows(plain), "completion", str) == column(rows(again), "completion", str)
    for one, other in zip(train_lines(plain), train_lines(again), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-11)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-11) and one["grad_norm"] > 0.1


def test_gradient_checkpointing_changes_nothing(go, tmp_path):
    flags = {"script": patched(tmp_path, "grpo", FLOAT64), "lr": 1e-4, "beta": 0.05}
    on, off = go("on", gradient_checkpointing=True, **flags).folder, go("off", **flags).folder
    assert_same_runs(on, off)
    assert max(tensor.abs().max() for name, tensor in weights(on).items() if "lora_B" in name) > 5e-5


def test_mask_truncated(go):
    folder = go("run", mask_truncated=True, max_new_tokens=8).folder
    for line in train_lines(folder):
        moved = [row for row in rows(folder, step=line["step"]) if float(row["advantage"])]
        finished = [row for row in moved if row["finished"] == "1"]
        assert line["rows_trained"] == len(finished)
        assert line["tokens_trained"] == sum(column(finished, "tokens"))
        assert len(finished) < len(moved)  # the others stay in their group's mean


def test_train_layers(go):
    """A3.16: one layer's adapters alone, and their number printed."""
    process = go("run", train_layers=1, lora_r=64)
    saved = weights(process.folder)
    assert all(".layers.1." in name for name in saved) and len(saved) == 14
    assert f"{sum(tensor.numel() for tensor in saved.values()) / 1e6:.2f} M trained" in process.out
    assert all(tensor.any() for tensor in saved.values())
    config = json.loads((process.folder / "final/adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1]


def test_system_and_prompt_template(go, tiny):
    """A3.15: the longest prompt is as long as they make it; the default asks for the answer's format."""
    tokenizer = models.load_tokenizer(str(tiny))
    train, held_out = data.train_validation("arithmetic", n_train=20, n_validation=4, level=1, seed=0)

    def longest(system, template="{prompt}"):
        return max(len(data.encode_prompt(tokenizer, e.prompt, system, template)) for e in train + held_out)

    default, own = longest(data.THINK_ANSWER_SYSTEM), longest("Be brief.", "Q {prompt} {ok}")
    assert len({default, own, longest("Be brief.")}) == 3
    assert f"prompts up to {default} tokens" in go("default", max_steps=1).out
    process = go("own", max_steps=1, system="Be brief.", prompt_template="Q {prompt} {ok}")
    assert f"prompts up to {own} tokens" in process.out


def test_split_sizes(go):
    """A2.13: 30 and 20 questions, disjoint, and the same for the same seed; each of the 30 is used."""
    flags = {"train_questions": 30, "eval_questions": 20, "level": 2, "prompts_per_step": 10,
             "num_generations": 2, "max_new_tokens": 2}
    process = go("run", **flags)
    assert "30 questions to train on, 20 held out" in process.out
    asked = set(column(rows(process.folder), "prompt", str))
    held_out = set(column(rows(process.folder, "eval.csv"), "prompt", str))
    assert len(asked) == 30 and len(held_out) == 20 and not asked & held_out
    again = go("again", **flags | {"lr": 0.1, "max_steps": 1}).folder
    assert set(column(rows(again, "eval.csv"), "prompt", str)) == held_out


def test_runs_never_share_a_directory(go, tmp_path):
    """A1.27: four runs started at once, two of them with the same arguments, in the default place."""
    flags = {"max_steps": 1, "eval_questions": 1, "max_new_tokens": 2, "wait": False}
    runs = [go(None, **flags | more) for more in ({}, {}, {"lr": 1e-5}, {"seed": 1})]
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


def test_wandb_that_cannot_begin_is_one_line_and_leaves_nothing(go, tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text("def init(**options): raise RuntimeError('No API key configured')\n")
    run = go("run", wandb=True, path=[tmp_path / "fake"], fails=True)
    assert run.err.startswith("error: --wandb: No API key configured (wandb login") and run.err.count("\n") == 1
    assert not run.folder.exists()


def test_the_overlong_penalty_is_not_evaluated(go):
    folder = go("run", overlong_buffer=12, max_steps=1).folder
    assert min(column(rows(folder), "reward")) < 0 and set(column(rows(folder, "eval.csv"), "reward")) == {0.0}


def test_wandb(go, tmp_path):
    """A2.12, with a fake one: rank 0 logs what metrics.jsonl holds, and a table; else it is not imported."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(FAKE_WANDB)
    flags = {"eval_samples": 2, "eval_k": 2, "max_steps": 2, "path": [tmp_path / "fake"]}
    go("without", env={"NOTES": str(tmp_path / "without.txt")}, **flags)
    assert not (tmp_path / "without.txt").exists()
    folder = go("with", wandb=True, env={"NOTES": str(tmp_path / "with.txt")}, ranks=2, **flags).folder
    notes = [json.loads(line) for line in (tmp_path / "with.txt").read_text().splitlines()]
    assert [what for what, _ in notes if what != "log"] == ["imported", "init", "finish"]
    assert notes[1][1]["config"]["max_steps"] == 2
    logged = [value for what, value in notes if what == "log"]
    assert [line for line in logged if "samples" not in line] == metrics(folder)
    tables, width = [line["samples"] for line in logged if "samples" in line], len(rows(folder)[0])
    assert tables == [f"table of 15 x {width}", f"table of 30 x {width}"]
    assert {"loss", "reward", "reward/std", "reward/max", "reward/min", "accumulated_reward", "time",
            "eval/pass@1", "eval/pass@2 T=0.5"} <= set().union(*logged)


@pytest.mark.parametrize("case", [
    "grpo.py", "sft.py", "two ranks", "a mistake"])
def test_dry_run_leaves_nothing(go, tiny, tmp_path, case):
    """A4.13: neither in the working directory, nor in --out, nor among the temporary files."""
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    flags = {"dry_run": True, "max_steps": 100, "cwd": tmp_path / "here",
             "env": {"TMPDIR": str(tmp_path / "temporary")}}
    if case == "a mistake":
        go("run", train_layers=7, fails=True, **flags)
    else:
        script, ranks = ("grpo.py", 2) if case == "two ranks" else (case, 1)
        process = go("run", script=script, ranks=ranks, **flags)
        assert "dry run: peak memory" in process.out and "100 steps" in process.out
        trained = int(re.search(r"\((\d+) tokens trained\)", process.out)[1])
        of = small(tiny)
        assert trained > 0 if script == "sft.py" else (  # every row, at its longest
            trained == of["prompts_per_step"] * of["num_generations"] * of["max_new_tokens"])
    assert listing(tmp_path) == ["here", "temporary"]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_difference_to_the_commit_is_kept(go, tmp_path):
    """A4.6, in a copy of the scripts that is a repository of its own."""
    repo = tmp_path / "repo"
    shutil.copytree(ROOT / "common", repo / "common", ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    shutil.copy(ROOT / "grpo.py", repo)

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True).stdout

    def run(name):
        folder = go(name, script=repo / "grpo.py", max_steps=1, max_new_tokens=2).folder
        return folder, json.loads((folder / "config.json").read_text())["git"]

    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    clean, clean_git = run("clean")
    with open(repo / "grpo.py", "a") as file:
        file.write("# a changed line\n")
    dirty, dirty_git = run("dirty")
    assert clean_git["commit"] == dirty_git["commit"] == git("rev-parse", "HEAD").strip()
    assert (clean_git["dirty"], dirty_git["dirty"]) == (False, True)
    assert not (clean / "git.diff").exists() and "+# a changed line" in (dirty / "git.diff").read_text()


# ------------------------------------------------------------------------------------------------------------
# From run to run


def test_a_run_as_model_merges_its_adapter(go, tiny):
    """Merged once in float32: logits of base and adapter to 1e-5 of the largest; the next run's KL is 0."""
    first = go("first", lr=1e-2).folder
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))

    def load(name):
        return models.load_model(str(name), torch.float32, torch.device("cpu"))

    adapted = load(tiny)
    grpo.add_lora(adapted, "policy", 4, 64, models.PROJECTIONS)
    models.load_adapter(first / "final", grpo.adapter_tensors(adapted, "policy"))
    with torch.no_grad():
        base, expected, merged = load(tiny)(ids).logits, adapted(ids).logits, load(first)(ids).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (base - expected).abs().max() > 0.1

    process = go("second", model=first, beta=0.1, max_steps=2, lr=1e-2)
    assert "step-0 KL 0" in process.out
    kl = [line["kl"] for line in train_lines(process.folder)]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] > 1e-5  # its reference is the merged start
    answers = [column(rows(folder, "eval.csv", step), "completion", str)
               for folder, step in ((first, 3), (process.folder, 0))]
    assert answers[0] == answers[1]
    with torch.no_grad():  # a run on a run: both adapters count
        assert (load(process.folder)(ids).logits - merged).abs().max() > 0.1


@pytest.fixture(scope="module")
def by_heart(start, tiny, tmp_path_factory):
    """sft.py --single-batch on 12 sums, 100 steps, and then grpo.py from that run on the same sums."""
    folder = tmp_path_factory.mktemp("by-heart")
    with open(folder / "sums.jsonl", "w") as file:
        for i in range(14):
            a, b, total = i, i % 5, i + i % 5
            row = {"prompt": f"{a}+{b}?", "answer": str(total),
                   "completion": f"<think>{a}+{b}</think><answer>{total}</answer>"}
            file.write(json.dumps(row) + "\n")
    go = launcher(start, tiny, folder)
    flags = {"data": folder / "sums.jsonl", "level": None, "train_questions": 12, "eval_questions": 2,
             "max_new_tokens": 24}
    go("sft", script="sft.py", single_batch=True, batch_size=12, max_steps=100, full=True, lr=1e-2, **flags)
    go("grpo", model=folder / "sft", lr=1e-5, temperature=1.5, max_steps=4, **flags)
    return folder


def test_a_single_batch_is_learnt_by_heart(by_heart):
    """A1.24."""
    lines = train_lines(by_heart / "sft")
    assert lines[0]["loss"] > 1 and lines[-1]["loss"] < 0.05 and lines[-1]["step"] == 100


def test_pass_at_k(go, by_heart):
    """A2.9: the share of the k-subsets of a question's three samples that hold a right one, averaged."""
    flags = {"data": by_heart / "sums.jsonl", "level": None, "train_questions": None, "max_new_tokens": 24,
             "seed": 1, "eval_questions": 8}  # with another seed others are held out: most of them it knows
    folder = go("run", model=by_heart / "sft", max_steps=1, eval_samples=3, eval_k=[1, 2, 3],
                eval_temperature=1.5, **flags).folder
    line, answers = eval_lines(folder)[0], rows(folder, "eval.csv", step=0)
    right = [[int(row["correct"]) for row in answers if row["id"] == id and row["sample"] != "0"]
             for id in {row["id"] for row in answers}]
    assert [len(samples) for samples in right] == [3] * 8 and any(0 < sum(samples) < 3 for samples in right)
    for k in (1, 2, 3):
        chances = [statistics.mean(map(max, itertools.combinations(samples, k))) for samples in right]
        assert line[f"eval/pass@{k} T=1.5"] == pytest.approx(sum(chances) / 8)
    greedy = [row for row in answers if row["sample"] == "0"]
    assert line["eval/pass@1"] == sum(column(greedy, "correct")) / 8 > 0


def test_samples_of_a_run_are_data_for_sft(go, by_heart):
    """A1.17: what GRPO sampled and got right, once each."""
    samples = rows(by_heart / "grpo")
    right = {(row["prompt"], row["completion"]) for row in samples if row["correct"] == "1"}
    assert 4 <= len(right) < sum(column(samples, "correct")) < len(samples)
    process = go("run", script="sft.py", data=by_heart / "grpo/samples.csv", filter="correct", level=None,
                 train_questions=None, eval_questions=1, max_steps=2)
    held_out = set(column(rows(process.folder, "eval.csv"), "prompt", str))
    kept = [prompt for prompt, _ in right if prompt not in held_out]
    assert f"{len(kept)} rows to train on" in process.out


def test_sft_held_out_loss_is_that_of_transformers(go, tiny):
    """Per token, over all of them (float32 sums: 1e-5)."""
    folder = go("run", script="sft.py", max_steps=1, system="Sum.").folder
    tokenizer = models.load_tokenizer(str(tiny))
    model = models.load_model(str(tiny), torch.float32, torch.device("cpu"))
    _, held_out = data.train_validation("arithmetic", n_train=20, n_validation=4, level=1, seed=0)
    loss = count = 0
    for example in held_out:
        prompt = data.encode_prompt(tokenizer, example.prompt, "Sum.")
        completion = tokenizer(example.completion + "<|im_end|>", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            loss += model(torch.tensor([prompt + completion]), labels=labels).loss.item() * len(completion)
        count += len(completion)
    before, after = eval_lines(folder)
    assert before["eval/loss"] == pytest.approx(loss / count, rel=1e-5)
    assert after["eval/loss"] < before["eval/loss"]
    greedy = rows(folder, "eval.csv", step=0)
    assert before["eval/questions"] == 4 and len(greedy) == 4
    assert before["eval/pass@1"] == sum(column(greedy, "correct")) / 4


def test_sft_from_scratch(go, tiny):
    process = go("run", script="sft.py", from_scratch=True, max_steps=1)
    assert "(all)" in process.out
    assert distance(weights(process.folder), load_file(tiny / "model.safetensors")) > 0.1  # its shape alone


# ------------------------------------------------------------------------------------------------------------
# Real input


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data is not beside the repository")
def test_real_tokenizer_and_gsm8k(go, tmp_path):
    """A random Qwen2 of two layers, Qwen2.5's vocabulary, Qwen2.5-Instruct's template, GSM8K as published."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

    template = (SHARED / "tokenizers/chat_templates/qwen2_5.jinja").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(
        SHARED / "tokenizers/qwen2.5", eos_token="<|im_end|>", chat_template=template)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True))
    model.generation_config = GenerationConfig(  # as published
        eos_token_id=[151645, 151643], do_sample=True, temperature=0.7, top_p=0.8, top_k=20,
        repetition_penalty=1.1)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert models.stop_ids(AutoModelForCausalLM.from_pretrained(folder), tokenizer) == [151643, 151645]

    run = go("run", bare=True, model=folder, data=SHARED / "gsm8k/train.jsonl", max_steps=2, eval_questions=5,
             prompts_per_step=2, num_generations=3, max_new_tokens=16).folder
    args = json.loads((run / "config.json").read_text())["args"]
    assert args["system"] == data.THINK_ANSWER_SYSTEM and args["lr"] == 2e-5
    assert [line["step"] for line in train_lines(run)] == [1, 2]
    assert [line["eval/questions"] for line in eval_lines(run)] == [5, 5]
    assert "7468 questions to train on, 5 held out" in (run / "log.txt").read_text()
    with open(SHARED / "gsm8k/train.jsonl", encoding="utf-8") as file:
        published = {row["question"]: row["answer"] for row in map(json.loads, file)}
    for row in rows(run) + rows(run, "eval.csv"):
        assert published[row["prompt"]].replace(",", "").endswith("#### " + row["answer"])


@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_prompts_without_gold_answers_are_judged_by_the_reward(go, tiny, tmp_path, script):
    """In training and evaluation; best/ is by it; nothing is called right or wrong of them."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(20)))
    (tmp_path / "r.py").write_text("def short(prompts, responses, answers):\n"
                                   "    assert not any(answers)\n    return [-len(r) for r in responses]\n")
    flags = small(tiny) | {"data": "prompts.jsonl", "level": None, "train_questions": 0, "rewards": "r.py:short=0.5",
                           "eval_samples": 2, "eval_k": 1, "max_steps": 2, "eval_every": 1}
    process = go("a", script=f"{script}.py", bare=True, **flags)
    first, *_, last = eval_lines(process.folder)
    assert "eval/pass@1" not in first and not any("pass@" in name for name in first)
    of_step = rows(process.folder, "eval.csv", step=0)
    greedy = [-0.5 * len(row["completion"]) for row in of_step if row["sample"] == "0"]
    assert first["eval/reward"] == pytest.approx(sum(greedy) / len(greedy)) and first["eval/questions"] == 4
    assert "held-out reward before" in process.out and f"after {last['eval/reward']:.3f}" in process.out
    if (process.folder / "best").exists():
        assert json.loads((process.folder / "best/best.json").read_text())["metric"] == "reward"
    said = go("b", script=f"{script}.py", bare=True, fails=True, **flags | {"rewards": "correctness"}).err
    assert "without a gold answer': 20" in said
