"""The benchmarks run to their end at toy sizes, and what they report is what they measured."""

import importlib
import importlib.util
import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import tyro

import common.models
import grpo
from bench import (algorithms, beside, gpu, gpu_parts, gpu_tools, grpo_step, models, pairs_step, ppo_memory,
                   real_gpu, sampling, scaling)
from common import data
from common.tables import read_csv
from tests.commands import run

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    models.build(folder, eos_prob=0.1, n_prompts=8)
    return folder


def run_main(script, capsys, monkeypatch, *words):
    """What `python bench/script.py words` prints: its JSON lines, the other lines, and stderr."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    script.main()
    out, err = capsys.readouterr()
    lines, text = [], []
    for line in out.splitlines():
        lines.append(json.loads(line)) if line.startswith("{") else text.append(line)
    return lines, text, err


def here(script, words, side):
    """`beside.run_side` in this process."""
    module, out = importlib.import_module(f"bench.{Path(script).stem}"), io.StringIO()
    command = [str(script), *map(str, words), "--side", side]
    with redirect_stdout(out), mock.patch.object(sys, "argv", command):
        module.main()
    return json.loads(out.getvalue().splitlines()[-1])


# ---- models.py ----


def test_the_recipe_keeps_its_weights(tmp_path):
    """Figures of other days are compared with today's: the same seed must go on making the same model."""
    model = models.build(tmp_path, "tiny", eos_prob=0.01, seed=0, n_prompts=1)
    head = model.lm_head.weight.detach()  # [V, D], tied to the embedding
    # drawn values, to the digits printed; the end token's first is computed, from a sum of float32 products
    torch.testing.assert_close(head[0, :3], torch.tensor([0.0994, 0.0282, -0.0251]), atol=5e-5, rtol=0)
    torch.testing.assert_close(head[258, :2], torch.tensor([2.7772, 0.0202]), atol=1e-3, rtol=0)
    down = model.model.layers[3].mlp.down_proj.weight.detach()
    torch.testing.assert_close(down[1, :2], torch.tensor([0.0099, -0.0070]), atol=5e-5, rtol=0)
    assert sum(p.numel() for p in model.parameters()) == 3_035_392


