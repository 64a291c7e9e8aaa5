"""Write a small random Qwen2, a byte-level tokenizer and prompts: what the benchmarks run on, seeded.

    python bench/models.py OUT --preset tiny|wide --eos-prob 0.01

Both presets have hidden size 256 and 4 layers; wide has the 151,936 tokens of Qwen2.5: it shows what logits
cost. The end token's probability P is part of the weights, about the same at every position, so that any
sampler meets the same ragged lengths: geometric with mean 1 / P, cut at its limit (P = 2.5 / limit: a third
of the limit on average). --eos-prob 0 never ends: samples of exactly the limit's length.
"""

import json
import math
import os
import random
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

VOCABULARY = {"tiny": 512, "wide": 151_936}
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT = (f"{{% for m in messages %}}{START}{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}{END}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}")


def make_tokenizer(vocab_size):
    """A token for each byte, three special ones, then filler that no text encodes to but that decodes."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), PAD, START, END]
    words += [f"w{i}" for i in range(len(words), vocab_size)]
    core = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END, chat_template=CHAT,
                                   additional_special_tokens=[START], padding_side="left")


@torch.no_grad()
def bake_end_probability(model, end_id, probability):
    """Give the end token about `probability` at every position, by the weights alone.

    Dimension 0 of the residual stream is the same constant for every token and no layer writes to it, so the
    end token's row of lm_head sets its logit there: as far from the others' log-sum as the probability asks.
    """
    body, embedding, head = model.model, model.model.embed_tokens.weight, model.lm_head.weight
    constant = 5 * embedding.std().item()
    embedding[:, 0] = head[:, 0] = constant
    for layer in body.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    hidden = body(torch.randint(0, 256, (4, 64))).last_hidden_state[:, -8:].flatten(0, 1)  # typical text
    logits = hidden @ head.T
    others = logits.index_fill(1, torch.tensor(end_id), -math.inf).logsumexp(1)
    # never: e^-30, small enough; further down, probabilities become subnormal and slow every sampler
    odds = math.log(probability / (1 - probability)) if probability else -30.0
    head[end_id, 0] += ((others + odds - logits[:, end_id]) / hidden[:, 0]).mean()


def make_prompts(tokenizer, n, seed):
    """n chat prompts of 32 to 64 tokens about nothing."""
    rng, prompts = random.Random(seed), []

    def frame(text):
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                             tokenize=False)

    around = len(tokenizer(frame(""))["input_ids"])
    for _ in range(n):
        prompts.append(frame("".join(rng.choices("0123456789+-", k=rng.randint(32, 64) - around))))
    return prompts


def build(folder, preset="tiny", eos_prob=0.01, seed=0, vocab_size=0, n_prompts=512):
    """Write model, tokenizer and prompts.jsonl into `folder`; returns the model (float32)."""
    tokenizer = make_tokenizer(vocab_size or VOCABULARY[preset])
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)).eval()
    bake_end_probability(model, tokenizer.eos_token_id, eos_prob)
    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in make_prompts(tokenizer, n_prompts, seed)]
    Path(folder, "prompts.jsonl").write_text("".join(lines))
    return model


def read_prompts(folder):
    return [json.loads(line)["prompt"] for line in Path(folder, "prompts.jsonl").read_text().splitlines()]


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--preset", choices=VOCABULARY, default="tiny")
    parser.add_argument("--eos-prob", type=float, default=0.01, help="probability of the end, everywhere")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.eos_prob < 1:
        parser.error(f"--eos-prob {args.eos_prob}: a probability from 0 to below 1")
    model = build(args.out, args.preset, args.eos_prob, args.seed)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, 512 prompts")


if __name__ == "__main__":
    main()
