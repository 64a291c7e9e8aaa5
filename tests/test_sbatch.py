"""sbatch/: the files as they are, run by stand-ins for SLURM's commands (tests/slurm) on this machine.

The stand-in for sbatch returns when the job has ended.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common import curves, models
from tests.commands import ENV, run

ROOT = Path(__file__).resolve().parents[1]
SBATCH = ROOT / "sbatch"
TOKEN = "hf_this-must-stay-secret"

# In the place of python: what it is called with, and where.
RECORD = """#!/usr/bin/env python3
import json, os, sys
place = [os.environ.get(name) for name in ("SLURM_NODEID", "APPTAINER_CONTAINER", "PYTHONPATH")]
with open(os.environ["RECORD"], "a") as file:
    print(json.dumps([sys.argv[1:], *place]), file=file)
sys.exit(sys.argv[1].endswith(os.environ.get("FAILS", "none")))
"""

# Ends as --plan says of each start: with an exit code, or in a way of its own on SIGUSR1.
TOY = """
import os, signal, sys, time
start, plan = int(os.environ.get("SLURM_RESTART_COUNT", 0)), sys.argv[sys.argv.index("--plan") + 1].split(",")
def last_step(number, frame):
    os.makedirs("runs/toy/final")
    sys.exit(1)
handlers = {"deaf": signal.SIG_IGN, "last-step": last_step}
signal.signal(signal.SIGUSR1, handlers.get(plan[start], signal.SIG_DFL))
os.makedirs("runs/toy", exist_ok=True)
print("started", " ".join(sys.argv[1:]), flush=True)
if plan[start].isdigit():
    open("runs/toy/config.json", "w").close()
    sys.exit(int(plan[start]))
