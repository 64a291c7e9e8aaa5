"""eval.py: estimators by their definitions, whole evaluations of small models, rollouts sampled again."""

import csv
import itertools
import json
import random
import re
import shutil
import statistics
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval
from common import curves, data, models, rewards
from common.rewards import pass_at_k, pass_at_ks
from eval import majority, summarise
from tests.commands import SMALL, read, run

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def write_sums(path, n, long=()):
    """Sums with their worked answer; the questions `long` go on and on."""
    path.write_text("".join(json.dumps({
        "prompt": f"Compute {i}+{i}." + " Yes, please." * 9 * (i in long), "answer": str(2 * i),
        "completion": f"<answer>{2 * i}</answer>"}) + "\n" for i in range(1, n + 1)))
    return path


def test_the_train_split_is_what_the_run_has_trained_on(tmp_path):
    """W15: not what it held out, nor what it left out."""
    write_sums(tmp_path / "sums.jsonl", 60, long=range(1, 31))
    run("--data", "sums.jsonl", "--train-questions", 10, "--eval-questions", 12, "--max-prompt-tokens", 30,
        "--max-steps", 1, "--prompts-per-step", 2, "--num-generations", 2, "--max-new-tokens", 4, "--seed", 3,
        "--warmup-steps", 0, "--out", "a", cwd=tmp_path, script="grpo.py")
    held_out = {row["prompt"] for row in read(tmp_path / "a/eval.csv")}
    assert len(held_out) == 12  # W17: filtered, then split
    run("--model", "base", "a", "--data", "sums.jsonl", "--split", "train", "--max-new-tokens", 4, "--out", "e",
        cwd=tmp_path)
    asked = {row["prompt"] for row in read(tmp_path / "e/samples.csv")}
    assert len(asked) == 10 and not asked & held_out and not any("please" in prompt for prompt in asked)
    assert {row["prompt"] for row in read(tmp_path / "a/samples.csv")} <= asked
    run("--data", "sums.jsonl", "--train-questions", 10, "--eval-questions", 12, "--max-steps", 1, "--seed", 4,
        "--max-new-tokens", 4, "--out", "b", cwd=tmp_path, script="sft.py")
    assert "different questions" in run("--model", "a", "b", "--data", "sums.jsonl", "--split", "train",
                                        cwd=tmp_path, fails=True)


@pytest.mark.parametrize("script", ["sft", "dpo", "reward_model"])
def test_held_out_is_what_was_asked_for_of_what_is_short_enough(tmp_path, script):
    """W17: what is too long goes before the split, not out of both parts."""
    import importlib

    module, dropped = importlib.import_module(script), Counter()
    tokenizer = models.load_tokenizer("")
    path = write_sums(tmp_path / "x.jsonl", 60, long=range(1, 31))
    if script == "sft":
        args = module.Args(data=str(path), eval_questions=12, max_tokens=40)
        train, held_out, _ = module.load_rows(args, tokenizer, dropped)
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"prompt": row["prompt"], "chosen": row["completion"],
                                            "rejected": "no"}) + "\n" for row in rows))
        args = module.Args(pairs=str(path), max_tokens=40)
        load = module.load_pairs if script == "dpo" else module.load_comparisons
        train, held_out = load(args, tokenizer, dropped)
    assert dropped["too long"] == 30
    assert (len(train), len(held_out)) == ((18, 12) if script == "sft" else (27, 3))  # of pairs a tenth


# ---- estimators ----


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [1] * c + [0] * (n - c)
        subsets = [max(subset) for subset in itertools.combinations(samples, k)]
        assert pass_at_k(n, c, k) == pytest.approx(statistics.mean(subsets), abs=1e-12)
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(n, 0, n + 1)


def test_golden_pass_at_k():
    assert pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)
    rows = [{"id": id, "correct": c, "answer": "7", "temperature": 0.5} for id, c in ((1, 1), (1, 0), (2, 0), (2, 0))]
    assert pass_at_ks(rows, (1, 2)) == {"eval/pass@1 T=0.5": 0.25, "eval/pass@2 T=0.5": 0.5}
    assert pass_at_ks([], (1,)) == pass_at_ks([row | {"answer": ""} for row in rows], (1,)) == {}


@pytest.mark.parametrize("answers, correct, expected", [
    (["5", "5.0", "7"], [1, 1, 0], 1.0),
    (["7", "5", "7"], [0, 1, 0], 0.0),
    (["7", "5"], [0, 1], 0.0),  # as many: the first
    (["1/2", "3", "0.5", "3", "\\frac{1}{2}"], [1, 0, 1, 0, 1], 1.0),
    (["", "", "5"], [0, 0, 1], 1.0),  # no answer, no vote
    (["", ""], [0, 0], 0.0)])
