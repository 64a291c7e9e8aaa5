"""No run is lost: signals, dead and failing ranks, full disks, damaged checkpoints."""

import hashlib
import json
import os
import re
import shutil
import signal
import stat

import pytest
import torch

from common import dist
from tests.processes import (
    assert_equal_bits,
    free_port,
    listing,
    metrics,
    patched,
    timeless,
    train_lines,
    wait_for,
    weights,
)


def n_steps(run):
    """Logged so far by a run that is under way."""
    log = run.folder / "log.txt"
    return len(re.findall(r"^step +\d+/", log.read_text(), re.MULTILINE)) if log.exists() else 0


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- signals ----

SIGNALLED = """
calls = 0
def make_batch(*arguments):  # a signal in the second micro-batch of step 2
    global calls
    calls += 1
    if len(METRICS()) == 1 and not os.path.exists("signalled"):
        with open("signalled", "w") as file:
            file.write(str(calls))
        os.kill(os.getpid(), signal.{signal})
    with open("calls", "w") as file:
        file.write(str(calls))
    return original(*arguments)
def METRICS():
    import json, glob
    return [line for path in glob.glob("stopped/metrics.jsonl") for line in open(path) if '"lr"' in line]
original, script.make_batch = script.make_batch, make_batch
"""


@pytest.mark.parametrize("script, name", [("grpo", "SIGTERM"), ("grpo", "SIGUSR1"), ("sft", "SIGINT")])
def test_a_signal_ends_the_run_after_the_micro_batch(go, tmp_path, script, name):
    """The step is given up, the one before is saved, the exit code says so; the resumed run lacks nothing."""
    flags = {"tokens_per_batch": 60, "save_every": 50}
    whole = go("whole", script=f"{script}.py", **flags).folder
    wrapper = patched(tmp_path, script, SIGNALLED.replace("{signal}", name))
    stopped = go("stopped", script=wrapper, fails=True, **flags)
    assert stopped.code == dist.STOPPED == 75
    assert (tmp_path / "calls").read_text() == (tmp_path / "signalled").read_text()  # no further micro-batch
    assert f"{name}: saving" in stopped.err and "--resume goes on" in stopped.out
    assert checkpoints(stopped.folder) == ["step-1"] and not (stopped.folder / "final").exists()
    go("stopped", script=f"{script}.py", resume=True, bare=True)
    assert timeless(stopped.folder) == timeless(whole)
    assert_equal_bits(weights(stopped.folder), weights(whole))


def test_a_step_that_has_moved_the_weights_is_finished(go, tmp_path):
    """Its first update cannot be taken back: the checkpoint is that of the step's end."""
    wrapper = patched(tmp_path, "grpo", """
updates = 0
def accumulate(*arguments, **more):
    global updates
    updates += 1
    if updates == 4:  # the second of step 2
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments, **more)
original, script.accumulate_gradients = script.accumulate_gradients, accumulate
""")
    flags = {"updates_per_batch": 2, "tokens_per_batch": 60}
    whole = go("whole", **flags).folder
    stopped = go("stopped", script=wrapper, fails=True, **flags)
    assert stopped.code == 75 and checkpoints(stopped.folder) == ["step-2"]
    go("stopped", resume=True, bare=True)
    assert_equal_bits(weights(stopped.folder), weights(whole))


def test_a_signal_to_one_of_two_ranks_ends_both(go, tmp_path):
    wrapper = patched(tmp_path, "grpo", """
def share(items):
    if dist.rank() == 1 and os.path.exists("stopped/metrics.jsonl") and '"lr"' in open(
            "stopped/metrics.jsonl").read():
        os.kill(os.getpid(), signal.SIGUSR1)
    return original(items)
from common import dist
original, dist.share = dist.share, share
""")
    whole = go("whole", ranks=2).folder
    stopped = go("stopped", script=wrapper, ranks=2, fails=True)
    assert [process.code for process in stopped.group] == [75, 75]
    go("stopped", resume=True, bare=True, ranks=2)
    assert timeless(stopped.folder) == timeless(whole)


