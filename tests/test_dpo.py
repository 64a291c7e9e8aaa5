"""dpo.py: losses against golden values and closed forms, invariances, resuming, and pairs that are learnt."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dpo
from common import curves, data, models
from dpo import Args, Completion, Pair, accumulate_gradients, add_lora, preference_loss, right_against_wrong
from tests.commands import run
from tests.tiny_models import some_prompts, tiny_model

torch.set_num_threads(1)
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = torch.device("cpu")


def value(h, loss, **more):
    """The loss of log-ratios h/2 and -h/2 (any split gives the same)."""
    zero, one = torch.zeros(1), torch.ones(1)
    return preference_loss(torch.tensor([h / 2]), torch.tensor([-h / 2]), zero, zero, one, one, loss=loss,
                           **{"beta": 0.1} | more)[0].item()


@pytest.mark.parametrize("loss, more, expected", [
    ("sigmoid", {}, 0.598139), ("sigmoid", {"label_smoothing": 0.1}, 0.618139),
    ("robust", {"label_smoothing": 0.1}, 0.573139), ("ipo", {}, 9.0), ("hinge", {}, 0.8)])
def test_golden_losses(loss, more, expected):
    assert value(2.0, loss, **more) == pytest.approx(expected, abs=1e-6)


def test_golden_lengths():
    """Log-ratios +1 over 5 tokens and -1 over 4; SimPO with means -2 and -3."""
    def of(loss, chosen, rejected, lengths, **more):
        chosen, rejected, *lengths = (torch.tensor([float(x)]) for x in (chosen, rejected, *lengths))
        zero = torch.zeros(1)
        return preference_loss(chosen, rejected, zero, zero, *lengths, loss=loss, **more)[0].item()

    assert of("ipo", 1, -1, (5, 4), beta=0.1, length_normalize=True) == pytest.approx(20.7025, abs=1e-4)
    assert of("sigmoid", 1, -1, (5, 4), beta=0.1, length_normalize=True) == pytest.approx(0.670900, abs=1e-6)
    assert of("simpo", -10, -12, (5, 4), beta=2.0, gamma=1.0) == pytest.approx(0.313262, abs=1e-6)


@pytest.mark.parametrize("loss, first", [("sigmoid", math.log(2)), ("robust", math.log(2)), ("ipo", 25.0),
                                         ("hinge", 1.0)])
def test_losses_at_the_start_and_their_slopes(loss, first):
    """At h = 0, and d loss / d h by central differences in float64, away from hinge's corner."""
    more = {"label_smoothing": 0.2} if loss in ("sigmoid", "robust") else {}
    assert value(0.0, loss, **more) == pytest.approx(first, abs=1e-6)
    for h in (-3.0, 0.4, 4.0):
        chosen = torch.tensor([h], dtype=torch.float64, requires_grad=True)
        rest = [torch.zeros(1, dtype=torch.float64)] * 3 + [torch.ones(1)] * 2

        def at(x):
            return preference_loss(x, *rest, loss=loss, beta=0.1, **more)[0].sum()

        at(chosen).backward()
        with torch.no_grad():
            slope = (at(chosen + 1e-5) - at(chosen - 1e-5)) / 2e-5
        assert chosen.grad.item() == pytest.approx(slope.item(), abs=1e-7) and slope < 0


