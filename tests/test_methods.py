"""docs/methods.md: the calls on the page give the numbers on the page; python -m tests.test_methods prints them."""

import ast
import importlib
import re

import pytest
import torch

from common import rewards
from tests.processes import ROOT

PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
LINES = re.findall(r"^- `([^`]+)` = (.+)$", PAGE, re.MULTILINE)
MODULES = {"rewards": rewards, "torch": torch}


def value(call):
    """The result of a call as nested lists of rounded floats; nothing but literals stands in it."""
    node = ast.parse(re.sub(r"\b([TF])\b(?=[,\]])", lambda m: str(m[1] == "T"), call), mode="eval").body
    module = MODULES.get(node.func.value.id) or importlib.import_module(node.func.value.id)
    args = [ast.literal_eval(arg) for arg in node.args]
    if module is not rewards:
        args = [torch.tensor(arg, dtype=None if isinstance(first(arg), int) else torch.float64)
                if isinstance(arg, list) else arg for arg in args]
    return rounded(getattr(module, node.func.attr)(
        *args, **{keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}))


def first(nested):
    return first(nested[0]) if isinstance(nested, list) else nested


def rounded(result):
    if isinstance(result, torch.Tensor):
        return rounded(result.tolist())
    if isinstance(result, list | tuple):
        return [rounded(item) for item in result]
    return float(round(float(result), 6)) + 0.0


@pytest.mark.parametrize("call, expected", LINES)
def test_the_calls_on_the_page_give_its_numbers(call, expected):
    assert close(value(call), ast.literal_eval(expected.strip("`")))


def close(found, expected):
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return abs(found - expected) <= 1.1e-6


def test_every_loss_stands_on_the_page():
    functions = {call.partition("(")[0] for call, _ in LINES}
    assert functions >= {"reward_model.ranking_loss", "dpo.preference_loss", "grpo.policy_loss", "ppo.value_loss",
                         "grpo.group_advantages", "grpo.row_weights", "grpo.kl_estimate", "ppo.adapted_beta",
                         "ppo.generalized_advantages", "grpo.sampler_weights", "grpo.overlong_penalty"}
    losses = {match for match in re.findall(r'loss="([\w-]+)"', PAGE)}
    assert losses == {"pair", "best-of-n", "sigmoid", "robust", "ipo", "hinge", "simpo"}
    for script in ("sft", "reward_model", "dpo", "grpo", "ppo", "star", "eval"):
        assert f"`{script}.py`)" in PAGE


if __name__ == "__main__":
    print(re.sub(r"^(- `([^`]+)` = ).+$", lambda m: f"{m[1]}`{value(m[2])}`", PAGE, flags=re.MULTILINE), end="")