@pytest.mark.parametrize("probability", [0.1, 0.01, 0.0])
def test_the_end_has_the_probability_asked_for_everywhere(tmp_path, probability):
    model = models.build(tmp_path, eos_prob=probability, n_prompts=1)
    ids = torch.randint(0, 256, (8, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids).logits.softmax(-1)[:, 32:, model.config.eos_token_id].mean(0)  # prompts are longer
    # set for the average log-odds of other texts than these: the mean of eight rows strays by a third
    assert 0.7 * probability <= found.min() and found.max() <= 1.5 * probability + 1e-9


def test_the_tokenizer_and_the_prompts(folder):
    tokenizer = grpo.models.load_tokenizer(str(folder))
    assert len(tokenizer) == 512 and tokenizer.eos_token == models.END
    assert tokenizer.decode(tokenizer("Ünïcode 12\n")["input_ids"]) == "Ünïcode 12\n"
    prompts = models.read_prompts(folder)
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    assert len(set(prompts)) == 8 and min(lengths) >= 32 and max(lengths) <= 64
    assert all(prompt.endswith(f"{models.START}assistant\n") for prompt in prompts)


# ---- sampling.py ----


def test_sampling(folder, capsys, monkeypatch):
    (line,), _, _ = run_main(sampling, capsys, monkeypatch, "--model", folder, "--prompts", 2, "--group", 3,
                             "--new", 8, "--rounds", 2, "--threads", 1)
    theirs, ours = line["tokens_per_s"]["generate"], line["tokens_per_s"]["sampler"]
    assert len(theirs) == len(ours) == 2 and min(theirs + ours) > 0
    ratios = [b / a for a, b in zip(theirs, ours)]
    # to the rounding of what is printed
    assert line["ratio"] == pytest.approx(sum(ratios) / 2, rel=0.01)  # the median of two is their mean
    assert line["ratio_range"] == pytest.approx(sorted(ratios), rel=0.01)
    assert all(1 <= mean <= 8 for mean in line["mean_length"].values()) and line["longest"] <= 8
    assert line["logprob_gap"] < 1e-4  # float32: both did the same work


# ---- grpo_step.py ----


def test_one_step_trains_the_adapter_alone(folder):
    model = grpo.models.load_model(str(folder), torch.float32, torch.device("cpu"))
    params = grpo.add_lora(model, "policy", 4, 8, ("q_proj", "down_proj"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    args = grpo.Args(num_generations=4, max_new_tokens=8, beta=0.04, tokens_per_batch=2048)
    prompt_ids = [[1, 2, 3], [4, 5]]
    seconds, lengths = grpo_step.one_step(model, params, torch.optim.AdamW(params), grpo.Sampler(model, ()),
                                          prompt_ids, args, 1, "cpu")
    assert list(seconds) == ["sample", "reward", "reference", "update"] and min(seconds.values()) > 0
    assert lengths == [8] * 8
    assert all(B.any() for B in params[1::2])
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def toy_step(folder):
    return ("--model", folder, "--prompts", 2, "--group", 4, "--new", 8, "--steps", 2, "--warmup", 1,
            "--rounds", 1, "--threads", 1)


@pytest.mark.slow
def test_grpo_step_without_trl(folder, capsys, monkeypatch):
    monkeypatch.setattr(beside, "PEER", ("trl_is_absent",))
    (line,), _, err = run_main(grpo_step, capsys, monkeypatch, *toy_step(folder), "--beta", 0)
    assert "trl_is_absent not installed: pip install trl_is_absent" in err
    assert line["ratio"] is None and list(line["seconds"]) == ["unrolled"]
    side = line["each"][0]["unrolled"]
    assert list(side["seconds"]) == ["sample", "reward", "update", "step"]  # beta 0: no reference pass
    # nearly all of the step: 0.99 of it, less where another process takes the core between two phases
    assert 0.5 < sum(list(side["seconds"].values())[:-1]) / side["seconds"]["step"] < 1.01
    assert side["longest"] <= 8 and side["tokens_per_step"] <= 64 and 0.1 < side["peak_gb"] < 4


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in beside.PEER),
                    reason="TRL is not installed")
def test_grpo_step_beside_trl(folder, capsys, monkeypatch):
    monkeypatch.setattr(beside, "run_side", here)
    (line,), _, _ = run_main(grpo_step, capsys, monkeypatch, *toy_step(folder), "--micro", 4)
    sides = line["each"][0]
    phases = {side: set(figures["seconds"]) for side, figures in sides.items()}
    assert phases["trl"] == {"sample", "reward", "reference", "forward", "backward", "rest", "step"}
    assert phases["unrolled"] == {"sample", "reward", "reference", "update", "step"}
    assert line["ratio"] == pytest.approx(line["seconds"]["trl"] / line["seconds"]["unrolled"], rel=0.01)
    for side, figures in sides.items():  # rounded to 0.1 ms: the reward may show as 0
        assert figures["seconds"]["sample"] > 0 and min(figures["seconds"].values()) >= 0, side
    assert all(side["mean_length"] <= 8 and side["longest"] <= 8 for side in sides.values())


@pytest.mark.parametrize("words, message", [(("--warmup", 2), "leaves none of 2 steps"),
                                            (("--micro", 3), "does not divide the 8 samples")])
def test_grpo_step_refuses(folder, capsys, monkeypatch, words, message):
    with pytest.raises(SystemExit):
        run_main(grpo_step, capsys, monkeypatch, *toy_step(folder), *words)
    assert message in capsys.readouterr().err


# ---- pairs_step.py ----

TOY_PAIRS = ["--batch", 4, "--new", 12, "--steps", 2, "--warmup", 1, "--rounds", 1, "--threads", 1]


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_pairs_step_alone(folder, capsys, monkeypatch, method):
    (line,), _, _ = run_main(pairs_step, capsys, monkeypatch, "--model", folder, "--method", method,
                             *TOY_PAIRS, "--side", "unrolled")
    assert set(line["seconds"]) == ({"reference", "step"} if method == "dpo" else {"step"})
    assert 0 < line["seconds"]["step"] < 60 and 0.1 < line["peak_gb"] < 4


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in beside.PEER),
                    reason="TRL is not installed")
