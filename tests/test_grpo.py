"""The method of grpo.py: advantages, losses, KL, denominators. Golden values by hand, gradients against
closed forms, invariances to micro-batches, ranks and skipped rows, and toy tasks that must be learnt.

Most gradients are taken on a policy that is a table of logits: what is expected of it can be written down.
"""

import csv
import itertools
import json
import math
import multiprocessing
import random
import re
import shlex
import signal
import statistics
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from torch import nn

import grpo
from common import data, dist, models, rewards
from grpo import (
    Args,
    Completion,
    Rollout,
    Sampler,
    State,
    accumulate_gradients,
    add_lora,
    collect,
    group_advantages,
    kl_estimate,
    learning_rate,
    noise_key,
    overlong_penalty,
    policy_loss,
    row_weights,
    sample_rollouts,
    sampler_weights,
    score_rollouts,
    split_by_length,
)
from tests.tiny_models import SIZES, tiny_model

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
NAN = math.nan

# Log-probs, and so the ratios and KL made of them, are float32: 6e-8 relative for each of a few operations.
# So 1e-6 of the largest value is rounding and nothing else; 5e-6 where that is a difference of larger ones.
ROUNDING = 1e-6
SUMS = 5e-6
GOLDEN = 1e-6  # golden values have six decimals


def close(value, tolerance=GOLDEN):
    return pytest.approx(value, rel=tolerance, abs=tolerance)


def assert_close(a, b, tolerance=ROUNDING):
    """No entry further apart than `tolerance` times the largest of b."""
    assert a.shape == b.shape and torch.isfinite(a).all()
    assert (a - b).abs().max().item() <= tolerance * (b.abs().max().item() or 1.0)


# ---- what the tests are made of ----

class Table(nn.Module):
    """A policy that is a table: row s of theta [V, V] holds the logits of the token that follows token s."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta.double())
        self.head = nn.Linear(len(theta), len(theta), bias=False).double().requires_grad_(False)
        self.head.weight.copy_(torch.eye(len(theta)))
        self.config = SimpleNamespace(model_type="llama")

    def base_model(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=self.theta[input_ids])

    def get_output_embeddings(self):
        return self.head


def table_logprobs(theta, rollouts, temperature=1.0):
    """A list of [L], float64, with gradient towards theta."""
    rows = []
    for r in rollouts:
        before = (r.prompt_ids + r.completion.ids)[len(r.prompt_ids) - 1:-1]
        rows.append((theta[before] / temperature).log_softmax(-1)[range(len(before)), r.completion.ids])
    return rows


def model_logprobs(model, rollouts, temperature=1.0):
    """The same from a transformers model's own logits, each row alone."""
    rows = []
    for r in rollouts:
        ids = torch.tensor(r.prompt_ids + r.completion.ids)
        logprobs = (model(ids[None]).logits[0].double() / temperature).log_softmax(-1)
        rows.append(logprobs[range(len(r.prompt_ids) - 1, len(ids) - 1), ids[len(r.prompt_ids):]])
    return rows


def rollout(prompt_ids, ids, old=None, *, advantage=0.0, sampled=None, ref=None, group=0):
    """A Rollout of hand-made numbers; the sampler's log-probs are the old ones unless given."""
    old = [0.0] * len(ids) if old is None else [float(x) for x in old]
    completion = Completion(ids, old if sampled is None else [float(x) for x in sampled], True)
    ref = None if ref is None else torch.tensor([float(x) for x in ref])
    return Rollout(None, group, 0, prompt_ids, completion, advantage=advantage,
                   old_logprobs=torch.tensor(old), ref_logprobs=ref)


