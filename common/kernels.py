"""Three kernels for a decode step of the sampler on CUDA, in Triton, which comes with torch's CUDA builds.

With one token a row, a step is bound by memory and by the number of kernels. Each of these does in one pass
what its plain form in the scripts (`SamplerLayer`, `Sampler._decode`) does in 2 to 10, and reads live keys
alone. Products with weights are left to cuBLAS.
"""

import torch
import triton
import triton.language as tl


def fit(layer, dtype) -> bool:
    """Whether the kernels can run a SamplerLayer (heads of 256: more shared memory than small cards have)."""
    return (dtype == torch.bfloat16 and not layer.softcap and layer.head_dim in (32, 64, 128)
            and type(layer.act).__name__ in ("SiLU", "SiLUActivation") and layer.attn_out_norm is None
            and "Gemma" not in type(layer.attn_norm).__name__)


def attend(qkv, cos, sin, positions, keys, values, scale):
    """Turn each row's q and k by its position, put k and v into the cache there, attend to all up to there.

    Shapes: qkv [N, H + 2 Hkv, K], read only; cos, sin [S, 1, K], sine signed as the rotated half; positions
    [N]; keys, values [slots, Hkv, S, K], the first N rows are used -> [N, H K].
    """
    n, heads, K = qkv.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads - 2
    out = qkv.new_empty(n, kv_heads * group * K)
    few = n * kv_heads <= 256  # programs: less than two for each of the card's 132 processors
    _attend[n, kv_heads](
        qkv, cos, sin, positions, keys, values, out, qkv.stride(0), *keys.stride()[:3], scale, kv_heads,
        group, max(16, triton.next_power_of_2(group)), K, BLOCK=64 if few else 32, num_warps=8 if few else 4)
    return out


@triton.jit
def _attend(qkv, cos, sin, positions, keys, values, out, qkv_row, slot, of_head, column, scale,
            KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr,
            BLOCK: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    k, g = tl.arange(0, K), tl.arange(0, PADDED)[:, None]
    rolled = (k + K // 2) % K
    c = tl.load(cos + position * K + k).to(tl.float32)
    s = tl.load(sin + position * K + k).to(tl.float32)
    cache = row * slot + head * of_head

    new = qkv + row * qkv_row + (KV_HEADS * GROUP + head) * K
    key = tl.load(new + k).to(tl.float32) * c + tl.load(new + rolled).to(tl.float32) * s
    key, value = key.to(keys.dtype.element_ty), tl.load(new + KV_HEADS * K + k)
    tl.store(keys + cache + position * column + k, key)
    tl.store(values + cache + position * column + k, value)

    new, there = qkv + row * qkv_row + (head * GROUP + g) * K, g < GROUP  # a product takes 16 rows or more
    q = (tl.load(new + k, mask=there, other=0.0).to(tl.float32) * c
         + tl.load(new + rolled, mask=there, other=0.0).to(tl.float32) * s).to(keys.dtype.element_ty)
    # softmax as it goes (arXiv 2205.14135), the new key first: largest score, sum of exponentials, values
    top = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale  # [PADDED]
    total = tl.full([PADDED], 1.0, tl.float32)
    mixed = tl.zeros([PADDED, K], tl.float32) + value.to(tl.float32)
    for start in tl.range(0, position, BLOCK, num_stages=3):
        t = start + tl.arange(0, BLOCK)
        old, live = cache + t[:, None].to(tl.int64) * column + k, t[:, None] < position  # [BLOCK, K]
        scores = tl.dot(q, tl.trans(tl.load(keys + old, mask=live, other=0.0))) * scale
        scores = tl.where(t < position, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
        block = tl.load(values + old, mask=live, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(block.dtype), block)
        total, top = total * shrink + tl.sum(weights, 1), higher
    tl.store(out + ((row * KV_HEADS + head) * GROUP + g) * K + k, mixed / total[:, None], mask=there)


def swiglu(x):
    """silu(gate) * up, of x [N, 2 I] that holds gate and up side by side -> [N, I]."""
    n, size = len(x), x.shape[1] // 2
    out = x.new_empty(n, size)
    _swiglu[n, triton.cdiv(size, 1024)](x, out, x.stride(0), size, 1024)
    return out


@triton.jit
def _swiglu(x, out, x_row, size, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * x_row + i, mask=i < size, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + size + i, mask=i < size, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty)  # rounded as the model's own
    tl.store(out + row * size + i, gate.to(tl.float32) * up, mask=i < size)


def add_norm(x, y, norm):
    """x + y and its RMS norm by the module `norm`; x, y [N, D] -> [N, D], [N, D]."""
    n, size = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _add_norm[n,](x, y, norm.weight, total, normed, x.stride(0), y.stride(0), norm.variance_epsilon, size,
                  triton.next_power_of_2(size), num_warps=8)
    return total, normed


@triton.jit
def _add_norm(x, y, weight, total, normed, x_row, y_row, eps, size, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = i < size
    a = tl.load(x + row * x_row + i, mask=there, other=0.0).to(tl.float32)
    b = tl.load(y + row * y_row + i, mask=there, other=0.0).to(tl.float32)
    a = (a + b).to(total.dtype.element_ty)
    tl.store(total + row * size + i, a, mask=there)
    a = a.to(tl.float32)
    a = a * tl.rsqrt(tl.sum(a * a, 0) / size + eps)
    a = a * tl.load(weight + i, mask=there, other=0.0).to(tl.float32)
    tl.store(normed + row * size + i, a, mask=there)