@pytest.mark.parametrize("words", [("dpo",), ("dpo", "--loss", "ipo"), ("dpo", "--loss", "hinge"), ("sft",)])
def test_loss_and_gradient_norm_equal_trls(folder, capsys, monkeypatch, words):
    """One batch of ragged pairs, the same adapter on both sides."""
    (line,), _, _ = run_main(pairs_step, capsys, monkeypatch, "--model", folder, "--check", "--method",
                             *words, *TOY_PAIRS)
    assert line["tensors"] == line["ours"] and line["grad_norm"] > 0.1
    assert line["loss"] == pytest.approx(line["trl_loss"], rel=1e-4)
    assert line["grad_norm"] == pytest.approx(line["trl_grad_norm"], rel=1e-4)


# ---- scaling.py ----


@pytest.mark.slow
def test_scaling(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "run_side", here)
    figures, table, _ = run_main(
        scaling, capsys, monkeypatch, "--groups", 2, 4, "--lengths", "--vocabularies", "--prompts", 2,
        "--new", 4, "--steps", 2, "--rounds", 1, "--threads", 1)
    assert [f["tokens_per_step"] for f in figures] == [2 * 2 * 4, 2 * 4 * 4]  # the model never ends: exact
    first, second = (f["seconds"]["step"] for f in figures)
    assert [f["cost_per_size"] for f in figures] == [1, pytest.approx(second / first / 2, abs=1e-3)]
    assert [row.split("|")[1:4] for row in table[2:]] == [[" G ", " 2 ", " 16 "], [" G ", " 4 ", " 32 "]]
    assert {row.count("|") for row in table} == {10}


# ---- ppo_memory.py and algorithms.py ----


@pytest.mark.slow
def test_ppo_memory(start, tmp_path, capsys, monkeypatch):
    def forked(command, **_):  # a process of its own, which has imported torch
        done = start(command[1:], tmp_path, {}, [ROOT], tmp_path).wait()
        return SimpleNamespace(returncode=done.code, stdout=done.out, stderr=done.err)

    monkeypatch.setattr(ppo_memory, "subprocess", SimpleNamespace(run=forked))
    (line,), _, _ = run_main(ppo_memory, capsys, monkeypatch, "--layers", 2, "--hidden", 256,
                             "--intermediate", 1024, "--vocabulary", 100_000, "--rows", 2, "--tokens", 16)
    one, four = line["shared"], line["four"]
    assert four["weights_m"] > 3.5 * one["weights_m"] > 90
    assert four["peak_gb"] - one["peak_gb"] > 0.25  # three times 28 M weights of four bytes
    assert line["ratio"] == pytest.approx(four["peak_gb"] / one["peak_gb"], abs=2e-3)


@pytest.mark.slow
def test_algorithms(tmp_path, capsys, monkeypatch):
    words = ["--methods", "grpo", "iterative dpo", "--seeds", 2, "--tokens", 500, "--out", tmp_path, "--more",
             "num-generations=4", "eval-questions=8", "max-new-tokens=40", "train-questions=60"]
    in_process = SimpleNamespace(run=lambda command, **_: SimpleNamespace(
        returncode=0, stdout=run(*command[2:], cwd=tmp_path, script=Path(command[1]).name)))
    monkeypatch.setattr(algorithms, "subprocess", in_process)
    _, table, _ = run_main(algorithms, capsys, monkeypatch, *words)
    assert [row.split("|")[1].strip() for row in table[2:]] == ["grpo", "iterative dpo"]
    for row in table[2:]:
        assert len(row.split("|")[3].split()) == 2 and int(row.split("|")[6].replace(",", "")) >= 500
    assert run_main(algorithms, capsys, monkeypatch, *words)[1] == table  # from what is there


@pytest.mark.parametrize("method", algorithms.METHODS)
def test_the_command_of_each_method(method):
    """It parses; sft.py trains, and a round of dpo.py samples, about as many tokens as the others sample."""
    script, *words = algorithms.METHODS[method](100_000).split()
    args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=words)
    if method == "sft":
        rows = data.load_examples("arithmetic", limit=64 * args.max_steps)
        tokenizer = common.models.load_tokenizer("")
        tokens = sum(len(data.encode_completion(tokenizer, e.completion, 0)) for e in rows)
        assert tokens == pytest.approx(100_000, rel=0.02)
    elif method == "dpo":
        assert args.questions * args.num_generations == pytest.approx(7400, rel=0.01)  # of 13.5 tokens
    else:
        assert args.token_budget == 100_000