def random_rollouts(logprobs_of, vocab, lengths, spread, seed=0):
    """Rollouts of random tokens and advantages; their log-probs lie `spread` around the policy's."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(vocab, (n,), generator=generator).tolist()

    def near(values):
        return (values + spread * torch.randn(len(values), generator=generator)).tolist()

    rollouts = [rollout(tokens(1 + i % 3), tokens(n)) for i, n in enumerate(lengths)]
    with torch.no_grad():
        present = logprobs_of(rollouts)
    return [rollout(r.prompt_ids, r.completion.ids, (old := near(values)), sampled=near(torch.tensor(old)),
                    ref=near(values), advantage=torch.randn((), generator=generator).item())
            for r, values in zip(rollouts, present)]


def n_tokens(rollouts):
    return sum(len(r.completion.ids) for r in rollouts)


def gradient(model, params, rollouts, args, tokens_per_batch=10**6, of=None):
    """(gradient as one vector, sums) of accumulate_gradients; the denominators count the rollouts `of`."""
    of = rollouts if of is None else of
    for p in params:
        p.grad = None
    sums = accumulate_gradients(model, rollouts, args, len(of), n_tokens(of), tokens_per_batch, CPU)
    dist.sum_gradients(params)
    return torch.cat([p.grad.flatten() for p in params]), sums


def loss_by_hand(logprobs, rollouts, args, n_sequences, n_tokens):
    """(loss of a step, KL summed over tokens): token by token in float64, as the papers write it."""
    total, total_kl = 0.0, 0.0
    for values, r in zip(logprobs, rollouts):
        A, L, low, high = r.advantage, len(values), 1 - args.clip_eps_low, 1 + args.clip_eps_high
        log_ratios = values - r.old_logprobs.double()
        row = 0.0
        for t in range(L):
            rho = (log_ratios.mean() if args.ratio == "sequence" else log_ratios[t]).exp()
            if args.clip == "detach":
                f = -min(rho.item(), high) * A * values[t]
            else:
                J = torch.minimum(rho * A, rho.clamp(low, high) * A)
                if args.dual_clip and A < 0:
                    J = torch.maximum(J, torch.tensor(args.dual_clip * A, dtype=torch.float64))
                f = -J
            if args.beta and args.kl_in == "loss":
                d = values[t] - r.ref_logprobs[t].item()
                kl = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[args.kl_estimator]
                f, total_kl = f + args.beta * kl, total_kl + kl.item()
            weight = math.exp(r.old_logprobs[t].item() - r.completion.logprobs[t])
            cap = args.sampler_correction_cap
            if args.sampler_correction == "truncate":
                f = f * min(weight, cap)
            elif args.sampler_correction == "mask":
                f = f * (1 / cap <= weight <= cap)
            row = row + f
        total = total + row / {"sequence": n_sequences * L, "token": n_tokens,
                               "constant": n_sequences * args.max_new_tokens}[args.aggregation]
    return total, total_kl


LOSSES = [{"ratio": ratio, "clip": clip} for ratio in ("token", "sequence") for clip in ("min", "detach")]
AGGREGATIONS = ("sequence", "token", "constant")
LENGTHS = (3, 1, 6, 2, 5, 4, 1, 6, 2, 3, 5, 4)


@pytest.fixture
def theta():
    return torch.randn(7, 7, generator=torch.Generator().manual_seed(3))


# ---- advantages ----

def advantages(rewards, groups=None, scaling="std"):
    groups = [0] * len(rewards) if groups is None else groups
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return group_advantages(rewards, torch.tensor(groups, dtype=torch.int64), scaling).tolist()


def advise(rollouts, rewards, scaling="std", groups=None):
    for r, advantage in zip(rollouts, advantages(rewards, groups, scaling)):
        r.advantage = advantage


def test_advantages_golden():
    """TRAPS C0: R = (1, 0, 0, 0); the deviation divides by N - 1 and adds 1e-4."""
    assert advantages([1, 0, 0, 0]) == close([1.499700] + 3 * [-0.499900])
    assert advantages([1, 0, 0, 0], scaling="none") == close([0.75] + 3 * [-0.25])
    assert advantages([1, 0, 0, 0], scaling="loo") == close([1] + 3 * [-1 / 3])
    # far from zero E[x^2] - mean^2 loses every digit of the deviation
    for scaling in ("std", "none", "loo"):
        far = advantages([1e6 + 1, 1e6, 1e6, 1e6], scaling=scaling)
        assert far == close(advantages([1, 0, 0, 0], scaling=scaling))


@pytest.mark.parametrize("scaling", ["std", "none", "loo"])
def test_equal_rewards_have_exactly_zero_advantage(scaling):
    """The mean of equal floats need not be that float, and rounding over 1e-4 would still move weights."""
    assert sum([0.1] * 3) / 3 != 0.1
    for n in range(1, 20):
        assert advantages([0.1] * n, scaling=scaling) == [0.0] * n
        assert advantages([1e6 / 3] * n + [1, 0], [0] * n + [1, 1], scaling)[:n] == [0.0] * n


def test_a_reward_of_zero_is_a_reward():
    assert advantages([0, 0, -1, -1]) == close(advantages([1, 1, 0, 0]))
    assert advantages([0, NAN, -1]) == close(advantages([0, -1])[:1] + [0] + advantages([0, -1])[1:])


@pytest.mark.parametrize("scaling", ["std", "none", "loo"])
def test_a_nan_reward_leaves_its_group_and_nothing_else(scaling):
    whole = advantages([1, 0, 0, 1, 0, 2, 5, 2], [4, 4, 4, 4, 9, 9, 9, 9], scaling)
    with_nan = advantages([1, 0, NAN, 0, 1, 0, NAN, 2, 5, 2], [4] * 5 + [9] * 5, scaling)
    assert with_nan[2] == with_nan[6] == 0
    assert [a for i, a in enumerate(with_nan) if i not in (2, 6)] == close(whole, 1e-12)
    # a group of which one reward or none is known teaches nothing, and is no NaN either
    assert advantages([NAN, 3, NAN, NAN, NAN], [0, 0, 0, 1, 1], scaling) == [0.0] * 5
    assert advantages([], [], scaling) == []


@pytest.mark.parametrize("scaling", ["std", "none", "loo"])
def test_groups_are_integer_ids_in_any_order(scaling):
    """By the statistics module. Permuting rows permutes advantages; dropping some changes no other group."""
    rng = random.Random(0)
    for _ in range(20):
        groups = [g for g in rng.sample(range(10**12), 5) for _ in range(rng.randint(2, 6))]
        rng.shuffle(groups)
        rewards = [rng.choice([0.0, 0.5, 1.0, rng.gauss(0, 1), NAN]) for _ in groups]
        found = advantages(rewards, groups, scaling)
        for i, group in enumerate(groups):
            R = rewards[i]
            others = [rewards[j] for j in range(len(groups)) if groups[j] == group and j != i]
            others = [x for x in others if not math.isnan(x)]
            if math.isnan(R) or not {*others} - {R}:
                assert found[i] == 0
                continue
            mean, deviation = statistics.mean([*others, R]), statistics.stdev([*others, R])
            expected = {"std": (R - mean) / (deviation + 1e-4), "none": R - mean,
                        "loo": R - statistics.mean(others)}
            assert found[i] == close(expected[scaling], 1e-9)
        order = rng.sample(range(len(groups)), len(groups))
        assert advantages([rewards[i] for i in order], [groups[i] for i in order], scaling) == close(
            [found[i] for i in order], 1e-12)
        touched = groups[0]
        kept = [i for i in range(len(groups)) if groups[i] != touched or rng.random() < 0.5]
        dropped = advantages([rewards[i] for i in kept], [groups[i] for i in kept], scaling)
        assert [a for a, i in zip(dropped, kept) if groups[i] != touched] == close(
            [found[i] for i in kept if groups[i] != touched], 1e-12)


# ---- the policy term ----

TOKEN = {"ratio": "token", "clip": "min", "clip_eps_low": 0.2, "clip_eps_high": 0.2}


def one_token(rho, A, **switches):
    """(loss, d loss / d logprob, clipped low, clipped high) of one token."""
    logprobs = torch.tensor([[math.log(rho) - 1]], dtype=torch.float64, requires_grad=True)
    old, A = torch.tensor([[-1.0]]).double(), torch.tensor([float(A)]).double()
    loss, low, high = policy_loss(logprobs, old, A, torch.tensor([[True]]), **(TOKEN | switches))
    return loss.item(), torch.autograd.grad(loss.sum(), logprobs)[0].item(), low.item(), high.item()


@pytest.mark.parametrize("rho, A, dual_clip, loss, slope, low, high", [
    (1.5, -1, 0, 1.5, 1.5, False, False),
    (1.5, -1, 3, 1.5, 1.5, False, False),
    (4.0, -1, 0, 4.0, 4.0, False, False),
    (4.0, -1, 3, 3.0, 0.0, False, False),
    (0.5, -1, 0, 0.8, 0.0, True, False),
    (0.5, -1, 3, 0.8, 0.0, True, False),
    (1.5, 1, 0, -1.2, 0.0, False, True),
    (4.0, 1, 3, -1.2, 0.0, False, True),  # dual clip is for negative advantages alone
    (0.5, 1, 0, -0.5, -0.5, False, False),
    (1.1, 1, 0, -1.1, -1.1, False, False),
    (1.0, 2, 0, -2.0, -2.0, False, False),  # two equal terms: their gradient is neither halved nor doubled
    (1.0, -2, 3, 2.0, 2.0, False, False),
    (4.0, 0, 3, 0.0, 0.0, False, False)])
def test_policy_term_golden(rho, A, dual_clip, loss, slope, low, high):
    found = one_token(rho, A, dual_clip=dual_clip)
    assert found[:2] == close((loss, slope), 1e-9) and found[2:] == (low, high)


def test_lower_and_upper_clip_are_their_own_numbers():
    wide = {"clip_eps_low": 0.1, "clip_eps_high": 0.28}
    assert one_token(1.25, 1, **wide)[:2] == close((-1.25, -1.25), 1e-9)
    assert one_token(1.5, 1, **wide) == (close(-1.28, 1e-9), 0, False, True)
    assert one_token(0.85, -1, **wide) == (close(0.9, 1e-9), 0, True, False)
    assert one_token(0.95, -1, **wide)[:2] == close((0.95, 0.95), 1e-9)


def test_gspo_golden():
    """TRAPS C0: log-ratios .1, .3, -.1 make w = 1.105171 at each of the row's tokens."""
    old = torch.tensor([[-1.0, -2.0, -0.5, 7.0]])
    logprobs = (old + torch.tensor([[0.1, 0.3, -0.1, 9.0]])).requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    switches = {"ratio": "sequence", "clip": "min", "clip_eps_low": 3e-4, "clip_eps_high": 4e-4}
    loss, low, high = policy_loss(logprobs, old, torch.tensor([-2.0]), mask, **switches)
    assert loss[0].tolist() == close([2 * 1.105171] * 3 + [0])
    # each of the row's tokens moves w by a third, at three places: 2 w in all
    assert torch.autograd.grad(loss.sum(), logprobs)[0][0].tolist() == close([2 * 1.105171] * 3 + [0])
    assert not low.any() and not high.any()
    loss, low, high = policy_loss(logprobs, old, torch.tensor([2.0]), mask, **switches)
    assert loss[0].tolist() == close([-2 * 1.0004] * 3 + [0])
    assert high.tolist() == [[True, True, True, False]] and not low.any()
    assert not torch.autograd.grad(loss.sum(), logprobs)[0].any()


def test_cispo_golden():
    """-sg(min(rho, 1 + high)) A logprob: a clipped token keeps its gradient, with a capped weight."""
    cispo = {"clip": "detach", "clip_eps_high": 0.28}
    # one_token's old log-prob is -1, so that logprob = log rho - 1
    assert one_token(1.1, 2, **cispo)[:2] == close((-1.1 * 2 * (math.log(1.1) - 1), -2.2), 1e-9)
    assert one_token(3, 2, **cispo)[:2] == close((-1.28 * 2 * (math.log(3) - 1), -2.56), 1e-9)
    assert one_token(1.1, 2, **cispo)[2:] == (False, False) and one_token(3, 2, **cispo)[2:] == (False, True)
    assert one_token(3, -2, **cispo)[1] == close(2.56, 1e-9)
    assert one_token(0.1, -2, **cispo)[1:] == (close(0.2, 1e-9), False, False)  # no lower clip


