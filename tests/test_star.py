"""star.py: what samples teach, hints that leave no trace, restarts, reuse of answers, learning."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import dpo
import star
from common import curves, data, models, rewards
from common.data import HINT, Example
from common.tables import read_csv
from star import (
    Args,
    Completion,
    Row,
    Sample,
    accumulate_gradients,
    add_lora,
    explains,
    rows_to_train,
    training_rows,
    with_hint,
)
from tests.commands import run
from tests.tiny_models import some_prompts, tiny_model

torch.set_num_threads(1)
CPU = torch.device("cpu")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"the shared data are not at {DATA}")


# ---- what samples teach ----


def samples_of(*answers):
    """Samples from (question, ids, right, reward); an unfinished one has no 9 at its end."""
    return [Sample(q, i, Example(q, f"Q{q}", "5"), Completion(ids, [0.0] * len(ids), ids[-1] == 9),
                   f"text {ids}", correct=float(right), reward=reward)
            for i, (q, ids, right, reward) in enumerate(answers)]


def rows_of(samples, strategy, per_question=0, **more):
    prompts = {s.example.id: [100 + s.question] for s in samples}
    return training_rows(samples, prompts, Args(per_question=per_question, **more), models.load_tokenizer(""),
                         strategy)


SOME = samples_of((0, [1, 9], 1, 1.0), (0, [2, 9], 0, 0.0), (0, [1, 9], 1, 1.0), (0, [3], 1, 1.0),
                  (1, [4, 9], 1, 1.0), (1, [5, 9], 1, 1.0), (2, [6, 9], 0, 0.0), (3, [7, 9], 1, math.nan),
                  (3, [8, 9], 0, 0.5))


def test_sft_takes_right_finished_answers_once():
    assert [(row.prompt_ids, row.chosen, row.weight) for row in rows_of(SOME, "sft")] == [
        ([100], [1, 9], 1.0), ([101], [4, 9], 1.0), ([101], [5, 9], 1.0), ([103], [7, 9], 1.0)]
    assert [row.chosen for row in rows_of(SOME, "sft", 1)] == [[1, 9], [4, 9], [7, 9]]


def test_pairs_never_mix_two_questions():
    assert [(row.prompt_ids, row.chosen, row.rejected) for row in rows_of(SOME, "dpo")] == [
        ([100], [1, 9], [2, 9]), ([103], [7, 9], [8, 9])]
    many = samples_of(*[(0, [i, 9], i % 2, 0.0) for i in range(1, 9)])
    assert len(rows_of(many, "dpo")) == 4 and len(rows_of(many, "dpo", 3)) == 3
    ids = [tuple(x) for row in rows_of(many, "dpo") for x in (row.chosen, row.rejected)]
    assert len(set(ids)) == len(ids)


def test_reinforce_centres_rewards_over_the_question():
    """Unfinished and equal ones are samples, too; what all do alike moves nothing; NaN has no part."""
    rows = rows_of(SOME, "reinforce")
    assert [row.prompt_ids[0] for row in rows] == [100] * 4
    assert [row.weight for row in rows] == pytest.approx([1 / 3, -1, 1 / 3, 1 / 3])
    assert rows_of(samples_of(*[(0, [i, 9], 0, 0.1) for i in range(1, 9)]), "reinforce") == []


def test_soft_targets_weigh_rationales_by_the_answer_they_make_probable():
    """The example of 0.8 and 0.2; the gold answer stands in the place of the sampled one."""
    tokenizer = models.load_tokenizer("")
    two = samples_of((0, [1, 9], 0, math.log(1.0)), (0, [2, 9], 0, math.log(0.25)), (1, [3, 9], 0, -7.0))
    two[0].response = "<think>2+3=5</think><answer>7</answer>"
    rows = rows_of(two, "soft")
    assert [row.weight for row in rows] == pytest.approx([0.8, 0.2, 1.0])
    assert tokenizer.decode(rows[0].chosen[:-1]) == "<think>2+3=5</think><answer>5</answer>"
    assert rows[0].chosen[-1] == tokenizer.eos_token_id
    two[0].response = "<think>" + "2+3=5 " * 50
    assert len(rows_of(two, "soft", max_new_tokens=20)[0].chosen) <= 20


def test_gain_keeps_rationales_that_make_the_gold_answer_more_probable():
    tokenizer = models.load_tokenizer("")
    of = samples_of((0, [1, 9], 0, 0.3), (0, [2, 9], 1, -0.1), (1, [3, 9], 0, 0.0), (1, [3, 9], 1, math.nan))
    of[0].response = "<think>2+3=5</think><answer>7</answer>"
    (row,) = rows_of(of, "gain")
    assert row.weight == 1 and tokenizer.decode(row.chosen[:-1]) == "<think>2+3=5</think><answer>5</answer>"


def test_metrics_of_an_iteration_by_level():
    of = samples_of((0, [1, 9], 1, 1.0), (0, [2, 9], 0, 0.0), (1, [3], 1, 1.0), (2, [4, 9], 0, 0.0))
    of += [replace(of[3], number=4, completion=Completion([5, 9], [0.0] * 2, True), source="rationalized",
                   correct=1.0)]
    of = [replace(s, example=replace(s.example, level=3 if s.question == 0 else 4)) for s in of]
    expected = {"questions": 3, "samples": 4, "rows": 2, "correct": 0.5, "solved": pytest.approx(1 / 3),
                "hinted": 2, "rationalized": 0.5, "unexplained": 7, "solved level 3": 1.0,
                "kept level 3": 1.0, "solved level 4": 0.0, "kept level 4": 0.5}  # unfinished: not solved
    assert rewards.iteration_metrics(of, {"hinted": 2, "unexplained": 7}, rows_of(of, "sft")) == expected
    loaded = [replace(s, source="loaded") for s in of[:4]]
    assert rewards.iteration_metrics(loaded, {}, rows_of(loaded, "sft"))["correct"] == 0.5


@pytest.mark.parametrize("options, iteration, expected", [
    ({"epochs": 3}, 2, 30), ({"epochs": 1.5}, 1, 15), ({"epochs": 0}, 3, 0), ({}, 0, 0),
    ({"first_steps": 40, "step_growth": 1.2}, 1, 40 * 64),
    ({"first_steps": 40, "step_growth": 1.2}, 2, 48 * 64), ({"epochs": 1, "step_growth": 2}, 3, 40)])
def test_rows_an_iteration_trains(options, iteration, expected):
    assert rows_to_train(10, iteration, Args(**options)) == expected


# ---- the gradient ----


@pytest.fixture
def toy():
    """A model with an adapter away from its start, and rows on which it runs."""
    torch.manual_seed(0)
    model = tiny_model("qwen2")
    params = add_lora(model, "policy", 4, 8, models.PROJECTIONS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in params:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    prompts, chosen, rejected = (some_prompts(lengths, seed=i) for i, lengths in enumerate(
        ([3, 5, 4, 6], [4, 1, 7, 3], [2, 6, 3, 5])))
    return model, params, prompts, chosen, rejected


def gradient(params):
    found = torch.cat([p.grad.flatten() for p in params])
    for p in params:
        p.grad = None
    return found


@pytest.mark.parametrize("tokens_per_batch", [8, 20, 1000])
def test_weighted_likelihood_is_that_of_transformers(toy, tokens_per_batch):
    model, params, prompts, chosen, _ = toy
    weights = [1.0, -0.5, 0.25, 2.0]
    loss = 0
    for p, c, w in zip(prompts, chosen, weights):
        logits = model(torch.tensor([p + c])).logits[0, len(p) - 1:-1].log_softmax(-1)
        loss = loss - w * logits.gather(1, torch.tensor(c)[:, None]).sum() / 15
    loss.backward()
    expected = gradient(params)
    rows = [Row(p, c, weight=w) for p, c, w in zip(prompts, chosen, weights)]
    sums = accumulate_gradients(model, rows, 0.1, 15, tokens_per_batch, CPU)
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(gradient(params), expected, atol=1e-6)


@pytest.mark.parametrize("tokens_per_batch", [8, 1000])
def test_pairs_have_the_gradient_of_dpo(toy, tokens_per_batch):
    model, params, prompts, chosen, rejected = toy
    refs = [(-9.0, -7.5), (-3.0, -12.0), (-20.0, -6.0), (-8.0, -8.0)]
    theirs = dpo.accumulate_gradients(
        model, [dpo.Pair(p, c, r, *ref) for p, c, r, ref in zip(prompts, chosen, rejected, refs)],
        dpo.Args(beta=0.3), 4, 1000, CPU)
    expected = gradient(params)
    rows = [Row(p, c, r, 1.0, *ref) for p, c, r, ref in zip(prompts, chosen, rejected, refs)]
    ours = accumulate_gradients(model, rows, 0.3, 4, tokens_per_batch, CPU)
    assert ours["loss"] == pytest.approx(theirs["loss"] / 4, rel=1e-5)
    assert ours["accuracy"] == theirs["accuracy"]
    assert torch.allclose(gradient(params), expected, atol=1e-6)


# ---- hints ----


def test_hints():
    options = "Which?\nA) x\nB) y\nC) z\nD) B) y"
    assert with_hint("Compute 1+1.", "2", HINT) == "Compute 1+1. (The answer is 2.)"
    assert with_hint("{answer}", "2", "{prompt}={answer}") == "{answer}=2"  # braces of the question stay
    assert with_hint(options, "B", "mark") == "Which?\nA) x\nB) y (CORRECT)\nC) z\nD) B) y"
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert with_hint(chat, "7", "{prompt} {answer}")[-1]["content"] == "Q 7" and chat[-1]["content"] == "Q"
    with pytest.raises(ValueError, match="has no option C"):
        with_hint("Compute 1+1.", "C", "mark")


@pytest.mark.parametrize("response, form, teaches", [
    ("<think>1+1=2</think><answer>2</answer>", HINT, True),
    ("Well, 1+1=2.\n<answer>2</answer>", HINT, True),
    ("<answer>2</answer>", HINT, False),  # copied
    ("<think> </think><answer>2</answer>", HINT, False),
    ("<think>it says (The answer is 2.)</think><answer>2</answer>", HINT, False),
    ("#### 2", HINT, False), ("\\boxed{2}", HINT, False), ("1+1=2, so\n#### 2", HINT, True),
    ("1+1=2. The answer is 2.", "{prompt}\nThe answer is {answer}.", True),  # which is how many end
    ("<think>1+1=2</think><answer>2</answer>", "{prompt} {answer}", True),
    ("<think>B) y (CORRECT) is marked</think><answer>B</answer>", "mark", False),
    ("<think>y fits</think><answer>B</answer>", "mark", True)])
def test_what_explains_an_answer(response, form, teaches):
    assert explains(response, "2", form) == teaches


# ---- whole runs ----

SMALL = ["--questions", 12, "--num-generations", 4, "--batch-size", 8, "--eval-questions", 10,
         "--max-new-tokens", 48, "--train-questions", 40, "--warmup-steps", 0]


def train_lines(folder):
    return [line for line in curves.read_metrics(folder) if "loss" in line]


def without_times(lines):
    return [{k: v for k, v in line.items() if k != "time" and "seconds" not in k and "memory" not in k}
            for line in lines]


@pytest.fixture
def watched(monkeypatch):
    """What a run does: weights and prompts when it samples, weights and rows when it trains."""
    seen = {"sampled": [], "trained": [], "momenta": []}
    sample, train, make = star.sample_all, star.accumulate_gradients, torch.optim.AdamW

    class AdamW(make):
        def step(self):
            seen["momenta"].append(len(self.state))
            super().step()

    def weights(model):
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def sampling(sampler, prompt_ids, keys, n, temperature, run, doing):
        if prompt_ids:
            seen["sampled"].append((doing, weights(sampler.model), prompt_ids))
        return sample(sampler, prompt_ids, keys, n, temperature, run, None)

    def training(model, rows, *rest, **more):
        seen["trained"].append((weights(model), rows))
        return train(model, rows, *rest, **more)

    monkeypatch.setattr(star, "sample_all", sampling)
    monkeypatch.setattr(star.Run, "counter", lambda self, doing: doing)
    monkeypatch.setattr(star, "accumulate_gradients", training)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    return seen


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("restart", ["base", "previous"])
@pytest.mark.parametrize("full, epochs", [([], 1.5), ([], 0.4), (["--full"], 1.5)])
def test_where_an_iteration_starts(watched, tmp_path, restart, full, epochs):
    """base: from the bits of M_0, though M_1 was the one that sampled; previous: from M_1's.

    base begins with no momenta and a new warm-up as well.
    """
    run("--out", "a", *SMALL, "--iterations", 2, "--restart", restart, "--warmup-steps", 99, "--epochs",
        epochs, *full, cwd=tmp_path, script="star.py")
    lines = train_lines(tmp_path / "a")
    second = [line["iteration"] for line in lines].index(2)
    assert second > 0 and len(lines) == len(watched["trained"]) == len(watched["momenta"])
    assert watched["momenta"][0] == 0 and (watched["momenta"][second] == 0) == (restart == "base")
    assert lines[second]["lr"] == pytest.approx(lines[0]["lr"] * (1 if restart == "base" else second + 1))
    start, again = watched["trained"][0][0], watched["trained"][second][0]
    sampler = [weights for doing, weights, _ in watched["sampled"] if doing == "iteration 2"][0]
    assert not same(sampler, start)
    assert same(again, start) == (restart == "base") and same(again, sampler) == (restart == "previous")


def test_iterations_times_epochs(watched, tmp_path):
    run("--out", "a", *SMALL, "--iterations", 2, "--epochs", 3, cwd=tmp_path, script="star.py")
    lines = train_lines(tmp_path / "a")
    for iteration in (1, 2):
        rows = [(tuple(row.prompt_ids), tuple(row.chosen))
                for line, (_, rows) in zip(lines, watched["trained"]) if line["iteration"] == iteration
                for row in rows]
        kept = [line["rows"] for line in curves.read_metrics(tmp_path / "a")
                if line.get("iteration") == iteration and "rows" in line]
        assert len(kept) == 1 and len(set(rows)) == kept[0] and all(rows.count(row) == 3 for row in set(rows))
        assert [line["epoch"] for line in lines if line["iteration"] == iteration][-1] == 3
    # every kept row was right: what was trained is what samples.csv calls right
    tokenizer = models.load_tokenizer("")
    right = {row["completion"] for row in read_csv(tmp_path / "a" / "samples.csv") if row["correct"] == "1"}
    assert {tokenizer.decode(row.chosen[:-1]) for _, rows in watched["trained"] for row in rows} <= right


def test_no_epochs_sample_and_evaluate_only(watched, tmp_path):
    out = run("--out", "a", *SMALL, "--iterations", 2, "--epochs", 0, cwd=tmp_path, script="star.py")
    final = load_file(tmp_path / "a" / "final" / "adapter_model.safetensors")
    assert watched["trained"] == [] and not any(v.any() for k, v in final.items() if "lora_B" in k)
    lines, rows = curves.read_metrics(tmp_path / "a"), read_csv(tmp_path / "a" / "samples.csv")
    assert "eval/pass@1" in lines[0] and [line["iteration"] for line in lines] == [0, 1, 2]
    assert len(rows) == 2 * 12 * 4 and "done in" in out


def test_samples_csv(tmp_path):
    """N rows for each question, all that is known of them, and the same file when written again."""
    run("--out", "a", *SMALL, "--iterations", 1, cwd=tmp_path, script="star.py")
    path = tmp_path / "a" / "samples.csv"
    rows, before = read_csv(path), path.read_bytes()
    assert len(rows) == 48 and {sum(r["id"] == row["id"] for r in rows) for row in rows} == {4}
    assert {"id", "prompt", "completion", "answer", "extracted", "correct", "logprob", "iteration", "seed",
            "source", "repetition", "in_language", "reward/correctness"} <= set(rows[0])
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert path.read_bytes() == before


@pytest.mark.parametrize("more", [[], ["--strategy", "dpo"], ["--strategy", "reinforce"],
                                  ["--strategy", "soft", "--rewards", "answer-prob"]])
def test_given_answers_need_no_sampler(watched, tmp_path, more):
    """The first loss is that of the run that sampled them; held-out ones are scored, not asked."""
    run("--out", "a", *SMALL, "--iterations", 1, *more, cwd=tmp_path, script="star.py")
    run("--out", "held", *SMALL, "--iterations", 1, "--epochs", 0, "--seed", 5, cwd=tmp_path,
        script="star.py")
    watched["sampled"].clear()
    out = run("--out", "b", *SMALL, "--iterations", 1, *more, "--generations", "a/samples.csv",
              "--eval-generations", "held/samples.csv", cwd=tmp_path, script="star.py")
    assert watched["sampled"] == [] and "repeated" in out and "another model" not in out
    (first, *_), (again, *rest) = train_lines(tmp_path / "a"), train_lines(tmp_path / "b")
    if not more or "dpo" in more:  # the others weigh equal and unfinished samples, too, which are left out
        both = [(line["loss"], line["grad_norm"]) for line in (again, first)]
        assert both[0] == pytest.approx(both[1], rel=1e-5)
    assert again["sampled_tokens"] == 0 and len(rest) > 0
    before, after = [line for line in curves.read_metrics(tmp_path / "b") if "eval/loss" in line]
    assert before["eval/ranking_accuracy"] == 0.5 and "eval/pass@1" not in before  # all gains are 0
    assert before["eval/loss"] != after["eval/loss"] and 0 <= after["eval/ranking_accuracy"] <= 1


def test_given_answers_are_united_and_counted(tmp_path):
    for seed in (0, 1):
        run("--out", f"a{seed}", *SMALL, "--iterations", 1, "--epochs", 0, "--seed", seed, cwd=tmp_path,
            script="star.py")
    files = ["a0/samples.csv", "a1/samples.csv", "a0/samples.csv"]
    found = [data.load_generations([tmp_path / f for f in files[:n]]) for n in (1, 2, 3)]
    assert len(found[0]) < len(found[1]) == len(found[2])
    assert [e.completion for e, _ in found[1][:len(found[0])]] == [e.completion for e, _ in found[0]]
    run("--out", "tuned", "--model", "a0", *SMALL, "--iterations", 1, cwd=tmp_path, script="star.py")
    out = run("--out", "b", "--model", "tuned", *SMALL, "--iterations", 1, "--generations", *files[:2],
              cwd=tmp_path, script="star.py")
    assert out.count("another model's samples") == 2 and re.search(r"left out: .*repeated \d+", out)
    held = {row["prompt"] for row in read_csv(tmp_path / "b" / "eval.csv")}
    n_held = sum(e.text in held for e, _ in found[1])
    assert (f"held out {n_held}" in out) == (n_held > 0)


def told_the_sum(text):
    """(right reply if the hint is there, wrong one) to a sum."""
    problem = re.search(r"Compute ([-+\d]+)\.", text)[1]
    total = sum(map(int, re.findall(r"[+-]?\d+", problem)))
    right = f"<think>{problem}={total}</think><answer>{total}</answer>" if "(The answer is" in text else ""
    return right, f"<answer>{total + 7}</answer>"


def told_the_letter(text):
    marked = re.search(r"\n([A-D])\) [^\n]*\(CORRECT\)", text)
    return f"<think>nitori</think><answer>{marked[1]}</answer>" if marked else "", "<answer>none</answer>"


@pytest.mark.parametrize("solve, mark, more", [
    (told_the_sum, "The answer is", []),
    pytest.param(told_the_letter, "CORRECT", ["--hint", "mark", "--data", DATA / "mmlu_african" / "ig",
                                              "--max-prompt-tokens", 400], marks=needs_data)])
def test_the_hint_leaves_no_trace(solve, mark, more, monkeypatch, tmp_path):
    """With a sampler that solves what it is told, and else fails: no row that is trained has the hint."""
    tokenizer, trained, hinted = models.load_tokenizer(""), [], []

    def sampling(sampler, prompt_ids, keys, n, temperature, run, doing):
        found = []
        for ids, row in zip(prompt_ids, keys):
            right, wrong = solve(tokenizer.decode(ids))
            hinted.extend([right] if right else [])
            reply = right or wrong
            ids = tokenizer(reply, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            found.append([Completion(ids, [-1.0] * len(ids), True) for _ in row])
        return found

    real = star.accumulate_gradients
    monkeypatch.setattr(star, "sample_all", sampling)
    monkeypatch.setattr(star, "accumulate_gradients", lambda model, rows, *rest, **more: (
        trained.extend(rows), real(model, rows, *rest, **more))[1])
    run("--out", "a", *SMALL, "--iterations", 2, "--rationalize", *more, cwd=tmp_path, script="star.py")
    texts = [tokenizer.decode(row.prompt_ids + row.chosen) for row in trained]
    assert len(hinted) == 24 and texts and not any(mark in text for text in texts)
    assert all("<think>" in text for text in texts)
    rows = read_csv(tmp_path / "a" / "samples.csv")
    told = [row for row in rows if row["source"] == "rationalized"]
    assert len(told) == 2 * 12 * 4 and all(row["correct"] == "1" for row in told)
    assert not any(mark in value for row in rows for value in row.values())
    assert not any(row["correct"] == "1" for row in rows if row["source"] == "sampled")
    [first, _] = [line for line in curves.read_metrics(tmp_path / "a") if "hinted" in line]
    assert (first["hinted"], first["solved"], first["rationalized"], first["rows"]) == (12, 0, 1, 12)
    out = run("--out", "b", *SMALL, "--iterations", 1, *more, cwd=tmp_path, fails=True, script="star.py")
    assert "no question gave anything to learn from" in out and "--rationalize" in out


@pytest.fixture
def sums(tmp_path):
    """40 questions with worked answers; all that are not held out are trained on."""
    with open(tmp_path / "sums.jsonl", "w") as file:
        for i in range(40):
            print(json.dumps({"prompt": f"Compute {i}+{i % 7}.", "answer": str(i + i % 7),
                              "completion": f"<answer>{i + i % 7}</answer>"}), file=file)
    return "sums.jsonl"


def test_few_shot_examples_are_taken_from_the_training_questions(sums, tmp_path):
    """What is shown is then no question."""
    out = run("--out", "a", "--data", sums, "--few-shot", 3, "--questions", 4, "--max-new-tokens", 48,
              "--iterations", 1, "--eval-questions", 4, "--epochs", 0, cwd=tmp_path, script="star.py")
    assert "33 questions to train on, 4 held out" in out


def test_held_out_answers_are_not_asked_again(sums, tmp_path):
    """Questions of --eval-generations are not trained on."""
    words = ["--data", sums, "--questions", 12, "--max-new-tokens", 48, "--iterations", 1,
             "--eval-questions", 4]
    run("--out", "a", *words, "--epochs", 0, cwd=tmp_path, script="star.py")
    out = run("--out", "b", *words, "--eval-generations", "a/samples.csv", cwd=tmp_path, script="star.py")
    assert "24 questions to train on, 0 held out" in out


def test_few_shot_examples_are_shown_in_the_first_iteration_alone(watched, tmp_path):
    run("--out", "a", *SMALL, "--iterations", 2, "--few-shot", 2, "--strategy", "soft", "--rewards",
        "answer-prob", cwd=tmp_path, script="star.py")
    tokenizer = models.load_tokenizer("")
    asked = {doing: [tokenizer.decode(ids).count("Compute") for ids in prompts]
             for doing, _, prompts in watched["sampled"]}
    assert set(asked["iteration 1"]) == {3} and set(asked["iteration 2"]) == set(asked["evaluation"]) == {1}
    assert all(tokenizer.decode(row.prompt_ids).count("Compute") == 1
               for _, rows in watched["trained"] for row in rows)


@pytest.mark.parametrize("more", [[], ["--strategy", "dpo", "--rationalize"],
                                  ["--full", "--restart", "previous"]])
def test_resumed_is_the_same_bit_for_bit(tmp_path, more):
    """From each checkpoint, in the middle of an iteration and at its end."""
    run("--out", "whole", "--save-every", 1, "--keep", 99, *SMALL, "--iterations", 2, *more, cwd=tmp_path,
        script="star.py")
    whole = curves.read_metrics(tmp_path / "whole")
    n = max(line["step"] for line in train_lines(tmp_path / "whole"))
    end = max(line["step"] for line in train_lines(tmp_path / "whole") if line["iteration"] == 1)
    for kept in {1, end, end + 1} - {n}:
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(tmp_path / "whole", cut)
        shutil.rmtree(cut / "final")
        for step in range(kept + 1, n + 1):
            shutil.rmtree(cut / "checkpoints" / f"step-{step}")
        run("--out", cut, "--resume", cwd=tmp_path, script="star.py")
        assert without_times(curves.read_metrics(cut)) == without_times(whole)
        assert (cut / "samples.csv").read_bytes() == (tmp_path / "whole" / "samples.csv").read_bytes()
        name = "final/model.safetensors" if "--full" in more else "final/adapter_model.safetensors"
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_ends_the_run_with_its_step(monkeypatch, tmp_path):
    """After the last step it is a finished run; before that it goes on later."""
    train = star.accumulate_gradients
    monkeypatch.setattr(star, "accumulate_gradients", lambda *words, **more: (
        os.kill(os.getpid(), signal.SIGTERM), train(*words, **more))[1])
    for steps in (1, 2):
        path = tmp_path / str(steps)
        run("--out", path, *SMALL, "--iterations", 1, "--max-steps", steps, cwd=tmp_path, script="star.py")
        assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-1"]
        assert (path / "final").exists() == (steps == 1)
    monkeypatch.undo()
    run("--out", path, "--resume", cwd=tmp_path, script="star.py")
    assert (path / "final").exists() and len(train_lines(path)) == 2


def test_a_token_budget_ends_with_its_iteration(tmp_path):
    run("--out", "a", *SMALL, "--iterations", 99, "--token-budget", 700, cwd=tmp_path, script="star.py")
    lines = [line for line in curves.read_metrics(tmp_path / "a") if "samples" in line]
    tokens = [line["sampled_tokens"] for line in lines]
    assert len(tokens) > 1 and tokens[-1] >= 700 > tokens[-2]
    assert tokens[-1] == sum(int(row["tokens"]) for row in read_csv(tmp_path / "a" / "samples.csv"))
    assert train_lines(tmp_path / "a")[-1]["iteration"] == len(lines)
    run("--out", "d", "--questions", 12, "--num-generations", 4, "--eval-questions", 10, "--max-new-tokens",
        48, "--iterations", 99, "--token-budget", 700, "--train-questions", 40, cwd=tmp_path, script="dpo.py")
    tokens = [line["sampled_tokens"] for line in train_lines(tmp_path / "d")]
    assert tokens[-1] >= 700 and tokens[-1] == sum(
        int(row["tokens"]) for row in read_csv(tmp_path / "d" / "samples.csv"))
    assert [n for n, _ in itertools.groupby(tokens)][-2] < 700


@pytest.mark.parametrize("words, complaint", [
    (["--strategy", "soft"], "add --rewards answer-prob"),
    (["--strategy", "soft", "--rewards", "answer-prob:exp"], "without exp"),
    (["--strategy", "gain", "--rewards", "answer-prob"], "add --rewards answer-prob:prior"),
    (["--strategy", "gain", "--rewards", "answer-prob:exp+prior"], "add --rewards answer-prob:prior"),
    (["--rationalize", "--strategy", "gain", "--rewards", "answer-prob:prior"], "use sft or dpo"),
    (["--strategy", "dpo", "--num-generations", 1], "use 2 or more"),
    (["--rationalize", "--strategy", "reinforce"], "use sft or dpo"),
    (["--hint", "{prompt}"], "needs {prompt} and {answer}"),
    (["--hint", "mark", "--rationalize"], "has no option"),
    (["--iterations", 0], "--iterations 0: must be 1 or more"),
    (["--epochs", -1], "--epochs -1.0: cannot be negative"),
    (["--step-growth", 0], "--step-growth 0.0: must be more than 0"),
    (["--generations", "none.csv"], "none.csv"),
    (["--rewards", "answer-prob:often"], "unknown often; take mean, exp, any, prior, others"),
    (["--few-shot", 99999], "worked examples to show"),
    (["--max-prompt-tokens", 2], "leaves 0 questions to train on and 0 held out"),
    (["--token-budget", -1], "--token-budget -1: cannot be negative")])
def test_mistakes_end_in_one_line(words, complaint, tmp_path):
    out = run("--out", "a", *words, cwd=tmp_path, fails=True, script="star.py")
    assert complaint in out and not (tmp_path / "a").exists()


@pytest.mark.parametrize("more", [[], ["--strategy", "dpo", "--epochs", 0]])
def test_dry_run(tmp_path, more):
    out = run(*SMALL, "--dry-run", *more, cwd=tmp_path, script="star.py")
    assert "dry run: peak memory" in out and list(tmp_path.iterdir()) == []


# ---- choices in other languages ----


@needs_data
@pytest.mark.parametrize("folder, sample", [("mmlu", "A) "), ("mmlu_african/am", "ሕ")])
def test_the_loop_on_published_choices(folder, sample, watched, monkeypatch, tmp_path):
    """Random weights under Qwen2.5's own tokenizer: two iterations, every file, each text byte for byte."""
    said, score = [], star.score_samples
    monkeypatch.setattr(star, "score_samples", lambda samples, *rest: (said.extend(samples),
                                                                       score(samples, *rest))[1])
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "qwen2.5")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run("--out", "a", "--model", "model", "--data", DATA / folder, "--train-questions", 40, "--questions", 6,
        "--num-generations", 2, "--iterations", 2, "--strategy", "soft", "--rewards",
        "answer-prob:mean+prior", "--eval-questions", 8, "--max-new-tokens", 12, "--batch-size", 4, "--system",
        "none", cwd=tmp_path, script="star.py", draw=True)
    path = tmp_path / "a"
    names = {p.name for p in path.iterdir()}
    assert {"config.json", "star.py", "log.txt", "metrics.jsonl", "samples.csv", "eval.csv", "curves.png",
            "checkpoints", "final"} <= names
    lines = curves.read_metrics(path)
    assert max(line.get("iteration", 0) for line in lines) == 2
    assert [line["eval/chance"] for line in lines if "eval/pass@1" in line] == [0.25] * 3
    source = {e.prompt: e for e in data.load_examples(DATA / folder, "train")}
    rows = read_csv(path / "samples.csv") + read_csv(path / "eval.csv")
    assert len(rows) == 2 * 12 + 3 * 8 and any(sample in row["prompt"] for row in rows)
    for row in rows:
        example = source[row["prompt"]]
        assert row["answer"] == example.answer in "ABCD" and row["task"] == "choice"
        text = tokenizer.decode(data.encode_prompt(tokenizer, row["prompt"]))
        assert f"user\n{row['prompt']}<|im_end|>" in text
        assert all(f"\n{letter}) " in row["prompt"] for letter in "ABCD")
    assert [row["completion"] for row in rows[:24]] == [s.response for s in said] and any(
        "\ufffd" in s.response or not s.response.isascii() for s in said)
    trained = {tokenizer.decode(row.prompt_ids + row.chosen)
               for _, batch in watched["trained"] for row in batch}
    assert trained and all(re.search(r"<answer>[A-D]</answer>\S*$", text)
                           and any(prompt in text for prompt in source) for text in trained)
    assert all(math.isfinite(line["loss"]) for line in train_lines(path))


