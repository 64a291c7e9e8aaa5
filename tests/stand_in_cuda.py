"""A CUDA device that is not there: tensors that say they are on cuda:0 and keep their data on the CPU.

    with as_if_on_cuda() as device:
        grpo.main(grpo.Args(device="cuda"))
    assert not device.errors

It has the rules that a run on the CPU cannot break: tensors of two devices do not mix; kernels captured in a
graph run at its replays alone, on the tensors of the capture; nothing in a capture waits for the device.
What breaks a rule raises, as on CUDA, and stays in `device.errors`, should something catch it. Whatever makes
the host wait for the device is in `device.waits`. Triton's kernels cannot run on it: as_if_on_cuda takes what
stands for common/kernels.py, or the sampler's plain forms run.

It has none of CUDA's own arithmetic, memory or speed, and no inference mode: a write to one of its tensors
outside, which torch refuses, is not seen. Its name is cuda:0 ("cuda" is understood by dist.setup
alone). In a backward pass `index_put` may mix: torch takes these tensors for the CPU's, and so it makes there
the zeros for an index's gradient.
"""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from common import models

ROOT = f"{Path(__file__).resolve().parents[1]}/"
CPU, CUDA, GB = torch.device("cpu"), torch.device("cuda", 0), 2**30

aten = torch.ops.aten
COPYING = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.repeat_interleave,
           aten._unique2, aten.unique_dim, aten.unique_consecutive}  # a value, or a size that depends on one


class OnCuda(torch.Tensor):
    """On cuda:0 to Python, on the CPU to torch's own code: autograd needs no GPU. `held`: the data."""

    @staticmethod
    def __new__(cls, held):
        new = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        new.held = held
        return new

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    data = property(lambda self: self.detach(), lambda self, new: setattr(self, "held", new.held))
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Device.current.run(func, args, kwargs or {})

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = args[0].device, args[0].dtype
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return self if dtype is None else super().to(dtype)
        assert not (self.requires_grad and torch.is_grad_enabled()), "the stand-in copies no gradients"
        Device.current.wait("copy to the CPU")
        return self.held.to(dtype, copy=True)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.to("cpu").tolist()

    def __iter__(self):
        return iter(self.unbind(0))

    def __repr__(self, **_):
        return f"OnCuda({self.held})"

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.held.__reduce_ex__(protocol)


class Device(TorchDispatchMode):
    """`waits`, `errors`: lines "file:line: what"; `graph`: the one that is being captured."""

    current = None

    def __init__(self):
        super().__init__()
        self.waits, self.errors, self.graph = [], [], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """One operator, on whichever device its arguments are."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ours = {id(t.held): t for t in tensors if isinstance(t, OnCuda)}
        target = kwargs.get("device") and torch.device(kwargs["device"]).type
        if ours and func is aten._to_copy.default:
            target = None  # another dtype: OnCuda.to has seen to the device
        if not ours and target != "cuda":
            return func(*args, **kwargs)
        self.check(func, tensors, args)
        args, kwargs = tree_map_only(OnCuda, lambda t: t.held, (args, kwargs))
        if target == "cuda":
            kwargs = kwargs | {"device": CPU}
            if func is aten._to_copy.default:  # which copies nothing that has the dtype already
                args = args[0].clone(), *args[1:]
        if func in (aten.mm.dtype, aten.mm.dtype_out):  # float32 from bfloat16, which the CPU has not
            func = wide_product
        out = self.graph.add(func, args, kwargs) if self.graph else func(*args, **kwargs)
        if target == "cpu":
            return out
        # what was written in place comes back as the tensor it is
        return tree_map_only(torch.Tensor, lambda t: ours[id(t)] if id(t) in ours else OnCuda(t), out)

    def check(self, func, tensors, args):
        """Note a wait, refuse a mix. A CPU's tensor without dimensions is a number, which goes with all."""
        kind, strange = func.overloadpacket, [t for t in tensors if t.dim() and not isinstance(t, OnCuda)]
        waits = kind in WAITING or kind in COPYING and strange
        if kind in INDEXING:
            indices = [t for t in args[1] if t is not None]
            waits = any(t.dtype == torch.bool or not isinstance(t, OnCuda) for t in indices)
            strange = [t for t in strange if not any(t is index for index in indices)]
        if waits:
            self.wait(str(func))
        backward = kind in INDEXING and torch._C._current_graph_task_id() >= 0
        if strange and len(strange) < len(tensors) and not (kind in COPYING or backward):
            self.error(f"{func}: found at least two devices, cuda:0 and cpu {[t.shape for t in strange]}")
        assert torch.Tag.inplace_view not in func.tags, f"{func}: the stand-in's tensors keep their shape"

    def wait(self, why):
        self.waits.append(f"{place()}: {why}")
        if self.graph:
            self.error(f"operation not permitted when stream is capturing: {why}")

    def error(self, message):
        self.errors.append(f"{place()}: {message}")
        raise RuntimeError(self.errors[-1])


