"""The plain path: any causal language model of transformers, through its own forward pass and its own cache.

Where the layer is the Llama family's (`models.is_fast`) the scripts' own Sampler and log-probs are faster.
The noise is keyed alike, so both paths draw the same samples from the same weights.
"""

import inspect
import itertools
from functools import lru_cache, partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import models
from common.draws import Completion, draw, uniform


def sampler(fast, model, *settings):
    """One of the class `fast` where that knows the layer, else a PlainSampler."""
    return (fast if models.is_fast(model) else PlainSampler)(model, *settings)


def own_logits(model, hidden, kind):
    """Logits [N, V] of hidden states [N, D] as the model's own class makes them: scaled, capped, biased.

    Its body is replaced by what it would return; of OPT and Gemma 3 the decoder, which is called, lies in it.
    """
    output, bodies = kind(last_hidden_state=hidden[None]), {model.base_model, model.get_decoder()}
    for body in bodies:
        body.forward = lambda *args, **more: output
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for body in bodies:
            del body.forward


def token_logprobs(model, input_ids, completion_mask, temperature=1.0, attention_mask=None, chunk_tokens=0):
    """As the scripts' function of that name; each chunk of logits is made once more in the backward pass."""
    rows, columns = completion_mask[:, 1:].nonzero(as_tuple=True)
    rows, columns = rows.to(input_ids.device), columns.to(input_ids.device)
    where = {} if attention_mask is None else accepted(
        model, attention_mask=attention_mask, position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0))
    output = model.base_model(input_ids=input_ids, use_cache=False, **where)
    hidden, targets = output.last_hidden_state[rows, columns], input_ids[rows, columns + 1]

    def chosen(hidden, targets):
        logits = own_logits(model, hidden, type(output)).float()
        return (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    size = chunk_tokens or max(16, 2**24 // model.config.get_text_config().vocab_size)
    values = [checkpoint(chosen, hidden[i:i + size], targets[i:i + size], use_reentrant=False)
              for i in range(0, len(hidden), size)]
    values = torch.cat(values) if values else hidden.new_zeros(0, dtype=torch.float32)
    return torch.zeros(input_ids.shape, device=input_ids.device).index_put((rows, columns + 1), values)


def accepted(model, **arguments):
    """Those of the arguments that the model's forward pass takes: a recurrent one knows no positions."""
    takes = parameters(type(model))
    return {name: value for name, value in arguments.items() if name in takes}


@lru_cache
def parameters(model_class):
    return inspect.signature(model_class.forward).parameters


def can_be_cut(cache) -> bool:
    """Whether rows of the cache can be picked: of keys and values they can, of recurrent states not."""
    return all(hasattr(layer, "batch_select_indices") and not hasattr(layer, "conv_states")
               for layer in cache.layers)


class PlainSampler:
    """Samples completions in left-padded batches of at most `slots` rows, the shortest prompts first.

    A prompt is run once for those of its samples that stand in one batch, where the cache can be repeated;
    rows that have ended leave as soon as they are half of the batch, where it can be cut.
    """

    def __init__(self, model, stop_ids, slots=256, dtype=None, stop_texts=None):
        self.model, self.stop_ids, self.stop_texts, self.slots = model, set(stop_ids), stop_texts, slots
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.cache_name = "cache_params" if accepted(model, cache_params=0) else "past_key_values"

    def cache_bytes(self, length):
        """What the keys and values of all slots take, if all layers keep them."""
        c = self.model.config.get_text_config()
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        return 2 * c.num_hidden_layers * self.slots * heads * size * length * self.dtype.itemsize

    @torch.inference_mode()
    def sample(self, prompts, keys, max_new_tokens, temperature=1.0, progress=None):
        """As the scripts' Sampler."""
        if not all(prompts):
            raise ValueError("a prompt has no tokens; there is nothing to continue")
        done = [[None] * len(row) for row in keys]
        order = sorted(((p, g) for p, row in enumerate(keys) for g in range(len(row))),
                       key=lambda row: (len(prompts[row[0]]), row))
        batches = [order[first:first + self.slots] for first in range(0, len(order), self.slots)]
        n_done = 0
        with models.not_training(self.model):
            for ended in itertools.chain.from_iterable(
                    self.batch(prompts, keys, rows, max_new_tokens, temperature) for rows in batches):
                for p, g, completion in ended:
                    done[p][g] = completion
                n_done += len(ended)
                if progress:
                    progress(n_done, len(order), ended)
        return done

    def batch(self, prompts, keys, rows, max_new_tokens, temperature):
        """Yields [(p, g, Completion)] as rows (p, g) end."""
        which = list(dict.fromkeys(p for p, _ in rows))  # each prompt once
        T = max(len(prompts[p]) for p in which)
        new = partial(torch.tensor, device=self.device)
        ids = new([[0] * (T - len(prompts[p])) + prompts[p] for p in which])
        mask = new([[0] * (T - len(prompts[p])) + [1] * len(prompts[p]) for p in which])
        repeats, keys = new([which.index(p) for p, _ in rows]), new([keys[p][g] for p, g in rows])
        output = self.step(ids, mask)
        if cuts := can_be_cut(output[self.cache_name]):
            output[self.cache_name].batch_select_indices(repeats)
            output.logits = output.logits[repeats]
        elif len(which) < len(rows):
            output = self.step(ids[repeats], mask[repeats])
        cache, logits, mask = output[self.cache_name], output.logits[:, -1].float(), mask[repeats]
        positions, found = mask.sum(1), [([], []) for _ in rows]  # of the next token; ids and log-probs
        while rows:
            tokens, logprobs = draw(logits, temperature, uniform(keys, positions))
            ended = []
            for i, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
                if rows[i] is None:
                    continue
                found[i][0].append(token)
                found[i][1].append(logprob)
                if completion := self.completion(*found[i], max_new_tokens):
                    ended.append((*rows[i], completion))
                    rows[i] = None
            if ended:
                yield ended
            live = [i for i, row in enumerate(rows) if row is not None]
            if not live:
                return
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            if cuts and 2 * len(live) <= len(rows):
                cache.batch_select_indices(keep := new(live))
                tokens, mask, positions, keys = (x[keep] for x in (tokens, mask, positions, keys))
                rows, found = [rows[i] for i in live], [found[i] for i in live]
            output = self.step(tokens[:, None], mask, positions[:, None], cache)
            cache, logits, positions = output[self.cache_name], output.logits[:, -1].float(), positions + 1

    def step(self, ids, mask, positions=None, cache=None):
        positions = (mask.cumsum(1) - 1).clamp(min=0) if positions is None else positions
        more = accepted(self.model, position_ids=positions, logits_to_keep=1, **{self.cache_name: cache})
        return self.model(input_ids=ids, attention_mask=mask, use_cache=True, **more)

    def completion(self, ids, logprobs, max_new_tokens):
        """The row's Completion if it ends here, else None."""
        tail = ids[-self.stop_texts.window:] if self.stop_texts else ids
        if self.stop_texts and self.stop_texts.find(tail) >= 0:
            n, cut = self.stop_texts.end(ids)
            return Completion(ids[:n], logprobs[:n], True, cut)
        finished = ids[-1] in self.stop_ids
        return Completion(ids, logprobs, finished) if finished or len(ids) == max_new_tokens else None
