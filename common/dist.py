"""torch.distributed behind a few functions that also work on one process, so that no loop needs an `if`."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist


def setup(device: str = "") -> torch.device:
    """Join the process group that torchrun announced (if it did) and choose this rank's device.

    device: "" picks CUDA, then MPS, then the CPU; under torchrun a CUDA rank takes its LOCAL_RANK's card.
    Errors: ValueError for a device that this machine lacks.
    """
    kind = device or ("cuda" if torch.cuda.is_available()
                      else "mps" if torch.backends.mps.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {kind}: no CUDA device is visible here; use --device cpu")
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        chosen = torch.device(kind)
    except RuntimeError:
        raise ValueError(f"--device {kind}: not a device that torch knows; use cuda, mps or cpu") from None
    if chosen.type == "cuda":
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(f"--device {kind}: this machine has {torch.cuda.device_count()} CUDA device(s); "
                             "start at most that many processes per node")
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        # A rank that hangs must not hold the others for ever: collectives fail after this long.
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return chosen


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
    if dist.is_initialized():
        dist.destroy_process_group()


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


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks if `flag` is true on one: how the ranks agree, so that none waits for another."""
    if not dist.is_initialized():
        return flag
    agreed = torch.tensor([float(flag)], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return bool(agreed.item())


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
    if not dist.is_initialized():
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
