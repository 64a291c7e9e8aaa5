"""reward_model.py: golden losses, scores that padding cannot move, interchange with PEFT, use as a reward."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import reward_model
from common import curves, data, models, rewards
from common.data import Example, Preference
from common.run import Fitting, RunState
from common.tables import read_csv
from reward_model import (
    Args,
    Comparison,
    accumulate_gradients,
    add_lora,
    ranking_loss,
)
from tests.commands import run
from tests.tiny_models import some_prompts, tiny_model

torch.set_num_threads(1)
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = torch.device("cpu")


def loss_of(*scores, loss="pair", margin=0.0, centre=0.0):
    return ranking_loss(torch.tensor([scores]), torch.tensor([margin]), loss=loss, centre=centre)[0].item()


def test_golden_losses():
    assert loss_of(1.0, 0.2) == pytest.approx(0.371101, abs=1e-6)
    assert loss_of(1.0, 0.2, margin=0.5) == pytest.approx(0.554355, abs=1e-6)
    assert loss_of(1.0, 0.2, centre=0.01) == pytest.approx(0.371101 + 0.0144, abs=1e-6)
    assert loss_of(1.0, 0.2, 0.0, -0.5, loss="best-of-n") == pytest.approx(0.713116, abs=1e-6)
    assert loss_of(0.0, 0.0) == pytest.approx(math.log(2), abs=1e-6)
    assert loss_of(1.0, 0.2, loss="best-of-n") == pytest.approx(loss_of(1.0, 0.2), abs=1e-6)


def test_a_difference_of_a_thousand_is_finite():
    for loss in ("pair", "best-of-n"):
        scores = torch.tensor([[-500.0, 500.0]], requires_grad=True)
        value = ranking_loss(scores, torch.zeros(1), loss=loss)
        value.sum().backward()
        assert value.item() == pytest.approx(1000.0)
        assert torch.allclose(scores.grad, torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize("loss", ["pair", "best-of-n"])
def test_slopes(loss):
    """Against central differences in float64, with margin and centring; a missing reply has none."""
    scores = torch.tensor([[0.4, -0.3, 1.2], [0.1, 0.7, -math.inf]], dtype=torch.float64, requires_grad=True)
    margins = torch.tensor([0.3, 0.0], dtype=torch.float64)

    def at(x):
        return ranking_loss(x, margins, loss=loss, centre=0.02).sum()

    at(scores).backward()
    for i, n in itertools.product(range(2), range(3)):
        if scores[i, n].isneginf():
            assert scores.grad[i, n] == 0
            continue
        step = torch.zeros(2, 3, dtype=torch.float64)
        step[i, n] = 1e-5
        with torch.no_grad():
            slope = (at(scores + step) - at(scores - step)) / 2e-5
        assert scores.grad[i, n].item() == pytest.approx(slope.item(), abs=1e-8)


def test_calibration_by_hand():
    """Margins of confidence 0.55 (two, one right), 0.95 (three, all right); a tie is half right."""
    low, high = math.log(0.55 / 0.45), math.log(0.95 / 0.05)
    bins = curves.calibration([low, -low, high, high, high], bins=2)
    assert [(round(sure, 6), right, n) for sure, right, n in bins] == [(0.55, 0.5, 2), (0.95, 1.0, 3)]
    assert curves.calibration([0.0, math.nan]) == [(0.5, 0.5, 1)]


# ---- on a model ----


@pytest.fixture
def toy():
    """A model with an adapter away from its start, a head, and questions of 2, 3 and 4 replies."""
    torch.manual_seed(1)
    model = tiny_model("qwen2")
    params = add_lora(model, "reward", 4, 8, models.PROJECTIONS)
    head = torch.nn.Parameter(0.3 * torch.randn(1, model.config.hidden_size))
    with torch.no_grad():
        for p in params:
            p.add_(0.02 * torch.randn_like(p))
    comparisons = []
    for i, n in enumerate((2, 3, 4, 2, 3)):
        rows = some_prompts(range(3 + 2 * i, 3 + 2 * i + n), seed=i)
        comparisons.append(Comparison(Preference(i, "", "", "", margin=0.5 * i), rows))
    return model, [*params, head], head, comparisons


@pytest.mark.parametrize("loss", ["pair", "best-of-n"])
def test_micro_batches_change_nothing(toy, loss):
    model, params, head, comparisons = toy
    args = Args(loss=loss, margin=0.2 if loss == "pair" else 0.0, centre=0.01)

    def gradient(part, size):
        for p in params:
            p.grad = None
        sums = accumulate_gradients(model, head, part, args, len(comparisons), size, CPU)
        return sums, torch.cat([p.grad.flatten() for p in params])

    sums, whole = gradient(comparisons, 10**6)
    assert whole.abs().max() > 0
    for size in (1, 70):
        again, grads = gradient(comparisons, size)
        assert torch.allclose(grads, whole, atol=1e-5 * whole.abs().max().item())
        assert again == pytest.approx(sums, rel=1e-5, abs=1e-5)  # a sum of margins may be near 0
    halves = [gradient(comparisons[r::2], 70)[1] for r in (0, 1)]
    assert torch.allclose(sum(halves), whole, atol=1e-5 * whole.abs().max().item())


def test_a_score_depends_on_its_row_alone(toy):
    """Alone or padded beside longer rows, with the padding id (0) or the end token inside and at its end."""
    model, _, head, _ = toy
    rows = [[5, 0, 7, 0], [9] * 30, [2, 2, 2], [0]]
    with torch.no_grad():
        together = models.last_token_scores(model, head, rows)
        alone = torch.cat([models.last_token_scores(model, head, [row]) for row in rows])
        hidden = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, torch.stack(hidden) @ head[0], atol=1e-5)


def test_golden_ranking_of_four_pairs(toy, monkeypatch):
    """Three of four held-out pairs ranked rightly: 0.75; every score stands in eval.csv."""
    model, _, head, _ = toy
    pairs = [Comparison(Preference(i, "q", "a", "b"), [[1] * (i + 2), [2]]) for i in range(4)]
    found = [[2.0, 1.0], [0.5, 0.1], [-1.0, 3.0], [4.0, 0.0]]
    monkeypatch.setattr(reward_model, "score_all", lambda *_, tokens_per_batch: torch.tensor(found))
    logged = {}

    class Stub:
        device, print = CPU, staticmethod(lambda text: None)
        log_held_out = staticmethod(lambda step, metrics: logged.update(metrics))
        write_rows = staticmethod(lambda rows, name: logged.update(rows=rows))

    state = reward_model.State(tokens_per_batch=100)
    reward_model.evaluate(model, head, pairs, Args(), state, Fitting(state, CPU, 1), Stub)
    mean, std = state.scale
    assert logged["eval/ranking_accuracy"] == 0.75 and logged["eval/pairs"] == 4
    assert [row["correct"] for row in logged["rows"]] == [1, 1, 0, 1]
    scores = torch.tensor([2.0, 0.5, -1.0, 4.0, 1.0, 0.1, 3.0, 0.0])
    assert mean == pytest.approx(scores.mean().item()) and std == pytest.approx(scores.std().item())


def saved_base(path):
    base = tiny_model("qwen2")
    base.save_pretrained(path)
    models.load_tokenizer("").save_pretrained(path)
    return base


def test_peft_reads_adapter_and_head(tmp_path):
    """As a sequence classifier of one label, in PEFT's format; its logit is the score."""
    peft = pytest.importorskip("peft")
    base = saved_base(tmp_path / "base")
    params = add_lora(base, "reward", 4, 6, ["q_proj", "down_proj"])
    torch.manual_seed(0)
    head = torch.randn(1, base.config.hidden_size)
    with torch.no_grad():
        for p in params:
            p.add_(0.1 * torch.randn_like(p))
        models.save_adapter(tmp_path / "rm", reward_model.adapter_tensors(base, "reward"), 6,
                            str(tmp_path / "base"), base, head)
        plain = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=1, pad_token_id=0)
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "rm").eval()
        rows = [[5, 9, 7, 3], [4, 4, 8, 1, 6, 2]]
        logits = torch.cat([theirs(torch.tensor([row])).logits[0] for row in rows])
        assert torch.allclose(models.last_token_scores(base, head, rows), logits, atol=1e-5)


