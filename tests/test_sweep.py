"""sbatch/sweep.py: what it expands, that it runs, and what it leaves alone."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def sweep(*words, cwd, **env):
    return subprocess.run([sys.executable, str(ROOT / "sbatch" / "sweep.py"), *map(str, words)], cwd=cwd,
                          capture_output=True, text=True, env=os.environ | env)


def test_it_prints_a_command_for_each_combination(tmp_path):
    done = sweep("grpo.py", "lr=1e-5,2e-5", "rewards=correctness=1 format=0.2,digit", "--dry", cwd=tmp_path)
    commands = [shlex.split(line)[2:] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and list(tmp_path.iterdir()) == [] and len(commands) == 4
    assert [words[words.index("--lr"):] for words in commands] == [
        ["--lr", lr, "--rewards", *names] for lr in ("1e-5", "2e-5")
        for names in (["correctness=1", "format=0.2"], ["digit"])]
    assert len({words[1] for words in commands}) == 4  # directories
    done = sweep("star.py", "rationalize=true,false", "--dry", cwd=tmp_path)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["--rationalize", "--no-rationalize"]


@pytest.mark.parametrize("words, complaint", [
    (["star.py", "lr"], "write name=value"), (["star.py", "lr=1,"], "write name=value"),
    (["sta.py"], "no script sta.py"), (["star.py", "lr=1", "lr=2"], "lr is there twice"),
    (["star.py", "--local", "0"], "--local 0")])
def test_mistakes(words, complaint, tmp_path):
    done = sweep(*words, cwd=tmp_path)
    assert done.returncode == 1 and complaint in done.stderr and "Traceback" not in done.stderr


def test_it_runs_here_and_goes_on(tmp_path):
    """A run that fails costs itself alone; what is finished is not made again, what was cut off goes on."""
    small = ["eval_questions=2", "train_questions=20", "questions=4", "iterations=1", "max_new_tokens=40"]
    words = ["star.py", "level=3,9", *small, "--local", 2, "--out", "s"]
    done = sweep(*words, cwd=tmp_path)
    assert done.returncode == 1 and "done" in done.stdout and "exit code 1, see s/level=9" in done.stdout
    [log] = [path for path in (tmp_path / "s").glob("level=9*.log")]
    assert "levels 1 to 8, not '9'" in log.read_text()
    [good] = [path for path in (tmp_path / "s").glob("level=3*") if path.is_dir()]
    assert (good / "final").is_dir()
    words[1] = "level=3"
    done = sweep(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")  # it is finished
    assert "--resume" in sweep(*words, "--dry", cwd=tmp_path).stdout


def test_it_sends_jobs(tmp_path):
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> sent\n')
    fake.chmod(0o755)
    done = sweep("grpo.py", "seed=0,1", "--sbatch", "--gpus=1 --time=4:00:00", "--out", "s", cwd=tmp_path,
                 PATH=f"{fake.parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    sent = (tmp_path / "sent").read_text().splitlines()
    assert sent.count("--gpus=1") == 2 and "--output=s/seed=1.log" in sent and (tmp_path / "s").is_dir()
    assert shlex.split(sent[-1])[-2:] == ["--seed", "1"]
