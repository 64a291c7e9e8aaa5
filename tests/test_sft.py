"""sft.py's own blocks: the loss is the completions' alone, whatever the micro-batches, and it learns."""

import json
from collections import Counter

import pytest
import torch

import sft
from common import data
from tests.tiny_models import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
END = 2  # the end token of the tiny tokenizer; it is also its padding's stand-in here


def make_rows(n=7, seed=0):
    """(prompt ids, completion ids) of unequal lengths, each completion closed by the end token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, 384, (length,), generator=generator).tolist()

    return [(ids(3 + 5 * i % 11), ids(1 + 7 * i % 13) + [END]) for i in range(n)]


def adapted(kind="qwen2"):
    """A tiny model with an adapter that is not zero, and its parameters."""
    model = tiny_model(kind)
    params = sft.add_lora(model, "policy", 4, 8, ["q_proj", "v_proj", "down_proj"])
    with torch.no_grad():
        for p in params:
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(p)))
    return model, params


def total(rows):
    return sum(len(completion) for _, completion in rows)


def gradient(model, params, rows, n_tokens, tokens_per_batch):
    """(loss, the gradient as one vector) of accumulate_gradients."""
    for p in params:
        p.grad = None
    loss = sft.accumulate_gradients(model, rows, n_tokens, tokens_per_batch, CPU)
    return loss, torch.cat([p.grad.flatten() for p in params])


def close(one, other):
    """Float32 sums of some hundred terms in another order: 1e-5 of the largest."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_loss_and_gradient_are_those_of_transformers(kind):
    """One padded batch with labels -100 outside the completions, padded with the end token itself."""
    model, params = adapted(kind)
    rows = make_rows()
    T = max(len(p) + len(c) for p, c in rows)
    input_ids, labels = torch.full((len(rows), T), END), torch.full((len(rows), T), -100)
    attention_mask = torch.zeros(len(rows), T, dtype=torch.int64)
    for i, (p, c) in enumerate(rows):
        input_ids[i, :len(p) + len(c)] = torch.tensor(p + c)
        labels[i, len(p):len(p) + len(c)] = torch.tensor(c)
        attention_mask[i, :len(p) + len(c)] = 1
    expected = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    expected.backward()
    expected_gradient = torch.cat([p.grad.flatten() for p in params])
    assert expected_gradient.abs().max() > 1e-3

    loss, found = gradient(model, params, rows, total(rows), 10**9)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    close(found, expected_gradient)


@pytest.mark.parametrize("tokens_per_batch, batches", [(10**9, 1), (90, 2), (40, 4)])
def test_micro_batches_of_unequal_sizes_change_nothing(tokens_per_batch, batches):
    model, params = adapted()
    rows = make_rows()
    parts = sft.split_by_length([len(p) + len(c) for p, c in rows], tokens_per_batch)
    sizes = [total([rows[i] for i in part]) for part in parts]
    assert len(sizes) == batches and (batches == 1 or len(set(sizes)) > 1)
    loss, found = gradient(model, params, rows, total(rows), tokens_per_batch)
    alone = [gradient(model, params, [row], total(rows), 1) for row in rows]
    assert loss == pytest.approx(sum(part for part, _ in alone), rel=1e-5)
    close(found, torch.stack([part for _, part in alone]).sum(0))


def test_shares_of_the_ranks_add_up_and_an_empty_one_adds_nothing():
    """n_tokens counts the whole step: the sum over ranks is the gradient of one process."""
    model, params = adapted()
    rows = make_rows()
    loss, whole = gradient(model, params, rows, total(rows), 10**9)
    shares = [gradient(model, params, rows[rank::3], total(rows), 10**9) for rank in range(3)]
    assert loss == pytest.approx(sum(part for part, _ in shares), rel=1e-5)
    close(torch.stack([part for _, part in shares]).sum(0), whole)
    assert sft.accumulate_gradients(model, [], total(rows), 10**9, CPU) == 0


