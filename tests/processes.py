"""Starting runs in forked processes, several ranks or one, and reading what they leave behind.

Importing torch and transformers takes seconds, a run in these tests half of one. So runs are forked from a
process that has imported them (FORK_SERVER): each is one of its own, which can be killed like any other. What
matters across interpreters (resuming, torchrun, the hub's client) is run by a `fresh` one.
"""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import models
from tests.commands import ENV, ROOT

# ------------------------------------------------------------------------------------------------------------
# Starting runs

FORK_SERVER = """
import atexit, gc, json, os, runpy, sys, tempfile, traceback
import torch, tyro, transformers.models.qwen2.modeling_qwen2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports half of torch
tiny, root = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)  # fills caches
sys.path[0] = root
from common import curves, data, dist, models, rewards, run
assert "wandb" not in sys.modules
sys.modules["matplotlib"] = None  # as if not installed: a picture takes longer than a run
gc.freeze()  # or each run's collections would walk through all of transformers
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    sys.exit()
os.chdir(request["cwd"])
os.environ.update(request["env"])
for fd, name in enumerate((os.devnull, request["out"], request["err"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
tempfile.tempdir = None
sys.argv = request["argv"]
sys.path[0], file = os.path.split(sys.argv[0])
sys.path[1:1] = request["path"]
if os.path.isdir(f"{sys.path[0]}/common"):  # of a copied repository
    for name in [name for name in sys.modules if name.split(".")[0] == "common" and sys.path[0] != root]:
        del sys.modules[name]
else:
    sys.path.insert(1, root)
try:
    runpy.run_module(file.removesuffix(".py"), run_name="__main__", alter_sys=True)  # which keeps bytecode
    code = 0
except SystemExit as end:
    code = end.code if isinstance(end.code, int | None) else print(end, file=sys.stderr) or 1
except BaseException:
    code = traceback.print_exc() or 1
atexit._run_exitfuncs()
sys.stdout.flush()
os._exit(code or 0)  # taking the interpreter down would last longer than the run
"""


class Process:
    """A run that was forked. `out`, `err`: what the terminal has shown so far; `folder`: its --out.

    `group`: the processes of all its ranks.
    """

    def __init__(self, ask, files, folder, request):
        self.ask, self.files, self.folder, self.code, self.group = ask, files, folder, None, [self]
        self.told = []
        self.pid = ask(request | {"out": f"{files}.out", "err": f"{files}.err"})

    def poll(self):
        if self.code is None:
            self.code = self.ask({"poll": self.pid})
        return self.code

    def wait(self):
        """Until all ranks have ended; as torchrun does, the others are sent SIGTERM once one has failed."""
        def ended():
            codes = [process.poll() for process in self.group]
            if any(codes) and not self.told:
                self.told = [os.kill(process.pid, signal.SIGTERM)
                             for process, code in zip(self.group, codes) if code is None]
            return None not in codes

        wait_for(ended, lambda: f"the run goes on\n{self.said()}")
        return self

    def kill(self):
        """kill -9 of all ranks."""
        for process in self.group:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
        return self.wait()

    def said(self):
        return "\n".join(f"[{process.code}] {process.out}\n{process.err}" for process in self.group)

    out = property(lambda self: Path(f"{self.files}.out").read_text())
    err = property(lambda self: Path(f"{self.files}.err").read_text())


def wait_for(condition, complaint=lambda: "nothing happened", seconds=120, every=0.02):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint()
        time.sleep(every)


@pytest.fixture(scope="session")
def start(tmp_path_factory, tiny):
    """start(argv, cwd, env, path, folder) -> Process."""
    files = tmp_path_factory.mktemp("processes")
    server = subprocess.Popen(
        [sys.executable, "-c", FORK_SERVER, tiny, ROOT], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENV | {"HF_HOME": str(files / "hf")})  # empty
    assert server.stdout.readline() == "ready\n"
    started = []

    def ask(request):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def start(argv, cwd, env, path, folder):
        request = {"argv": [*map(str, argv)], "cwd": str(cwd), "env": env, "path": [*map(str, path)]}
        started.append(Process(ask, files / str(len(started)), folder, request))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    server.stdin.close()
    server.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launcher(start, tiny, cwd):
    """go("NAME", beta=0.1, ...) runs grpo.py --out NAME --beta 0.1 ... in `cwd` to its end; it must succeed.

    script: another one, with a file name that begins with sft for sft.py's flags; ranks: how many;
    wait=False: return while it runs; fails=True: it must fail; bare=True: none of the flags of `small`.
    Returns the Process (of rank 0).
    """

    stores = []  # torchrun's, in which the ranks find each other; it outlives them

    def go(out, *more, script="grpo.py", ranks=1, wait=True, fails=False, bare=False, env=None, path=(),
           cwd=cwd, **flags):
        defaults = {} if bare else small_sft(tiny) if Path(script).name.startswith("sft") else small(tiny)
        argv = [ROOT / script, *words(defaults | {"out": out} | flags), *more]  # absolute paths stay
        group = [{}]
        if ranks > 1:
            stores.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[-1].port),
                      "TORCHELASTIC_USE_AGENT_STORE": "True"}
            group = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        processes = [start(argv, cwd, (env or {}) | rank, path, Path(cwd) / (out or "")) for rank in group]
        processes[0].group = processes
        if wait:
            processes[0].wait()
            assert all((process.code != 0) == fails for process in processes), processes[0].said()
            assert not any(process.out for process in processes[1:])  # only rank 0 speaks
        return processes[0]

    return go


