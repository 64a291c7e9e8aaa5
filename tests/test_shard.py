"""--shard: a model split over ranks makes the run that it makes whole on one.

In float64, and gradients are clipped so far that AdamW is linear in them: tests/test_ranks.py says why, and
tests what float32 leaves.
"""

import json

import pytest
import torch

from common import models
from tests.processes import (
    FLOAT64,
    assert_same_runs,
    distance,
    listing,
    patched,
    train_lines,
    weights,
)
from tests.tiny_models import tiny_model

ALL = {"lr": 0.03, "max_grad_norm": 1e-9, "warmup_steps": 0, "max_steps": 2, "tokens_per_batch": 83,
       "lora_r": 4, "system": "none"}
ASKING = {"data": "arithmetic", "level": 1, "train_questions": 40, "eval_questions": 5, "max_new_tokens": 24}
GRPO = ASKING | {"prompts_per_step": 5, "num_generations": 3, "rewards": "mark", "beta": 0.05}
PPO = GRPO | {"critic_lr": 0.03, "critic_max_grad_norm": 1e-9, "minibatches": 2}
SFT = ASKING | {"batch_size": 7}
EMBEDDED = ASKING | {"model": "", "level": None, "max_new_tokens": 40, "num_generations": 5}
PAIRS = {"pairs": "pairs.jsonl", "pairs_per_step": 7, "eval_pairs": 5}
CASES = {  # the first word is the script
    "grpo": GRPO | {"gradient_checkpointing": True, "train_layers": "1"},
    "grpo slots": GRPO | {"slots": 4},  # a rank that fills its slots again and again, the others have left
    "grpo --full": GRPO | {"full": True, "updates_per_batch": 2},
    "grpo idle": GRPO | {"prompts_per_step": 1, "eval_questions": 1},
    "sft --full": SFT | {"full": True, "gradient_checkpointing": True},
    "reward_model --full": PAIRS | {"full": True},
    "dpo": EMBEDDED | {"questions": 17, "pairs_per_step": 7, "passes": 2},
    "ppo --full": PPO | {"full": True},
    "star": EMBEDDED | {"questions": 9, "batch_size": 7, "iterations": 1, "rationalize": True},
}

WATCHED = """
from common import shard
def split(model, source, device):
    original(model, source, device)
    held = sum(p.to_local().numel() if shard.is_split(p) else p.numel() for p in model.parameters())
    open(f"held-{os.environ['RANK']}.txt", "w").write(f"{held} {sum(p.numel() for p in model.parameters())}")
original, shard.split = shard.split, split
"""


@pytest.fixture
def pairs(tmp_path):
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(60):
            file.write(json.dumps({"prompt": f"Compute {i}+{i % 7}.", "chosen": str(i + i % 7) * (1 + i % 5),
                                   "rejected": "no"}) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_split_over_ranks_it_makes_the_same_run(go, tiny, tmp_path, pairs, name):
    flags = {"model": tiny} | ALL | CASES[name]
    ranks = 3 if name == "grpo" else 2
    script = patched(tmp_path, name.split()[0], FLOAT64 + WATCHED)
    one = go("one", script=script, bare=True, **flags).folder
    split = go("split", script=script, ranks=ranks, shard=True, bare=True, **flags).folder
    assert_same_runs(split, one)  # the samples of both token for token
    held, of = map(int, (tmp_path / "held-0.txt").read_text().split())
    assert held / of < 1 / ranks + 0.03
    started = models.load_model(flags["model"] and str(tiny), torch.float64, torch.device("cpu"))
    ended = weights(one)
    moved = (distance({k: v for k, v in started.state_dict().items() if k in ended}, {
        k: v for k, v in ended.items() if k in started.state_dict()}) if "full" in flags else max(
        tensor.abs().max() for at, tensor in ended.items() if "lora_B" in at))
    assert len(train_lines(one)) == 2 and moved > 2e-4


@pytest.mark.parametrize("kind", ["gemma2", "qwen3"])
def test_other_families(go, tmp_path, kind):
    """Scaled embeddings, q and k norms, an lm_head of its own: the same samples."""
    model = tiny_model(kind, eos_token_id=2)
    model.save_pretrained(tmp_path / kind)
    models.load_tokenizer("").save_pretrained(tmp_path / kind)
    flags = ALL | GRPO | {"model": tmp_path / kind, "max_steps": 1, "prompts_per_step": 3}
    script = patched(tmp_path, "grpo", FLOAT64)
    one = go("one", script=script, bare=True, **flags).folder
    split = go("split", script=script, ranks=2, shard=True, bare=True, **flags).folder
    assert_same_runs(split, one)


def test_evaluation(go, tmp_path):
    flags = {"limit": 7, "k": [1, 2], "level": 1, "max_new_tokens": 24, "slots": 3}
    script = patched(tmp_path, "eval", FLOAT64)
    one = go("one", script=script, bare=True, **flags).folder
    split = go("split", script=script, ranks=2, shard=True, bare=True, **flags).folder
    assert_same_runs(split, one)


@pytest.mark.parametrize("full", [True, False])
def test_resumed_on_another_number_of_ranks(go, tiny, tmp_path, full):
    """Weights and moments that two ranks wrote, read by three; nothing in the checkpoint is pickled code."""
    flags = {"model": tiny} | ALL | GRPO | {"full": full or None, "max_steps": 4, "save_every": 2, "lr": 0.03}
    script = patched(tmp_path, "grpo", FLOAT64)
    whole = go("whole", script=script, bare=True, ranks=2, shard=True, **flags).folder
    stop = patched(tmp_path, "grpo", FLOAT64 + """
step = script.learning_rate
def learning_rate(number, args):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(number, args)
script.learning_rate = learning_rate
""")
    killed = go("killed", script=stop, ranks=2, shard=True, bare=True, fails=True, **flags).folder
    files = listing(killed / "checkpoints/step-2")
    assert ("training/shard-00001-model-00001-of-00001.safetensors" in files) == full
    go("killed", script=script, resume=True, bare=True, ranks=3)
    assert_same_runs(killed, whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_adapter_is_merged_into_what_was_split(go, tiny, tmp_path, dtype):
    """--merge: a plain model, as from one rank; bfloat16 passes the self-check, too."""
    flags = {"model": tiny, "dtype": dtype} | ALL | GRPO | {"merge": True, "max_steps": 1, "lr": 1e-3}
    script = patched(tmp_path, "grpo", FLOAT64 if dtype == "float32" else "")
    split = go("split", script=script, ranks=2, shard=True, bare=True, **flags).folder
    merged = models.load_model(str(split / "final"), torch.float32, torch.device("cpu")).state_dict()
    plain = models.load_model(str(tiny), torch.float32, torch.device("cpu")).state_dict()
    assert 0 < distance(merged, plain) < 0.05
    if dtype == "float32":
        one = go("one", script=script, bare=True, **flags).folder
        assert distance(weights(split), weights(one)) < 1e-12


def test_mistakes(go, tiny):
    assert "torchrun" in go("run", shard=True, fails=True).err


def test_a_full_run_keeps_its_shard(go):
    go("run", full=True, max_steps=1)
    again = go("run", full=True, shard=True, resume=True, bare=True, fails=True, ranks=2)
    assert "--shard is True, but the run began with False" in again.said()  # of the rank that was first