time.sleep(60)
"""


class Cluster:
    """A folder to send jobs from. `jobs`: those that have ended; `log`: all that a job has printed."""

    def __init__(self, path, env):
        self.path, self.env = path, env

    def __call__(self, *words, code=0, **env):
        """The standard output of a command of sbatch/, its errors if it fails with `code`."""
        name, *words = map(str, words)
        done = subprocess.run(["bash", SBATCH / name, *words], cwd=self.path, env=self.env | env,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr + "".join(
            path.read_text() for path in self.path.glob("logs/*"))
        return done.stdout if code == 0 else done.stderr

    @property
    def jobs(self):
        return [json.loads(line) for line in (self.path / "state/jobs.jsonl").read_text().splitlines()]

    @property
    def started(self):
        """What RECORD noted, of each start of python."""
        return [json.loads(line) for line in (self.path / "started").read_text().splitlines()]

    def log(self, id=1):
        return next(self.path.glob(f"logs/*_{id}.out")).read_text()


@pytest.fixture
def cluster(tmp_path):
    record = tmp_path / "record"
    record.write_text(RECORD)
    record.chmod(0o755)
    path = tmp_path / "a folder"  # with a space
    path.mkdir()
    commands = f"{ROOT / 'tests/slurm'}:{Path(sys.executable).parent}:{ENV['PATH']}"
    return Cluster(path, ENV | {
        "PATH": commands, "FAKE_SLURM": str(path / "state"), "ACCOUNT": "none", "HOME": str(tmp_path),
        "RECORD": str(path / "started"), "PYTHON": str(record)})


# ---- the files ----


def test_shellcheck():
    """Never skipped: requirements-dev.txt installs it, beside python."""
    files = [*SBATCH.glob("*.sh"), *SBATCH.glob("*.sbatch")]
    assert len(files) == 3
    for command, *flags in (["bash", "-n"], ["shellcheck"]):
        found = shutil.which(command, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert found, f"no {command}: pip install -r requirements-dev.txt"
        for file in files:  # bash -n reads one
            done = subprocess.run([found, *flags, file], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def test_no_account_is_refused(cluster):
    said = cluster("submit.sh", "--gpus=1", "grpo.py", code=1, ACCOUNT="")
    assert said.startswith("error: set ACCOUNT") and len(said.splitlines()) == 1
    assert cluster("submit.sh", "--gpus=1", code=1).startswith("error: no script")
    assert not list(cluster.path.iterdir())


def test_dry_prints_a_command_that_can_be_pasted(cluster):
    words = ["grpo.py", "--system", "", "--prompt-template", "a 'b' \"$c\" {prompt}", "--out", "runs/x y"]
    printed = shlex.split(
        cluster("submit.sh", "--gpus=1", "--dry", "-C", "fat", *words, ACCOUNT="a", PARTITION="p"))
    assert printed == ["sbatch", "--job-name=grpo", "--output=logs/%x_%j.out", "--account=a", "--partition=p",
                       "--gpus=1", "-C", "fat", str(SBATCH / "train.sbatch"), *words]
    assert cluster("submit.sh", "grpo.py", DRY="1").startswith("sbatch ") and not list(cluster.path.iterdir())


# ---- one file for one GPU, one node, many ----


@pytest.mark.parametrize("options, launcher", [
    (["--gpus=1"], []),
    (["--nodes=1", "--gpus-per-node=a100:8"], ["--nnodes", "1", "--nproc-per-node", "8", "--standalone"]),
    (["--nodes=2", "--gpus-per-node=4"], ["--nnodes", "2", "--nproc-per-node", "4", "--rdzv-backend", "c10d",
                                          "--rdzv-id", "1", "--rdzv-endpoint", "127.0.0.1:10001"])])
def test_layouts(cluster, options, launcher):
    words = ["--system", "", "--prompt-template", "a 'b' \"$c\" {prompt}", "--out=runs/deep/er"]
    cluster("submit.sh", *options, "grpo.py", *words)
    [job] = cluster.jobs
    assert job["states"] == ["COMPLETED"] and (cluster.path / "runs/deep").is_dir()
    assert job["options"]["signal"] == "B:USR1@300" and job["options"]["open-mode"] == "append"
    nodes = sorted(node for _, node, _, _ in cluster.started)
    assert nodes == [str(node) for node in range(int(job["options"]["nodes"]))]
    for command, *_ in cluster.started:
        at = command.index(str(ROOT / "grpo.py"))
        assert command[at + 1:] == words
        assert [word for word in command[:at] if word not in (
            "-m", "torch.distributed.run", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            "--shutdown-timeout", "270")] == launcher


def test_a_container_runs_the_same_command(cluster):
    home = cluster.path / "hub"
    for env in ({}, {"SIF": "env.sif", "HF_HOME": str(home)}):
        cluster("submit.sh", "--gpus=1", "grpo.py", "--system", "", "--out", "runs/a", **env)
    (bare, _, no_image, _), (inside, _, image, path) = cluster.started
    assert bare == inside and (no_image, image, path) == (None, "env.sif", str(ROOT))
    [image, options] = json.loads((cluster.path / "state/apptainer.json").read_text())
    assert options["--bind"].split(",") == [str(ROOT), str(cluster.path), str(home)]


def test_environments_are_activated(cluster, tmp_path):
    """A virtual environment and conda, whose own functions read variables that are not set."""
    for name in ("venv", "tools"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin/python").write_text(RECORD.replace("sys.argv[1:], *", f"{name!r}, *"))
        (tmp_path / name / "bin/python").chmod(0o755)
    (tmp_path / "venv/bin/activate").write_text(f"PATH='{tmp_path}/venv/bin':$PATH\n")
    (tmp_path / "conda").write_text(
        "#!/bin/bash\necho 'conda() { echo $NOT_SET; PATH=$HOME/$2/bin:$PATH; }'\n")
    (tmp_path / "conda").chmod(0o755)
    path = f"{tmp_path}:{cluster.env['PATH']}"
    cluster("submit.sh", "grpo.py", PYTHON="", VENV=str(tmp_path / "venv"), PATH=path)
    cluster("submit.sh", "grpo.py", PYTHON="", CONDA="tools", PATH=path)
    assert [name for name, *_ in cluster.started] == ["venv", "tools"]


def test_the_run_directory(cluster):
    """Of --out, of OUT, or named by the job, so that it is found again; runs.py compare makes none."""
    for words, env in [(["--out", "runs/a"], {"OUT": "runs/b"}), ([], {"OUT": "runs/b"}), ([], {})]:
        cluster("submit.sh", "grpo.py", *words, **env)
    cluster("submit.sh", "--gpus-per-node=8", "runs.py", "compare", "runs/a", "runs/b", OUT="runs/c")
    assert [command[1:] for command, *_ in cluster.started] == [
        ["--out", "runs/a"], ["--out", "runs/b"], ["--out", "runs/grpo-3"], ["compare", "runs/a", "runs/b"]]
    (cluster.path / "runs/a/final").mkdir(parents=True)
    (cluster.path / "runs/b").mkdir()
    (cluster.path / "runs/b/config.json").touch()
    cluster("submit.sh", "grpo.py", "--out", "runs/a")
    cluster("submit.sh", "grpo.py", "--out", "runs/b")
    cluster("submit.sh", "grpo.py", "--out", "runs/b", "--resume")
    assert "runs/a is finished" in cluster.log(5)
    assert [command[1:] for command, *_ in cluster.started[4:]] == [["--out", "runs/b", "--resume"]] * 2


def test_without_slurm_it_runs_here(cluster):
    for _ in range(2):
        cluster("train.sbatch", "grpo.py", "--seed", 1)
    assert [command for command, *_ in cluster.started] == [[str(ROOT / "grpo.py"), "--seed", "1"]] * 2
    (cluster.path / "mine.py").write_text("import sys; sys.exit(3)")  # a script of one's own
    cluster("train.sbatch", "mine.py", code=3, PYTHON=sys.executable)


# ---- the time limit ----


@pytest.mark.parametrize("plan, states, code", [
    ("75,75,0", ["REQUEUED", "REQUEUED", "COMPLETED"], 0),  # stopped and saved: it goes on
    ("3", ["FAILED"], 3),  # an error is no reason to try again
    ("75,75,75,0", ["REQUEUED", "REQUEUED", "FAILED"], 75),  # MAX_RESTARTS=2
    ("starting,0", ["REQUEUED", "COMPLETED"], 0),  # the signal found it importing, and ended it
    ("last-step", ["COMPLETED"], 0),  # it came too late to stop anything
    ("deaf", ["TIMEOUT"], -15)])
def test_what_goes_back_into_the_queue(cluster, plan, states, code):
    (cluster.path / "toy.py").write_text(TOY)
    cluster("submit.sh", "--time=0:02", "--signal=B:USR1@1", "toy.py", "--plan", plan, "--out", "runs/toy",
            PYTHON=sys.executable, MAX_RESTARTS="2", FAKE_CLOCK="started")
    [job] = cluster.jobs
    assert (job["states"], job["code"]) == (states, code)
    starts = [line for line in cluster.log().splitlines() if line.startswith("started")]
    assert len(starts) == len(states)
    assert ["--resume" in line for line in starts[1:]] == [plan[:2] == "75"] * (len(starts) - 1)
    assert ("not queued again after 2 restarts" in cluster.log()) == (code == 75)


SMALL = ["--max-steps", 6, "--prompts-per-step", 2, "--num-generations", 4, "--eval-questions", 2,
         "--train-questions", 50, "--max-new-tokens", 24, "--warmup-steps", 0]
LIMIT = ["--time=0:20", "--signal=B:USR1@19", "grpo.py", *SMALL, "--rewards", "correctness=1", "format=0.2",
         "slow.py:slow=0"]  # a second after the first step, of six that take almost half a second each
SLOW = """
import time
def slow(prompts, responses, answers):
    time.sleep(0.4)
    return [0.0] * len(prompts)
