"""The embedded model: small, safe, as its README describes, and its recipe runs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import data, models, rewards
from grpo import Sampler
from tests.commands import run

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "common" / "tiny"


def test_it_is_small_and_plain():
    files = [path for path in TINY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".py", ".md"}


@pytest.mark.parametrize("text", ["Compute 8+7-3.", "ṣe Ọ̀rọ̀ ሰላም 日本",
                                  "<think>1+1=2</think><answer>2</answer>", " a\n\n b\t"])
def test_tokenizer_returns_any_text(text):
    tokenizer = models.load_tokenizer("")
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_digits_stand_alone():
    tokenizer = models.load_tokenizer("")
    assert len(tokenizer("1234567890")["input_ids"]) == 10


@pytest.mark.slow
def test_the_start_is_weak_and_its_work_is_better_than_its_guesses():
    """Greedy pass@1 well below one half on held-out problems, but shown work is mostly right: room for RL."""
    tokenizer = models.load_tokenizer("")
    model = models.load_model("", torch.float32, torch.device("cpu"))
    _, questions = data.train_validation("arithmetic", n_train=1, n_validation=300)
    sampler = Sampler(model, models.stop_ids(model, tokenizer))

    def accuracy(opening):
        start = tokenizer(opening)["input_ids"] if opening else []
        prompts = [data.encode_prompt(tokenizer, e.prompt) + start for e in questions]
        texts = [opening + tokenizer.decode(c.ids, skip_special_tokens=True)
                 for (c,) in sampler.sample(prompts, [[0]] * len(prompts), 64, 0.0)]
        correct = rewards.correctness([e.prompt for e in questions], texts, [e.answer for e in questions])
        return sum(correct) / len(correct)

    assert accuracy("") < 0.5
    assert accuracy("<think>") > accuracy("") + 0.3


@pytest.mark.slow
def test_the_recipe_runs_at_small_scale(tmp_path):
    """The documented commands, with fewer steps and into a temporary folder; the loss must fall."""
    lines = re.search(r"```bash\n(.*?)```", (TINY / "README.md").read_text(), re.DOTALL)[1].splitlines()
    assert lines[0] == "python common/tiny/make_tokenizer.py"
    command = shlex.split(lines[1])
    for flag, value in (("--train-questions", "400"), ("--eval-questions", "20"), ("--max-steps", "12"),
                        ("--batch-size", "32"), ("--warmup-steps", "2"), ("--out", str(tmp_path / "run"))):
        command[command.index(flag) + 1] = value
    run(*command[2:], cwd=tmp_path, script=command[1])
    losses = [json.loads(line)["loss"]
              for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
              if '"loss"' in line]
    assert len(losses) == 12 and losses[-1] < losses[0] - 1
    saved = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {k: v.shape for k, v in saved.items()} == {
        k: v.shape for k, v in load_file(TINY / "model.safetensors").items()}


def test_make_tokenizer_writes_what_is_there(tmp_path):
    script = (TINY / "make_tokenizer.py").read_text()
    copy = tmp_path / "make_tokenizer.py"
    copy.write_text(script)
    subprocess.run([sys.executable, str(copy)], check=True, capture_output=True)
    for name in ("tokenizer.json", "config.json", "chat_template.jinja"):
        assert json_or_text(tmp_path / name) == json_or_text(TINY / name), name


def json_or_text(path):
    if path.suffix != ".json":
        return path.read_text()
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "transformers_version"}
