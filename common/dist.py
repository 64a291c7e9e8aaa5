"""torch.distributed behind a few functions that also work on one process, so that no loop needs an `if`."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

STOPPED = 75  # exit code of a run that a signal ended, its state saved (EX_TEMPFAIL in sysexits.h: try again)


def setup(device: str = "") -> torch.device:
    """Join the process group that torchrun or srun announced (if one did) and choose this rank's device.

    device: "" picks CUDA, then MPS, then the CPU; of several ranks on a machine each takes its LOCAL_RANK's
    card. A collective that lasts longer than UNROLLED_TIMEOUT seconds (default 1800) fails.
    Errors: ValueError for a device that this machine lacks.
    """
    _read_slurm()
    # micro-batches of ever new shapes leave gaps that fixed segments cannot close; read when CUDA starts
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    kind = device or ("cuda" if torch.cuda.is_available()
                      else "mps" if torch.backends.mps.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {kind}: no CUDA device is visible here; use --device cpu")
    if kind == "cuda":  # srun may show each rank its own card alone
        bound = "SLURM_STEP_NUM_TASKS" in os.environ and torch.cuda.device_count() == 1
        kind = f"cuda:{0 if bound else os.environ.get('LOCAL_RANK', 0)}"
    try:
        chosen = torch.device(kind)
    except RuntimeError:
        raise ValueError(f"--device {kind}: not a device that torch knows; use cuda, mps or cpu") from None
    if chosen.type == "cuda":
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(f"--device {kind}: this machine has {torch.cuda.device_count()} CUDA device(s); "
                             "start at most that many processes per node")
        torch.cuda.set_device(chosen)
        # cuDNN's attention plans each new shape anew, for half a second; micro-batches have ever new ones
        torch.backends.cuda.enable_cudnn_sdp(False)
        # sums of products in float32 throughout: sampler and trainer split them differently
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if "RANK" in os.environ and not dist.is_initialized():
        on_cuda = chosen.type == "cuda"
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        # on one node Python objects stay off the card; between nodes gloo would need a network of its own
        backend = "gloo" if not on_cuda else "cpu:gloo,cuda:nccl" if one_node else "nccl"
        # a rank that hangs must not hold the others for ever
        limit = timedelta(seconds=float(os.environ.get("UNROLLED_TIMEOUT", 1800)))
        global _store
        try:
            store, n, size = next(dist.rendezvous("env://", timeout=limit))
            dist.init_process_group(backend, store=store, rank=n, world_size=size, timeout=limit,
                                    device_id=chosen if on_cuda else None)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')}: cannot join the "
                             f"others at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
                             f"({first_line(error)})") from None
        # torchrun's outlives the ranks; without torchrun rank 0 would take it along
        _store = store if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
    return chosen


def _read_slurm():
    """Of ranks that srun started without torchrun: put SLURM's variables under torchrun's names."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    if missing := [name for name in (*names.values(), "SLURM_JOB_ID") if name not in os.environ]:
        raise ValueError(f"SLURM_STEP_NUM_TASKS is set without {', '.join(missing)}: start it by srun or "
                         "torchrun, or unset it")
    os.environ.update({name: os.environ[slurm] for name, slurm in names.items()})
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ["SLURM_STEP_NODELIST"]
        try:
            hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
            os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
        except (OSError, IndexError):
            raise ValueError(f"scontrol cannot tell the hosts of {nodes} here (inside a container?): export "
                             "MASTER_ADDR, the first of them, in the job script") from None


