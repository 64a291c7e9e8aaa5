"""One run for each combination of comma-joined values: printed, run here, or sent to SLURM.

    python sbatch/sweep.py star.py lr=5e-4,1e-3 strategy=sft,dpo --dry              # four commands, printed
    python sbatch/sweep.py star.py lr=5e-4,1e-3 strategy=sft,dpo --local 2          # run here, two at a time
    ACCOUNT=my-project python sbatch/sweep.py grpo.py seed=0,1,2 --sbatch "--gpus=1"    # a job each

name=value,value stands for --name value; flags are name=true,false; a value of several words goes in quotes:
"rewards=correctness=1 format=0.2,math=1". Each run has a directory of its own under --out, named by its
values; a run that is finished is left alone, one that was cut off goes on. At the end of local runs, a table.
"""

import itertools
import shlex
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import curves


def expand(script, settings, out):
    """(directory, arguments) of each combination. Errors: ValueError for what is no name=value,... ."""
    names, choices = [], []
    for setting in settings:
        name, equals, values = setting.partition("=")
        if not equals or not all(values.split(",")):
            raise ValueError(f"{setting!r}: write name=value,value")
        names.append(name.replace("_", "-"))
        choices.append(values.split(","))
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)} is there twice")
    for values in itertools.product(*choices):
        label = "-".join(f"{name}={value}" for name, value in zip(names, values))
        folder = Path(out, "".join(c if c.isalnum() or c in "=.-" else "_" for c in label) or "run")
        words = ["--out", str(folder)]
        for name, value in zip(names, values):
            words += {"true": [f"--{name}"], "false": [f"--no-{name}"]}.get(
                value, [f"--{name}", *shlex.split(value)])
        yield folder, words


def send(script, folder, words, options, dry):
    """The run as a job, its output in FOLDER.log. Errors: CalledProcessError."""
    subprocess.run(["bash", str(ROOT / "sbatch/submit.sh"), *["--dry"] * dry, f"--job-name={folder.name}",
                    f"--output={folder}.log", *shlex.split(options), script, *words], check=True)


def run(folder, words):
    """The command with its output in FOLDER.log; "done", or how it ended."""
    if (folder / "final").exists():
        return "done"
    with open(f"{folder}.log", "a") as log:
        code = subprocess.run(words, check=False, stdout=log, stderr=subprocess.STDOUT).returncode
    state = "done" if code == 0 else f"exit code {code}, see {folder}.log"
    print(f"{folder}: {state}", flush=True)
    return state


def table(states):
    """Text, of (directory, state) of each run: last step, the steps' seconds, held-out accuracy or reward."""
    rows = [("run", "state", "step", "seconds", "result")]
    for folder, state in states:
        lines, result = curves.read_metrics(folder), "-"
        for name in ("reward", "pass@1", "eval/pass@1"):  # the last one that there is
            for line in lines:
                if line.get(name) is not None:
                    result = f"{name} {line[name]:.3g}"
        seconds = sum(line.get("seconds") or 0 for line in lines)
        rows.append((str(folder), state, str(lines[-1]["step"]) if lines else "-", f"{seconds:.0f}", result))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("script", help="sft.py, dpo.py, grpo.py, ...")
    parser.add_argument("settings", nargs="*", help="name=value,value")
    parser.add_argument("--out", default="runs/sweep")
    parser.add_argument("--local", type=int, default=1, help="runs at a time on this machine")
    parser.add_argument("--sbatch", help="send each as a job, with these options of sbatch")
    parser.add_argument("--dry", action="store_true", help="print the commands only")
    a = parser.parse_args()
    try:
        if not (ROOT / a.script).is_file():
            raise ValueError(f"no script {a.script}: {', '.join(sorted(p.name for p in ROOT.glob('*.py')))}")
        if a.local < 1:
            raise ValueError(f"--local {a.local}: must be 1 or more")
        runs = list(expand(a.script, a.settings, a.out))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if a.sbatch is not None:
        try:
            for folder, words in runs:
                if not (folder / "final").exists():
                    send(a.script, folder, words, a.sbatch, a.dry)
        except subprocess.CalledProcessError as error:  # it has said why
            sys.exit(error.returncode)
        return
    commands = [(folder, [sys.executable, str(ROOT / a.script), *words,
                          *["--resume"] * (folder / "config.json").exists()]) for folder, words in runs]
    if a.dry:
        print("\n".join(shlex.join(words) for _, words in commands))
        return
    Path(a.out).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(a.local) as pool:
        states = list(pool.map(lambda job: run(*job), commands))
    print(table([(folder, state) for (folder, _), state in zip(commands, states)]))
    sys.exit(any(state != "done" for state in states))


if __name__ == "__main__":
    main()
