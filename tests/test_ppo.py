"""ppo.py: GAE, losses, whitening against golden values and a slow reference; roles that never leak; runs."""

import itertools
import math
import random
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo
import ppo
from common import curves, data, models, rewards
from ppo import (
    Args,
    Completion,
    Rollout,
    accumulate_gradients,
    adapter_tensors,
    add_lora,
    clipped_loss,
    completion_values,
    explained_variance,
    generalized_advantages,
    moments,
    set_advantages,
    token_logprobs,
    token_values,
    use_adapter,
    value_loss,
)
from tests.commands import ENV, ROOT, run
from tests.processes import wait_for
from tests.tiny_models import some_prompts, tiny_model

torch.set_num_threads(1)
CPU = torch.device("cpu")


def tensor(*values):
    return torch.tensor([values], dtype=torch.float64)


# ---- golden values ----


def test_golden_gae():
    A, returns = generalized_advantages(tensor(0, 0, 1), tensor(0.1, 0.2, 0.3), torch.zeros(1),
                                        torch.tensor([3]), 1.0, 0.95)
    assert A[0].tolist() == pytest.approx([0.82675, 0.765, 0.7], abs=1e-9)
    assert returns[0].tolist() == pytest.approx([0.92675, 0.965, 1.0], abs=1e-9)


def test_golden_value_clip():
    def of(value, clip=0.2):
        loss, clipped = value_loss(tensor(value), tensor(0.2), tensor(0.5), torch.ones(1, 1).bool(), clip)
        return loss.item(), clipped.item()

    assert of(0.9) == (pytest.approx(0.08), False)  # max(0.16, 0.01) / 2: the clip would have been kinder
    assert of(0.5) == (pytest.approx(0.005), True)  # right, but further from the old value than allowed
    assert of(0.5, clip=0) == (0.0, False)
    old, near, returns = 0.2 * torch.rand(3, 1, 999, generator=torch.Generator().manual_seed(0)) - 0.1
    assert (old + (near - old) != near).any()  # by rounding
    assert not value_loss(near, old, returns, torch.ones(1, 999).bool(), 0.2)[1].any()


def test_golden_moments_and_explained_variance():
    mean, variance = moments(torch.tensor([1.0, 2.0, 3.0]), CPU)
    assert mean == 2.0 and (3 - mean) / variance**0.5 == pytest.approx(1.224745, abs=1e-6)
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns, CPU) == 1.0
    assert explained_variance(returns + 5, returns, CPU) == 1.0  # a constant is no variance
    assert explained_variance(torch.zeros(4), returns, CPU) == 0.0
    assert explained_variance(-returns, returns, CPU) == pytest.approx(1 - 4.0)
    assert explained_variance(returns, torch.ones(4), CPU) == 0.0


@pytest.mark.parametrize("rho, A, expected, low, high", [
    (1.5, -1.0, 1.5, 0, 0), (0.5, -1.0, 0.8, 1, 0), (1.5, 1.0, -1.2, 0, 1), (0.5, 1.0, -0.5, 0, 0),
    (1.0, 1.0, -1.0, 0, 0)])
def test_golden_policy_loss(rho, A, expected, low, high):
    mask = torch.ones(1, 1).bool()
    loss, is_low, is_high = clipped_loss(tensor(math.log(rho)), tensor(0.0), tensor(A), mask, 0.2, 0.2)
    assert loss.item() == pytest.approx(expected) and (is_low.item(), is_high.item()) == (low, high)


def test_adaptive_beta():
    assert ppo.adapted_beta(0.1, 6.0, 6.0) == 0.1
    assert ppo.adapted_beta(0.1, 6.6, 6.0) == pytest.approx(0.1 * 1.01)
    assert ppo.adapted_beta(0.1, 600.0, 6.0) == pytest.approx(0.1 * 1.02)
    assert ppo.adapted_beta(0.1, -5.0, 6.0) == pytest.approx(0.1 * 0.98)


# ---- against a slow reference ----