"""
WANDB = """
import json, os
def note(*values, **more):
    with open("wandb.txt", "a") as file:
        file.write(json.dumps([values, more], default=str) + "\\n")
init = log = finish = note
Table = dict
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The rewards of the same run without a time limit."""
    path = tmp_path_factory.mktemp("whole")
    run("--out", path / "run", *SMALL, cwd=path, script="grpo.py")
    return rewards(path / "run")


def rewards(folder):
    """Step -> mean reward."""
    return {line["step"]: line["reward"] for line in curves.read_metrics(folder) if "loss" in line}


@pytest.fixture
def training(cluster, tmp_path):
    """A cluster whose jobs train, slowly."""
    for file, text in {"path/wandb.py": WANDB, "a folder/slow.py": SLOW,
                       "path/matplotlib.py": "raise ImportError"}.items():  # a picture takes as long as a run
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    cluster.env |= {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "path"), "FAKE_CLOCK": "step 1/"}
    return cluster


@pytest.mark.slow
def test_a_run_longer_than_the_time_limit(training, uninterrupted):
    """It is saved, queued again, and ends as if nothing had been; HF_TOKEN is nowhere in what it writes."""
    said = training("submit.sh", *LIMIT, "--out", "runs/a", "--wandb", HF_TOKEN=TOKEN)
    log, [job] = training.log(), training.jobs
    assert job["states"] == ["REQUEUED", "COMPLETED"] and "SIGUSR1: saving" in log
    assert "resuming from runs/a/checkpoints" in log and log.count("step 0: eval") == 1
    assert rewards(training.path / "runs/a") == uninterrupted
    written = {path: path.read_bytes() for path in training.path.rglob("*") if path.is_file()}
    names = {path.name for path in written}
    assert {"config.json", "log.txt", "wandb.txt", "slurm_script", "jobs.jsonl", "grpo_1.out"} <= names
    assert TOKEN not in said and not [path for path, data in written.items() if TOKEN.encode() in data]


@pytest.mark.slow
def test_two_nodes(training, uninterrupted):
    """A torchrun on each, which hands the signal to its rank and waits until that has saved."""
    training("submit.sh", "--nodes=2", *LIMIT, "--out", "runs/b", MAX_RESTARTS="0")
    assert training.jobs[0]["code"] == 75 and "2 process(es)" in training.log()
    done = rewards(training.path / "runs/b")
    assert 1 < len(done) < 6 and done == pytest.approx({step: uninterrupted[step] for step in done}, abs=1e-6)
    assert (training.path / f"runs/b/checkpoints/step-{max(done)}/state.json").exists()


# ---- PPO against GRPO, as jobs ----

CHAIN = [("baseline", []), ("grpo", ["baseline"]), ("eval-grpo", ["grpo"]), ("ppo", ["baseline"]),
         ("eval-ppo", ["ppo"]), ("compare", ["eval-grpo", "eval-ppo"]), ("plot", ["eval-grpo", "eval-ppo"])]


def test_the_chain_is_printed(cluster):
    words = ["--sbatch", "--gpus=1 -C fat", "--dry", "--eval-questions", "9"]
    said = cluster("ppo_vs_grpo.sh", *words, MODEL="a/b", CPU="--time=1:00:00", ACCOUNT="me")
    jobs = {}
    for line in said.splitlines():
        line = shlex.split(line)
        jobs[[word for word in line if word.startswith("--job-name=")][-1][11:]] = line
    after = [[word[21:].split(":") for word in line if word.startswith("--dependency")]
             for line in jobs.values()]
    assert list(jobs) == ["download", *(name for name, _ in CHAIN)]
    assert after == [[], [["download"]], *([ids] for _, ids in CHAIN[1:])]
    assert jobs["download"][-1] == "--download-only"
    assert all("--account=me" in line for line in jobs.values())
    assert [name for name, line in jobs.items() if "--gpus=1" not in line] == ["download", "compare", "plot"]
    assert [name for name, line in jobs.items() if "--eval-questions" in line] == ["grpo", "ppo"]
    assert not list(cluster.path.iterdir())


@pytest.mark.parametrize("fails", ["none", "ppo.py"])
def test_the_chain_is_sent(cluster, fails):
    """Each job after those it needs; after one that failed, none that needs it."""
    cluster("ppo_vs_grpo.sh", "--sbatch", "--gpus=1", MODEL="a b/c", OUT="runs/x", FAILS=fails)
    names = {str(job["id"]): job["options"]["job-name"] for job in cluster.jobs}
    after = [job["options"].get("dependency", "").split(":")[1:] for job in cluster.jobs]
    assert list(zip(names.values(), [[names[id] for id in ids] for ids in after])) == CHAIN
    ended = [names[str(job["id"])] for job in cluster.jobs if job["states"] == ["COMPLETED"]]
    if fails == "none":
        assert ended == [name for name, _ in CHAIN]
        (_, *baseline), *_, (_, *plot) = (command for command, *_ in cluster.started)
        assert baseline == ["--out", "runs/x/baseline", "--model", "a b/c", "--data", "", "--seed", "0"]
        assert plot == ["plot", "runs/x/grpo", "runs/x/ppo", "--out", "runs/x/curves.png"]
    else:
        assert ended == ["baseline", "grpo", "eval-grpo"]


# ---- the hub: a token, and models for nodes without a network ----


@pytest.fixture
def no_token(tmp_path, monkeypatch):
    """A home of its own, an empty working directory, no HF_TOKEN; all of it is set back."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("files, expected", [
    ({}, ""), ({".huggingface_token": f"\n {TOKEN} \nmore"}, TOKEN), ({".huggingface_token": ""}, ""),
    ({"work/.env": f"A=b\nexport HF_TOKEN = '{TOKEN}'\n"}, TOKEN),
    ({"work/.env": f"MY_HF_TOKEN={TOKEN}"}, ""),
    ({".huggingface_token": TOKEN, "work/.env": "HF_TOKEN=other"}, TOKEN)])