# ---- whole runs ----

SMALL = ["--max-steps", 4, "--train-pairs", 60, "--eval-pairs", 20, "--pairs-per-step", 6, "--eval-every", 2]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("rm")
    out = run("--out", "rm", "--save-every", 1, "--keep", 9, *SMALL, cwd=path, script="reward_model.py")
    return path / "rm", out


def test_what_a_run_leaves(small):
    path, out = small
    assert "held-out ranking accuracy before" in out and "left out: none" in out
    names = {p.name for p in path.iterdir()}
    assert {"config.json", "metrics.jsonl", "eval.csv", "final", "reward_model.py"} <= names
    lines = curves.read_metrics(path)
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4]
    assert len([line for line in lines if "loss" in line]) == 4
    pytest.importorskip("matplotlib")
    assert (path / "calibration.png").stat().st_size > 1000


@pytest.mark.parametrize("more", [[], ["--merge"], ["--full"]])
def test_the_reward_of_a_run_is_its_score(more, tmp_path):
    """Through --rewards' own loader: (score - mean) / std, whatever the batch; transformers agrees."""
    run("--out", "rm", *SMALL, *more, cwd=tmp_path, script="reward_model.py")
    path = tmp_path / "rm"
    reward = rewards.LearnedReward(str(path), torch.float32, CPU, 60)
    settings = json.loads((path / "final" / "reward.json").read_text())
    tokenizer = models.load_tokenizer("")
    replies = ["<answer>3</answer>", "<think>1+2=3</think><answer>3</answer>", "no", ""]
    values = reward([Example(0, "Compute 1+2.")] * 4, replies)
    rows = [data.encode_prompt(tokenizer, "Compute 1+2.") + data.encode_completion(
        tokenizer, reply, tokenizer.eos_token_id) for reply in replies]
    with torch.no_grad():
        scores = models.last_token_scores(reward.model, reward.head, rows)
    assert values == pytest.approx(((scores - settings["mean"]) / settings["std"]).tolist(), abs=1e-4)
    assert len(set(values)) == 4
    last = [row for row in read_csv(path / "eval.csv") if row["step"] == "4"]  # the run's own
    expected = [(float(row["score_chosen"]) - settings["mean"]) / settings["std"] for row in last]
    found = reward([Example(0, row["prompt"]) for row in last], [row["chosen"] for row in last])
    assert found == pytest.approx(expected, abs=1e-4) and len(last) == 20
    if more:  # a plain model for others
        theirs = AutoModelForSequenceClassification.from_pretrained(path / "final")
        with torch.no_grad():
            logits = [theirs(torch.tensor([row])).logits.item() for row in rows]
        assert logits == pytest.approx(scores.tolist(), abs=1e-4)
    score = rewards.score(rewards.parse_rewards([f"model:{path}=0.5", "format=0"], lambda folder: reward),
                          [Example(0, "Compute 1+2.", "3")] * 4, replies)
    assert score["rewards"]["rm"] == pytest.approx(values) and score["correct"] == [1.0, 1.0, 0.0, 0.0]
    assert score["total"] == pytest.approx([0.5 * value for value in values])