def slow_gae(rewards, values, bootstrap, gamma, lam):
    """One row: the sum of discounted deltas, as the definition has it."""
    following = [*values[1:], bootstrap]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0), (0.97, 0.5)])
@pytest.mark.parametrize("garbage", [0.0, 1e6, math.nan])
def test_gae_of_ragged_rows_is_each_alone(gamma, lam, garbage):
    """With 100 extra columns, and garbage in all that is padding."""
    rng, lengths = random.Random(0), [1, 7, 3, 5]
    rows = [([rng.gauss(0, 1) for _ in range(n)], [rng.gauss(0, 1) for _ in range(n)], rng.choice([0.0, 0.7]))
            for n in lengths]

    def padded(column):
        full = torch.full((4, 107), garbage, dtype=torch.float64)
        for i, row in enumerate(rows):
            full[i, :lengths[i]] = torch.tensor(row[column], dtype=torch.float64)
        return full

    A, returns = generalized_advantages(padded(0), padded(1), torch.tensor([row[2] for row in rows]),
                                        torch.tensor(lengths), gamma, lam)
    for i, (r, v, bootstrap) in enumerate(rows):
        expected = slow_gae(r, v, float(torch.tensor(bootstrap)), gamma, lam)
        assert A[i, :lengths[i]].tolist() == pytest.approx(expected, abs=1e-9)
        expected = [a + b for a, b in zip(expected, v)]
        assert returns[i, :lengths[i]].tolist() == pytest.approx(expected, abs=1e-9)
        assert not A[i, lengths[i]:].any() and not returns[i, lengths[i]:].any()


def test_losses_ignore_what_is_masked():
    torch.manual_seed(0)
    mask = torch.rand(3, 9) < 0.6
    tensors = [torch.randn(3, 9, dtype=torch.float64) for _ in range(3)]
    for loss in (lambda *x: clipped_loss(*x, mask, 0.2, 0.2)[0], lambda *x: value_loss(*x, mask, 0.2)[0]):
        clean = loss(*tensors)
        dirty = [torch.where(mask, x, math.nan) for x in tensors]
        leaf = dirty[0].requires_grad_()
        again = loss(leaf, *dirty[1:])
        again.sum().backward()
        assert torch.equal(clean, again.detach()) and not again[~mask].any()
        assert leaf.grad.isfinite().all() and not leaf.grad[~mask].any()