def test_the_token_is_found(no_token, files, expected, capsys):
    for name, text in files.items():
        (no_token / name).write_text(text)
        (no_token / name).chmod(0o600)
    models.use_token()
    assert os.environ["HF_TOKEN"] == expected and capsys.readouterr() == ("", "")


def test_a_token_that_others_can_read_is_warned_of(no_token, capsys, monkeypatch):
    file = no_token / ".huggingface_token"
    file.write_text(TOKEN)
    file.chmod(0o640)
    models.use_token()
    said = capsys.readouterr().err
    assert said == f"warning: others can read the token in {file}: chmod 600 {file}\n"
    monkeypatch.setenv("HF_TOKEN", "mine")
    models.use_token()
    assert os.environ["HF_TOKEN"] == "mine" and capsys.readouterr().err == ""


def sha1(data):
    return hashlib.sha1(data).hexdigest()


class Hub(ThreadingHTTPServer):
    """A hub on this machine. `files`: repository -> {name: bytes}; `asked`: (path, token) of each request."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked = files, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Authorization"]))
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "models", user, name, kind, *_]:
                of_all = {"id": f"{user}/{name}", "sha": "a" * 40}
                listing = [{"type": "file", "path": file, "size": len(data), "oid": sha1(data)}
                           for file, data in self.server.files[f"{user}/{name}"].items()]
                data = json.dumps(listing if kind == "tree" else of_all).encode()
            case [user, name, "resolve", _, *file]:
                data = self.server.files[f"{user}/{name}"].get("/".join(file))
            case _:
                data = None
        self.send_response(200 if data is not None else 404)
        data = data or b""
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", sha1(data))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


DOWNLOAD = """
import torch
from common import models
models.download("someone/adapter")
print("downloaded", flush=True)
input()  # until the hub is gone
models.offline_without_hub.cache_clear()
model = models.load_model("someone/model", torch.float32, torch.device("cpu"))
print(len(models.load_tokenizer("someone/model")), sum(p.numel() for p in model.parameters()))
models.download("")
try:
    models.download("someone/else")
