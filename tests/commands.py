"""Run a script's command in this process, faster than in one of its own."""

import contextlib
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from unittest import mock

from common import curves, dist
from common.run import cli

ROOT = Path(__file__).resolve().parents[1]
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
            if words and words[0] in ("compare", "plot", "show", "status"):
                module.command(words)
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