def test_exact_policy_gradient_on_an_enumerated_policy():
    """At ratio 1 the expected gradient of the loss is -grad E[R], summed over all outcomes of a softmax."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    R, logp = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64), theta.log_softmax(0)
    A = R - (logp.exp() * R).sum().detach()
    mask = torch.ones(3, 1).bool()
    loss, *_ = clipped_loss(logp[:, None], logp.detach()[:, None], A[:, None], mask, 0.2, 0.2)
    (found,) = torch.autograd.grad((logp.exp().detach() * loss[:, 0]).sum(), theta)
    (expected,) = torch.autograd.grad((theta.softmax(0) * R).sum(), theta)
    assert torch.allclose(found, -expected, atol=1e-12)


# ---- on a model ----


def rollouts_of(lengths=(3, 9, 1, 5, 2, 7), seed=0):
    """Rollouts with log-probs and rewards made up; some unfinished."""
    rng, found = random.Random(seed), []
    for i, (prompt, ids) in enumerate(zip(some_prompts((4, 2, 6, 3, 5, 1), seed=seed),
                                          some_prompts(lengths, seed=seed + 1))):
        completion = Completion(ids, [-rng.random() for _ in ids], i % 3 != 2)
        r = Rollout(data.Example(i, ""), i // 2, i % 2, prompt, completion, reward=rng.gauss(0, 1))
        r.old_logprobs = torch.tensor(completion.logprobs)
        r.ref_logprobs = r.old_logprobs - 0.1
        found.append(r)
    return found


@pytest.fixture
def toy():
    """A model with adapters reward, critic and policy, all away from their start, and the critic's head.

    The reward's stands on more layers than the others.
    """
    torch.manual_seed(1)
    model = tiny_model("qwen2")
    reward_params = add_lora(model, "reward", 2, 4, models.PROJECTIONS)
    critic_params, params = (add_lora(model, name, 4, 8, models.PROJECTIONS, range(1, 2))
                             for name in ("critic", "policy"))
    head = torch.nn.Parameter(0.3 * torch.randn(1, model.config.hidden_size))
    critic_params.append(head)
    with torch.no_grad():
        for p in params + critic_params + reward_params:
            p.add_(0.02 * torch.randn_like(p))
    for p in params + critic_params:
        p.requires_grad_()
    for module in ppo.lora_modules(model).values():
        module.active = "policy" if "policy" in module.A else None
    return SimpleNamespace(model=model, params=params, critic_params=critic_params, head=head,
                           reward_params=reward_params, critic_on=partial(use_adapter, model, "critic"))


def prepare(toy, rollouts, args, beta=0.0):
    ids = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
    with toy.critic_on():
        values = completion_values(toy.model, toy.head, *ids, 60, CPU)
    for r, row in zip(rollouts, values):
        r.values = row
    set_advantages(rollouts, args, beta, CPU)
    return rollouts


def gradients(toy, rollouts, args, size=10**6, n_tokens=0, beta=0.0, train_policy=True):
    for p in toy.params + toy.critic_params:
        p.grad = None
    n_tokens = n_tokens or sum(len(r.completion.ids) for r in rollouts)
    sums = accumulate_gradients(toy.model, toy.model, toy.critic_on, toy.head, rollouts, args, beta, n_tokens,
                                size, CPU, train_policy)
    return sums, [torch.zeros(()) if p.grad is None else p.grad.clone()
                  for p in toy.params + toy.critic_params]


def assert_equal(some, others, tolerance=1e-5):
    scale = max(g.abs().max().item() for g in others)
    assert all(torch.allclose(a, b, atol=tolerance * scale) for a, b in zip(some, others, strict=True))


def test_values_are_read_where_a_token_is_predicted(toy):
    """Against transformers' hidden states of each row alone; micro-batches return rows in their order."""
    rollouts = rollouts_of()
    ids = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
    with toy.critic_on(), torch.no_grad():
        for size in (1, 25, 10**6):
            found = completion_values(toy.model, toy.head, *ids, size, CPU)
            for r, values in zip(rollouts, found, strict=True):
                hidden = toy.model.base_model(torch.tensor([r.prompt_ids + r.completion.ids]))
                each = hidden.last_hidden_state[0] @ toy.head[0]
                assert torch.allclose(values, each[len(r.prompt_ids) - 1:], atol=1e-5)


def test_advantages_are_whitened_over_all_tokens_and_returns_are_not(toy):
    args = Args(gae_lambda=0.9)
    rollouts = prepare(toy, rollouts_of(), args, beta=0.0)
    flat = torch.cat([r.advantages for r in rollouts])
    assert flat.mean().item() == pytest.approx(0, abs=1e-6)
    assert flat.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    raw = []
    for r in rollouts:
        each = [0.0] * (len(r.completion.ids) - 1) + [r.reward if r.completion.finished else 0.0]
        bootstrap = 0.0 if r.completion.finished else r.values[-1].item()
        A = slow_gae(each, r.values[:-1].tolist(), bootstrap, 1.0, 0.9)
        assert r.returns.tolist() == pytest.approx([a + v for a, v in zip(A, r.values.tolist())], abs=1e-5)
        raw += A
    raw = torch.tensor(raw)
    assert torch.allclose(flat, (raw - raw.mean()) / raw.std(correction=0), atol=1e-4)


