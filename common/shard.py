"""--shard: a model split over the ranks by FSDP2 (`fully_shard`), so that no GPU has to hold it whole.

Matrices (decoder layers, embeddings, lm_head) are split by rows; vectors (norms, biases) and adapters stay
whole on every rank. FSDP2 gathers a layer when a pass reaches it, on all ranks at once: therefore all make
equally many passes (`micro_batches`), and what asks for `whole` tensors asks on all ranks.
"""

from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn

from common import dist


def is_split(tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, without the import


def local(tensor):
    """This rank's part of one that may be split."""
    return tensor.to_local() if is_split(tensor) else tensor


def whole(tensor):
    """The full tensor of one that may be split; gradients that flow into it are summed over the ranks."""
    if not is_split(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial()])


def gather(tensor):
    """The full tensor, on rank 0's CPU alone where it is split (None elsewhere): for files."""
    if not is_split(tensor):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if dist.is_main() else None


@lru_cache
def mesh_of(device):
    """All ranks, in one row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (dist.world_size(),))


@torch.no_grad()
def split(model, source, device) -> None:
    """Split `model`, on the meta device, over the ranks, and fill it from `source`, rank 0's whole copy.

    Errors: ValueError without several ranks.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    if not torch.distributed.is_initialized():
        raise ValueError("--shard splits the model over the ranks of torchrun, and this is a process alone: "
                         "torchrun --nproc-per-node 2 ...")
    base, head = model.base_model, model.get_output_embeddings()
    mesh, vectors = mesh_of(device), {p for p in model.parameters() if p.ndim < 2}
    tied = head.weight is base.get_input_embeddings().weight
    for module in [base.get_input_embeddings(), *base.layers, base] + [head] * (not tied):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=vectors)
        module.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by counts of all ranks already
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    if tied:
        head.weight = base.get_input_embeddings().weight
    tensors = source and dict(source.named_parameters()) | dict(source.named_buffers())
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        if dist.is_main():
            full = tensors[name].to(device=device, dtype=target.dtype).contiguous()
        else:
            full = torch.empty(target.shape, dtype=target.dtype, device=device)
        if is_split(target):
            target.to_local().copy_(distribute_tensor(full, mesh, target.placements).to_local())
        else:
            torch.distributed.broadcast(full, 0)
            target.copy_(full)
    # the first pass prepares FSDP's state: not under the sampler's inference mode
    base(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)


@contextmanager
def whole_model(model):
    """Within the block every rank has the weights of a split model whole. All enter it together.

    Passes in it wait for no other rank: each makes as many as it likes, and leaves when it likes.
    """
    parts = [module for module in model.modules() if hasattr(module, "unshard")]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight  # FSDP swaps the embedding's alone

    def swap(whole):
        for part in parts:
            part.set_reshard_after_forward(not whole, recurse=False)
            part.unshard() if whole else part.reshard()
        if tied:
            head.weight = embedding.weight

    swap(whole=True)
    try:
        yield
    finally:
        swap(whole=False)


def micro_batches(model, batches, *forwards):
    """Yield this rank's micro-batches; of a split model, then join in the passes of ranks that have more.

    forwards: the passes that a micro-batch makes, each called with input_ids [1, 1] and a completion_mask
    [1, 1] of nothing, and followed by its backward pass if there is a gradient.
    Errors: Stopped if a signal asks to leave (not of a split model, whose ranks wait for each other).
    """
    if not is_split(model.get_output_embeddings().weight):
        for batch in batches:
            dist.check_stop()
            yield batch
        return
    device = model.get_output_embeddings().weight.device
    idle, dist.lockstep = max(dist.gather(len(batches))) - len(batches), True
    yield from batches
    for _ in range(idle):
        for forward in forwards:
            output = forward(torch.zeros(1, 1, dtype=torch.int64, device=device),
                             torch.zeros(1, 1, dtype=torch.bool))
            if output.requires_grad:
                (0 * output).sum().backward()
    dist.lockstep = False


def optimizer_kernel(args, device) -> dict:
    """torch.optim's fastest form that works on the parameters: its further arguments."""
    return {"foreach": False} if args.shard else {"fused": device.type == "cuda"}


@torch.no_grad()
def clip_gradients(params, max_norm: float) -> float:
    """`clip_grad_norm_` of split and whole gradients: scales all to `max_norm`, returns the norm before."""
    pieces = [p.grad.to_local() for p in params if is_split(p.grad)]
    if not pieces:
        return nn.utils.clip_grad_norm_(params, max_norm).item()
    rest = [p.grad for p in params if not is_split(p.grad)]
    squares = dist.sum_dict({"split": sum(g.double().pow(2).sum() for g in pieces).item()}, pieces[0].device)
    norm = (squares["split"] + sum(g.double().pow(2).sum().item() for g in rest)) ** 0.5
    for grad in pieces + rest:
        grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


# ---- checkpoints: torch.distributed.checkpoint, every rank its part, as safetensors ----


def save(folder, tensors: dict) -> None:
    """Write split and whole tensors by name, each rank its own part. All ranks call it.

    Errors: RuntimeError, on all ranks, if one of them cannot.
    """
    from torch.distributed import checkpoint

    try:
        checkpoint.save(tensors, storage_writer=checkpoint.HuggingFaceStorageWriter(
            str(folder), save_distributed=True))
    except checkpoint.CheckpointException as failed:  # a BaseException
        raise RuntimeError(dist.first_line(next(iter(failed.failures.values()))[0])) from None


def load(folder, tensors: dict) -> None:
    """Read into `tensors` in place what `save` wrote, on whatever number of ranks."""
    from torch.distributed import checkpoint

    checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)))


def take_out(value, taken: dict, path=""):
    """A copy of nested dicts and lists: split tensors go into `taken`, what remakes them stays in place."""
    if is_split(value):
        taken[path] = value.detach()
        return {"split": path, "shape": list(value.shape), "dtype": str(value.dtype)[6:]}
    if isinstance(value, dict):
        return {key: take_out(item, taken, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [take_out(item, taken, f"{path}.{i}") for i, item in enumerate(value)]
    return value


def put_back(value, device, made: dict):
    """The reverse of `take_out`: fresh split tensors, which are in `made` by name for `load` to fill."""
    if isinstance(value, dict) and "split" in value:
        from torch.distributed.tensor import Shard, zeros

        made[value["split"]] = zeros(
            value["shape"], dtype=getattr(torch, value["dtype"]), placements=[Shard(0)],
            device_mesh=mesh_of(device))
        return made[value["split"]]
    if isinstance(value, dict):
        return {key: put_back(item, device, made) for key, item in value.items()}
    if isinstance(value, list):
        return [put_back(item, device, made) for item in value]
    return value