def first_line(error) -> str:
    """What an exception says, cut to a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


# ---- ending together: a signal, a failure, a rank that is gone ----

FAILED = "unrolled/failed"  # the key under which `_store`, common to the ranks, counts those that have failed
stop_signal = ""  # the name of the signal that asks this process to save and leave
stoppable = False  # whether what is under way can be given up: a step that has moved the weights cannot
lockstep = False  # whether the ranks make each pass together (--shard): none can leave in between
_stopped_at = 0.0
_store = None


class Stopped(Exception):
    """A signal came: the step under way is given up, on all ranks; the one before it is saved."""


def check_stop() -> None:
    """Errors: Stopped if a signal asks to leave and the step under way can be given up."""
    if stop_signal and stoppable and not lockstep:
        raise Stopped


def listen() -> None:
    """From here on SIGINT, SIGTERM and SIGUSR1 set `stop_signal`; a second Ctrl-C ends the process."""
    global stop_signal, stoppable, lockstep
    stop_signal, stoppable, lockstep = "", False, False
    _handle(_on_signal)


def ignore_signals() -> None:
    """What they ask for is done: the run is finished."""
    global stop_signal
    stop_signal = ""
    _handle(signal.SIG_IGN)


def _handle(handler):
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handler)


def _on_signal(number, frame):
    global stop_signal, _stopped_at
    with suppress(RuntimeError):  # torchrun itself is gone, and its store
        if _store is not None and _store.check([FAILED]):  # it ends all: nothing can be saved together
            leave_now(1)
    # torchrun passes on a Ctrl-C that the terminal has sent to its ranks already, and ends those that are
    # still saving when the first has left with SIGTERM
    if stop_signal and number == signal.SIGINT and time.monotonic() - _stopped_at > 1:
        raise KeyboardInterrupt
    if not stop_signal:
        stop_signal, _stopped_at = signal.Signals(number).name, time.monotonic()
        if is_main():  # not print: the signal may have come inside another
            os.write(2, f"\n{stop_signal}: saving (Ctrl-C: leave at once)\n".encode())


at_exit = []  # called by a process that leaves in the middle


def leave_now(code) -> None:
    """End this process, whatever its other threads wait for."""
    for clean_up in at_exit:
        clean_up()
    os._exit(code)


def lost_rank(error) -> str:
    """What an error in a collective says of the other ranks, by the words of gloo and NCCL; "" if nothing."""
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    if "timed out" in text or "timeout" in text:
        return "another rank did not answer in time (UNROLLED_TIMEOUT seconds, default 1800)"
    ended = ("connection closed", "connection reset", "broken pipe", "remote process exit")
    return "another rank has ended (killed? out of memory?)" if any(word in text for word in ended) else ""


def fail(message: str) -> None:
    """Say on stderr, once for all ranks, why this one cannot go on; torchrun or srun then ends the others."""
    if world_size() == 1:
        sys.exit(f"error: {message}")
    if not is_main():
        time.sleep(1)  # what all ranks find wrong, rank 0 says; this one is ended meanwhile
        message = f"rank {rank()}: {message}"
    first = True
    with suppress(RuntimeError):
        first = _store is None or _store.add(FAILED, 1) == 1
    if first:
        os.write(2, f"\nerror: {message}\n".encode())
    leave_now(1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def finish() -> None:
    """Take leave of the other ranks."""
    global _store
    if dist.is_initialized():
        barrier()  # torchrun ends the others as soon as one has left with a code that is not 0
        dist.destroy_process_group()
    _store = None


def share(items):
    """This rank's share of a list that is the same on all ranks: every world_size-th item, none dropped."""
    return items[rank()::world_size()]


def gather(value):
    """The list of every rank's `value` (any JSON-like Python object), on all ranks, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_rows(rows: list[dict], *keys) -> list[dict]:
    """Every rank's rows, sorted by the columns `keys`: the same list on all ranks, whatever their number."""
    everyone = [row for of_rank in gather(rows) for row in of_rank]
    return sorted(everyone, key=lambda row: [row[key] for key in keys])


def broadcast(value):
    """Rank 0's `value` on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def any_ranks(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag true on all ranks if it is on one: how the ranks agree, so that none waits for another."""
    if not dist.is_initialized():
        return flags
    agreed = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in agreed.tolist()]


def any_rank(flag: bool, device: torch.device) -> bool:
    """`any_ranks` of one flag."""
    return any_ranks([flag], device)[0]


def sum_dict(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum each entry over ranks (the keys must be the same everywhere), in float64."""
    if not dist.is_initialized():
        return dict(values)
    # gloo and NCCL reduce float64; MPS has none, but it has no process group either
    flat = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(flat)
    return dict(zip(values, flat.tolist()))


def sum_gradients(params: list[torch.nn.Parameter]) -> None:
    """Sum the gradients over ranks in place, as one flat buffer; a rank with no gradient joins with zeros.

    A sum and not a mean: the loss was divided by counts that were summed over ranks already. Zeros on a
    single process too: the optimizer's momentum must move the weights there as it does on many.
    """
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    params = [p for p in params if not hasattr(p, "full_tensor")]  # split ones: FSDP2 has summed theirs
    if not dist.is_initialized() or not params:
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, piece in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(piece.view_as(p))


def describe(device: torch.device) -> str:
    """One line for the run's head: how many processes, on what."""
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} threads")
    return f"{world_size()} process(es) on {socket.gethostname()}, {name}"