def test_a_row_beyond_the_context_is_nan(small):
    reward = rewards.LearnedReward(str(small[0]), torch.float32, CPU, 60)
    reward.longest = 30
    assert [math.isnan(value) for value in reward([Example(0, "q")] * 2, ["1", "1" * 60])] == [False, True]


def without_times(lines):
    return [{k: v for k, v in line.items() if k != "time" and "seconds" not in k and "memory" not in k}
            for line in lines]


def test_resumed_is_the_same_bit_for_bit(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "final")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step}")
    run("--out", "cut", "--resume", cwd=tmp_path, script="reward_model.py")
    ours, theirs = (without_times(curves.read_metrics(path)) for path in (tmp_path / "cut", small[0]))
    assert ours == theirs
    for name in ("adapter_model.safetensors", "reward.json"):
        assert (tmp_path / "cut" / "final" / name).read_bytes() == (small[0] / "final" / name).read_bytes()


@pytest.mark.parametrize("words, parts", [
    (["--pairs", "countdown"], ["countdown has no pairs"]), (["--margin", -1], ["--margin -1"]),
    (["--loss", "best-of-n", "--margin", 1], ["--loss pair"]), (["--eval-pairs", 0], ["--eval-pairs 0"]),
    (["--pairs", "x.csv"], ["no file x.csv"]), (["--max-steps", -1], ["--max-steps -1"]),
    (["--pairs", "x.csv", "--level", 2], ["--level 2"]), (["--pairs", "arithmetic,x.csv"], ["generated"]),
    (["--max-tokens", 3, "--train-pairs", 40], ["--max-tokens 3"])])
