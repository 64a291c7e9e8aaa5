"""Wiring: that a flag or a role reaches the weights, rows, metrics and lines of a run, by the commands alone.

Each test fails if one line of a script's main is changed, which no function's own test would see.
"""

import json
import re

import pytest
import torch

import dpo
import eval
import grpo
import ppo
import sft
import star
from common import data, models
from common.run import paired_interval
from tests.processes import column, launcher, rows, train_lines, weights

# ------------------------------------------------------------------------------------------------------------
# One step of every script, looked at from all sides

PROMPTS = ["Compute 1" + "1" * n for n in range(60)]  # each a token longer than the one before
SAMPLING = {"data": "questions.jsonl", "eval_questions": 4, "max_new_tokens": 12, "rewards": "mark=1"}
PAIRS = {"pairs": "pairs.jsonl", "pairs_per_step": 4}
ONE_STEP = {
    "grpo": SAMPLING | {"prompts_per_step": 3, "num_generations": 5},
    "ppo": SAMPLING | {"prompts_per_step": 6, "minibatches": 1, "ppo_epochs": 1},
    "ppo --full": SAMPLING | {"prompts_per_step": 6, "minibatches": 1, "ppo_epochs": 1, "full": True},
    "dpo": PAIRS | {"eval_questions": 4},
    "star": SAMPLING | {"questions": 4, "batch_size": 8, "strategy": "reinforce"},
    "sft": {"data": "questions.jsonl", "eval_questions": 4, "max_new_tokens": 12, "batch_size": 5},
    "reward_model": PAIRS}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiring")
    good, bad = "<answer>1</answer>", "<answer>2</answer>"
    lines = {"questions": [{"prompt": p, "answer": "1", "completion": good} for p in PROMPTS],
             "pairs": [{"prompt": p, "chosen": good, "rejected": bad} for p in PROMPTS]}
    for name, of in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of))
    return folder


@pytest.fixture(scope="module", params=ONE_STEP)
def one_step(request, start, tiny, texts):
    """(its name, how many tokens were the most allowed, the Process), with checkpointing and a trace."""
    name, tokenizer = request.param, models.load_tokenizer(str(tiny))
    longest = len(data.encode_prompt(tokenizer, PROMPTS[30]))
    limit = {"max_prompt_tokens": longest}
    if name in ("dpo", "sft", "reward_model"):
        completion = data.encode_completion(tokenizer, "<answer>1</answer>", tokenizer.eos_token_id)
        longest += len(completion)
        limit = {"max_tokens": longest}
    process = launcher(start, tiny, texts)(
        name, script=f"{name.split()[0]}.py", bare=True, model=tiny, max_steps=1, lora_r=4, system="none",
        profile=1, gradient_checkpointing=True, **ONE_STEP[name] | limit)
    return name, longest, process


def test_every_layer_is_computed_again_in_the_backward_pass(one_step):
    """With --gradient-checkpointing, by the trace: as many activations inside the engine as gradients."""
    events = json.loads((one_step[2].folder / "trace-1.json").read_text())["traceEvents"]

    def named(pattern):
        return [event for event in events if re.fullmatch(pattern, event.get("name", ""))]

    engine = [(e["ts"], e["ts"] + e["dur"]) for e in named("autograd::engine::evaluate_function.*")]
    again = [e for e in named("aten::silu_?") if any(a <= e["ts"] < b for a, b in engine)]
    assert len(again) == len(named("aten::silu_backward")) > 0


def test_the_betas_of_adamw(one_step):
    """Of every optimizer in the checkpoint, and by its moments: the first are (1 - beta) g and its square."""
    name, _, process = one_step
    saved = torch.load(process.folder / "checkpoints/step-1/training.pt", weights_only=True)
    optimizers = [value for value in saved.values() if isinstance(value, dict) and "param_groups" in value]
    assert len(optimizers) == (2 if name.startswith("ppo") else 1)
    betas = (0.9, 0.95) if name == "sft" else (0.9, 0.999)
    for optimizer in optimizers:
        assert [tuple(group["betas"]) for group in optimizer["param_groups"]] == [betas]
        for state in optimizer["state"].values():
            torch.testing.assert_close(state["exp_avg"] ** 2 / (1 - betas[0]) ** 2,
                                       state["exp_avg_sq"] / (1 - betas[1]), rtol=1e-3, atol=1e-30)


def test_the_longest_row_is_as_long_as_allowed(one_step):
    """Rows of each length about the limit are there; what has just that many tokens is kept."""
    _, longest, process = one_step
    [said] = re.findall(r"^data: .*up to (\d+) tokens", process.out, re.MULTILINE)
    assert int(said) == longest


def test_how_wide_an_adapter_begins(one_step):
    """A is uniform within 1 / sqrt(in), as in peft; the step has not moved it, for B began at 0."""
    name, _, process = one_step
    if name == "ppo --full":
        return
    A = {key: value for key, value in weights(process.folder).items() if "lora_A" in key}
    drawn = torch.cat([value.flatten() * value.shape[1] ** 0.5 for value in A.values()])
    assert len(A) == 14 and 0.99 < drawn.abs().max() <= 1
    assert drawn.std().item() == pytest.approx(3 ** -0.5, rel=0.05)  # of 2,048 draws: five deviations


# ------------------------------------------------------------------------------------------------------------
# Functions


@pytest.mark.parametrize("script", [grpo, ppo, dpo, star, sft, eval])
def test_the_text_of_an_answer_is_without_its_stop_token(script):
    """Whichever token stopped it; of one that was cut off all is kept but special tokens."""
    tokenizer = models.load_tokenizer("")
    ids = tokenizer("1+2=3.", add_special_tokens=False)["input_ids"]

    def text(ids, finished):
        return script.Completion(ids, [0.0] * len(ids), finished).text(tokenizer)

    assert text(ids, True) == "1+2=3" and text(ids, False) == "1+2=3."
    assert text([*ids, tokenizer.eos_token_id], True) == "1+2=3."
    assert text([*ids, tokenizer.eos_token_id], False) == "1+2=3."


def test_golden_paired_interval():
    """Differences 1, 0, 0, 0: mean 0.25, deviation 0.5, of which a half is the mean's; 1.96 of those."""
    assert paired_interval([0, 1, 0, 1], [1, 1, 0, 1]) == pytest.approx((0.25 - 0.49, 0.25 + 0.49))
    assert paired_interval([1, 0], [0, 0]) == pytest.approx((-0.5 - 0.98, -0.5 + 0.98))
    assert paired_interval([1.0], [0.0]) == (-1, -1)