def test_kl_and_entropy_in_the_reward(toy):
    """Zero values, lambda 1: a token's return is what all later tokens are paid."""
    rollouts = rollouts_of()
    for r in rollouts:
        r.values = torch.zeros(len(r.completion.ids) + 1)
    set_advantages(rollouts, Args(gae_lambda=1.0, entropy_bonus=0.01, kl_in="reward"), 0.5, CPU)
    for r in rollouts:
        paid = -0.5 * 0.1 - 0.01 * r.old_logprobs
        expected = paid.flip(0).cumsum(0).flip(0) + (r.reward if r.completion.finished else 0.0)
        assert torch.allclose(r.returns, expected, atol=1e-5)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_micro_batches_change_nothing(toy, kl_in):
    args = Args(kl_in=kl_in, kl_estimator="k3")
    rollouts = prepare(toy, rollouts_of(), args, beta=0.1)
    sums, whole = gradients(toy, rollouts, args, beta=0.1)
    assert all(g.abs().max() > 0 for g in whole)
    n_tokens = sum(len(r.completion.ids) for r in rollouts)
    for size in (1, 25):
        again, grads = gradients(toy, rollouts, args, size, beta=0.1)
        assert_equal(grads, whole)
        assert again == pytest.approx(sums, rel=1e-5, abs=1e-6)
    halves = [gradients(toy, rollouts[i::2], args, 25, n_tokens, beta=0.1)[1] for i in (0, 1)]
    assert_equal([a + b for a, b in zip(*halves)], whole)


def test_roles_do_not_leak(toy):
    """A policy step leaves critic, reward and base as they are, bit for bit; a critic step, the policy."""
    args = Args()
    rollouts = prepare(toy, rollouts_of(), args)
    base = {name: p.detach().clone() for name, p in toy.model.named_parameters() if not p.requires_grad}
    assert len(base) > len(toy.reward_params) and not any(p.requires_grad for p in toy.reward_params)
    gradients(toy, rollouts, args)
    for stepped, kept in ((toy.params, toy.critic_params), (toy.critic_params, toy.params)):
        before, moved = [p.detach().clone() for p in kept], [p.detach().clone() for p in stepped]
        torch.optim.AdamW(stepped, lr=0.1).step()
        assert all(torch.equal(a, b) for a, b in zip(before, kept))
        assert not any(torch.equal(a, b) for a, b in zip(moved, stepped))
    assert all(torch.equal(base[name], p) for name, p in toy.model.named_parameters() if name in base)
    with use_adapter(toy.model, None):
        ids = torch.tensor(some_prompts((9,)))
        assert torch.allclose(toy.model(ids).logits, tiny_model("qwen2")(ids).logits, atol=1e-5)


def test_warm_up_trains_the_critic_alone(toy):
    args = Args()
    rollouts = prepare(toy, rollouts_of(), args)
    _, both = gradients(toy, rollouts, args)
    _, alone = gradients(toy, rollouts, args, train_policy=False)
    n = len(toy.params)
    assert not any(g.any() for g in alone[:n])
    assert_equal(alone[n:], both[n:])


def test_checkpointing_recomputes_with_the_adapter_of_the_forward(toy):
    """A critic's and a reference's pass between a policy's forward and backward changes no gradient."""
    r = rollouts_of()[1]
    ids, mask = grpo.make_batch([r.prompt_ids], [r.completion.ids], CPU)

    def grads():
        for p in toy.params + toy.critic_params:
            p.grad = None
        loss = token_logprobs(toy.model, ids, mask).sum()
        with toy.critic_on():
            values, _ = token_values(toy.model, toy.head, ids, mask)
        with use_adapter(toy.model, None), torch.no_grad():
            token_logprobs(toy.model, ids, mask)
        (loss + values.sum()).backward()
        return [p.grad.clone() for p in toy.params + toy.critic_params]

    toy.model.train()
    plain = grads()
    ppo.enable_checkpointing(toy.model)
    assert_equal(grads(), plain, 1e-6)


def unwhitened(monkeypatch):
    monkeypatch.setattr(ppo, "moments", lambda values, device: (0.0, 1.0))