def test_interval_over_seeds():
    """Mean and half width, by scipy's t distribution for three values: 0.9, 0.94, 0.98."""
    mean, width = algorithms.interval([0.9, 0.94, 0.98])
    assert mean == pytest.approx(0.94) and width == pytest.approx(4.303 * 0.04 / 3**0.5, rel=1e-4)


# ---- gpu.py ----

WITHOUT = ("datasets", "tyro", "wandb", "trl", "peft", "math_verify", "matplotlib")
RUN_WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({WITHOUT}))  # importing one of them now fails
sys.argv = sys.argv[1:]
runpy.run_path("bench/" + sys.argv[0], run_name="__main__")
"""


def run_without(*words, code=RUN_WITHOUT):
    return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True,
                          check=False)


@pytest.mark.slow
def test_gpu_runs_to_its_end_with_torch_and_transformers_alone(tmp_path):
    done = run_without("gpu.py", "--small", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    figures = [json.loads(line) for line in lines]
    kinds = [f["figure"] for f in figures]
    assert kinds[:3] == ["machine", "part", "ceilings"] and not {"broken", "left out"} & set(kinds)
    checks = {f["name"]: f for f in figures if f["figure"] == "check"}
    assert len(checks) >= 40 and all(f["ok"] and f["value"] <= f["limit"] for f in checks.values())
    assert [f["name"] for f in figures if f["figure"] == "script"] == [
        "grpo", "grpo --resume", "ppo", "dpo", "sft", "star", "reward_model", "eval",
        "grpo --shard"]
    decode = [f for f in figures if f["figure"] == "decode"]
    few, many, bare = ("Sampler", 32), ("Sampler", 64), ("generate, no adapter", 32)
    assert [(f["what"], f["slots"]) for f in decode] == [
        few, many, bare, ("generate, with adapter", 32), few, many, bare]
    for f in decode:
        assert f["tokens_per_s"] == pytest.approx(1e3 * f["slots"] / f["ms_per_step"], rel=0.05)  # rounding
    steps = {f["what"]: f for f in figures if f["figure"] == "step"}
    assert list(steps) == ["with KL", "the defaults", "--gradient-checkpointing", "--full"]
    assert list(steps["with KL"]["seconds"]) == ["sample", "reward", "reference", "update"]
    assert steps["with KL"]["mean_new"] == 16 > steps["the defaults"]["mean_new"]
    assert sum(f["number"] for f in figures if f["figure"] == "captures") >= 2
    assert len([f for f in figures if f["figure"] == "kernels"]) == 4
    for heading in ("| check |", "| decode |", "| GRPO step |", "| where the time goes |", "| part |"):
        assert heading in done.stdout and heading in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu.jsonl").read_text().splitlines() == lines
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.jsonl", "gpu.md", "kernels.md",
                                                                "scripts.log"]


def test_gpu_limits_of_a_decode_step():
    """By hand, Qwen2.5-3B's shape at 4.3 TB/s and 790 TFLOP/s: bytes bind first, then operations."""
    model = gpu_tools.random_model("3B", torch.bfloat16, torch.device("meta"))
    body, head = gpu_parts.weights_of(model)
    assert head == 151_936 * 2048 and body + head == pytest.approx(3.09e9, rel=2e-3)
    for rows, seconds in ((64, (2 * 3.086e9 + 64 * 400 * 36_864) / 4.3e12),
                          (256, (2 * 3.086e9 + 256 * 400 * 36_864) / 4.3e12),
                          (512, 512 * (2 * 3.086e9 + 4 * 400 * 36 * 2048) / 790e12)):
        assert gpu_parts.decode_limit(model, rows, 400, 4.3e12, 790e12) == pytest.approx(seconds, rel=1e-3)


