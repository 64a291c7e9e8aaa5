"""Computing in float64 what scripts compute in float32, so that no token depends on the CPU.

Products over a batch of another shape are rounded in another way, which depends on the instruction set, and a
draw that lies so near the boundary between two tokens falls on the other one. Of some thousand draws now and
then one lies within 1e-7, and none within 1e-14.
"""

import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from common import checks, data, dist, models, rewards, run, shard


class Torch(types.ModuleType):
    """torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def softmax(original, x, dim, dtype=None):
    return original(x, dim, dtype=torch.float64 if dtype == torch.float32 else dtype)


def use_float64(script, setattr=setattr):
    """For this process, or for as long as `setattr` does: in a script (a module) and in common/."""
    for module in (script, checks, data, dist, models, rewards, run, shard):
        if hasattr(module, "torch"):
            setattr(module, "torch", Torch("torch"))
    setattr(torch.Tensor, "float", torch.Tensor.double)
    setattr(F, "softmax", partial(softmax, F.softmax))  # of transformers' eager attention
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def float64(monkeypatch):
    """A test of grpo.py's functions in float64."""
    import grpo

    use_float64(grpo, monkeypatch.setattr)
    yield
    torch.set_default_dtype(torch.float32)
