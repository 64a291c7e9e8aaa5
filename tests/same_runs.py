"""Two commits make the same runs: for a refactoring. Not part of the suite, whose runs are all of one commit.

    git worktree add ../old COMMIT
    OLD=../old python -m pytest tests/same_runs.py            # metrics to 1e-6, weights to 5e-6; rows to 2e-5,
                                                              # for their log-probs are sums over the tokens
    OLD=../old EXACT=1 python -m pytest tests/same_runs.py    # to the bit

Every case of test_ranks.py on 1 and 2 ranks, of test_shard.py on 2, grpo.py under every row of the README's
table of switches, PPO with a reward model, each script stopped and resumed. Completions are equal to the
letter either way. Run it on one machine, under one ATEN_CPU_CAPABILITY.
"""

import json
import os
import shlex
from pathlib import Path

import pytest

from tests import test_ranks, test_shard
from tests.processes import ROOT, distance, rows, timeless, weights
from tests.test_grpo import SWITCHES

OLD = Path(os.environ.get("OLD", ROOT)).resolve()
METRICS, ROWS, WEIGHTS = (0.0, 0.0, 0.0) if os.environ.get("EXACT") else (1e-6, 2e-5, 5e-6)
ROUNDING = {"sampler_gap", "sampler_gap/max"}  # metrics that are nothing else
RANKS = [(name, ranks) for name in test_ranks.CASES for ranks in (1, 2)]


def assert_equal(new, old):
    for name in ("samples.csv", "eval.csv"):
        assert (new / name).exists() == (old / name).exists()
        if (new / name).exists():
            for row, other in zip(rows(new, name), rows(old, name), strict=True):
                assert near(row, other, ROWS), (row, other)
    for line, other in zip(timeless(new), timeless(old), strict=True):
        assert near(line, other), {key: (line.get(key), other.get(key)) for key in {**line, **other}
                                   if not near({key: line.get(key)}, {key: other.get(key)})}
    if (old / "final").exists():
        assert distance(weights(new), weights(old)) <= WEIGHTS


def near(line, other, tolerance=METRICS):
    """Equal text, numbers within the tolerance, of the larger of 1 and their size."""
    def same(key):
        a, b, most = line[key], other[key], ROWS if key in ROUNDING else tolerance
        try:
            return a == b or abs(float(a) - float(b)) <= most * max(1, abs(float(b)))
        except (TypeError, ValueError):
            return False

    return line.keys() == other.keys() and all(map(same, line))


@pytest.fixture
def both(go, tmp_path):
    """both(script, **flags): the run of each worktree, compared. stages: flags of one run after another."""
    (tmp_path / "rewards.py").write_text(test_ranks.FIRST_TWO_CALLS)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(60):
            pair = {"prompt": f"{i}+{i % 7}?", "chosen": str(i + i % 7) * (1 + i % 5), "rejected": "no"}
            file.write(json.dumps(pair) + "\n")

    def run(script, *more, ranks=1, stages=({},), **flags):
        folders = []
        for side, root in (("new", ROOT), ("old", OLD)):
            for i, stage in enumerate(stages):
                given = flags | stage if i == 0 else stage
                process = go(side, *more, script=root / f"{script}.py", ranks=ranks, bare=True, **given)
            folders.append(process.folder)
        assert_equal(*folders)
        return folders[0]

    return run


@pytest.mark.parametrize("name, ranks", RANKS)
def test_cases_of_the_ranks(both, go, tiny, name, ranks):
    if "given" in name:
        go("given", script="star.py", bare=True, **test_ranks.STAR | {"iterations": 1, "epochs": 0})
    both(name.split()[0], ranks=ranks, **{"model": tiny} | test_ranks.ALL | test_ranks.CASES[name])


@pytest.mark.parametrize("name", test_shard.CASES)
def test_cases_of_shard(both, tiny, name):
    both(name.split()[0], ranks=2, shard=True, **{"model": tiny} | test_shard.ALL | test_shard.CASES[name])


@pytest.mark.parametrize("method", SWITCHES)
def test_switches(both, method):
    both("grpo", *shlex.split(SWITCHES[method]), **test_ranks.EMBEDDED, prompts_per_step=4, num_generations=4,
         max_steps=2)


def test_ppo_with_a_reward_model(both, go, tiny):
    flags = {"model": tiny} | test_ranks.ALL
    reward = go("rm", script="reward_model.py", bare=True, **flags | test_ranks.PAIRS).folder
    both("ppo", **flags | test_ranks.PPO | {"rewards": f"model:{reward}"})


@pytest.mark.parametrize("name", ["sft", "reward_model", "dpo", "grpo", "ppo", "star"])
def test_stopped_and_resumed(both, tiny, name):
    flags = {"model": tiny} | test_ranks.ALL | test_ranks.CASES[name]
    both(name, stages=({"max_steps": 2, "save_every": 1}, {"resume": True, "max_steps": 3}), **flags)


@pytest.mark.parametrize("ranks", [1, 2])
def test_answers(both, ranks):
    both("eval", ranks=ranks, limit=7, k=[1, 2], level=1, max_new_tokens=24)
