"""Run a script's command in this process, faster than in one of its own."""

import contextlib
import csv
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest

from common import curves, dist
from common.run import cli

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--level", "1", "--max-new-tokens", "24"]  # of a quick evaluation
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(*words, cwd, fails=False, script="eval.py", draw=False):
    """What a command prints (a signal may stop it); the one line of a mistake if it `fails`.

    draw: with the curves at the end of a run, which last longer than most runs here.
    """
    words = [str(word) for word in words]
    module, out, error = importlib.import_module(script.removesuffix(".py")), io.StringIO(), ""
    home, before = os.getcwd(), (sys.argv, {number: signal.getsignal(number)
                                            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)})
    sys.argv = [script, *words]
    try:
        os.chdir(cwd)
        with contextlib.redirect_stdout(out):
            if script == "runs.py":
                module.main(words)
            elif words and words[0] == "replay":
                module.replay_command(words[1:])
            else:
                with contextlib.nullcontext() if draw else mock.patch.object(curves, "draw"):
                    cli(module.main, module.Args)
    except SystemExit as end:
        error = "" if end.code == dist.STOPPED else str(end.code)
    finally:
        os.chdir(home)
        sys.argv = before[0]
        for number, handler in before[1].items():
            signal.signal(number, handler)
    assert bool(error) == fails, out.getvalue() + error
    assert not error or (error.startswith("error: ") and "\n" not in error)
    return error or out.getvalue()


def read(path):
    """The rows of a CSV, by the standard library alone."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A short GRPO run of the embedded model with a checkpoint after every step."""
    cwd = tmp_path_factory.mktemp("trained")
    run("--out", "grpo", "--max-steps", 3, "--save-every", 1, "--keep", 3, "--eval-questions", 20,
        "--train-questions", 50, "--prompts-per-step", 4, "--num-generations", 4, "--warmup-steps", 0,
        "--max-new-tokens", 40, cwd=cwd, script="grpo.py", draw=True)
    return cwd
