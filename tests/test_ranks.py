"""1, 2 and 3 ranks make the same run: the same samples, metrics and weights, whatever the script.

The sizes are ragged: 7 rows or questions, 5 samples of each and 5 held-out questions divide neither by 2 nor
by 3, and one rank has more micro-batches than another. In the cases called idle some have no row at all.

Up to rounding: the runs compute in float64, where it decides no token (tests/float64.py), and the last test
says what float32 leaves. Ranks add up gradients in another order. An AdamW step near lr * sign(gradient) would
make a whole step of the last bit of a gradient that is nearly 0, and tell nothing. So gradients are clipped to
a norm of 1e-9: far below AdamW's eps of 1e-8, where its step is lr / eps * momentum, linear in the gradient,
and rounding stays rounding. At --lr 0.03 all weights together move by 0.003 a step.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import grpo
from common import models
from tests.processes import (
    FLOAT64,
    ROOT,
    assert_same_runs,
    column,
    distance,
    eval_lines,
    free_port,
    fresh,
    metrics,
    patched,
    rows,
    small,
    train_lines,
    weights,
    words,
)

LINEAR = {"lr": 0.03, "max_grad_norm": 1e-9, "warmup_steps": 0}
ALL = LINEAR | {"max_steps": 3, "tokens_per_batch": 61, "lora_r": 4, "system": "none"}
ASKING = {"data": "arithmetic", "level": 1, "train_questions": 40, "eval_questions": 5, "max_new_tokens": 12}
SFT = ASKING | {"batch_size": 7}
PAIRS = {"pairs": "pairs.jsonl", "pairs_per_step": 7, "eval_pairs": 5}
EMBEDDED = ASKING | {"model": "", "level": None, "max_new_tokens": 40}  # which is right now and then
DPO = EMBEDDED | {"questions": 17, "num_generations": 5, "pairs_per_step": 7, "passes": 2, "iterations": 2,
                  "max_steps": 0}
GRPO = ASKING | {"prompts_per_step": 7, "num_generations": 5, "rewards": "mark"}
PPO = GRPO | {"critic_lr": 0.03, "critic_max_grad_norm": 1e-9, "beta": 0.05, "kl_target": 1}
STAR = EMBEDDED | {"questions": 11, "num_generations": 5, "batch_size": 7, "iterations": 2, "max_steps": 0}
CURRICULUM = {"level": "3-4", "curriculum": 0.1, "curriculum_window": 5}  # the second opens after a step
ONE = {"prompts_per_step": 1, "eval_questions": 1, "rewards": "answer-prob:exp+prior"}
CASES = {  # the first word is the script
    "sft": SFT,
    "sft --full": SFT | {"full": True},
    "sft idle": SFT | {"batch_size": 2, "eval_questions": 2},
    "reward_model": PAIRS,
    "reward_model idle": PAIRS | {"pairs_per_step": 2, "eval_pairs": 2},
    "dpo": DPO | CURRICULUM,
    "dpo idle": DPO | {
        "questions": 2, "pairs_per_step": 2, "eval_questions": 1, "passes": 3, "iterations": 1},
    "grpo": GRPO | {"beta": 0.05, "eval_samples": 3, "eval_k": [1, 3]},
    "grpo curriculum": GRPO | EMBEDDED | CURRICULUM | {"rewards": "correctness"},
    "grpo dynamic sampling": GRPO | {
        "dynamic_sampling": True, "aggregation": "token", "prompts_per_step": 5, "beta": 0.05},
    "grpo several updates": GRPO | {"updates_per_batch": 2, "clip_eps_high": 1e-3, "slots": 4},
    "grpo no reward differs from step 3 on": GRPO | {
        "rewards": "rewards.py:first_two_calls", "max_steps": 4, "weight_decay": 0.1},
    "grpo idle": GRPO | ONE,
    "ppo": PPO,
    "ppo idle": PPO | ONE | {"minibatches": 1},
    "star": STAR | CURRICULUM | {"rationalize": True, "rewards": ["correctness", "answer-prob=0"]},
    "star given answers": STAR | {"strategy": "dpo", "generations": "given/samples.csv", "full": True,
                                  "epochs": 3},
    "star idle": STAR | {"questions": 2, "strategy": "reinforce", "num_generations": 5, "batch_size": 2},
}

FIRST_TWO_CALLS = """
calls = 0

def first_two_calls(prompts, responses, answers):  # then every row earns the same
    global calls
    calls += 1
    return [float(len(r)) if calls <= 2 else 1.0 for r in responses]
"""

COUNTED = """
def split_by_length(lengths, tokens_per_batch):
    batches = original(lengths, tokens_per_batch)
    with open(f"dealt-{os.environ.get('WORLD_SIZE', 1)}-{os.environ.get('RANK', 0)}.txt", "a") as file:
        print(len(batches), file=file)
    return batches

