"""What samplers draw: completions, token by token, by noise that is a hash of a row's key and the position.

Without a generator's state a token's noise depends on neither its slot nor the batch, the number of ranks or
a captured graph.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jinja2 import TemplateError


@dataclass
class Completion:
    """A sampled answer: token ids (stop token included), their log-probs, whether it stopped by itself."""

    ids: list[int]
    logprobs: list[float]
    finished: bool

    def text(self, tokenizer):
        """What it says, from what the prompt has begun of it (`answer_opening`) to the stop token."""
        ids = self.ids[:-1] if self.finished else self.ids
        silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        return answer_opening(tokenizer) + tokenizer.decode([i for i in ids if i not in silent])


@lru_cache(maxsize=8)
def answer_opening(tokenizer) -> str:
    """What the chat template itself writes of every answer: <think> of models that always think."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False,
                                               add_generation_prompt=True)
    except TemplateError:  # `data.encode_prompt` will say it
        return ""
    return re.search(r"(?:<think>\s*(?:</think>\s*)?)?\Z", prompt)[0]


def noise_key(*parts: int) -> int:
    """A signed 64-bit key from integers like (seed, step, question, sample): the same on every machine."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(keys, positions):
    """A float32 in (0, 1) from each key and position, int64 tensors that broadcast: splitmix64, a counter."""
    x = keys + positions * -7046029254386353131  # 2^64 / golden ratio; int64 products wrap around
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return ((x >> 41 & (1 << 23) - 1).float() + 0.5) / (1 << 23)  # 24 bits: exact in float32, never 0 or 1


def draw(logits, temperature, u):
    """Invert the distribution function of softmax(logits / temperature) at u; temperature 0 takes the top.

    Shapes: logits [B, V] float32, overwritten; u [B] -> tokens, log-probs [B] (at temperature 0: of 1).
    The sum runs over blocks, then inside one: faster and more exact in float32 than one long cumulative sum.
    """
    if temperature == 0:
        best, tokens = logits.max(-1)
        return tokens, best - logits.logsumexp(-1)
    probs = torch.softmax(logits.div_(temperature) if temperature != 1 else logits, -1, out=logits)
    width = math.gcd(probs.shape[1], 128)
    blocks = probs.view(len(probs), -1, width)  # [B, V / width, width]
    edges = F.pad(blocks.sum(-1).cumsum(-1), (1, 0))  # [B, V / width + 1]: the sum before each block, and all
    target = u[:, None] * edges[:, -1:]
    block = torch.searchsorted(edges, target, right=True).sub_(1).clamp_(max=blocks.shape[1] - 1)  # [B, 1]
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, width)).squeeze(1).cumsum(-1)  # [B, width]
    # rounding may leave the rest at or above the block's sum: stay below it, on a token that has probability
    rest = torch.minimum(target - edges.gather(1, block), inside[:, -1:] * (1 - 1e-6))
    tokens = torch.searchsorted(inside, rest, right=True).clamp_(max=width - 1).add_(block, alpha=width)
    return tokens.squeeze(1), probs.gather(1, tokens).log().squeeze(1)