@pytest.fixture
def go(start, tiny, tmp_path):
    return launcher(start, tiny, tmp_path)


def fresh(*argv, cwd, **env):
    """A run in an interpreter of its own, with another hash seed than the forked ones."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=ENV | {"PYTHONHASHSEED": "7"} | env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def patched(folder, script, code):
    """A copy of `script` (such as grpo) that first runs the lines of `code`, in which `script` is the module.

    Its file name begins with the script's.
    """
    path = folder / f"{script}_{len(list(folder.glob('*.py')))}.py"
    path.write_text(f"import os, signal, sys, time\nimport torch\nimport {script} as script\n"
                    f"from common.run import cli\n{code}\ncli(script.main, script.Args)\n")
    return path


FLOAT64 = "from tests.float64 import use_float64; use_float64(script)\n"  # for `patched`


# ------------------------------------------------------------------------------------------------------------
# What they read


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Qwen2 under the embedded model's tokenizer.

    Wide weights, and more weight on the end token and the marks: rows end, and earn `mark`, differently.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(models.TINY)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 32, 64
    config.layer_types = config.layer_types[:2]
    tokenizer = AutoTokenizer.from_pretrained(models.TINY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        embedding = model.get_input_embeddings().weight
        embedding[tokenizer("<think></think><answer></answer>")["input_ids"]] *= 2
        embedding[tokenizer.eos_token_id] *= 4
    folder = tmp_path_factory.mktemp("model") / "random"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(model):
    """The flags of a small GRPO run: 3 prompts of 5 samples of up to 12 tokens, 4 held-out questions."""
    return {"model": model, "data": "arithmetic", "level": 1, "train_questions": 20, "eval_questions": 4,
            "prompts_per_step": 3, "num_generations": 5, "max_new_tokens": 12, "max_steps": 3, "lr": 1e-3,
            "rewards": "mark=1", "lora_r": 4, "warmup_steps": 0}


def small_sft(model):
    only_grpo = ("prompts_per_step", "num_generations", "rewards")
    return {name: value for name, value in small(model).items() if name not in only_grpo} | {"batch_size": 5}


def words(flags):
    """Flags as the words of a command; True: the flag alone, None: without it."""
    argv = []
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        argv += [] if value is None else ["--" + name.replace("_", "-"), *map(str, values)]
    return argv


# ------------------------------------------------------------------------------------------------------------
# What they leave behind


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    """metrics.jsonl without what two equal runs may differ in."""
    def kept(name):
        return name not in ("time", "memory_gb") and not name.startswith("seconds")

    return [{name: value for name, value in line.items() if kept(name)} for line in metrics(folder)]


def train_lines(folder):
    return [line for line in metrics(folder) if "lr" in line]


def eval_lines(folder):
    return [line for line in metrics(folder) if "eval/questions" in line]


def rows(folder, name="samples.csv", step=None):
    with open(folder / name, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if step is None or int(row["step"]) == step]


def column(of_rows, name, kind=float):
    return [kind(row[name]) for row in of_rows]


def place(row):
    return [int(row[name]) for name in ("step", "group", "sample")]


def weights(folder, part="final"):
    """The adapter's tensors, or with --full all of them."""
    return load_file(next((folder / part).glob("*model.safetensors")))


def assert_equal_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same_runs(one, other, to=1e-12, rest=1e-10):
    """Weights to `to`, metrics and numbers in rows to `rest`; the same rows, to the letter, in the same order.

    For runs in FLOAT64, whose sums differ by 1e-15 of their terms: measured are weights to 3e-17, gradient
    norms of some hundreds to 3e-13, log-probs of whole rows to 4e-14. The sampler's gap is nothing but
    rounding, and must be small; so is, while the policy is the reference, which of a pair gains more.
    """
    def differing(line, expected, to):
        def near(a, b):
            try:
                return a == b or abs(float(a) - float(b)) <= to * max(1, abs(float(b)))
            except (TypeError, ValueError):  # text, None
                return False

        assert line.keys() == expected.keys()
        return {at: (line[at], expected[at]) for at in expected if not near(line[at], expected[at])}

    for name in ("samples.csv", "eval.csv"):
        if (other / name).exists():
            for row, expected in zip(rows(one, name), rows(other, name), strict=True):
                assert differing(row, expected, rest) == {}
    for line, expected in zip(timeless(one), timeless(other), strict=True):
        for of in (line, expected):
            assert of.pop("sampler_gap/max", 0) < rest
            if abs(of.get("loss", 0) - math.log(2)) < 1e-5:  # the policy is the reference still
                of.pop("accuracy", None)
        assert differing(line, expected, rest) == {}
    if (other / "final").exists():
        assert distance(weights(one), weights(other)) <= to