def test_a_second_ctrl_c_leaves_at_once(go, tmp_path):
    wrapper = patched(tmp_path, "grpo", """
def policy_loss(*arguments, **more):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # torchrun's copy of the same one
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
script.policy_loss = policy_loss
""")
    stopped = go("stopped", script=wrapper, fails=True)
    assert stopped.code == 130 and "Traceback" not in stopped.err


# ---- ranks ----


def one_line(group):
    """What all ranks together say on stderr. Errors: if it is more than a line."""
    said = [line for process in group for line in process.err.splitlines()
            if line.strip() and line != "SIGTERM: saving (Ctrl-C: leave at once)"]  # torchrun's, before it
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("victim, more", [(1, {}), (0, {}), (2, {"shard": True})])
def test_a_killed_rank_ends_all(go, victim, more):
    """kill -9: soon there is one line that says so, and no process left; torchrun names the rank."""
    run = go("run", ranks=3, wait=False, max_steps=10_000, **more)
    wait_for(lambda: n_steps(run) > 2)
    os.kill(run.group[victim].pid, signal.SIGKILL)
    run.wait()
    assert "another rank has ended" in one_line(run.group)
    assert [process.code for process in run.group if process is not run.group[victim]] == [1, 1]


@pytest.mark.parametrize("error, said", [
    ("ValueError('a mistake')", "error: rank 1: a mistake"), ("KeyError('a defect')", "KeyError: 'a defect'")])
def test_a_rank_that_fails_ends_all_with_its_error(go, tmp_path, error, said):
    wrapper = patched(tmp_path, "grpo", f"""
def policy_loss(*arguments, **more):
    if os.environ["RANK"] == "1":
        raise {error}
    return original(*arguments, **more)
original, script.policy_loss = script.policy_loss, policy_loss
""")
    run = go("run", script=wrapper, ranks=3, fails=True, tokens_per_batch=60)
    if "ValueError" in error:
        assert one_line(run.group) == said
    else:  # a defect keeps its traceback, in the rank where it is
        assert [said in process.err for process in run.group] == [False, True, False]
        assert ["Traceback" in process.err for process in run.group] == [False, True, False]


def test_what_all_ranks_find_wrong_is_said_once(go):
    run = go("run", ranks=3, temperature=-1, fails=True)
    assert one_line(run.group).startswith("error: --temperature -1")


def test_a_rank_that_hangs_ends_all(go, tmp_path):
    """Collectives carry a time limit: here of 4 seconds."""
    wrapper = patched(tmp_path, "grpo", """
def policy_loss(*arguments, **more):
    time.sleep(1000 * (os.environ["RANK"] == "1"))
    return original(*arguments, **more)
original, script.policy_loss = script.policy_loss, policy_loss
""")
    run = go("run", script=wrapper, ranks=2, fails=True, env={"UNROLLED_TIMEOUT": "4"})
    assert run.code == 1 and "did not answer in time" in one_line(run.group)


def test_ranks_of_srun_without_torchrun(go, tmp_path, monkeypatch):
    """Two tasks of a job step, joined by SLURM's variables alone."""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] && echo 127.0.0.1 node2\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(free_port()),
            "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    group = [go("run", wait=False, env=step | {"SLURM_PROCID": n, "SLURM_LOCALID": n}) for n in ("0", "1")]
    assert [process.wait().code for process in group] == [0, 0], group[0].said() + group[1].said()
    assert json.loads((group[0].folder / "config.json").read_text())["world_size"] == 2
    one = go("one").folder
    assert len(train_lines(group[0].folder)) == len(train_lines(one))
    assert go("alone", env=step | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).code == 0