original, script.split_by_length = script.split_by_length, split_by_length
"""


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_makes_the_same_run(go, tiny, tmp_path, name):
    script = patched(tmp_path, name.split()[0], FLOAT64 + COUNTED)
    (tmp_path / "rewards.py").write_text(FIRST_TWO_CALLS)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(60):
            pair = {"prompt": f"{i}+{i % 7}?", "chosen": str(i + i % 7) * (1 + i % 5), "rejected": "no"}
            file.write(json.dumps(pair) + "\n")
    if "given" in name:
        go("given", script=patched(tmp_path, "star", FLOAT64), bare=True,
           **STAR | {"iterations": 1, "epochs": 0})
    flags = {"model": tiny} | ALL | CASES[name]
    one, *others = [go(f"r{ranks}", script=script, ranks=ranks, bare=True, **flags).folder
                    for ranks in ((1, 2, 3) if name in ("dpo", "ppo", "star") else (1, 3))]
    for other in others:
        assert_same_runs(other, one)

    # what was compared says something
    assert len(train_lines(one)) >= 3
    assert train_lines(one)[-1].get("iteration") == flags.get("iterations")
    began = load_file(tiny / "model.safetensors") if flags["model"] else load_file(
        ROOT / "common/tiny/model.safetensors")
    ended = weights(one)
    assert {tensor.dtype for tensor in ended.values()} == {torch.float64}
    moved = distance(ended, began) if "full" in flags else max(
        tensor.abs().max() for at, tensor in ended.items() if "lora_B" in at)
    assert moved > 3e-4
    for path in (one, *others):
        ranks = json.loads((path / "config.json").read_text())["world_size"]
        counts = [(tmp_path / f"dealt-{ranks}-{rank}.txt").read_text().split() for rank in range(ranks)]
        assert path.name == f"r{ranks}" and (ranks == 1 or len(set(map(tuple, counts))) > 1)
        assert "idle" not in name or ranks == 1 or "0" in counts[-1]
    if (one / "eval.csv").exists():
        for step in {line["step"] for line in eval_lines(one)}:
            greedy = [row["id"] for row in rows(one, "eval.csv", step) if row["sample"] == "0"]
            assert len(greedy) == len(set(greedy)) == flags.get("eval_questions", flags.get("eval_pairs"))
    if "curriculum" in flags:
        assert {line["level"] for line in metrics(one) if "level" in line} == {3, 4}
    if "no reward" in name:  # there is no gradient then, and AdamW's momentum and decay go on
        assert [line["rows_trained"] > 0 for line in train_lines(one)] == [True, True, False, False]
    if "answer-prob:exp+prior" in flags.get("rewards", ""):
        assert len(set(column(rows(one), "reward/answer-prob"))) > 1


@pytest.mark.parametrize("limit, all_ranks", [(7, (1, 2, 3)), (1, (1, 3))])
def test_any_number_of_ranks_gives_the_same_answers(go, tmp_path, limit, all_ranks):
    """C-30: every question is counted once, also with more ranks than questions."""
    script = patched(tmp_path, "eval", FLOAT64)
    one, *others = [go(f"r{ranks}", script=script, ranks=ranks, bare=True, limit=limit, k=[1, 2], level=1,
                       max_new_tokens=24).folder for ranks in all_ranks]
    for other in others:
        assert_same_runs(other, one)
    (line,), answers = metrics(one), rows(one)
    assert line["questions"] == limit == len({row["id"] for row in answers}) and len(answers) == 3 * limit


@pytest.mark.slow
def test_torchrun(go, tiny, tmp_path):
    """As a user starts them, with AdamW as it is, which makes of 1e-15 of a gradient near 0 1e-11 of a weight."""
    flags, script = {"eval_questions": 7, "lr": 1e-4, "beta": 0.05}, patched(tmp_path, "grpo", FLOAT64)
    one = go("one", script=script, **flags).folder
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    fresh(*torchrun, script, *words(small(tiny) | flags | {"out": "two"}), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert_same_runs(tmp_path / "two", one, to=1e-9, rest=1e-8)
    assert json.loads((tmp_path / "two/config.json").read_text())["world_size"] == 2


RECORDED = """
def row(self, step):
    return original(self, step) | {"prompt_ids": self.prompt_ids, "ids": self.completion.ids}
original, script.Rollout.row = script.Rollout.row, row
"""


@pytest.mark.parametrize("ranks, more", [
    (3, {}), (2, {"shard": True}), (3, {"shard": True, "slots": 4})])
def test_float32_differs_only_by_draws_at_a_boundary(go, tiny, tmp_path, ranks, more):
    """Every token of every rank is the one on which its draw falls in float64, to 1e-5: the distribution
    function of float32 is off by about 1e-7. Where all tokens agree, so does the rest: weights to 1e-6 (the
    step is linear, they move by 1e-3), log-probs and metrics to 1e-4.
    """
    flags = {"model": tiny, "prompts_per_step": 11, "max_steps": 1} | more
    script = patched(tmp_path, "grpo", RECORDED)
    folders = [go(name, script=script, ranks=n, bare=True, **ALL | GRPO | flags | given).folder
               for name, n, given in (("one", 1, {"shard": None}), ("split", ranks, {}))]
    model = models.load_model(str(tiny), torch.float64, torch.device("cpu"))
    for row in rows(folders[0], step=1) + rows(folders[1], step=1):
        prompt, ids = json.loads(row["prompt_ids"]), json.loads(row["ids"])
        places, tokens = torch.arange(len(ids)) + len(prompt), torch.tensor(ids)[:, None]
        draws = grpo.uniform(torch.tensor(grpo.noise_key(0, 1, int(row["group"]), int(row["sample"]))), places)
        with torch.no_grad():
            probs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].double().softmax(-1)
        above = probs.cumsum(-1).gather(1, tokens)[:, 0]
        below = above - probs.gather(1, tokens)[:, 0]
        assert (draws > below - 1e-5).all() and (draws < above + 1e-5).all()
    one, split = [[row["ids"] for row in rows(folder, step=1)] for folder in folders]
    assert len(one) == len(split) == 55 and sum(a != b for a, b in zip(one, split)) <= 3
    if one == split:
        assert_same_runs(folders[1], folders[0], to=1e-6, rest=1e-4)