except ValueError as error:
    print(error)
"""


def test_downloaded_models_load_without_the_hub(tmp_path):
    """An adapter, the base it names, and nothing else there; with the token of ~/.huggingface_token."""
    tiny = {path.name: path.read_bytes() for path in models.TINY.iterdir() if path.is_file()}
    unused = dict.fromkeys(["consolidated.safetensors", "onnx/config.json", "model.bin"], b"")
    adapter = {"adapter_model.safetensors": b"",
               "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "someone/model"}'}
    hub = Hub({"someone/model": tiny | unused, "someone/adapter": adapter})
    (tmp_path / ".huggingface_token").write_text(TOKEN)
    env = ENV | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"),
                 "HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
                 "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", DOWNLOAD], cwd=ROOT, env=env, text=True, **pipes) as process:
        assert process.stdout.readline() == "downloaded\n", process.stderr.read()
        hub.shutdown()
        hub.server_close()
        out, error = process.communicate("\n", timeout=120)
    sizes, missing = out.splitlines()
    assert sizes == "384 837760"
    assert error.startswith("warning: others can read") and len(error.splitlines()) == 1
    assert "someone/else: cannot reach the hub for its files" in missing
    files = {path.rpartition("/")[2] for path, _ in hub.asked if "/resolve/" in path}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json",
                     "tokenizer_config.json", "model.safetensors", "chat_template.jinja"}
    assert {token for path, token in hub.asked if "/resolve/" in path} == {f"Bearer {TOKEN}"}
    cached = [path.read_bytes() for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert len(cached) > 7 and not [data for data in cached if TOKEN.encode() in data]
