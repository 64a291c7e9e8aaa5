"""common/kernels.py, run by Triton's interpreter on the CPU, against the plain forms of the scripts."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-3}  # of results of about 4


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton for this system")
def test_kernels_are_the_plain_forms():
    """In a process of its own: Triton asks how to run when it is imported, which another test may do."""
    done = subprocess.run([sys.executable, "-m", "tests.test_kernels"], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1], env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and done.stdout.count("ok") == 9, done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton for this system")
@pytest.mark.parametrize("change, fits", [
    ({}, True), ({"softcap": 50.0}, False), ({"head_dim": 96}, False), ({"head_dim": 256}, False),
    ({"act": torch.nn.GELU()}, False), ({"attn_out_norm": torch.nn.Identity()}, False),
    ({"attn_norm": type("GemmaRMSNorm", (), {})()}, False)])
def test_layers_of_another_form_are_left_to_the_plain_forms(change, fits):
    from common import kernels

    layer = {"softcap": None, "head_dim": 64, "act": torch.nn.SiLU(), "attn_out_norm": None,
             "attn_norm": type("Qwen2RMSNorm", (), {})()}
    assert kernels.fit(SimpleNamespace(**layer | change), torch.bfloat16) == fits
    assert not kernels.fit(SimpleNamespace(**layer), torch.float32)


def rotate(qkv, kv_heads, cos, sin):
    """RoFormer's rotation (arXiv 2104.09864 eq. 34) of q and k; the sine is signed as the rotated half.

    qkv [N, H + 2 Hkv, K] -> q [N, H, K], kv [N, 2, Hkv, K].
    """
    first, second = qkv.chunk(2, -1)
    turned = qkv * cos + torch.cat([second, first], -1) * sin
    q, k, v = turned[:, :-2 * kv_heads], turned[:, -2 * kv_heads:-kv_heads], qkv[:, -kv_heads:]
    return q, torch.stack([k, v], 1)


def check_attend(kernels, kv_heads, group, K, dtype, positions=(0, 1, 63, 64, 150)):
    """Rows at the first position, inside, at the border of and after blocks of 64 keys; qkv is a slice."""
    torch.manual_seed(0)
    n, S, heads = len(positions), 200, kv_heads * group
    qkv = torch.randn(n, (heads + 2 * kv_heads) * K + 7).to(dtype)[:, :-7].view(n, -1, K)
    angles = 6 * torch.rand(S, 1, K // 2)
    cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    positions = torch.tensor(positions)
    cache = torch.randn(2, n + 2, kv_heads, S, K).to(dtype)
    dead = torch.arange(S) > positions[:, None]
    cache[:, :n] = cache[:, :n].masked_fill(dead[:, None, :, None], torch.nan)  # must not be read
    expected = cache.clone()

    got = kernels.attend(qkv, cos, sin, positions, *cache, scale=K**-0.5)
    q, kv = rotate(qkv.float(), kv_heads, cos[positions].float(), sin[positions].float())
    expected[:, torch.arange(n), :, positions] = kv.to(dtype)
    torch.testing.assert_close(cache, expected, rtol=0, atol=ROUNDING[dtype], equal_nan=True)
    for row, position in enumerate(positions):
        k, v = (x[row, :, :position + 1].float() for x in expected)
        want = F.scaled_dot_product_attention(q[row].to(dtype).float().view(kv_heads, group, K), k, v)
        assert (got[row].float() - want.flatten()).abs().max() <= ROUNDING[dtype]


def check_swiglu_and_add_norm(kernels, dtype):
    """Sizes that are no multiple of a block, rows that lie in a wider tensor."""
    torch.manual_seed(0)
    x = torch.randn(4, 3003).to(dtype)[:, :3000]
    assert (kernels.swiglu(x) - F.silu(x[:, :1500]) * x[:, 1500:]).abs().max() <= ROUNDING[dtype]
    x, y, weight = *torch.randn(2, 4, 303).to(dtype)[:, :, :300], torch.rand(300).to(dtype)
    total, normed = kernels.add_norm(x, y, SimpleNamespace(weight=weight, variance_epsilon=1e-5))
    assert torch.equal(total, x + y)
    assert (normed - F.rms_norm(x + y, (300,), weight, 1e-5)).abs().max() <= ROUNDING[dtype]


if __name__ == "__main__":
    from common import kernels

    for dtype in ROUNDING:
        for sizes in ((2, 3, 32), (1, 17, 64), (2, 1, 32)):  # kv_heads, group, K
            check_attend(kernels, *sizes, dtype)
            print("ok")
        check_swiglu_and_add_norm(kernels, dtype)
        print("ok")
    check_attend(kernels, 2, 2, 32, torch.float32, [(7 * i) % 70 for i in range(130)])  # blocks of 32 keys
    print("ok")