def test_with_a_zero_critic_it_is_reinforce(toy, monkeypatch):
    """lambda = gamma = 1, no KL, no whitening: -mean over tokens of R grad log p; a cut-off row earns 0."""
    unwhitened(monkeypatch)
    with torch.no_grad():
        toy.head.zero_()
    args, rollouts = Args(gae_lambda=1.0), rollouts_of()
    ids = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
    for r, row in zip(rollouts, ppo.completion_logprobs(toy.model, *ids, 1.0, 10**6, CPU)):
        r.old_logprobs = row
    prepare(toy, rollouts, args)
    _, found = gradients(toy, rollouts, args)
    for p in toy.params:
        p.grad = None
    n_tokens = sum(len(r.completion.ids) for r in rollouts)
    for r in rollouts:
        ids = torch.tensor([r.prompt_ids + r.completion.ids])
        logits = toy.model(ids).logits[0, len(r.prompt_ids) - 1:-1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(r.completion.ids)[:, None])
        (-r.reward * r.completion.finished * logp.sum() / n_tokens).backward()
    assert_equal(found[:len(toy.params)], [p.grad for p in toy.params], 1e-4)


def test_with_grpos_advantages_it_is_grpo(toy):
    args, rollouts = Args(), prepare(toy, rollouts_of(), Args())
    A = grpo.group_advantages(torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
                              torch.tensor([r.group for r in rollouts]), "std").tolist()
    for r, advantage in zip(rollouts, A):
        r.advantages = torch.full((len(r.completion.ids),), advantage)
    sums, found = gradients(toy, rollouts, args)
    theirs = [grpo.Rollout(r.example, r.group, r.sample, r.prompt_ids, r.completion, advantage=advantage,
                           old_logprobs=r.old_logprobs) for r, advantage in zip(rollouts, A)]
    for p in toy.params:
        p.grad = None
    n_tokens = sum(len(r.completion.ids) for r in rollouts)
    again = grpo.accumulate_gradients(toy.model, theirs, grpo.Args(aggregation="token"), 6, n_tokens, 10**6,
                                      CPU)
    assert_equal(found[:len(toy.params)], [p.grad for p in toy.params], 1e-6)
    assert again["loss"] == pytest.approx(sums["loss"] / n_tokens, rel=1e-5)
    assert (again["clip_low"], again["clip_high"]) == (sums["clip_low"], sums["clip_high"])


def test_minibatches_hold_each_row_once_an_epoch():
    args = Args(ppo_epochs=3, minibatches=4)
    parts = list(ppo.draw_minibatches(list(range(10)), args, step=2))
    assert len(parts) == 12 and len({tuple(part) for part in parts}) == 12
    for epoch in range(3):
        assert sorted(itertools.chain(*parts[4 * epoch:4 * epoch + 4])) == list(range(10))
    assert parts == list(ppo.draw_minibatches(list(range(10)), args, step=2))
    assert [len(part) for part in ppo.draw_minibatches([1, 2], args, step=2)] == [1] * 6  # none is empty
    assert list(ppo.draw_minibatches([], args, step=2)) == []


# ---- whole runs ----

SMALL = ["--max-steps", 3, "--prompts-per-step", 6, "--minibatches", 2, "--eval-questions", 6, "--eval-every",
         2, "--train-questions", 40, "--max-new-tokens", 24, "--warmup-steps", 0,
         "--save-every", 1, "--keep", 9]


def without_times(lines):
    return [{k: v for k, v in line.items() if k != "time" and "seconds" not in k and "memory" not in k}
            for line in lines]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("ppo")
    run("--out", "a", *SMALL, "--beta", 0.05, "--kl-target", 1, cwd=path, script="ppo.py")
    return path / "a"


def test_the_first_step(small):
    first, *_, last = [line for line in curves.read_metrics(small) if "loss" in line]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["value"] == 0 and first["beta"] == 0.05
    assert first["clip_first"] == 0 and first["sampler_gap"] < 1e-5 and first["updates"] == 4
    assert first["explained_variance"] == pytest.approx(0)  # a zero critic explains nothing
    assert last["beta"] == pytest.approx(0.05 * 0.98**2) and last["value"] != 0  # KL far below its target
    assert all(math.isfinite(line[name]) for line in (first, last)
               for name in ("value_loss", "value_clip", "approx_kl", "entropy", "critic_grad_norm"))