def test_prompt_tokens_and_padding_get_no_loss():
    """The hidden states with a gradient are those that predict a completion token, the end token included."""
    model, _ = adapted()
    rows = make_rows()
    states = []

    def keep(module, inputs, output):
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    model.base_model.register_forward_hook(keep)
    sft.accumulate_gradients(model, rows, total(rows), 10**9, CPU)
    (hidden,) = states
    order = sft.split_by_length([len(p) + len(c) for p, c in rows], 10**9)[0]
    for i, state in zip(order, hidden.grad):
        p, c = rows[i]
        predicting = [t for t, row in enumerate(state) if row.any()]
        assert predicting == list(range(len(p) - 1, len(p) + len(c) - 1))


def test_a_changed_prompt_token_is_read_but_not_predicted():
    """The loss is the completion's, by hand from the model's logits."""
    model, params = adapted()
    (p, c), other = ([5, 6, 7, 8], [9, 10, END]), [5, 99, 7, 8]
    for prompt in (p, other):
        logprobs = model(torch.tensor([prompt + c])).logits[0].log_softmax(-1)
        expected = -sum(logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(c)).item() / len(c)
        assert gradient(model, params, [(prompt, c)], len(c), 10**9)[0] == pytest.approx(expected, rel=1e-5)


def test_it_learns_a_batch_by_heart():
    """With an adapter alone; the frozen lm_head must be loud enough for a probability near 1."""
    model = tiny_model("llama")
    model.lm_head.weight.data *= 2
    params = sft.add_lora(model, "policy", 16, 32, sft.models.PROJECTIONS)
    rows = make_rows(n=6, seed=1)
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(sft.accumulate_gradients(model, rows, total(rows), 60, CPU))
        optimizer.step()
    assert losses[0] > 3 and losses[-1] < 0.05


def chat(*contents, roles=("user", "assistant", "user")):
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


@pytest.mark.parametrize("prompt", [
    "Compute 1+1.", chat("Hi", "Hello.", "Bye"), chat("Be brief.", "Compute 1+1.", roles=("system", "user"))])
@pytest.mark.parametrize("completion", ["<think>2</think> 2", " two", "2\n", "2<|im_end|>", ""])
def test_the_rows_are_what_the_chat_template_writes(prompt, completion):
    """C-40: prompt and completion, tokenised apart, begin the whole chat; there is exactly one end token."""
    tokenizer = tiny_tokenizer()
    p = data.encode_prompt(tokenizer, prompt)
    c = data.encode_completion(tokenizer, completion, tokenizer.eos_token_id)
    reply = chat(completion.removesuffix("<|im_end|>"), roles=("assistant",))
    messages = (chat(prompt) if isinstance(prompt, str) else prompt) + reply
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert whole[:len(p) + len(c)] == p + c
    assert c.count(tokenizer.eos_token_id) == 1 and c[-1] == tokenizer.eos_token_id


def test_train_on_all_answers_of_a_conversation(tmp_path):
    """A conversation is trained or held out as a whole; a row of one question is as before."""
    def turns(i, n):
        return [{"role": role, "content": f"{role[0]}{i}.{k}"} for k in range(n) for role in ("user", "assistant")]

    rows = [{"messages": turns(i, 1 + i % 3)} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer()
    parts = {}
    for train_on in ("last", "all"):
        args = sft.Args(data=str(tmp_path / "a.jsonl"), eval_questions=2, train_on=train_on)
        train, held_out, encoded = sft.load_rows(args, tokenizer, Counter())
        parts[train_on] = [{e.completion for e in part} for part in (train, held_out)]
        assert all(tokenizer.decode(encoded[e.id][1][:-1]) == e.completion for e in train + held_out)
        assert all(e.completion.replace("a", "u") in tokenizer.decode(encoded[e.id][0]) for e in train + held_out)
    last, every = parts["last"], parts["all"]
    assert len(last[0] | last[1]) == 9 and every[0] | every[1] == {f"a{i}.{k}" for i in range(9)
                                                                 for k in range(1 + i % 3)}
    for some, more in zip(last, every):
        assert some <= more and {text.split(".")[0] for text in some} == {text.split(".")[0] for text in more}