@pytest.mark.parametrize("dual_clip", [0, 1.3])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_policy_term_against_finite_differences(ratio, dual_clip):
    """At rho far from 1; gradcheck's own tolerances for float64 (no value lies on a kink)."""
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    logprobs = (old + torch.randn(24, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    A = torch.randn(24, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 2] * 4)[:, None]
    switches = TOKEN | {"ratio": ratio, "dual_clip": dual_clip}
    assert all(clipped.any() for clipped in policy_loss(logprobs, old, A, mask, **switches)[1:])
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, A, mask, **switches)[0], logprobs)


@pytest.mark.parametrize("rubbish", [NAN, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("switches", LOSSES, ids=str)
def test_what_stands_outside_the_mask_changes_nothing(switches, rubbish):
    """Losses, clip marks and gradients bit for bit; nothing is written into the arguments."""
    generator = torch.Generator().manual_seed(2)
    logprobs, old, sampled = torch.randn(3, 4, 6, generator=generator)
    A = torch.tensor([1.0, -1.0, 2.0, -0.5])
    mask = torch.arange(6) < torch.tensor([6, 2, 0, 3])[:, None]

    def outcome(fill):
        tensors = [torch.where(mask, x, fill) for x in (logprobs, old, sampled)]
        kept = [x.clone() for x in tensors]
        tensors[0].requires_grad_()
        loss, low, high = policy_loss(*tensors[:2], A, mask, **(TOKEN | switches | {"dual_clip": 3.0}))
        loss = loss * sampler_weights(tensors[1], tensors[2], mask, "truncate", 2.0)
        slope, = torch.autograd.grad(loss.sum(), tensors[0])
        for x, copy in zip(tensors, kept):
            torch.testing.assert_close(x.detach(), copy, rtol=0, atol=0, equal_nan=True)
        return loss.detach(), low, high, slope

    found, expected = outcome(rubbish), outcome(0.0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(not x[~mask].any() for x in found) and found[0][mask].all()
    assert not found[0][2].any()  # a row with nothing in its mask


def test_sampler_weights_golden():
    """exp(old - sampled) is 1, 1.648721, 2.225541, .449329; a cap of 2 truncates above, masks both sides."""
    sampled = torch.tensor([[-1.0, -2.0, -3.0, -0.5, NAN]])
    old = (sampled + torch.tensor([[0, 0.5, 0.8, -0.8, 0]])).requires_grad_()
    mask = torch.tensor([[True, True, True, True, False]])
    truncated = sampler_weights(old, sampled, mask, "truncate", 2.0)
    assert truncated[0, :4].tolist() == close([1, 1.648721, 2, 0.449329])
    assert sampler_weights(old, sampled, mask, "mask", 2.0)[0, :4].tolist() == [1, 1, 0, 0]
    assert sampler_weights(old, sampled, mask, "mask", 3.0)[0, :4].tolist() == [1, 1, 1, 1]
    assert torch.isfinite(truncated).all()


# ---- KL ----

def test_kl_golden():
    """TRAPS C0: d = .5; pi = (.7, .3) against (.5, .5)."""
    d = torch.tensor([0.5])
    assert [kl_estimate(d - 2, torch.tensor([-2.0]), kind).item() for kind in ("k1", "k2", "k3")] == close(
        [0.5, 0.125, 0.106531])
    pi, ref = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.5, 0.5]).double()
    mean = {kind: (pi * kl_estimate(pi.log(), ref.log(), kind)).sum().item() for kind in ("k1", "k2", "k3")}
    assert mean == close({"k1": 0.0822829, "k2": 0.0787662, "k3": 0.0822829})
    assert (ref * kl_estimate(ref.log(), pi.log(), "k1")).sum().item() == close(0.0871767)  # the other way


def test_k3_is_never_negative():
    """Though a sum of k1 over a batch may be; in float32 the exponential rounds by half an ulp of 1."""
    d = torch.linspace(-8, 8, 100001)
    assert kl_estimate(d.double(), torch.zeros(()).double(), "k3").min() >= 0
    assert kl_estimate(d, torch.zeros(()), "k3").min() >= -6e-8
    assert kl_estimate(torch.tensor([-3.0, -0.1]), torch.tensor([-2.0, -0.3]), "k1").sum() < 0


THETA, REF = torch.tensor([0.3, -0.2, 0.5]).double(), torch.tensor([0.2, 0.5, 0.3]).double()


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("kind, expected", [
    ("k1", (0, 0, 0)), ("k2", (0.138796, -0.219580, 0.080784)), ("k3", (0.153615, -0.285522, 0.131906))])
def test_kl_as_a_loss_golden_gradients(kind, expected):
    """TRAPS C0, an enumerated softmax: 0, the gradient of KL(policy || ref), that of KL(ref || policy)."""
    theta = THETA.clone().requires_grad_()
    logprobs = theta.log_softmax(0)
    loss = (logprobs.exp().detach() * kl_estimate(logprobs, REF.log(), kind)).sum()
    assert torch.autograd.grad(loss, theta)[0].tolist() == close(expected)


def test_k1_in_the_reward_golden_gradient():
    """A = -k1 of the tokens drawn, weighted by their probabilities, pulls along KL(policy || ref)."""
    theta = THETA.clone().requires_grad_()
    logprobs = theta.log_softmax(0)[:, None]
    pi = logprobs[:, 0].exp().detach()
    k1 = kl_estimate(logprobs[:, 0].detach(), REF.log(), "k1")
    for switches in LOSSES:
        mask = torch.ones(3, 1, dtype=torch.bool)
        loss = policy_loss(logprobs, logprobs.detach(), -k1, mask, **(TOKEN | switches))[0]
        slope, = torch.autograd.grad((pi * loss[:, 0]).sum(), theta, retain_graph=True)
        assert slope.tolist() == close((0.138796, -0.219580, 0.080784))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_is_zero_with_zero_gradient_where_the_policy_is_the_reference(kind, theta):
    """The first step of every run: beta adds nothing (float32 may leave half an ulp of 1 in k3)."""
    model = Table(theta)
    rollouts = random_rollouts(lambda rows: table_logprobs(theta.double(), rows), 7, LENGTHS, 0)
    without, _ = gradient(model, [model.theta], rollouts, Args())
    with_kl, sums = gradient(model, [model.theta], rollouts, Args(beta=0.5, kl_estimator=kind))
    assert sums["kl"] == close(0, 1e-6)
    assert_close(with_kl, without)


# ---- aggregation ----

@pytest.mark.parametrize("aggregation, expected", zip(AGGREGATIONS, (0.75, 0.666667, 0.25)))
def test_aggregation_golden(aggregation, expected):
    """TRAPS C0: rows of L = 2 (f = 1) and L = 4 (f = .5), L_max 8."""
    sums = torch.tensor([2 * 1.0, 4 * 0.5])
    weights = row_weights(aggregation, torch.tensor([2, 4]), 2, 6, 8)
    assert (weights * sums).sum().item() == close(expected)
    twice = row_weights(aggregation, torch.tensor([2, 4]), 2, 6, 16)  # only Dr. GRPO knows of max_new_tokens
    assert (twice * sums).sum().item() == close(expected / (2 if aggregation == "constant" else 1))
    # rows and tokens of other micro-batches and ranks count, though they are not here
    more = row_weights(aggregation, torch.tensor([2, 4]), 6, 18, 8)
    assert (more * sums).sum().item() == close(expected / 3)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_on_policy_is_zero_only_by_sequence(aggregation, theta):
    """At rho = 1 a row's mean is -A, and z-scored advantages sum to 0; by token it is -sum L A / sum L."""
    model = Table(theta)
    rollouts = random_rollouts(lambda rows: table_logprobs(theta.double(), rows), 7, LENGTHS, 0)
    advise(rollouts, [i % 3 for i in range(len(rollouts))])
    _, sums = gradient(model, [model.theta], rollouts, Args(aggregation=aggregation, max_new_tokens=8))
    weighted = sum(len(r.completion.ids) * r.advantage for r in rollouts)
    expected = {"sequence": 0, "token": -weighted / sum(LENGTHS), "constant": -weighted / (8 * len(LENGTHS))}
    assert sums["loss"] == close(expected[aggregation], SUMS)
    assert (abs(sums["loss"]) < 1e-5) == (aggregation == "sequence")
    assert sums["clip_low"] == sums["clip_high"] == 0


# ---- gradients of the whole loss ----

@pytest.mark.parametrize("switches", LOSSES, ids=str)
def test_loss_and_gradient_under_every_switch(switches, theta):
    """accumulate_gradients against the formulas written out token by token, and the sums that are logged."""
    temperature = 0.8
    model, exact = Table(theta), theta.double().requires_grad_()

    def logprobs_of(rollouts):
        return table_logprobs(exact, rollouts, temperature)

    rollouts = random_rollouts(logprobs_of, 7, LENGTHS, 0.5)
    base = Args(**switches, max_new_tokens=8, temperature=temperature, sampler_correction_cap=1.4)
    present = torch.cat(logprobs_of(rollouts)).detach()
    gaps = (present - torch.cat([torch.tensor(r.completion.logprobs) for r in rollouts])).abs()
    for dual_clip, aggregation, kind, correction in itertools.product(
            (0, 1.3), AGGREGATIONS, (None, "k1", "k2", "k3"), ("none", "truncate", "mask")):
        args = replace(base, dual_clip=dual_clip, aggregation=aggregation, sampler_correction=correction,
                       beta=0.3 if kind else 0.0, kl_estimator=kind or "k3")
        loss, kl = loss_by_hand(logprobs_of(rollouts), rollouts, args, len(rollouts), n_tokens(rollouts))
        expected, = torch.autograd.grad(loss, exact)
        found, sums = gradient(model, [model.theta], rollouts, args, of=rollouts * 3)  # of a larger step
        assert_close(3 * found, expected.flatten(), SUMS)
        assert 3 * sums["loss"] == close(loss.item(), SUMS)
        assert sums["kl"] == close(kl, 1e-5)
        assert sums["tokens"] == n_tokens(rollouts)
        assert (sums["gap"], sums["gap_max"]) == close((gaps.sum().item(), gaps.max().item()), 1e-5)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_clip_shares_count_the_tokens_whose_gradient_is_cut_off(ratio, theta):
    exact = theta.double()
    rollouts = random_rollouts(lambda rows: table_logprobs(exact, rows), 7, LENGTHS, 0.5)
    low = high = 0
    for r, values in zip(rollouts, table_logprobs(exact, rollouts)):
        log_ratios = values - r.old_logprobs
        for x in log_ratios if ratio == "token" else log_ratios.mean().expand(len(values)):
            low += r.advantage < 0 and x.exp() < 0.9
            high += r.advantage > 0 and x.exp() > 1.3
    model = Table(theta)
    _, sums = gradient(model, [model.theta], rollouts, Args(ratio=ratio, clip_eps_low=0.1, clip_eps_high=0.3))
    assert (sums["clip_low"], sums["clip_high"]) == (low, high) and low > 0 and high > 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("switches", LOSSES, ids=str)
def test_on_policy_every_loss_has_the_policy_gradient(switches, aggregation, theta):
    """At rho = 1 it is -sum w A (onehot - p), w the weight of the row: no term is lost or counted twice."""
    model, p = Table(theta), theta.double().softmax(-1)
    rollouts = random_rollouts(lambda rows: table_logprobs(theta.double(), rows), 7, LENGTHS, 0)
    expected = torch.zeros_like(p)
    for r in rollouts:
        weight = {"sequence": 1 / (len(rollouts) * len(r.completion.ids)), "token": 1 / n_tokens(rollouts),
                  "constant": 1 / (len(rollouts) * 8)}[aggregation]
        before = r.prompt_ids[-1]
        for token in r.completion.ids:
            expected[before] -= weight * r.advantage * (torch.eye(7)[token] - p[before])
            before = token
    for dual_clip in (0, 3):
        args = Args(**switches, aggregation=aggregation, dual_clip=dual_clip, max_new_tokens=8)
        found, _ = gradient(model, [model.theta], rollouts, args)
        assert_close(found, expected.flatten())


# ---- a population: every sequence of up to two tokens, as many rows of it as its share in 100 draws ----

TENTHS = torch.tensor([[4, 3, 2, 1], [1, 4, 3, 2], [2, 1, 4, 3], [3, 2, 1, 4]])  # p(next | token) in tenths
START, STOP, LONGEST = 3, 0, 2
SEQUENCES = [[STOP]] + [[a, b] for a in (1, 2, 3) for b in range(4)]
POPULATION = [ids for ids in SEQUENCES for _ in range(
    math.prod(int(TENTHS[s, a]) for s, a in zip([START, *ids], ids)) * (10 if len(ids) == 1 else 1))]


def expected_reward(theta, reward):
    """E[R] over every sequence, a differentiable function of theta."""
    logprobs = table_logprobs(theta, [rollout([START], ids) for ids in SEQUENCES])
    return sum(values.sum().exp() * reward(ids) for ids, values in zip(SEQUENCES, logprobs))


def population(theta, ref_theta=None):
    rollouts = [rollout([START], ids) for ids in POPULATION]
    old = table_logprobs(theta, rollouts)
    ref = table_logprobs(theta if ref_theta is None else ref_theta, rollouts)
    return [rollout([START], ids, old=o, ref=q) for ids, o, q in zip(POPULATION, old, ref)]


@pytest.mark.parametrize("scaling", ["std", "none", "loo"])
@pytest.mark.parametrize("switches", LOSSES, ids=str)
def test_the_gradient_over_all_sequences_is_that_of_the_expected_reward(switches, scaling):
    """Over an exact population the baseline drops out: -grad E[R], times the group's scaling."""
    theta = (TENTHS / 10).double().log()
    rng = random.Random(0)
    rewards = {tuple(ids): rng.gauss(0, 1) for ids in SEQUENCES}
    rollouts = population(theta)
    assert len(rollouts) == 100
    R = [rewards[tuple(r.completion.ids)] for r in rollouts]
    advise(rollouts, R, scaling)
    exact = theta.clone().requires_grad_()
    expected, = torch.autograd.grad(-expected_reward(exact, lambda ids: rewards[tuple(ids)]), exact)
    expected = expected * {"std": 1 / (statistics.stdev(R) + 1e-4), "none": 1, "loo": 100 / 99}[scaling]
    model = Table(theta)
    args = Args(**switches, aggregation="constant", max_new_tokens=LONGEST)  # a sum over N * LONGEST
    found, _ = gradient(model, [model.theta], rollouts, args)
    assert expected.abs().max() > 0.05
    assert_close(LONGEST * found, expected.flatten())


REF_TENTHS = torch.tensor([[2, 2, 2, 4], [5, 1, 2, 2], [1, 3, 3, 3], [2, 5, 2, 1]])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_in_the_loss_over_all_sequences(kind):
    """In each state, as often as it is met: 0, gradient of KL(policy || ref), of KL(ref || policy)."""
    theta, ref = (TENTHS / 10).double().log(), (REF_TENTHS / 10).double()
    rollouts = population(theta, ref.log())
    visits = torch.zeros(4, dtype=torch.float64)
    for r in rollouts:
        for state in [START, *r.completion.ids][:-1]:
            visits[state] += 1 / len(rollouts)
    exact = theta.clone().requires_grad_()
    pi = exact.softmax(-1)
    by_state = {"k1": 0 * kl(pi, ref), "k2": kl(pi, ref), "k3": kl(ref, pi)}[kind]
    expected, = torch.autograd.grad((visits * by_state).sum(), exact)
    model = Table(theta)
    args = Args(aggregation="constant", max_new_tokens=LONGEST, beta=0.5, kl_estimator=kind)
    found, sums = gradient(model, [model.theta], rollouts, args)
    assert_close(LONGEST * found / 0.5, expected.flatten())
    assert (kind == "k1") == (expected.abs().max() < 0.05)
    if kind != "k2":  # whose mean is no KL
        assert sums["kl"] / len(rollouts) == close((visits * kl(theta.exp(), ref)).sum().item(), SUMS)


def test_k1_in_the_reward_over_all_sequences():
    """A row's -k1 as its reward pulls along the KL of whole sequences, the states' own change included."""
    theta, ref = (TENTHS / 10).double().log(), (REF_TENTHS / 10).double()
    rollouts = population(theta, ref.log())
    R = [-0.5 * kl_estimate(r.old_logprobs, r.ref_logprobs, "k1").sum().item() for r in rollouts]
    advise(rollouts, R, "none")
    exact = theta.clone().requires_grad_()
    sequences = [rollout([START], ids) for ids in SEQUENCES]
    kl_of_sequences = sum(values.sum().exp() * (values.sum() - q.sum()) for values, q in zip(
        table_logprobs(exact, sequences), table_logprobs(ref.log(), sequences)))
    expected, = torch.autograd.grad(kl_of_sequences, exact)
    model = Table(theta)
    found, _ = gradient(model, [model.theta], rollouts, Args(aggregation="constant", max_new_tokens=LONGEST))
    assert_close(LONGEST * found / 0.5, expected.flatten())


# ---- the names in the README ----

TABLE = (ROOT / "README.md").read_text().split("which switches are which method")[1].split("\n## ")[0]
SWITCHES = dict(re.findall(r"^\| ([^|(]+?) (?:\([^|]*\) )?\| `(--[^|]*)` \|$", TABLE, re.MULTILINE))


def readme_switches(method):
    """The Args of a row of the README's table, read by the parser that the command line has."""
    return tyro.cli(Args, args=shlex.split(SWITCHES[method]))


def inside(rho, A, low, high):
    """1 where PPO's clip leaves the gradient, else 0."""
    return float(not (A > 0 and rho > 1 + high or A < 0 and rho < 1 - low))


# d loss / d logprob of a token, from the papers, times the number of rows: A the row's advantage, rho the
# token's ratio, w their geometric mean, L the row's length, M the mean, K max_new_tokens, d = logprob - ref.
PAPERS = {
    "GRPO": lambda A, rho, w, L, M, K, d: (0.04 * (1 - math.exp(-d)) - inside(rho, A, .2, .2) * rho * A) / L,
    "Dr. GRPO": lambda A, rho, w, L, M, K, d: -inside(rho, A, .2, .2) * rho * A / K,
    "DAPO": lambda A, rho, w, L, M, K, d: -inside(rho, A, .2, .28) * rho * A / M,
    "GSPO": lambda A, rho, w, L, M, K, d: -inside(w, A, 3e-4, 4e-4) * w * A / L,
    "CISPO": lambda A, rho, w, L, M, K, d: -min(rho, 1.28) * A / M}


@pytest.mark.parametrize("method", PAPERS)
def test_the_switches_of_a_method_are_its_mathematics(method, theta):
    """The gradient under the README's switches against the method's formula, from rewards to logits."""
    args = replace(readme_switches(method), max_new_tokens=8)
    exact, spread = theta.double(), 5e-4 if method == "GSPO" else 0.5  # its clip is of another order
    rollouts = random_rollouts(lambda rows: table_logprobs(exact, rows), 7, LENGTHS, spread)
    rewards, groups = [float(i % 3) for i in range(len(rollouts))], [i // 4 for i in range(len(rollouts))]
    advise(rollouts, rewards, args.group_scaling, groups)
    expected, p, cut = torch.zeros_like(exact), exact.softmax(-1), 0
    for i, (r, values) in enumerate(zip(rollouts, table_logprobs(exact, rollouts))):
        of_group = rewards[i // 4 * 4:i // 4 * 4 + 4]
        A = rewards[i] - statistics.mean(of_group)
        A = A if method == "Dr. GRPO" else A / (statistics.stdev(of_group) + 1e-4)
        log_ratios, L = (values - r.old_logprobs).tolist(), len(values)
        w, M, before = math.exp(statistics.mean(log_ratios)), statistics.mean(LENGTHS), r.prompt_ids[-1]
        for t, token in enumerate(r.completion.ids):
            d = values[t].item() - r.ref_logprobs[t].item()
            slope = PAPERS[method](A, math.exp(log_ratios[t]), w, L, M, 8, d) / len(rollouts)
            expected[before] += slope * (torch.eye(7)[token] - p[before])
            before = token
            cut += A != 0 and slope == 0
    model = Table(theta)
    found, _ = gradient(model, [model.theta], rollouts, args)
    assert_close(found, expected.flatten(), SUMS)
    assert (cut > 0) == (method not in ("GRPO", "CISPO"))  # whose tokens all keep some gradient


def test_rloo_is_reinforce_with_a_leave_one_out_baseline(theta):
    """arXiv 2402.14740: the mean of (R - mean of the others) grad log p(whole answer), over a constant."""
    args = replace(readme_switches("RLOO"), max_new_tokens=8)
    assert (args.kl_in, args.kl_estimator, args.beta > 0) == ("reward", "k1", True)
    exact = theta.double().requires_grad_()
    rollouts = random_rollouts(lambda rows: table_logprobs(exact, rows), 7, LENGTHS, 0)
    rewards = [float(i % 3) for i in range(len(rollouts))]
    advise(rollouts, rewards, args.group_scaling)
    loss = 0
    for R, values in zip(rewards, table_logprobs(exact, rollouts)):
        baseline = (sum(rewards) - R) / (len(rewards) - 1)
        loss = loss - (R - baseline) * values.sum() / len(rewards) / 8
    expected, = torch.autograd.grad(loss, exact)
    model = Table(theta)
    found, _ = gradient(model, [model.theta], rollouts, args)
    assert_close(found, expected.flatten())


@pytest.mark.parametrize("method", SWITCHES)
def test_the_switches_of_the_table_are_accepted(method, monkeypatch):
    seen, check = [], grpo.check
    monkeypatch.setattr(grpo, "check", lambda args: seen.append(args) or check(args))
    grpo.main(replace(readme_switches(method), download_only=True, device="cpu"))
    (args,) = seen
    assert args.recompute_old == (args.ratio == "sequence" or args.sampler_correction != "none")


def test_the_switches_of_the_table_that_are_not_in_the_gradient():
    assert set(PAPERS) | {"RLOO"} <= set(SWITCHES)
    dapo = readme_switches("DAPO")
    assert dapo.dynamic_sampling and dapo.overlong_buffer > 0 and not dapo.beta
    assert readme_switches("PPO's dual clip").dual_clip == 3


# ---- the same gradient however the rows are dealt out ----

ROW_LENGTHS = (9, 1, 4, 12, 2, 7, 3, 10, 5)


@pytest.fixture(scope="module")
def rows():
    """(model, its adapter's parameters, rollouts): the adapter is past its start, the rows are off policy."""
    return dealt_rows(torch.float64)


def dealt_rows(dtype):
    torch.manual_seed(0)
    model = tiny_model("qwen2").to(dtype)
    params = add_lora(model, "policy", 4, 8, models.PROJECTIONS)
    with torch.no_grad():
        for p in params:
            p.add_(0.1 * torch.randn_like(p))
    rollouts = random_rollouts(partial(model_logprobs, model), SIZES["vocab_size"], ROW_LENGTHS, 0.3)
    for r in rollouts[2::3]:
        r.advantage = 0.0  # dead
    return model, params, rollouts


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_change_no_gradient(aggregation, kind, rows):
    """1, 2, 3 unequal ones, one a row: all equal the formula on transformers' own logits.

    In float64 but for the log-probs and the adapters' gradients: these are float32 and round.
    """
    model, params, rollouts = rows
    args = Args(aggregation=aggregation, max_new_tokens=16, beta=0.1, kl_estimator=kind)
    loss, _ = loss_by_hand(model_logprobs(model, rollouts), rollouts, args, len(rollouts), n_tokens(rollouts))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
    for size, batches in ((1000, 1), (200, 2), (60, 3), (1, len(rollouts))):
        dealt = split_by_length([len(r) for r in rollouts], size)
        assert len(dealt) == batches
        if 1 < batches < len(rollouts):  # unequal in rows and in tokens
            assert len({len(batch) for batch in dealt}) > 1
            assert len({n_tokens([rollouts[i] for i in batch]) for batch in dealt}) > 1
        found, sums = gradient(model, params, rollouts, args, size)
        assert_close(found, expected)
        assert sums["loss"] == close(loss.item(), SUMS)
    shuffled = random.Random(1).sample(rollouts, len(rollouts))
    assert_close(gradient(model, params, shuffled, args, 60)[0], expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("switches", LOSSES, ids=str)
def test_skipping_dead_rows_is_bit_equal(switches, aggregation):
    """The denominator counts them. In float32, each row in a micro-batch of its own: the same additions."""
    model, params, rollouts = dealt_rows(torch.float32)
    args = Args(**switches, aggregation=aggregation, max_new_tokens=16)
    live = [r for r in rollouts if r.advantage]
    assert 0 < len(live) < len(rollouts)
    skipped, _ = gradient(model, params, live, args, 1, of=rollouts)
    assert skipped.any() and torch.equal(skipped, gradient(model, params, rollouts, args, 1)[0])
    without, _ = gradient(model, params, live, args, 1)  # counting these alone is another rate
    assert (without - skipped).norm() > 0.1 * skipped.norm()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_skipping_dead_rows_in_padded_micro_batches(aggregation, rows):
    """Other rows beside them, other padding: 1e-6 of the largest, the rounding of the float32 gradients."""
    model, params, rollouts = rows
    args = Args(aggregation=aggregation, max_new_tokens=16)
    live = [r for r in rollouts if r.advantage]
    whole, _ = gradient(model, params, rollouts, args, 60)
    assert_close(gradient(model, params, live, args, 60, of=rollouts)[0], whole)


def test_a_step_with_no_live_row_has_a_zero_gradient(rows):
    """C-8, C-47: no rows, or rows with zero advantage: zeros, not None or NaN, and finite sums."""
    model, params, rollouts = rows
    dead = [replace(r, advantage=0.0) for r in rollouts]
    for some in ([], dead):
        for aggregation in AGGREGATIONS:
            found, sums = gradient(model, params, some, Args(aggregation=aggregation), of=dead)
            assert not found.any() and torch.isfinite(found).all()
            assert sums["loss"] == 0 and sums["tokens"] == n_tokens(some) and math.isfinite(sums["gap_max"])
    assert gradient(model, params, [], Args(), of=[])[1]["loss"] == 0


def test_rollouts_are_left_as_they_are(rows):
    """C-9: a pass that wrote into its log-probs would change the next update on the same batch."""
    model, params, rollouts = rows
    args = Args(beta=0.1, sampler_correction="truncate", updates_per_batch=2)

    def content():
        return [(list(r.completion.ids), list(r.completion.logprobs), r.old_logprobs.tolist(),
                 r.ref_logprobs.tolist(), r.advantage) for r in rollouts]

    before = content()
    first, _ = gradient(model, params, rollouts, args, 26)
    assert content() == before
    assert torch.equal(gradient(model, params, rollouts, args, 26)[0], first)


# ---- two processes ----

DEALS = {"by turns": lambda i: i % 2, "two rows and seven": lambda i: int(i > 1), "all on one": lambda i: 0}


def rank_step(rollouts, args, model, params):
    """What a rank does with its rows between the advantages and the optimizer: grpo.main's "update"."""
    counts = dist.sum_dict({"sequences": len(rollouts), "tokens": n_tokens(rollouts)}, CPU)
    for p in params:
        p.grad = None
    live = [r for r in rollouts if r.advantage or args.beta]
    sums = accumulate_gradients(model, live, args, counts["sequences"], counts["tokens"], 26, CPU)
    dist.sum_gradients(params)
    sums = dist.sum_dict({name: value for name, value in sums.items() if name != "gap_max"}, CPU)
    found = torch.cat([p.grad.flatten() for p in params])
    norm = nn.utils.clip_grad_norm_(params, 1e-3).item()
    return found, sums, norm, torch.cat([p.grad.flatten() for p in params])


def rank_main(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model, params, rollouts = dealt_rows(torch.float64)
    done = {}
    for (name, owner), aggregation, beta in itertools.product(DEALS.items(), AGGREGATIONS, (0.0, 0.1)):
        mine = [r for i, r in enumerate(rollouts) if owner(i) == rank]
        args = Args(aggregation=aggregation, beta=beta, max_new_tokens=16)
        done[name, aggregation, beta] = rank_step(mine, args, model, params)
    torch.save(done, f"{folder}/rank-{rank}.pt")
    dist.finish()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo", "tests.tiny_models"])  # torch and transformers are imported once
    processes = [context.Process(target=rank_main, args=(rank, folder), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, "a rank failed, or hung in a collective that the other never joined"
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("deal", DEALS)
def test_two_ranks_have_the_gradient_of_one(deal, two_ranks, rows):
    """C-11: ranks with different numbers of rows and tokens, one with none. Rounding as for micro-batches."""
    model, params, rollouts = rows
    tokens = [n_tokens([r for i, r in enumerate(rollouts) if DEALS[deal](i) == rank]) for rank in range(2)]
    assert tokens[0] != tokens[1]
    for aggregation, beta in itertools.product(AGGREGATIONS, (0.0, 0.1)):
        args = Args(aggregation=aggregation, beta=beta, max_new_tokens=16)
        (found, sums, norm, cut), other = (of_rank[deal, aggregation, beta] for of_rank in two_ranks)
        assert torch.equal(found, other[0]) and (sums, norm) == other[1:3] and torch.equal(cut, other[3])
        logprobs = model_logprobs(model, rollouts)
        loss, kl = loss_by_hand(logprobs, rollouts, args, len(rollouts), n_tokens(rollouts))
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
        assert_close(found, expected)
        assert norm == close(expected.norm().item(), SUMS)  # of the whole step, before the clip
        assert_close(cut, found * 1e-3 / norm, SUMS)  # torch divides by the norm + 1e-6
        one = rank_step(rollouts, args, model, params)
        assert_close(found, one[0])
        assert sums == close(one[1], SUMS)
        assert (sums["kl"], sums["loss"]) == close((kl, loss.item()), SUMS)
        assert sums["tokens"] == n_tokens([r for r in rollouts if r.advantage or beta])


# ---- grpo.main, looked at from inside ----

@pytest.fixture
def steps_of(monkeypatch, tmp_path):
    """steps_of(reward, counted, **flags) runs grpo.main on the embedded model with reward(rollout).

    Returns one entry per update (the rows trained, the counts, all rollouts of the step; loss and gradient's
    norm by hand of those with counted(rollout)), and the training lines of metrics.jsonl.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]

    def steps_of(reward, counted, **flags):
        sampled, updates, real = [], [], grpo.accumulate_gradients

        def score(rollouts, functions, args, run):
            for r in rollouts:
                r.rewards = {"toy": reward(r)} if functions else {}
                r.reward = sum(r.rewards.values())
            if functions:
                sampled[:] = rollouts

        def spy(model, live, args, n_sequences, n_tokens, **rest):
            params = [p for p in model.parameters() if p.requires_grad]
            of = [r for r in sampled if counted(r)]
            with torch.enable_grad():
                logprobs = model_logprobs(model, of, args.temperature)
                loss, _ = loss_by_hand(logprobs, of, args, n_sequences, n_tokens)
                norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]).norm().item()
            updates.append(SimpleNamespace(live=list(live), sampled=list(sampled), n_sequences=n_sequences,
                                           n_tokens=n_tokens, loss=loss.item(), norm=norm))
            return real(model, live, args, n_sequences, n_tokens, **rest)

        monkeypatch.setattr(grpo, "score_rollouts", score)
        monkeypatch.setattr(grpo, "accumulate_gradients", spy)
        small = {"out": str(tmp_path / "run"), "device": "cpu", "level": "1", "rewards": ("mark=1",),
                 "lora_r": 4, "train_questions": 20, "eval_questions": 2, "prompts_per_step": 4,
                 "num_generations": 5, "max_new_tokens": 5, "max_steps": 2, "warmup_steps": 0,
                 "temperature": 1.6}
        grpo.main(Args(**(small | flags)))
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        return updates, [line for line in lines if "grad_norm" in line]

    yield steps_of
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def toy_reward(r):
    """Group 0 is dead, one row of group 1 has no reward, group 3 has one reward only."""
    one, only = NAN if r.sample == 2 else r.sample % 2, NAN if r.sample else 1.0
    return {0: 1.0, 1: one, 2: r.sample, 3: only}[r.group]


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_which_rows_reach_the_trainer_and_which_count(mask_truncated, steps_of):
    """NaN rows do neither, dead ones count, truncated too unless masked; they stay in the group's mean."""
    def counted(r):
        return not math.isnan(r.reward) and (r.completion.finished or not mask_truncated)

    updates, lines = steps_of(toy_reward, counted, mask_truncated=mask_truncated)
    assert len(updates) == 2
    for update, line in zip(updates, lines):
        assert len(update.sampled) == 20
        expected = advantages([r.reward for r in update.sampled], [r.group for r in update.sampled])
        assert [r.advantage for r in update.sampled] == close(expected, 1e-12)
        of = [r for r in update.sampled if counted(r)]
        assert (update.n_sequences, update.n_tokens) == (len(of), n_tokens(of))
        live = [(r.group, r.sample) for r in update.live]
        assert live == [(r.group, r.sample) for r in of if r.group in (1, 2) and r.advantage]
        assert (2, 2) not in live and 0 < len(live) < len(of)  # its reward is the mean: nothing to learn
        assert line["reward_failed"] == 5 and line["rows_trained"] == len(live)
    kinds = {r.completion.finished for update in updates for r in update.sampled if r.advantage}
    assert kinds == {True, False}


@pytest.mark.parametrize("flags", [{}, {"aggregation": "token", "beta": 0.1, "updates_per_batch": 2}],
                         ids=["plain", "token, beta, 2 updates"])
def test_the_norm_that_is_logged_and_clipped_is_that_of_the_whole_step(flags, steps_of):
    """C-52: over all micro-batches, before the clip; against transformers' logits, all in float32: 1e-4."""
    updates, lines = steps_of(toy_reward, lambda r: not math.isnan(r.reward), tokens_per_batch=60,
                              max_grad_norm=1e-3, **flags)
    per_step = flags.get("updates_per_batch", 1)
    assert len(updates) == 2 * per_step and len(lines) == 2
    for i, line in enumerate(lines):
        first, last = updates[i * per_step], updates[(i + 1) * per_step - 1]
        assert line["grad_norm"] == pytest.approx(last.norm, rel=1e-4) and last.norm > 1e-2
        assert line["loss"] == pytest.approx(first.loss, abs=1e-5)
        assert line["clip_low"] == line["clip_high"] == 0  # first update: on policy
        assert line["sampler_gap/max"] < 1e-4


# ---- questions, groups and further draws ----

@pytest.fixture(scope="module")
def toy():
    """(sampler, 10 questions of one and the same text, their prompt ids): 16 tokens, of which 1 stops."""
    sampler = Sampler(tiny_model("qwen2", vocab_size=16), {1}, 64)
    examples = [data.Example(id, "the same question") for id in range(10)]
    return sampler, examples, {e.id: [3, 5, 7] for e in examples}


RUN = SimpleNamespace(device=CPU, counter=lambda doing: None, phase=lambda name: nullcontext())


class TEXT:
    """A tokenizer."""

    decode = staticmethod(lambda ids: "")
    bos_token_id, eos_token_id, pad_token_id = None, 2, 0



def test_identical_prompts_stay_groups_of_their_own(toy, float64):
    """C-15, C-43: grouped by number, not by text, with noise of their own; any row can be replayed alone."""
    _, examples, prompt_ids = toy
    sampler = Sampler(tiny_model("qwen2", vocab_size=16), {1}, 64)
    args = Args(num_generations=4, max_new_tokens=12, seed=5)
    questions = [(0, examples[6]), (1, examples[2]), (4, examples[9])]
    rollouts = sample_rollouts(sampler, questions, prompt_ids, args, 3, TEXT, RUN)
    expected = [(group, sample, e.id) for group, e in questions for sample in range(4)]
    assert [(r.group, r.sample, r.example.id) for r in rollouts] == expected
    assert len({tuple(r.completion.ids) for r in rollouts}) == len(rollouts)
    for r in rollouts:
        alone = sampler.sample([r.prompt_ids], [[noise_key(5, 3, r.group, r.sample)]], 12)[0][0]
        assert alone.ids == r.completion.ids
    rewards = [float(r.group == 1 and r.sample > 0) for r in rollouts]
    advise(rollouts, rewards, "none", [r.group for r in rollouts])
    assert [r.advantage for r in rollouts] == close([0] * 4 + [-0.75, 0.25, 0.25, 0.25] + [0] * 4)


@pytest.mark.parametrize("mixed, drawn, trained", [
    ({0, 1, 2}, 3, {0, 1, 2}),
    ({1, 3, 5}, 6, {1, 3, 5}),
    ({1, 3, 4, 5, 7}, 6, {1, 3, 4}),  # more than asked for: the first, in the order of the questions
    ({2, 8}, 9, {2, 8}),  # the cap: 3 and two further draws of 3
    (set(), 9, set())])
@pytest.mark.parametrize("correctness", [False, True])
def test_dynamic_sampling_draws_until_groups_differ_or_the_cap(mixed, drawn, trained, correctness, toy,
                                                               monkeypatch):
    """With a reward of that name, right and wrong count (0 < correct < G), not what else the rewards say."""
    sampler, examples, prompt_ids = toy

    def score(rollouts, functions, args, run):
        for r in rollouts:
            r.reward = NAN if r.sample == 3 else float(r.group in mixed and r.sample > 0)
            if correctness:
                r.rewards = {"correctness": r.reward}
                r.reward += 0.1 * r.sample

    monkeypatch.setattr(grpo, "score_rollouts", score)
    args = Args(prompts_per_step=3, num_generations=4, max_new_tokens=4, dynamic_sampling=True, max_refills=2)
    state = State(step=1, position=6)
    rollouts, groups = collect(sampler, examples, prompt_ids, [], args, state, TEXT, RUN)
    assert (state.position, groups) == (6 + drawn, trained)
    assert [(r.group, r.sample) for r in rollouts] == [(g, s) for g in range(drawn) for s in range(4)]
    order = data.batch_indices(len(examples), 6, drawn, args.seed)
    assert [r.example.id for r in rollouts[::4]] == [examples[i].id for i in order]
    args = replace(args, dynamic_sampling=False)
    state = State(step=1, position=6)
    rollouts, groups = collect(sampler, examples, prompt_ids, [], args, state, TEXT, RUN)
    assert (len(rollouts), groups, state.position) == (12, {0, 1, 2}, 9)


def test_samples_csv_keeps_what_the_answer_check_needs(tmp_path):
    """A countdown row read back is a countdown example: its expression is checked, not its text."""
    (example, *_) = data.load_examples("countdown", limit=1)
    row = Rollout(example, 0, 0, [], Completion([1], [0.0], True), response=example.completion).row(1)
    with open(tmp_path / "samples.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    (again,) = data.load_examples(tmp_path / "samples.csv")
    assert (again.task, again.meta, again.level) == (example.task, example.meta, example.level)
    assert rewards.correctness([""], [again.completion], [again.answer], [again.task], [again.meta]) == [1.0]


def test_the_letter_of_a_choice_is_extracted():
    example = data.Example(0, "A) 1\nB) 2", "B", task="choice")
    r = Rollout(example, 0, 0, [], Completion([1], [0.0], True), response="So only option (B) is left.")
    assert r.row(1)["extracted"] == "B"


def test_rewards_are_given_the_ids():
    seen = []
    spy = rewards.RewardFunction("spy", 1.0, lambda *lists, ids, **_: seen.extend(ids) or [0.0] * len(ids))
    rollouts = [Rollout(data.Example(7 + i, "?"), i, 0, [], Completion([], [], False)) for i in range(3)]
    score_rollouts(rollouts, [spy], Args(), RUN)
    assert seen == [7, 8, 9]


# ---- learning ----

LEARNERS = {"GRPO": {"beta": 0.01}, "Dr. GRPO": {"group_scaling": "none", "aggregation": "constant"},
            "DAPO": {"aggregation": "token", "clip_eps_high": 0.28},
            "GSPO": {"ratio": "sequence", "clip_eps_low": 3e-4, "clip_eps_high": 4e-4},
            "CISPO": {"clip": "detach", "aggregation": "token"}, "RLOO": {"group_scaling": "loo"},
            "the reward's own KL": {"kl_in": "reward", "beta": 0.01, "kl_estimator": "k1"}}


def learn(reward, steps, lr=0.02, updates=1, longest=3, **switches):
    """The mean reward of each step, from a random model of 16 tokens (1 stops); and the last samples."""
    torch.manual_seed(0)
    model = tiny_model("qwen2", seed=1, vocab_size=16)
    params = add_lora(model, "policy", 4, 8, models.PROJECTIONS)
    optimizer, sampler = torch.optim.AdamW(params, lr=lr, weight_decay=0.0), Sampler(model, {1}, 32)
    args = Args(max_new_tokens=longest, **switches)
    prompts, means = [[2, 3, 4], [5], [6, 7], [8, 9, 10, 11]], []
    for step in range(steps):
        keys = [[noise_key(0, step, p, g) for g in range(16)] for p in range(len(prompts))]
        samples = sampler.sample(prompts, keys, args.max_new_tokens, args.temperature)
        rollouts = [
            Rollout(None, p, g, prompts[p], c, reward=reward(c), old_logprobs=torch.tensor(c.logprobs))
            for p, row in enumerate(samples) for g, c in enumerate(row)]
        means.append(statistics.mean(r.reward for r in rollouts))
        if args.beta:
            ids = [r.prompt_ids for r in rollouts], [r.completion.ids for r in rollouts]
            with grpo.use_adapter(model, None):
                ref = grpo.completion_logprobs(model, *ids, args.temperature, 400, CPU)
            for r, values in zip(rollouts, ref):
                r.ref_logprobs = values
                if args.kl_in == "reward":
                    kl = kl_estimate(r.old_logprobs, values, args.kl_estimator)
                    r.reward -= args.beta * kl.sum().item()
        advise(rollouts, [r.reward for r in rollouts], args.group_scaling, [r.group for r in rollouts])
        for update in range(updates):
            optimizer.zero_grad()
            sums = accumulate_gradients(model, rollouts, args, len(rollouts), n_tokens(rollouts), 400, CPU)
            dist.sum_gradients(params)
            if update == 0:  # C-18: on policy the ratio is the sampler's gap alone, and nothing is clipped
                assert sums["gap_max"] < 1e-4 and sums["clip_low"] == sums["clip_high"] == 0
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
    return means, rollouts


def test_stopping_at_once_is_learnt():
    """C-2: the sampled stop token is in the loss, so that a reward for it, rare at first, is followed."""
    means, rollouts = learn(lambda c: float(c.finished and len(c.ids) == 1), 30, longest=6)
    assert means[0] < 0.3 and statistics.mean(means[-5:]) > 0.95
    assert all(r.completion.ids[-1] == 1 for r in rollouts if r.completion.finished)


def test_not_stopping_is_learnt_too():
    """The other sign: stop tokens get less likely where the reward is for going on."""
    means, _ = learn(lambda c: float(not c.finished), 12, longest=6)
    assert means[0] < 0.8 and statistics.mean(means[-3:]) > 0.95


@pytest.mark.parametrize("method", LEARNERS)
def test_an_even_first_token_is_learnt(method):
    """C-12, C-14: each method raises the reward, none has a zero gradient or a wrong sign."""
    means, _ = learn(lambda c: float(c.ids[0] % 2 == 0), 18, **LEARNERS[method])
    assert means[0] < 0.75 and statistics.mean(means[-3:]) > 0.9


def test_several_updates_on_a_batch_learn_faster():
    """All updates but the first are off policy, and their gradients still lead the right way."""
    one, four = (learn(lambda c: float(c.ids[0] % 2 == 0), 10, lr=0.005, updates=n)[0] for n in (1, 4))
    assert statistics.mean(four[-3:]) > statistics.mean(one[-3:]) + 0.05


# ---- pass@k, overlong answers, packing, learning rate, weight decay ----

def test_overlong_penalty_golden():
    """DAPO: 0 up to L_max - L_cache = 16 tokens, then down to -1 at L_max = 20."""
    assert [overlong_penalty(n, 20, 4) for n in (1, 16, 17, 18, 20, 25)] == [0, 0, -0.25, -0.5, -1, -1]
    assert [overlong_penalty(n, 20, 0) for n in (1, 20, 25)] == [0, 0, 0]
    assert overlong_penalty(0, 20, 20) == 0 and overlong_penalty(5, 20, 20) == -0.25


def test_split_by_length_deals_each_row_once_within_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(0, 40))]
        budget = rng.choice([1, 10, 60, 200, 10**6])
        batches = split_by_length(lengths, budget)
        assert sorted(itertools.chain(*batches)) == list(range(len(lengths))) and all(batches)
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        # of similar length: no row of one micro-batch is longer than any of the one before
        for one, other in itertools.pairwise(batches):
            assert min(lengths[i] for i in one) >= max(lengths[i] for i in other)
    assert split_by_length([7] * 6, 14) == [[0, 1], [2, 3], [4, 5]]


def test_split_by_length_wastes_least_of_all_cuts():
    """Against every way to cut 9 sorted rows: padded tokens, and budget / 8 for each micro-batch."""
    rng = random.Random(0)

    def cost(batches, lengths, budget):
        sizes = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
        fits = all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, batches))
        return sum(sizes) + budget / 8 * len(batches) if fits else math.inf

    for budget in (30, 100, 1000, 10**5):
        lengths = [rng.randint(1, 50) for _ in range(9)]
        rows = sorted(range(9), key=lambda row: -lengths[row])
        cuts = itertools.chain(*(itertools.combinations(range(1, 9), n) for n in range(9)))
        ways = [[rows[a:b] for a, b in itertools.pairwise((0, *cut, 9))] for cut in cuts]
        assert cost(split_by_length(lengths, budget), lengths, budget) == close(min(
            cost(way, lengths, budget) for way in ways))


def test_micro_batches_of_a_step_are_few_and_little_padded():
    """16 x 8 rows of log-normal length, mean 230 behind prompts of 130 tokens, at what fits 3B on 80 GB."""
    rng, budget = random.Random(0), 10_240
    lengths = [130 + min(512, int(rng.lognormvariate(5.3, 0.5))) for _ in range(128)]
    batches = split_by_length(lengths, budget)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.08 and len(batches) <= 1 + math.ceil(sum(lengths) / budget)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_peaks_at_the_last_warm_up_step(schedule):
    """A1.26: 45 steps of warm-up of 100; the decay would reach 0 with the step after the last."""
    args = Args(lr=3e-4, warmup_steps=45, max_steps=100, lr_schedule=schedule)
    rates = [learning_rate(step, args) for step in range(1, 102)]
    assert rates[:45] == close([3e-4 * step / 45 for step in range(1, 46)], 1e-12)
    assert rates[44] == 3e-4 == max(rates)
    if schedule == "constant":
        assert set(rates[44:]) == {3e-4}
    else:
        assert all(a > b for a, b in itertools.pairwise(rates[44:])) and rates[99] > 0
        assert rates[100] == pytest.approx(0, abs=1e-18)
        assert rates[72] == pytest.approx(1.5e-4)  # step 73 lies halfway between 45 and 101
    assert learning_rate(1, replace(args, warmup_steps=0, lr_schedule="constant")) == 3e-4
    assert learning_rate(1, replace(args, warmup_steps=1)) == 3e-4


def test_weight_decay_of_a_parameter_with_zero_gradient(rows):
    """A1.26: a step without a live row shrinks it by lr * decay * theta (float32 rounds the product)."""
    params = rows[1]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = torch.optim.AdamW(copies, lr=0.01, weight_decay=0.1)
    dist.sum_gradients(copies)  # no gradient becomes zeros, else AdamW would leave the parameter out
    optimizer.step()
    for p, start in zip(copies, params):
        torch.testing.assert_close(p.data, start.data * (1 - 0.01 * 0.1), rtol=1e-6, atol=0)
        assert not torch.equal(p.data, start.data)