def test_logged_means_are_those_of_the_samples(small):
    """Recomputed from samples.csv: reward, its parts, correct, length, entropy."""
    from common.tables import read_csv

    rows = read_csv(small / "samples.csv")
    for line in curves.read_metrics(small):
        mine = [row for row in rows if int(row["step"]) == line["step"]] if "loss" in line else []
        if mine:
            for name in ("reward", "reward/correctness", "reward/format", "correct", "tokens"):
                mean = sum(float(row[name]) for row in mine) / len(mine)
                assert line[name] == pytest.approx(mean, rel=1e-6)
            entropy = -sum(float(r["logprob"]) for r in mine) / sum(int(r["tokens"]) for r in mine)
            assert line["entropy"] == pytest.approx(entropy, rel=1e-6)


def test_killed_and_resumed_is_the_same_bit_for_bit(small, go, tmp_path):
    """kill -9 after the first checkpoint; both optimizers and the adaptive coefficient go on."""
    process = go("cut", *map(str, SMALL), script="ppo.py", bare=True, wait=False, beta=0.05, kl_target=1)
    wait_for((tmp_path / "cut/checkpoints/step-1/state.json").exists, process.said)
    process.kill()
    assert not (tmp_path / "cut" / "final").exists()
    go("cut", script="ppo.py", bare=True, resume=True)
    assert without_times(curves.read_metrics(tmp_path / "cut")) == without_times(curves.read_metrics(small))
    ours, theirs = (folder / "final" / "adapter_model.safetensors" for folder in (tmp_path / "cut", small))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (torch.load(folder / "checkpoints/step-3/training.pt", weights_only=True)
                    for folder in (tmp_path / "cut", small))
    assert ours["beta"] == theirs["beta"]
    assert all(torch.equal(a, b) for a, b in zip(ours["critic"], theirs["critic"], strict=True))


@pytest.mark.parametrize("more", [
    ["--full", "--beta", 0.1], ["--gradient-checkpointing"], ["--recompute-old"], ["--critic-warmup", 1],
    ["--target-kl", 1e-9, "--beta", 0.1, "--kl-in", "loss", "--kl-estimator", "k3"],
    ["--num-generations", 2, "--merge"]])
def test_switches_run(more, tmp_path):
    run("--out", "r", *SMALL, "--max-steps", 2, *more, cwd=tmp_path, script="ppo.py")
    lines = [line for line in curves.read_metrics(tmp_path / "r") if "loss" in line]
    assert len(lines) == 2 and all(math.isfinite(line["value_loss"]) for line in lines)
    if "--target-kl" in more:
        assert lines[0]["updates"] == 1  # the second would have moved further than allowed
    if "--critic-warmup" in more:
        assert lines[0]["approx_kl"] < 1e-8 < lines[1]["approx_kl"]


@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]])
def test_a_reward_model_shares_the_base(more, tmp_path):
    """Its scores are those of the model loaded apart, whatever the policy's adapter is."""
    run("--out", "rm", "--max-steps", 2, "--train-pairs", 40, "--eval-pairs", 10, "--pairs-per-step", 4,
        cwd=tmp_path, script="reward_model.py")
    args = Args()
    model = models.load_model("", torch.float32, CPU)
    shared = ppo.shared_reward(str(tmp_path / "rm"), "reward", args, model, CPU)
    params = add_lora(model, "policy", 4, 8, models.PROJECTIONS)
    with torch.no_grad():
        for p in params:
            p.add_(0.1)
    assert shared.model is model
    alone = rewards.LearnedReward(str(tmp_path / "rm"), torch.float32, CPU, 100)
    texts = ["<answer>3</answer>", "<think>1+2=3</think><answer>3</answer>"]
    asked = [data.Example(0, "Compute 1+2.")] * 2
    assert shared(asked, texts) == pytest.approx(alone(asked, texts), abs=1e-4)
    assert all(not x.requires_grad for pair in adapter_tensors(model, "reward").values() for x in pair)
    run("--out", "p", "--rewards", "model:rm", *SMALL, "--max-steps", 1, "--train-layers", "2-3", *more,
        cwd=tmp_path, script="ppo.py")  # the reward's adapter stands on all four layers
    [line] = [line for line in curves.read_metrics(tmp_path / "p") if "loss" in line]
    assert line["reward"] == pytest.approx(line["reward/rm"]) and "correct" in line