def test_majority(answers, correct, expected):
    assert majority(answers, correct) == expected


def test_repetition_sees_circles_in_any_language():
    """A1.11, in bytes: what a tokenizer without Yoruba makes of it."""
    assert rewards.repetition(list(("ṣe " * 50).encode())) > 0.95
    text = "Ìdáhùn náà ni pé omi máa ń hó ní ọgọ́rùn-ún ìwọ̀n, nítorí náà B ni ìdáhùn tí ó tọ̀nà jù lọ."
    assert rewards.repetition(list(text.encode())) < 0.2  # words of two letters come again
    assert rewards.repetition([]) == rewards.repetition([1, 2]) == 0


def answer_rows(outcomes):
    """Rows of samples.csv from {id: [correct of sample 0, 1, ...]}."""
    return [{"id": id, "sample": g, "correct": c, "extracted": "5" if c else f"wrong {id} {g}", "format": 1.0,
             "finished": 1, "repetition": 0.0, "in_language": "", "tokens": 4}
            for id, of in outcomes.items() for g, c in enumerate(of)]


def test_summary_by_hand():
    """Two questions mixed, one always right; the mixed set of the first model is kept for the second."""
    rows = answer_rows({1: [1, 1, 1, 1], 2: [0, 1, 0, 1], 3: [1, 0, 0, 1]})
    metrics, mixed = summarise(rows, (1, 2), 0.5)
    assert mixed == [2, 3] and metrics["pass@1"] == pytest.approx(2 / 3)
    assert metrics["pass@1 T=0.5"] == pytest.approx((1 + 2 / 3 + 1 / 3) / 3)
    assert metrics["pass@2 T=0.5"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert metrics["maj@3 T=0.5"] == pytest.approx(2 / 3)
    assert metrics["acc_mixed"] == 0.5
    greedy = [row for row in rows if row["sample"] == 0]
    given = [(1, 1, "5", 4), (0.5, 0, "", 9), (0, 1, "7", 8)]
    for row, (format, finished, extracted, tokens) in zip(greedy, given):
        row.update(format=format, finished=finished, extracted=extracted, tokens=tokens)
        row["repetition"] = tokens / 10
    metrics, _ = summarise(rows, (1, 2), 0.5)  # of the greedy rows alone
    assert [metrics[name] for name in ("format", "truncated", "no_answer", "tokens", "repetition")] == (
        pytest.approx([1 / 3, 1 / 3, 1 / 3, 7, 0.7]))
    again = answer_rows({1: [0, 0, 0, 0], 2: [1, 1, 1, 1], 3: [1, 1, 1, 1]})
    later, kept = summarise(again, (1,), 0.5, mixed)
    assert kept == mixed and later["acc_mixed"] == 1.0
    plain, none = summarise(answer_rows({1: [1], 2: [0]}), (1,), 0.5)
    assert none is None and plain["pass@1"] == 0.5 and "acc_mixed" not in plain


# ---- real data ----


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
@pytest.mark.parametrize("path, split, n, chance", [
    ("gsm8k", "test", 1319, None), ("math500", "test", 500, None), ("aqua_rat", "test", 254, 5),
    ("mmlu", "test", 14_042, 4), ("mmlu_african/am", "test", 604, 4), ("mmlu_african/ig", "test", 604, 4),
    ("mmlu_african/mmmlu_layout/mmlu_IG.csv", "test", 604, 4)])
def test_published_data_and_guessing(path, split, n, chance):
    """Gold answers are all right; letters drawn at random are right as often as chance, within 3 SE."""
    questions = data.load_examples(DATA / path, split)
    assert len(questions) == n

    def right(texts):
        return sum(rewards.correctness([""] * n, texts, [e.answer for e in questions],
                                       [e.task for e in questions], [e.meta for e in questions])) / n

    assert right([f"<answer>{e.answer}</answer>" for e in questions]) == 1.0
    if chance:
        rng, letters = random.Random(0), "ABCDE"[:chance]
        p = 1 / chance
        assert abs(right([f"The answer is {rng.choice(letters)}." for _ in questions]) - p) < 3 * (
            p * (1 - p) / n) ** 0.5


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
def test_non_latin_text_survives():
    """Question to tokens to text, byte for byte, under Qwen2.5's tokenizer: Amharic, Igbo and a smile."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "qwen2.5")
    files = sorted((DATA / "mmlu_african").rglob("*.csv"))[:12]
    texts = [row[0] for file in files for row in csv.reader(open(file, encoding="utf-8", newline=""))][:300]
    for text in [*texts, "Ṣé omi máa ń hó? 😀\r\n\t«ọ̀»"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


# ---- whole evaluations ----


@pytest.mark.parametrize("n", [1, 7, 13])
def test_every_question_is_counted_once(n, tmp_path):
    run("--limit", n, "--k", 1, 2, "--out", "e", *SMALL, cwd=tmp_path)
    (line,), rows = curves.read_metrics(tmp_path / "e"), read(tmp_path / "e" / "samples.csv")
    assert line["questions"] == n and len(rows) == 3 * n
    assert len({row["id"] for row in rows}) == n
    greedy = [row for row in rows if row["sample"] == "0"]
    assert line["pass@1"] == pytest.approx(sum(int(row["correct"]) for row in greedy) / n)
    assert {row["temperature"] for row in greedy} == {"0.0"}


def test_checkpoints_share_one_base(trained, monkeypatch):
    """A row each with its step; the base's weights are read once; each row equals its model merged, alone."""
    loads = []
    load = models.load_model
    monkeypatch.setattr(
        models, "load_model", lambda *args, **more: loads.append(args[0]) or load(*args, **more))
    names = ["base", *(f"grpo/checkpoints/step-{n}" for n in (1, 2, 3)), "grpo"]
    monkeypatch.chdir(trained)
    eval.main(eval.Args(model=tuple(names), limit=12, max_new_tokens=40, out="all", device="cpu"))
    lines = curves.read_metrics("all")
    assert [(line["model"], line["step"]) for line in lines] == list(zip(names, (0, 1, 2, 3, 3)))
    assert len(loads) == 1
    rows = read("all/samples.csv")
    by_model = {name: [row for row in rows if row["model"] == name] for name in names}
    prompts = [e for e in data.load_examples("arithmetic", "test", limit=12)]
    tokenizer = models.load_tokenizer("")
    for name in ("base", "grpo"):
        merged = load("" if name == "base" else name, torch.float32, torch.device("cpu"))
        sampler = eval.Sampler(merged, models.stop_ids(merged, tokenizer), 12)
        ids = [data.encode_prompt(tokenizer, e.prompt) for e in prompts]
        for row, (c,) in zip(by_model[name], sampler.sample(ids, [[0]] * 12, 40, 0)):
            assert len(c.ids) == int(row["tokens"]) and sum(c.logprobs) == pytest.approx(
                float(row["logprob"]), abs=1e-3)
    assert by_model["grpo"] == [row | {"model": "grpo"} for row in by_model["grpo/checkpoints/step-3"]]
    assert (Path("all") / "curves.png").stat().st_size > 10_000


def test_trained_from_the_embedded_model(trained, tmp_path):
    """No system message: for its checkpoints, too, and for a plain model that a run of a run wrote."""
    for name in ("", *(trained / "grpo" / part for part in ("", "final", "checkpoints/step-1"))):
        assert models.is_embedded(str(name))
    plain = tmp_path / "runs" / "b" / "final"
    shutil.copytree(models.TINY, plain)
    assert not models.is_embedded(str(plain))
    (plain.parent / "metrics.jsonl").touch()
    (plain.parent / "config.json").write_text(json.dumps({"args": {"model": str(trained / "grpo")}}))
    assert models.is_embedded(str(plain)) and models.is_embedded(str(plain.parent))


def test_base_after_an_adapter_in_bfloat16(trained, monkeypatch):
    """Taking an adapter off leaves the plain model: what `base` alone answers."""
    monkeypatch.chdir(trained)
    for out, names in (("both", ("grpo", "base")), ("alone", ("",))):
        eval.main(eval.Args(model=names, limit=6, max_new_tokens=40, out=out, device="cpu", dtype="bfloat16",
                            slots=6))
    last = [row["completion"] for row in read("both/samples.csv") if row["model"] == "base"]
    assert last == [row["completion"] for row in read("alone/samples.csv")]


def test_preambles_few_shot_and_resume(trained):
    preambles = ["", "Think logically.", "{braces} stay"]
    words = ["--preamble", *preambles, "--limit", 5, "--few-shot", 2, "--out", "p", *SMALL]
    run(*words, cwd=trained)
    lines, rows = curves.read_metrics(trained / "p"), read(trained / "p" / "samples.csv")
    assert [line["preamble"] for line in lines] == preambles
    for row in rows:
        assert row["preamble"] in row["prompt"] and row["prompt"].count("Compute") == 3
    questions = {re.findall(r"Compute [^.]*\.", row["prompt"])[-1] for row in rows}
    assert not questions & {q for row in rows for q in re.findall(r"Compute [^.]*\.", row["prompt"])[:-1]}
    metrics = trained / "p" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    run("--out", "p", "--resume", cwd=trained)
    assert read(trained / "p" / "samples.csv") == rows  # what was not finished is not there twice
    assert [line["preamble"] for line in curves.read_metrics(trained / "p")] == preambles


def test_one_prompt_and_dry_run_leave_nothing(tmp_path):
    out = run("--prompt", "Compute 3+4.", "--answer", "7", "--max-new-tokens", 48, cwd=tmp_path)
    assert "correctness" in out and "extracted" in out
    out = run("--dry-run", *SMALL, cwd=tmp_path)
    assert "so 33 take at most" in out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, parts", [
    (["--k", 5, "--samples", 3], ["--k 5", "--samples 5"]),
    (["--k", 0], ["--k 0"]),
    (["--model", "nowhere"], ["nowhere", "no such folder"]),
    (["--split", "dev"], ["'dev'", "validation"]),
    (["--model", "base"], ["--model base"]),
    (["--preamble", "a", "a"], ["--preamble", "'a'"]),
    (["--few-shot", 9, "--data", "arithmetic", "--level", "9"], ["9"]),
    (["replay", "nowhere", "--step", 1], ["nowhere"])])
