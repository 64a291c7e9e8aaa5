"""What samplers draw: completions, token by token, by noise that is a hash of a row's key and the position.

Without a generator's state a token's noise depends on neither its slot nor the batch, the number of ranks or
a captured graph. And where a completion ends: at an end token, at a --stop text, or cut off.
"""

import hashlib
import math
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from jinja2 import TemplateError

from common import dist


@dataclass
class Completion:
    """A sampled answer: token ids (end token included), their log-probs, whether it stopped by itself."""

    ids: list[int]
    logprobs: list[float]
    finished: bool
    # of a row that a --stop text ended: how many characters of that text its last token holds
    cut: int | None = None

    def text(self, tokenizer):
        """What it says, from what the prompt has begun of it (`answer_opening`) to what ended it."""
        ids = self.ids[:-1] if self.finished and self.cut is None else self.ids
        text = decode(tokenizer, ids)
        return answer_opening(tokenizer) + text[:len(text) - (self.cut or 0)]


def decode(tokenizer, ids) -> str:
    """The text of sampled ids, tags that are special tokens included."""
    silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return tokenizer.decode([i for i in ids if i not in silent])


# where a base model goes on with the next example of its own, beside the words of --prompt-template
NEXT_EXAMPLE = ("\nQuestion:", "\nQ:", "\nProblem:", "\nHuman:", "\nUser:")


class StopTexts:
    """Texts at which an answer ends: --stop, else, without a chat template, where the next example begins.

    State: `texts`; `window`, the most tokens that one of them can take.
    """

    def __init__(self, tokenizer, stop=(), prompt_template="{prompt}", dry_run=False):
        self.tokenizer, self.texts = tokenizer, stop
        if stop == ("none",) or dry_run:  # whose answers all run to full length
            self.texts = ()
        elif not stop and not tokenizer.chat_template:
            before = prompt_template.partition("{prompt}")[0].strip()
            self.texts = NEXT_EXAMPLE + ((f"\n{before}",) if before else ())
            if dist.is_main():
                print("no chat template: an answer ends where the next question begins, too, at one of "
                      f"{' '.join(map(repr, self.texts))} (--stop)")
        # a token has a byte or more
        self.window = 1 + max((len(text.encode()) for text in self.texts), default=0)

    def __bool__(self):
        return bool(self.texts)

    def find(self, ids) -> int:
        """Where in the text of ids the first of the texts begins, or -1."""
        text = decode(self.tokenizer, ids)
        return min((at for at in map(text.find, self.texts) if at >= 0), default=-1)

    def found(self, ids, positions, prompts, live, steps):
        """The live rows whose answer holds one of the texts, ended in the last `steps` tokens: their slots.

        Shapes: ids [slots, columns]; positions, of each row's last token; live: (prompt, sample) of each row.
        """
        at = torch.tensor(positions, device=ids.device)[:, None]
        window = torch.arange(1 - self.window - steps, 1, device=ids.device)
        tails = ids[:len(positions)].gather(1, (at + window).clamp(min=0)).tolist()
        sampled = [position + 1 - len(prompts[p]) for position, (p, _) in zip(positions, live)]
        return [slot for slot, tail in enumerate(tails) if self.find(tail[-sampled[slot]:]) >= 0]

    def end(self, ids):
        """(how many of a row's ids stay, its `Completion.cut`): those that hold something before the text.

        At least one stays. What was sampled behind the text changes nothing: it ends where it first is whole.
        """
        lengths = range(1, len(ids) + 1)
        whole = bisect_left(lengths, True, key=lambda n: self.find(ids[:n]) >= 0) + 1
        if whole > len(ids):
            return len(ids), None
        before = decode(self.tokenizer, ids[:whole])[:self.find(ids[:whole])]
        said = partial(decode, self.tokenizer)
        kept = bisect_left(lengths, True, key=lambda n: said(ids[:n]).startswith(before)) + 1
        return kept, len(said(ids[:kept])) - len(before)


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


@lru_cache(maxsize=8)
def answer_prefix(tokenizer) -> str:
    """What the template writes in front of an answer that is given to it, behind what ends a prompt.

    Of Qwen3 an empty thinking block, of gpt-oss the channel.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ""
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "#answer#"}]
    try:
        prompt, before = render(turns[:1], add_generation_prompt=True), render(turns).partition("#answer#")[0]
    except TemplateError:
        return ""
    return before[len(prompt):] if before.startswith(prompt) else ""


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