def test_a_cut_off_answer_never_beats_the_same_one_finished(toy, monkeypatch):
    """With a critic that expects what is then paid: both are as good as expected."""
    unwhitened(monkeypatch)
    (done,), (cut,) = rollouts_of()[:1], rollouts_of()[:1]
    cut.completion.finished = False
    for r in (done, cut):
        r.reward, r.values = 1.0, torch.full((len(r.completion.ids) + 1,), 0.8)
    set_advantages([done], Args(), 0.0, CPU)
    set_advantages([cut], Args(), 0.0, CPU)
    assert (cut.advantages < done.advantages).all() and cut.returns[-1].item() == pytest.approx(0.8)


def test_the_critics_gradient_row_by_row(toy):
    """By autograd on half the mean of (V - return)^2, from transformers' hidden states, clip and all."""
    rollouts, args = rollouts_of(), Args(value_clip=0.1)
    prepare(toy, rollouts, args)
    rng = random.Random(3)
    for r in rollouts:  # old values elsewhere, so that the clip acts on some
        r.values = r.values + torch.tensor([rng.choice([0.0, 0.3]) for _ in r.values])
    sums, found = gradients(toy, rollouts, args)
    for p in toy.critic_params:
        p.grad = None
    n_tokens, total, held = sum(len(r.completion.ids) for r in rollouts), 0.0, 0
    for r in rollouts:
        with toy.critic_on():
            ids = torch.tensor([r.prompt_ids + r.completion.ids])
            hidden = toy.model.base_model(ids).last_hidden_state[0]
        V, first = hidden @ toy.head[0], len(r.prompt_ids) - 1
        for t, (ret, old) in enumerate(zip(r.returns, r.values[:-1])):
            value = V[first + t]
            near = old + (value - old).clamp(-0.1, 0.1)
            total = total + torch.maximum((value - ret) ** 2, (near - ret) ** 2) / 2
            held += int((near - ret) ** 2 > (value - ret) ** 2 and abs(value - old) > 0.1)
    (total / n_tokens).backward()
    assert_equal(found[len(toy.params):], [p.grad for p in toy.critic_params], 1e-4)
    assert sums["value_loss"] == pytest.approx(total.item(), rel=1e-4) and 0 < sums["value_clip"] == held


def test_approx_kl_and_the_kl_loss_by_hand(toy):
    """k3 of the old policy against the new one; the KL loss is added, not taken away."""
    args = Args(kl_in="loss", kl_estimator="k2")
    rollouts = prepare(toy, rollouts_of(), args)
    ids = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
    new = ppo.completion_logprobs(toy.model, *ids, 1.0, 10**6, CPU)
    moved = torch.cat([n - r.old_logprobs for n, r in zip(new, rollouts)])
    expected = (torch.exp(moved) - 1 - moved).sum()
    plain, _ = gradients(toy, rollouts, args)
    assert plain["approx_kl"] == pytest.approx(expected.item(), rel=1e-4)
    with_kl, _ = gradients(toy, rollouts, args, beta=0.5)
    kl = sum(((n - r.ref_logprobs) ** 2 / 2).sum() for n, r in zip(new, rollouts)).item()
    assert with_kl["loss"] - plain["loss"] == pytest.approx(0.5 * kl, rel=1e-3)


def test_each_gradient_has_a_norm_of_its_own(small, tmp_path):
    """A critic clipped to nothing leaves the policy's first step as it was."""
    run("--out", "c", *SMALL, "--max-steps", 1, "--critic-max-grad-norm", 1e-9, "--beta", 0.05, "--kl-target",
        1, cwd=tmp_path, script="ppo.py")
    ours, theirs = (load_file(folder / "checkpoints/step-1/adapter_model.safetensors")
                    for folder in (tmp_path / "c", small))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("words, parts", [
    (["--gamma", 1.5], ["--gamma 1.5"]), (["--ppo-epochs", 0], ["--ppo-epochs 0"]),
    (["--kl-target", 6], ["--kl-target 6", "--beta"]), (["--minibatches", 200], ["--minibatches 200", "128"]),
    (["--beta", 0.1, "--kl-in", "loss"], ["expected gradient of 0"]),
    (["--rewards", "model:nowhere/x/y"], ["--rewards model:nowhere"]),
    (["--max-steps", -1], ["--max-steps -1"]), (["--token-budget", -1], ["--token-budget -1"])])