def test_half_of_slurms_variables_are_refused_by_name(go):
    run = go("run", fails=True, env={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})
    assert run.err.startswith("error: SLURM_STEP_NUM_TASKS is set without SLURM_LOCALID, SLURM_JOB_ID")


# ---- disks and damage ----

SMALL_DISK = """
import resource
from common.run import Run
def save(self):
    if self._unsaved and self.state.step == 2:  # no file may be larger than this: the checkpoint's are
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    original(self)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
original, Run.write_checkpoint = Run.write_checkpoint, save
"""


def test_a_full_disk_costs_no_run(go, tmp_path):
    """The checkpoint of step 2 cannot be written: it is said, the one before stays, and the run goes on."""
    flags = {"save_every": 1, "keep": 1, "max_steps": 3}
    wrapper = patched(tmp_path, "grpo", SMALL_DISK)
    run = go("run", script=wrapper, **flags)
    (said,) = [line for line in run.out.splitlines() if "cannot be written" in line]
    assert "step 2" in said and "File too large" in said and "the last one is step-1" in said
    assert checkpoints(run.folder) == ["step-3"]


@pytest.mark.parametrize("name", ["position", "optimizer", "rng"])
def test_a_checkpoint_of_another_version_is_refused(go, name):
    """By what it lacks: a position that starts anew would train on the same questions twice."""
    folder = go("run", max_steps=1).folder
    path = folder / "checkpoints/step-1/training.pt"
    values = torch.load(path, weights_only=True)
    del values[name]
    torch.save(values, path)
    state = json.loads((path.parent / "state.json").read_text())
    state["sha256"]["training.pt"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "state.json").write_text(json.dumps(state))
    said = go("run", resume=True, bare=True, fails=True).err
    assert said.count("\n") == 1 and f"no {name} in it" in said and "start another run with --model" in said


def test_memory_that_runs_out_while_loading_is_one_line(go, tmp_path):
    wrapper = patched(tmp_path, "grpo", """
def load_model(*args, **more):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")
script.models.load_model = load_model
""")
    said = go("run", script=wrapper, fails=True).err
    assert said.count("\n") == 1 and said.startswith("error: out of memory") and "12.00 GiB" in said


def test_a_full_disk_at_the_end_is_one_line(go, tmp_path):
    wrapper = patched(tmp_path, "grpo", SMALL_DISK.replace("self.state.step == 2", "False") + """
def save_final(self, write):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    last(self, write)
last, Run.save_final = Run.save_final, save_final
""")
    run = go("run", script=wrapper, fails=True)
    assert run.err.startswith("error: ") and run.err.count("\n") == 1
    assert "final cannot be written" in run.err and "File too large" in run.err
    go("run", resume=True, bare=True)
    assert_equal_bits(weights(run.folder), weights(go("whole").folder))


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(start, tiny, tmp_path_factory):
    from tests.processes import launcher

    cwd = tmp_path_factory.mktemp("saved")
    run = launcher(start, tiny, cwd)("run", save_every=1, keep=2).folder
    return cwd, run


@pytest.mark.parametrize("file, damage, said", [
    ("adapter_model.safetensors", cut, "adapter_model.safetensors is not what was written"),
    ("training.pt", cut, "training.pt is not what was written"),
    ("training.pt", change, "training.pt is not what was written"),
    ("adapter_model.safetensors", lambda path: path.unlink(), "adapter_model.safetensors: No such file"),
    ("state.json", cut, "state.json is not what was written"),
    ("state.json", lambda path: path.unlink(), "state.json: No such file")])
def test_a_damaged_checkpoint_is_set_aside(go, saved, tmp_path, file, damage, said):
    shutil.copytree(saved[0], tmp_path / "copy")
    folder = tmp_path / "copy/run"
    shutil.rmtree(folder / "final")
    damage(folder / "checkpoints/step-3" / file)
    run = go("run", resume=True, bare=True, cwd=tmp_path / "copy")
    (line,) = [line for line in run.out.splitlines() if "damaged" in line]
    assert said in line and "using step-2" in line
    assert timeless(folder) == timeless(saved[1])
    assert_equal_bits(weights(folder), weights(saved[1]))
    assert checkpoints(folder) == ["damaged-step-3", "step-2", "step-3"]


