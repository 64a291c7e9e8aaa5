"""Run a script's command in this process, faster than in one of its own; several ranks are processes."""

import contextlib
import importlib
import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from common import dist
from common.run import cli

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(*words, cwd, fails=False, script="eval.py", ranks=1):
    """What a command prints (a signal may stop it); the one line of a mistake if it `fails`.

    Several ranks are processes.
    """
    words = [str(word) for word in words]
    if ranks > 1:
        port = str(random.randint(20000, 40000))
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                               "--master-port", port, str(ROOT / script), *words],
                              cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
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