def test_gradient_on_an_enumerated_policy():
    """-beta sigma(-beta h) (grad log pi(w) - grad log pi(l)), on a softmax of three outcomes."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logp, beta, one = theta.log_softmax(0), 0.5, torch.ones(1)
    loss, _ = preference_loss(logp[:1], logp[1:2], ref[:1], ref[1:2], one, one, loss="sigmoid", beta=beta)
    loss.sum().backward()
    pi = theta.detach().softmax(0)
    h = (pi[0].log() - ref[0]) - (pi[1].log() - ref[1])
    direction = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)  # the softmax's own terms cancel
    assert torch.allclose(theta.grad, -beta * torch.sigmoid(-beta * h) * direction, atol=1e-12)


# ---- on a model ----


@pytest.fixture
def toy():
    """A model with an adapter that is away from its start, and six pairs of unequal lengths."""
    torch.manual_seed(1)
    model = tiny_model("qwen2")
    params = add_lora(model, "policy", 4, 8, models.PROJECTIONS)
    with torch.no_grad():
        for p in params:
            p.add_(0.02 * torch.randn_like(p))
    chosen, rejected = some_prompts((3, 9, 1, 5, 2, 7), seed=1), some_prompts((6, 2, 8, 1, 4, 7), seed=2)
    pairs = [Pair(*row, -3.0 * i, -2.0 * i) for i, row in enumerate(zip(
        some_prompts((4, 2, 6, 3, 5, 1)), chosen, rejected))]
    return model, params, pairs


def gradient(model, params, pairs, args, size, n_pairs=None):
    for p in params:
        p.grad = None
    sums = accumulate_gradients(model, pairs, args, n_pairs or len(pairs), size, CPU)
    return sums, torch.cat([p.grad.flatten() for p in params])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo"])
def test_micro_batches_change_nothing(toy, loss):
    """One pair at a time, all at once, or over two ranks: sums to 1e-5 of float32."""
    model, params, pairs = toy
    args = Args(loss=loss, beta=0.3)
    sums, whole = gradient(model, params, pairs, args, 10**6)
    for size in (1, 60):
        again, grads = gradient(model, params, pairs, args, size)
        assert torch.allclose(grads, whole, atol=1e-5 * whole.abs().max().item())
        assert again == pytest.approx(sums, rel=1e-5)
    halves = [gradient(model, params, pairs[r::2], args, 60, n_pairs=6)[1] for r in (0, 1)]
    assert torch.allclose(sum(halves), whole, atol=1e-5 * whole.abs().max().item())


def test_one_forward_of_both_is_two(toy):
    """Against transformers' own logits of each row alone."""
    model, params, pairs = toy
    args, total = Args(beta=0.3), 0.0
    sums, _ = gradient(model, params, pairs, args, 10**6)
    with torch.no_grad():
        for pair in pairs:
            logps = []
            for ids in (pair.chosen, pair.rejected):
                logits = model(torch.tensor([pair.prompt_ids + ids])).logits[0, len(pair.prompt_ids) - 1:-1]
                logps.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item())
            h = (logps[0] - pair.ref_chosen) - (logps[1] - pair.ref_rejected)
            total += math.log1p(math.exp(-0.3 * h))
    assert sums["loss"] == pytest.approx(total, rel=1e-5)


def test_pairs_of_one_question():
    def completion(*ids, finished=True):
        return Completion(list(ids), [0.0] * len(ids), finished)

    rows = [completion(1, 9), completion(2, 9), completion(1, 9), completion(3, 9),
            completion(4, finished=False), completion(5, 9)]
    pairs = right_against_wrong([7], rows, [1, 0, 1, 0, 0, 1], 4)
    assert [(p.chosen, p.rejected) for p in pairs] == [([1, 9], [2, 9]), ([5, 9], [3, 9])]
    assert len(right_against_wrong([7], rows, [1, 0, 1, 0, 0, 1], 1)) == 1
    assert right_against_wrong([7], rows, [1] * 6, 4) == []
    assert right_against_wrong([7], [rows[0], rows[4]], [1, 0], 4) == []  # cut off: neither right nor wrong


@pytest.mark.parametrize("more, accuracy", [
    ({"loss": "simpo"}, 1.0), ({"length_normalize": True}, 1.0), ({}, 0.0)])
def test_held_out_pairs_are_ranked_by_the_margin_of_the_loss(more, accuracy, monkeypatch):
    """Log-probs -10 of ten tokens against -6 of three: better per token, worse in all."""
    logged = {}
    monkeypatch.setattr(dpo, "summed_logprobs", lambda *_: ([-10.0], [-6.0]))
    monkeypatch.setattr(dpo, "sample_all", lambda *_: [])
    stub = SimpleNamespace(device=None, counter=lambda text: None,
                           log_evaluation=lambda step, rows, metrics: logged.update(metrics))
    pairs = [Pair([1], [2] * 10, [3] * 3, 0.0, 0.0)]
    dpo.evaluate(None, None, [], {}, pairs, Args(**more), 0, None, None, stub)
    assert logged == {"eval/ranking_accuracy": accuracy}


# ---- whole runs ----

SMALL = ["--questions", 12, "--num-generations", 6, "--pairs-per-step", 4, "--eval-questions", 10,
         "--max-new-tokens", 32, "--train-questions", 40, "--warmup-steps", 0]


def train_lines(folder):
    return [line for line in curves.read_metrics(folder) if "loss" in line]


def without_times(lines):
    return [{k: v for k, v in line.items() if k != "time" and "seconds" not in k and "memory" not in k}
            for line in lines]