def test_mistakes_are_one_line(words, parts, tmp_path):
    error = run(*words, cwd=tmp_path, script="reward_model.py", fails=True)
    assert all(part in error for part in parts) and list(tmp_path.iterdir()) == []


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(small, tmp_path):
    error = run("--model", small[0], "--max-steps", 1, "--train-questions", 20, cwd=tmp_path,
                script="grpo.py", fails=True)
    assert "use it as --rewards model:" in error
    error = run("--rewards", "model:", "--max-steps", 1, cwd=tmp_path, script="grpo.py", fails=True)
    assert "no reward model" in error
    assert list(tmp_path.iterdir()) == []


def test_dry_run_keeps_nothing(tmp_path):
    assert "dry run: peak memory" in run("--dry-run", *SMALL, cwd=tmp_path, script="reward_model.py")
    assert list(tmp_path.iterdir()) == []


def test_grpo_and_eval_take_it(small, tmp_path):
    run("--out", "g", "--rewards", f"model:{small[0]}", "--max-steps", 1, "--prompts-per-step", 2,
        "--num-generations", 4, "--eval-questions", 4, "--max-new-tokens", 24, "--train-questions", 20,
        cwd=tmp_path, script="grpo.py")
    line = [line for line in curves.read_metrics(tmp_path / "g") if "reward" in line][0]
    assert line["reward"] == pytest.approx(line["reward/rm"]) and "correct" in line
    out = run("--out", "e", "--rewards", f"model:{small[0]}", "--limit", 12, "--k", 4, cwd=tmp_path)
    [line], rows = curves.read_metrics(tmp_path / "e"), read_csv(tmp_path / "e" / "samples.csv")
    best = {}
    for row in rows:  # by hand: the answer it likes best
        if row["sample"] != "0":
            best.setdefault(row["id"], []).append((float(row["reward/rm"]), int(row["correct"])))
    by_hand = sum(max(of)[1] for of in best.values()) / len(best)
    assert line["best@4 by rm T=0.5"] == pytest.approx(by_hand) and "best@4 by rm" in out


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
@pytest.mark.parametrize("tokenizer, pairs, left_out", [
    ("qwen2.5", "ultrafeedback_binarized/train.jsonl", "equal scores 56, same reply 1, empty reply 1"),
    ("qwen2.5", "hh_rlhf/harmless-base/test.jsonl.gz", "prompts differ 5, empty reply 4"),
    ("qwen2.5", "lm_human_preferences/layout_fixture.json", "none"),
    ("gpt2", "lm_human_preferences/layout_fixture.json", "none")])
@pytest.mark.parametrize("script", ["reward_model.py", "dpo.py"])
def test_published_preferences_train(script, tokenizer, pairs, left_out, tmp_path):
    """Random weights under the real tokenizers; what is left out is what the data's README counts."""
    theirs = models.load_tokenizer(str(DATA / "tokenizers" / tokenizer))
    base = tiny_model("qwen2", vocab_size=len(theirs), num_hidden_layers=1, max_position_embeddings=4096)
    base.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "base")
    more = ["--loss", "best-of-n"] if "lm_human" in pairs and script == "reward_model.py" else []
    more += ["--eval-pairs", 6] if script == "reward_model.py" else ["--eval-questions", 6]
    out = run("--out", "r", "--model", "base", "--pairs", DATA / pairs, "--max-steps", 2, "--pairs-per-step",
              2, "--label-tokenizer", DATA / "tokenizers" / "gpt2", "--max-tokens", 900, *more,
              cwd=tmp_path, script=script)
    said = out.split("left out: ")[1].splitlines()[0]
    kept = [part for part in said.split(", ") if not part.startswith("too long ")] or ["none"]
    assert sorted(kept) == sorted(left_out.split(", "))
    first, second = [line for line in curves.read_metrics(tmp_path / "r") if "loss" in line]
    assert math.isfinite(second["loss"])
    if script == "dpo.py":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_it_learns_to_rank(tmp_path):
    """Guesses and working cut short, after 40 steps: worse replies that a model of this size can see."""
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
            for p in data.load_preferences("arithmetic", seed=1)
            if p.rejected.count("=") < p.chosen.count("=")][:1200]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--out", "l", "--pairs", "pairs.jsonl", "--max-steps", 40, "--eval-pairs", 100, cwd=tmp_path,
        script="reward_model.py")
    scores = [line["eval/ranking_accuracy"] for line in curves.read_metrics(tmp_path / "l")
              if "eval/loss" in line]
    assert scores[0] < 0.8 and scores[-1] > 0.95