@pytest.mark.parametrize(("operator", "sizes", "kind"), [
    ("aten::addmm", [[2560], [64, 2048], [2048, 2560], [], []], "layers' products"),
    ("aten::mm", [[256, 2048], [2048, 22_016 + 64]], "layers' products"),  # with A below
    ("aten::addmm_", [[64, 22_016], [64, 64], [64, 22_016]], "LoRA's products"),
    ("aten::mm", [[32, 8192], [8192, 2048]], "LoRA's products"),  # the gradient of A
    ("aten::mm", [[883, 2048], [2048, 151_936], [883, 151_936]], "head's product"),
    ("aten::_flash_attention_forward", [], "attention"), ("aten::copy_", [], "copies, cache"),
    ("aten::_fused_rms_norm", [], "norm"), ("aten::cumsum", [], "draw, log-probs"),
    ("aten::silu", [], "elementwise")])
def test_gpu_classes_of_operators(operator, sizes, kind):
    assert gpu_parts.class_of(operator, sizes, 151_936) == kind


def test_gpu_stand_in_graph_reads_its_tensors_anew_and_its_capture_writes_nothing():
    """As a CUDA graph does: what is written in place is seen, what is bound to another tensor is not."""
    weight, total, graph = torch.ones(3), torch.zeros(3), gpu_tools.StandInGraph()
    with gpu_tools.StandInCapture(graph):
        made = torch.zeros(3).add_(weight[1:].sum())
        total += made
    assert total.tolist() == [0, 0, 0]
    graph.replay()
    weight += 1
    graph.replay()
    assert total.tolist() == [6, 6, 6]


def gpu_run(monkeypatch, capsys, words, *steps):
    """(Exit code, output) of a run whose only part with content is these steps."""
    monkeypatch.setattr(gpu_parts, "check_float32", lambda: [step() for step in steps])
    words = ("--small", "--only", "float32 against transformers", *words)
    with pytest.raises(SystemExit) as end:
        run_main(gpu, capsys, monkeypatch, *words)
    return bool(end.value.code), capsys.readouterr().out


def test_gpu_a_failed_check_or_a_broken_part_fails_the_run(capsys, monkeypatch):
    assert gpu_run(monkeypatch, capsys, (), lambda: gpu_tools.check("close", 0.5, 1))[0] is False
    failed, out = gpu_run(monkeypatch, capsys, (), lambda: gpu_tools.check("far", float("nan"), 1))
    assert failed and "**FAILED**" in out
    failed, out = gpu_run(monkeypatch, capsys, (), lambda: 1 / 0)
    assert failed and "| float32 against transformers | ZeroDivisionError: division by zero |" in out
    failed, out = gpu_run(monkeypatch, capsys, (), lambda: sys.exit("error: no such model"))
    assert failed and "SystemExit: error: no such model" in out


def test_gpu_names_what_the_budget_leaves_out(capsys, monkeypatch):
    failed, out = gpu_run(monkeypatch, capsys, ("--seconds", 0), lambda: 1 / 0)
    assert not failed and "| float32 against transformers | 6 |" in out