def wide_product(a, b, dtype, out=None):
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


class Graph:
    """torch.cuda.CUDAGraph. One whose capture was cut short raises; CUDA's would run what it has."""

    def __init__(self):
        self.kernels, self.whole = [], False

    def add(self, func, args, kwargs):
        """The operator's results, not computed: their shapes alone are worked out, on the meta device."""
        if getattr(func, "is_view", False):
            return func(*args, **kwargs)
        given = {}  # stands for which argument; both are kept, or another could get the same id

        def stand_in(t):
            shape = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")
            given[id(shape)] = t, shape
            return shape

        def real(shape):
            return given[id(shape)][0] if id(shape) in given else torch.empty_strided(
                shape.size(), shape.stride(), dtype=shape.dtype)

        shapes, more = tree_map_only(torch.Tensor, stand_in, (args, kwargs))
        out = func(*shapes, **more | ({"device": "meta"} if "device" in more else {}))
        out = tree_map_only(torch.Tensor, real, out)
        self.kernels.append((func, args, kwargs, out))
        return out

    def replay(self):
        if not self.whole:
            raise RuntimeError("replay of a graph whose capture did not come to its end")
        for func, args, kwargs, out in self.kernels:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(new, torch.Tensor) and new is not kept:  # it is if it was written in place
                    kept.copy_(new)


@contextmanager
def capture(graph, **_):
    """torch.cuda.graph."""
    Device.current.graph = graph
    try:
        yield
        graph.whole = True
    finally:
        Device.current.graph = None


def place():
    """The innermost line under way of the project's own, the tests apart."""
    frame = sys._getframe()
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and not path.startswith((f"{ROOT}tests/", f"{ROOT}.venv/")):
            return f"{path[len(ROOT):]}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"


def to_cuda(model):
    """The model, its parameters and buffers replaced by ones on the device; tied ones stay tied."""
    moved = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in moved:
                moved[p] = torch.nn.Parameter(OnCuda(p.data), requires_grad=p.requires_grad)
            module._parameters[name] = moved.get(p)
        module._buffers.update((name, OnCuda(b)) for name, b in module._buffers.items() if b is not None)
    return model


@contextmanager
def as_if_on_cuda(kernels=None):
    """Within the block `device="cuda"` works, models are loaded there, and CUDA's autocast acts."""
    device = Device.current = Device()
    load_model, autocast = models.load_model, torch.autocast

    def load(name, dtype, device, *args, **kwargs):
        return to_cuda(load_model(name, dtype, CPU, *args, **kwargs))

    class Autocast(autocast):
        def __init__(self, kind, *args, **kwargs):
            super().__init__("cpu", *args, **kwargs)

    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "no GPU",
               "get_device_capability": (9, 0), "is_bf16_supported": True, "mem_get_info": (60 * GB, 80 * GB),
               "memory_allocated": GB, "max_memory_allocated": GB, "memory_reserved": GB,
               "max_memory_reserved": GB, "utilization": 50, "graph_pool_handle": (0, 1), "set_device": None,
               "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
               "manual_seed_all": None, "_lazy_init": None}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            patch.setattr(torch, name, lambda kind="cuda", of=getattr(torch, name): of("cpu"))
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setitem(sys.modules, "common.kernels", kernels)  # without: as where Triton is missing
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(device.graph))
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(models, "load_model", load)
        # torch's own takes no tensors of a subclass
        patch.setattr(torch._C, "_InferenceMode", lambda on: torch.no_grad() if on else nullcontext())
        models.working_kernels.cache_clear()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=cuda) is a copy from the CPU
        try:
            with device:
                yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            models.working_kernels.cache_clear()
            Device.current = None