def test_mistakes_are_one_line(words, parts, tmp_path):
    error = run(*words, cwd=tmp_path, fails=True)
    assert all(part in error for part in parts) and list(tmp_path.iterdir()) == []


def test_latex_answers_are_judged_by_math_verify(tmp_path, monkeypatch):
    """Equal as mathematics though not as text; an answer that hangs costs its own row and no other."""
    pytest.importorskip("math_verify")
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{x^2 + 2x + 1}", r"\boxed{7}", r"\boxed{(1, 2)}"]
    golds = [r"\dfrac12", "(x+1)^2", "8", "(1,2)"]
    (tmp_path / "math.jsonl").write_text("".join(
        json.dumps({"problem": f"{i}?", "solution": f"\\boxed{{{gold}}}", "answer": gold}) + "\n"
        for i, gold in enumerate(golds)))

    class Says:
        slots, model = 4, SimpleNamespace()

        def sample(self, prompts, keys, *_):
            return [[eval.Completion([10 + i], [0.0], False) for _ in row] for i, row in enumerate(keys)]

    monkeypatch.setattr(eval.OneBase, "sampler", lambda self, *_: Says())
    monkeypatch.setattr(eval.shard, "whole_model", nullcontext)
    tokenizer = models.load_tokenizer("")
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **_: texts[ids[0] - 10])
    monkeypatch.chdir(tmp_path)
    eval.main(eval.Args(data="math.jsonl", out="e", device="cpu"))
    assert [row["correct"] for row in read("e/samples.csv")] == ["1", "1", "0", "1"]
    (tmp_path / "slow.py").write_text("""def slow(prompts, responses, answers):
    while any("7" in response for response in responses):
        pass
    return [1.0] * len(responses)
""")
    eval.main(eval.Args(data="math.jsonl", out="f", device="cpu", rewards=("slow.py:slow=1",),
                        reward_timeout=1.0))
    assert [row["reward/slow"] for row in read("f/samples.csv")] == ["1.0", "1.0", "nan", "1.0"]
    assert [row["correct"] for row in read("f/samples.csv")] == ["1", "1", "0", "1"]
    assert curves.read_metrics("f")[0]["reward_failed"] == 1


# ---- a rollout sampled again ----


@pytest.mark.parametrize("step, row", [(1, 0), (2, 7), (3, 15)])
def test_a_rollout_sampled_again_is_what_was_recorded(trained, step, row):
    out = run("replay", "grpo", "--step", step, "--row", row, cwd=trained)
    recorded = [r for r in read(trained / "grpo" / "samples.csv") if r["step"] == str(step)][row]
    assert recorded["completion"] in out and "equal to what was recorded" in out
    tokens = [line for line in out.splitlines() if re.search(r"-?\d\.\d{4}\s+\d\.\d{5}$", line)]
    ratios = [float(line.split()[-1]) for line in tokens]
    assert len(ratios) == int(recorded["tokens"])
    assert all(abs(ratio - 1) < 1e-4 for ratio in ratios)  # float32: the sampler's are the trainer's


def test_steps_whose_weights_are_gone_are_named(trained, tmp_path):
    shutil.copytree(trained / "grpo", tmp_path / "grpo")
    shutil.rmtree(tmp_path / "grpo" / "checkpoints" / "step-1")
    error = run("replay", "grpo", "--step", 2, cwd=tmp_path, fails=True)
    assert "steps 1, 3, 4" in error