RUN_UNTIL = """
import os, signal, sys, time
sys.path.insert(0, ".")
from bench import gpu, gpu_parts, gpu_tools
def hang():
    gpu_tools.check("before", 0, 1)
    EVENT
    time.sleep(1000)
gpu_parts.check_float32, gpu_tools.HANGS = hang, 1
sys.argv = ["gpu.py", "--small", "--only", "float32 against", "--out", sys.argv[1]]
gpu.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("event", "why"), [
    ("os.kill(os.getpid(), signal.SIGTERM)", "SIGTERM"),
    ("gpu_tools.here.seconds = gpu_tools.elapsed()", "it hangs")])
def test_gpu_prints_its_tables_when_it_is_ended(tmp_path, event, why):
    done = subprocess.run([sys.executable, "-c", RUN_UNTIL.replace("EVENT", event), str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    for text in (done.stdout, (tmp_path / "gpu.md").read_text()):
        assert "| before | 0 | 1 | ok |" in text
        assert f"| float32 against transformers | ended here: {why} |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_says_what_it_needs(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run_main(gpu, capsys, monkeypatch)
    assert "no CUDA device here; --small" in capsys.readouterr().err


# ---- real_gpu.py ----


@pytest.mark.slow
def test_real_gpu_evaluates_before_and_after_training(tmp_path):
    """Its phases are forked: it needs a process that has not trained anything itself."""
    done = run_without(
        "real_gpu.py", "--small", "--methods", "grpo", "--max-steps", "2", "--questions", "8", "--held-out", "4",
        "--prompts", "2", "--group", "4", "--max-new-tokens", "24", "--out", str(tmp_path),
        code=RUN_WITHOUT.replace("'matplotlib'", "'_'"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "real_gpu.md", "summary.json", "compare.md", "curves.png", "metrics.jsonl", "samples.csv",
        "answers.csv", "log.txt"}
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [phase["phase"] for phase in found["phases"]] == ["eval-before", "grpo", "eval-grpo"]
    before, after = found["accuracy"]
    answers = read_csv(tmp_path / "answers.csv")
    for entry in (before, after):
        right = [int(row["correct"]) for row in answers if row["of"] == entry["of"]]
        assert len(right) == 8 and entry["pass@1"] == sum(right) / 8
    assert after["difference"] == pytest.approx(after["pass@1"] - before["pass@1"])
    (run,) = found["runs"]
    rows = read_csv(tmp_path / "samples.csv")
    assert run["steps"] == 2 and len(rows) == 16
    assert run["sampled_tokens"] == sum(int(row["tokens"]) for row in rows)


def test_real_gpu_a_failed_phase_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(real_gpu.Bench, "process", lambda *_: (1, False))
    monkeypatch.setattr(real_gpu, "BEGUN", time.monotonic())
    monkeypatch.setattr(real_gpu.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        run_main(real_gpu, capsys, monkeypatch, "--small", "--methods", "grpo", "--out", tmp_path)
    assert end.value.code == 1
    assert "FAILED (see log.txt): eval-before, grpo." in (tmp_path / "real_gpu.md").read_text()


def test_real_gpu_goes_on_from_the_start_where_sft_has_saved_nothing(tmp_path, capsys, monkeypatch):
    asked = []

    def process(self, script, values, seconds):
        asked.append((script, values["model"]))
        if script == "sft":  # stopped in its first step
            Path(values["out"]).mkdir()
            Path(values["out"], "metrics.jsonl").write_text('{"step": 0}\n')
        return 0, script == "sft"

    monkeypatch.setattr(real_gpu.Bench, "process", process)
    monkeypatch.setattr(real_gpu, "BEGUN", time.monotonic())
    monkeypatch.setattr(real_gpu.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        run_main(real_gpu, capsys, monkeypatch, "--small", "--sft", 1, "--methods", "grpo", "--out", tmp_path)
    assert end.value.code == 0 and asked == [("eval", ("",)), ("sft", ""), ("grpo", "")]


def test_real_gpu_table():
    """A later method that the clock ended says so; the first always ends that way."""
    interval = [0.01, 0.05]
    run = {"ok": True, "stopped": True, "minutes": 1.5, "steps": 30, "sampled_tokens": 2_000_000,
           "sampled_tokens_per_s": 50_000, "tokens_per_s_of_the_run": 20_000, "peak_gb": 9.8}
    after = {"from": "before", "difference": 0.02, "difference_interval": interval, "mcnemar_p": 0.01,
             "pass@1": 0.05, "interval": interval, "questions": 1319}
    text = real_gpu.table({
        "accuracy": [{"of": "before", "pass@1": 0.03, "interval": interval, "questions": 1319},
                     after | {"of": "grpo"}],
        "runs": [run | {"run": "grpo"}, run | {"run": "star", "peak_gb": None}], "phases": [],
        "skipped": ["ppo"], "arguments": {"methods": ["grpo", "star"]}, "card": "a card", "torch": "2",
        "transformers": "5", "python": "3", "seconds": 200})
    row = "| grpo | 3.0% | 5.0% | +2.0% [+1.0%, +5.0%] | 0.01 | 1.5 | 30 | 2,000,000 | 50,000 |"
    assert row in text and "| star (cut short) | 3.0% | - | - | - |" in text
    assert "1319 test questions, greedy; a card" in text and "No time was left for: ppo." in text


def test_real_gpu_cut():
    rows = [{"a": "x" * 98}] * 3  # and a comma or line end each
    assert real_gpu.cut(rows, 200) == rows[:2] and real_gpu.cut(rows, 1000) == rows
