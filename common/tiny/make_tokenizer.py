"""Write the embedded model's tokenizer and configuration into this folder: step one of README.md's recipe.

    python common/tiny/make_tokenizer.py

Byte-level BPE (any text round-trips), digits one by one (a number's value must not depend on how it was cut),
and the marks <think>, </think>, <answer>, </answer> as single tokens that decoding keeps.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config

FOLDER = Path(__file__).parent
VOCABULARY = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ["<think>", "</think>", "<answer>", "</answer>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message['role'] }}\n{{ message['content'] }}" + END
    + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)
# The words of the generated tasks: enough for BPE to make one token of each.
CORPUS = ["user\n", "assistant\n", "system\n", "Compute ", "Using the numbers", ", make",
          "Use each number at most once", ", with + - * / and parentheses.", "Invert the matrix",
          "Bring the matrix to reduced row echelon form", "not invertible", " is", " so", "The answer is",
          "Think step by step."] * 8


def main() -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, min_frequency=2, special_tokens=[PAD, START, END],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    tokenizer.add_tokens(MARKS)  # ordinary added tokens: skip_special_tokens leaves them in the text
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(FOLDER)
    Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"], eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    ).save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