@pytest.mark.parametrize("more", [[], ["--full"], ["--gradient-checkpointing", "--merge"]])
def test_first_loss_is_ln_2_from_a_plain_base_and_from_a_run(more, tmp_path):
    run("--out", "a", "--max-steps", 2, *SMALL, *more, cwd=tmp_path, script="dpo.py")
    run("--out", "b", "--model", "a", "--max-steps", 2, *SMALL, *more, cwd=tmp_path, script="dpo.py")
    for folder in ("a", "b"):
        first, second = train_lines(tmp_path / folder)[:2]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and second["loss"] != first["loss"]
        assert first["margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("more", [["--iterations", 2, "--reference", "previous"], ["--passes", 2]])
def test_resumed_is_the_same_bit_for_bit(tmp_path, more):
    """The pairs of an iteration are kept in the checkpoint; each 2 steps are cut after the third."""
    run("--out", "whole", "--save-every", 1, "--keep", 99, *SMALL, *more, cwd=tmp_path, script="dpo.py")
    whole = curves.read_metrics(tmp_path / "whole")
    n = max(line["step"] for line in whole)
    assert n >= 3
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "final")
    for step in range(3, n + 1):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step}")
    run("--out", "cut", "--resume", cwd=tmp_path, script="dpo.py")
    assert without_times(curves.read_metrics(tmp_path / "cut")) == without_times(whole)
    name = "final/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    before = (tmp_path / "cut" / "metrics.jsonl").read_text()
    run("--out", "cut", "--resume", cwd=tmp_path, script="dpo.py")  # finished: nothing is done again
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == before


def test_fixed_pairs_and_dry_run(tmp_path):
    rows = [{"prompt": f"Compute {a}+{b}.", "chosen": f"<answer>{a + b}</answer>",
             "rejected": "<answer>0</answer>"} for a, b in itertools.product(range(1, 9), repeat=2)]
    rows += [rows[0] | {"chosen": rows[0]["rejected"]}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--pairs", "pairs.jsonl", "--eval-questions", 10, "--max-new-tokens", 32, "--passes", 3,
             "--train-questions", 20]
    out = run("--out", "f", *words, cwd=tmp_path, script="dpo.py")
    assert "same reply 1" in out
    lines = curves.read_metrics(tmp_path / "f")
    ranking = [line["eval/ranking_accuracy"] for line in lines if "eval/ranking_accuracy" in line]
    assert ranking[0] == 0.5 and ranking[-1] > 0.9  # fresh adapter: all ties
    assert "dry run: peak memory" in run("--dry-run", *words, cwd=tmp_path, script="dpo.py")
    assert "dry run: peak memory" in run("--dry-run", *SMALL, cwd=tmp_path, script="dpo.py")


@pytest.mark.parametrize("words, parts", [
    (["--beta", 0], ["--beta 0"]), (["--label-smoothing", 0.5], ["--label-smoothing 0.5"]),
    (["--loss", "ipo", "--label-smoothing", 0.1], ["sigmoid"]), (["--num-generations", 1], ["two samples"]),
    (["--pairs", "x.jsonl", "--iterations", 2], ["--iterations 2"]), (["--pairs", "x.jsonl"], ["x.jsonl"])])
def test_mistakes_are_one_line(words, parts, tmp_path):
    error = run(*words, cwd=tmp_path, script="dpo.py", fails=True)
    assert all(part in error for part in parts) and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
@pytest.mark.parametrize("path", ["ultrafeedback_binarized", "hh_rlhf/harmless-base"])
def test_published_pairs_train(path, tmp_path):
    """A few pairs of the real files, through the real loader, on the embedded model's own tokenizer."""
    pairs = data.load_preferences(DATA / path, "test", limit=12)
    rows = [{"prompt": data.prompt_text(p.prompt)[:200], "chosen": p.chosen[:100],
             "rejected": p.rejected[:90] + "."} for p in pairs]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--out", "p", "--pairs", "some.jsonl", "--pairs-per-step", 4, "--max-steps", 2, "--eval-questions", 4,
        "--max-new-tokens", 16, "--train-questions", 20, cwd=tmp_path, script="dpo.py")
    assert train_lines(tmp_path / "p")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_dpo_learns(tmp_path):
    """Pairs of the embedded model's own answers lift held-out pass@1 by 0.15 or more."""
    out = run("--out", "l", "--questions", 128, "--train-questions", 128, "--eval-questions", 100,
              "--max-new-tokens", 64, cwd=tmp_path, script="dpo.py")
    scores = [line["eval/pass@1"] for line in curves.read_metrics(tmp_path / "l") if "eval/pass@1" in line]
    assert scores[-1] >= scores[0] + 0.15, out