# ---- learning ----


@pytest.mark.slow
def test_iterations_lift_held_out_accuracy(tmp_path):
    run("--out", "a", "--questions", 160, "--train-questions", 480, "--max-new-tokens", 64,
        "--eval-questions", 100, cwd=tmp_path, script="star.py", draw=True)
    scores = [line["eval/pass@1"] for line in curves.read_metrics(tmp_path / "a") if "eval/pass@1" in line]
    assert len(scores) == 4 and scores[0] < 0.4 and min(scores[1:]) > 0.7
    assert (tmp_path / "a" / "curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_grpo_learns_from_the_probability_of_the_answer_alone(tmp_path):
    """No verifier: log p(gold answer | rationale) of the policy itself; `correct` is logged and not used."""
    run("--out", "a", "--rewards", "answer-prob:exp", "--max-steps", 8, "--eval-questions", 60,
        "--train-questions", 200, "--max-new-tokens", 64, cwd=tmp_path, script="grpo.py")
    lines = curves.read_metrics(tmp_path / "a")
    scores = [line["eval/pass@1"] for line in lines if "eval/pass@1" in line]
    assert scores[0] < 0.5 and scores[-1] > 0.75
    assert all(line["reward"] == pytest.approx(line["reward/answer-prob"])
               for line in train_lines(tmp_path / "a"))