def test_mistakes_are_one_line(words, parts, tmp_path):
    error = run(*words, cwd=tmp_path, script="ppo.py", fails=True)
    assert all(part in error for part in parts) and list(tmp_path.iterdir()) == []


def test_dry_run_keeps_nothing(tmp_path):
    assert "dry run: peak memory" in run("--dry-run", *SMALL, cwd=tmp_path, script="ppo.py")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["ppo.py", "grpo.py"])
def test_a_token_budget_ends_the_run(script, tmp_path):
    """With the step that reaches it; what was sampled is what samples.csv holds; resuming adds nothing."""
    from common.tables import read_csv

    small = ["--max-steps", 99, "--prompts-per-step", 4, "--num-generations", 2, "--eval-questions", 4,
             "--max-new-tokens", 24, "--token-budget", 150, "--warmup-steps", 0, "--train-questions", 40]
    run("--out", "b", *small, cwd=tmp_path, script=script)
    lines = [line for line in curves.read_metrics(tmp_path / "b") if "loss" in line]
    sampled = [line["sampled_tokens"] for line in lines]
    assert sampled[-1] >= 150 > sampled[-2] and (tmp_path / "b" / "final").exists()
    assert sampled[-1] == sum(int(row["tokens"]) for row in read_csv(tmp_path / "b" / "samples.csv"))
    run("--out", "b", "--resume", cwd=tmp_path, script=script)
    assert [line for line in curves.read_metrics(tmp_path / "b") if "loss" in line] == lines


def test_the_recipe_compares_both(tmp_path):
    """The commands that it starts, run here: four, and two when what is done already is not done again."""
    small = ["--prompts-per-step", "4", "--num-generations", "2", "--eval-questions", "8", "--max-new-tokens",
             "24", "--train-questions", "40"]
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@" END >> commands.txt\n')
    (tmp_path / "python").chmod(0o755)
    env = ENV | {"OUT": "r", "TOKENS": "150", "PYTHON": str(tmp_path / "python")}
    for started in (["grpo.py", "ppo.py", "runs.py", "runs.py"], ["runs.py", "runs.py"]):
        subprocess.run(["bash", ROOT / "sbatch" / "ppo_vs_grpo.sh", *small], env=env, cwd=tmp_path,
                       check=True, capture_output=True)
        *commands, _ = (tmp_path / "commands.txt").read_text().split("\nEND\n")
        commands = [text.split("\n") for text in commands]
        assert [Path(path).name for path, *_ in commands] == started
        said = [run(*words, cwd=tmp_path, script=Path(path).name) for path, *words in commands]
        assert "8 questions in common, 0 left out" in said[-2] and "McNemar p" in said[-2]
        (tmp_path / "commands.txt").unlink()
    assert (tmp_path / "r" / "curves.png").stat().st_size > 1000


def test_a_step_without_any_reward_goes_on(tmp_path):
    """Every call of the reward fails in the second step: nothing is trained in it, and it is said."""
    (tmp_path / "r.py").write_text(
        "calls = 0\n"
        "def f(prompts, responses, answers):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [1.0 if calls == 1 else float('nan')] * len(prompts)\n")
    out = run("--out", "n", *SMALL, "--max-steps", 2, "--rewards", "r.py:f", cwd=tmp_path, script="ppo.py")
    first, second = [line for line in curves.read_metrics(tmp_path / "n") if "loss" in line]
    assert (first["reward_failed"], second["reward_failed"]) == (0, 6) and "not a finite number" in out
    assert second["loss"] == second["grad_norm"] == 0 and (tmp_path / "n" / "final").exists()