def test_a_common_prefix_of_the_prompts_tokens_counts_for_nothing(toy):
    """The loss sees completion tokens: where log-probs look one token back, a prefix changes nothing."""
    model, params, pairs = toy

    class OneBack(torch.nn.Module):  # a body whose state is a function of the present token alone
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(384, 32)

        def forward(self, input_ids, **_):
            return SimpleNamespace(last_hidden_state=self.embed(input_ids))

    body, head = OneBack(), torch.nn.Linear(32, 384, bias=False)
    stub = SimpleNamespace(base_model=body, get_output_embeddings=lambda: head,
                           config=SimpleNamespace(model_type="llama"), get_input_embeddings=lambda: body.embed, zero_grad=body.zero_grad)
    weights = [*body.parameters(), *head.parameters()]
    plain, grads = gradient(stub, weights, pairs, Args(), 10**6)
    longer = [Pair([7] * 9 + p.prompt_ids, p.chosen, p.rejected, p.ref_chosen, p.ref_rejected) for p in pairs]
    again, same = gradient(stub, weights, longer, Args(), 10**6)
    assert again == pytest.approx(plain, rel=1e-6) and torch.allclose(grads, same, atol=1e-7)


def test_closed_form_of_the_optimum():
    """pi* = pi_ref exp(r / beta) / Z: no policy earns more of E[r] - beta KL, and DPO's loss is least there.

    On four outcomes; the pairs are labelled by Bradley-Terry with rewards r, all of them, in expectation.
    """
    torch.manual_seed(0)
    r, ref = (torch.tensor(x).double() for x in ([0.3, -0.7, 1.1, 0.2], [0.4, 0.3, 0.1, 0.2]))
    beta = 0.5
    best = (ref.log() + r / beta).softmax(0)

    def objective(p):
        return (p * r).sum(-1) - beta * (p * (p / ref).log()).sum(-1)

    others = torch.distributions.Dirichlet(torch.ones(4).double()).sample((1000,))
    assert (objective(others) < objective(best)).all()

    theta, one = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.ones(16)
    w, l = (index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    prefers = torch.sigmoid(r[w] - r[l])
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        logp = theta.log_softmax(0)
        loss, _ = preference_loss(logp[w], logp[l], ref.log()[w], ref.log()[l], one, one, loss="sigmoid",
                                  beta=beta)
        (prefers * loss).sum().backward()
        return (prefers * loss).sum()

    optimizer.step(closure)
    assert torch.allclose(theta.detach().softmax(0), best, atol=1e-5)


def test_after_a_resume_the_first_loss_of_an_iteration_is_ln_2(tmp_path):
    """The reference of the second iteration is the policy that was saved at the end of the first."""
    more = ["--iterations", 2, "--reference", "previous", "--save-every", 1, "--keep", 99]
    run("--out", "r", *SMALL, *more, cwd=tmp_path, script="dpo.py")
    first = [line["step"] for line in train_lines(tmp_path / "r") if line["iteration"] == 2][0]
    shutil.rmtree(tmp_path / "r" / "final")
    for folder in (tmp_path / "r" / "checkpoints").iterdir():
        if int(folder.name[5:]) >= first:
            shutil.rmtree(folder)
    run("--out", "r", "--resume", cwd=tmp_path, script="dpo.py")
    [line] = [line for line in train_lines(tmp_path / "r") if line["step"] == first]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_its_samples_are_pairs_for_another_run(tmp_path):
    """samples.csv of a run gives the same pairs, first loss and gradient; another model's are warned of."""
    run("--out", "a", *SMALL, "--max-steps", 1, cwd=tmp_path, script="dpo.py")
    rows = (tmp_path / "a" / "samples.csv").read_text().count("<answer>")
    assert rows >= 60  # 12 questions, 6 samples
    out = run("--out", "b", "--pairs", "a/samples.csv", *SMALL, "--max-steps", 1, cwd=tmp_path,
              script="dpo.py")
    assert "another model" not in out and "repeated" in out and "unfinished" not in out
    assert train_lines(tmp_path / "b")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    out = run("--out", "c", "--model", "b", "--pairs", "a/samples.csv,a/samples.csv", *SMALL, "--max-steps",
              1, cwd=tmp_path, script="dpo.py")
    assert out.count("another model's samples") == 2
    out = run("--out", "d", "--model", "a", "--pairs", "a/samples.csv", *SMALL, "--max-steps", 1,
              cwd=tmp_path, script="dpo.py")
    assert "another model" not in out  # what that run has become