def test_a_checkpoint_without_hashes_is_taken_as_it_is(go, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    (tmp_path / "copy/run/checkpoints/step-3/state.json").write_text('{"step": 3, "complete": true}')
    assert "resuming from run/checkpoints/step-3" in go("run", resume=True, bare=True, cwd=tmp_path / "copy").out


def test_a_smaller_micro_batch_from_here_on(go, saved, tmp_path):
    """What --resume advises after out of memory with --shard."""
    shutil.copytree(saved[0], tmp_path / "copy")
    folder = go("run", resume=True, bare=True, max_steps=5, tokens_per_batch=64, cwd=tmp_path / "copy").folder
    assert [line["tokens_per_batch"] for line in train_lines(folder)] == [2048] * 3 + [64] * 2


@pytest.mark.parametrize("flags, said", [
    ({"seed": 7}, "--seed is 7, but the run began with 0"), ({"level": 2}, "--level is '2'"),
    ({"lr": 1e-4}, "--lr is 0.0001, but the run began with 0.001"), ({"full": True}, "--full is True"),
    ({"model": ""}, "--model is ''"), ({"rewards": ["digit=1"]}, "--rewards is ('digit=1',)"),
    ({"script": "sft.py"}, "that run is grpo.py's; this script has no ")])
def test_what_a_run_is_does_not_change(go, saved, tmp_path, flags, said):
    shutil.copytree(saved[0], tmp_path / "copy")
    before = (tmp_path / "copy/run/config.json").read_text()
    run = go("run", resume=True, bare=True, fails=True, cwd=tmp_path / "copy", **flags)
    assert run.err.startswith("error: ") and run.err.count("\n") == 1 and said in run.err
    assert (tmp_path / "copy/run/config.json").read_text() == before


def test_an_extension_is_kept_and_less_than_there_is_ends_at_once(go, saved, tmp_path):
    """Extended to 5 and killed, it goes on to 5; a last step that lies behind is the end."""
    shutil.copytree(saved[0], tmp_path / "copy")
    wrapper = patched(tmp_path, "grpo", """
from common.run import Run
def save(self, due, **more):
    if self.state.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, due, **more)
original, Run.save = Run.save, save
""")
    cwd = {"cwd": tmp_path / "copy"}
    go("run", script=wrapper, resume=True, bare=True, fails=True, max_steps=5, **cwd)
    folder = go("run", resume=True, bare=True, **cwd).folder
    of_whole = timeless(go("whole", max_steps=5, save_every=1).folder)
    # step 3 was the last one once, and was evaluated
    assert [line for line in timeless(folder) if line["step"] != 3 or "lr" in line] == of_whole
    again = go("run", resume=True, bare=True, max_steps=2, **cwd)
    assert "step 6/" not in again.out and checkpoints(folder) == ["step-4", "step-5"]


def test_two_that_start_at_once(go, tmp_path):
    """The folder belongs to the first; the second has written nothing into it."""
    wrapper = patched(tmp_path, "grpo", """
from common.run import Run
def take(self, path):
    open("there", "w").close() if os.environ["WHO"] == "first" else None
    while os.environ["WHO"] == "first" and not os.path.exists("ended") or not os.path.exists("there"):
        time.sleep(0.01)
    original(self, path)
original, Run._take = Run._take, take
""")
    # both find the folder free; the second takes it first
    one = go("run", script=wrapper, wait=False, env={"WHO": "first"})
    two = go("run", script=wrapper, wait=False, env={"WHO": "second"}, max_steps=10_000)
    wait_for(lambda: n_steps(two) > 0)
    (tmp_path / "ended").touch()
    assert one.wait().code == 1 and one.err == "error: --out run: another process is at work on that run\n"
    two.kill()


def test_two_starts_one_after_the_other(go, tmp_path):
    """The second has looked before the first began, and comes when it has ended."""
    wrapper = patched(tmp_path, "grpo", """
from common.run import Run
def take(self, path):
    open("there", "w").close()
    while not os.path.exists("ended"):
        time.sleep(0.01)
    original(self, path)
original, Run._take = Run._take, take
""")
    late = go("run", script=wrapper, wait=False)
    wait_for((tmp_path / "there").exists)
    shutil.rmtree(tmp_path / "run")
    first = go("first").folder
    first.rename(tmp_path / "run")
    (tmp_path / "ended").touch()
    assert late.wait().code == 1 and late.err == "error: --out run: another run has just begun there\n"


@pytest.mark.parametrize("file, line", [
    ("metrics.jsonl", b"\0" * 40), ("metrics.jsonl", b""), ("metrics.jsonl", b'{"step": 1, "x'),
    ("metrics.jsonl", b'{"step": null}'), ("metrics.jsonl", b"\xff\xfe"),
    ("samples.csv", b"\0" * 40), ("samples.csv", b"1,2,3"), ("samples.csv", b"one\xff" + b"," * 30),
    ("eval.csv", b"\xff")])
@pytest.mark.parametrize("place", ["last", "inside"])
def test_a_bad_line_is_named_and_set_aside(go, saved, tmp_path, file, line, place):
    shutil.copytree(saved[0], tmp_path / "copy")
    folder = tmp_path / "copy/run"
    shutil.rmtree(folder / "final")
    rows = (folder / file).read_bytes().split(b"\n")[:-1]
    at = len(rows) if place == "last" else 2
    if file == "samples.csv" and place == "inside":  # a row has several lines: behind the header
        at = 1
    (folder / file).write_bytes(b"\n".join([*rows[:at], line, *rows[at:]]) + b"\n" * (place == "inside"))
    out = go("run", resume=True, bare=True, cwd=tmp_path / "copy").out
    assert timeless(folder) == timeless(saved[1])
    for name in ("samples.csv", "eval.csv"):
        assert (folder / name).read_bytes() == (saved[1] / name).read_bytes()
    if place == "inside":  # at the end it is what a kill leaves
        assert f"{file}: line {at + 1} is not what was written" in out
        assert f"{file}: line {at + 1}: " in (folder / "damaged.txt").read_text()


@pytest.mark.parametrize("garbage", ["training.pt", "adapter_model.safetensors", "a file", "a link"])
def test_a_checkpoint_that_cannot_be_read_is_set_aside(go, saved, tmp_path, garbage):
    """Though its hashes are right."""
    shutil.copytree(saved[0], tmp_path / "copy")
    folder = tmp_path / "copy/run"
    shutil.rmtree(folder / "final")
    last = folder / "checkpoints/step-3"
    if garbage.startswith("a "):
        shutil.rmtree(last)
        last.touch() if garbage == "a file" else last.symlink_to("nowhere")
    else:
        (last / garbage).write_bytes(b"garbage")
        state = json.loads((last / "state.json").read_text())
        state["sha256"][garbage] = hashlib.sha256(b"garbage").hexdigest()
        (last / "state.json").write_text(json.dumps(state))
    out = go("run", resume=True, bare=True, cwd=tmp_path / "copy").out
    assert "step-3 is damaged" in out and "using step-2" in out
    assert timeless(folder) == timeless(saved[1])
    assert_equal_bits(weights(folder), weights(saved[1]))


def test_rewards_that_fail_on_every_row_end_the_run(go, tmp_path):
    (tmp_path / "r.py").write_text("def f(prompts, responses, answers):\n    raise KeyError('x')\n")
    run = go("run", rewards=["r.py:f=1"], max_steps=9, fails=True)
    assert run.err.startswith("error: --rewards: one failed on every row in 3 steps")
    assert "KeyError" in run.out
    assert checkpoints(run.folder) == ["step-3"]


SCORES = """
from common import rewards
def answer_metrics(rows):
    values.append(values.pop(0)) if evaluated else evaluated.append(True)
    return original(rows) | {"eval/pass@1": values[0]}
values, evaluated = [float(word) for word in os.environ["SCORES"].split()], []
original, rewards.answer_metrics = rewards.answer_metrics, answer_metrics
"""


@pytest.mark.parametrize("scores, best", [
    ("0.1 0.5 0.3 0.5", 1), ("0.1 0.2 0.3 0.4", 3), ("0.4 0.4 0.3 0.1", None)])
def test_the_best_weights_are_kept(go, tmp_path, scores, best):
    """Of several that are equally good the first; where none is better than the start there are none."""
    run = go("run", script=patched(tmp_path, "grpo", SCORES), env={"SCORES": scores}, eval_every=1,
             save_every=1, keep=9)
    if best is None:
        assert not (run.folder / "best").exists() and "best held-out" not in run.out
        return
    assert_equal_bits(weights(run.folder, "best"), weights(run.folder, f"checkpoints/step-{best}"))
    assert f"best held-out pass@1 {scores.split()[best]}00 at step {best}: run/best" in run.out
    go("more", model="run/best", max_steps=1)
    # killed after step 2 was saved: the steps after it are evaluated again
    for step in range(3, 4):
        shutil.rmtree(run.folder / f"checkpoints/step-{step}")
    before = listing(run.folder / "best")
    go("run", script=patched(tmp_path, "grpo", SCORES), resume=True, bare=True,
       env={"SCORES": " ".join(scores.split()[3:])})
    assert listing(run.folder / "best") == before
    assert json.loads((run.folder / "best/best.json").read_text())["step"] == best


def test_one_process_at_a_time(go, tmp_path):
    run = go("run", wait=False, max_steps=10_000)
    wait_for(lambda: n_steps(run) > 0)
    said = go("run", resume=True, bare=True, fails=True).err
    assert said == "error: --out run: another process is at work on that run\n"
    run.kill()
    go("run", resume=True, bare=True, max_steps=len(train_lines(run.folder)) + 1)


def test_no_whole_checkpoint_is_a_run_from_the_start(go, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    folder = tmp_path / "copy/run"
    for step in (2, 3):
        cut(folder / f"checkpoints/step-{step}/training.pt")
    run = go("run", resume=True, bare=True, cwd=tmp_path / "copy")
    assert run.out.count("is damaged") == 2 and "starting from step 0" in run.out
    assert timeless(folder) == timeless(saved[1])


def test_an_older_checkpoint_goes_when_the_next_is_verified(go, tmp_path):
    """A checkpoint that is not what was written leaves the one before in place."""
    wrapper = patched(tmp_path, "grpo", """
from common import run
def damage(folder):
    return "bad sector" if "step-2" in str(folder) else original(folder)
original, run.damage = run.damage, damage
""")
    run = go("run", script=wrapper, save_every=1, keep=1, max_steps=2)
    assert "bad sector" in run.out and "step-1" in checkpoints(run.folder)


def test_killed_while_its_directory_is_made(go, tmp_path):
    """From the first file on it can be resumed; before that the directory counts as empty."""
    for name, where, more in (("config", "os.replace", {}), ("copy", "shutil.copy", {"resume": True})):
        code = f"from common import run\nrun.{where} = lambda *_: os.kill(os.getpid(), 9)"
        killed = go(name, script=patched(tmp_path, "grpo", code), fails=True)
        assert killed.code == -signal.SIGKILL and killed.folder.exists()
        again = go(name, bare=bool(more), **more)
        assert len(metrics(again.folder)) == len(metrics(go(f"{name}-whole").folder))
