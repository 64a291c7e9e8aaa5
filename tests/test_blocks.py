"""The blocks that every script shares, against independent references: LoRA, log-probs of given tokens, sampler."""

import copy
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from common import checks, models
from grpo import (
    FusedLinear,
    LoRALinear,
    Sampler,
    SamplerLayer,
    add_lora,
    completion_logprobs,
    draw,
    enable_checkpointing,
    lora_modules,
    make_batch,
    merged_state_dict,
    noise_key,
    token_logprobs,
    uniform,
    use_adapter,
)
from tests.tiny_models import (
    KINDS,
    SIZES,
    adapted_model,
    assert_close,
    greedy_by_generate,
    shake,
    some_prompts,
    spread,
    tiny_model,
    tiny_tokenizer,
)

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    """add_lora draws from torch's own generator: each test starts it alike, alone or among others."""
    torch.manual_seed(0)


PROMPTS = some_prompts((4, 1, 9, 17, 30, 5, 2))  # the longest and 24 more need a second block of the cache
KEYS = [[noise_key(0, 0, p, g) for g in range(3)] for p in range(len(PROMPTS))]
ROWS = list(zip(some_prompts((3, 7, 1)), some_prompts((6, 2, 9), seed=1)))  # (prompt ids, completion ids)


def reference_logprobs(model, ids, temperature=1.0):
    """Log-softmax of the model's own logits for one row alone, [T - 1]: entry t - 1 belongs to token t."""
    ids = torch.tensor(ids)
    logits = model(ids[None]).logits[0].float() / temperature
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


def padded(rows, side):
    """input_ids, completion_mask, attention_mask [B, T] of (prompt, completion) pairs; random padding."""
    T = max(len(p) + len(c) for p, c in rows) + 3
    input_ids = torch.randint(SIZES["vocab_size"], (len(rows), T), generator=torch.Generator().manual_seed(9))
    completion, attended = torch.zeros(2, len(rows), T, dtype=torch.bool)
    for i, (p, c) in enumerate(rows):
        first = T - len(p) - len(c) if side == "left" else 0
        row = slice(first, first + len(p) + len(c))
        input_ids[i, row], attended[i, row] = torch.tensor(p + c), True
        completion[i, first + len(p):row.stop] = True
    return input_ids, completion, attended.long() if side != "right" else None


def gradients(loss, params):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])


# ---- log-probs of given tokens ----

@pytest.mark.parametrize("trained", ["adapter", "all weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_gradients_are_those_of_the_models_logits(kind, trained):
    """Against log_softmax(model(...).logits / temperature), each row alone; 1e-5: float32 rounding."""
    model, params = adapted_model(kind)
    if trained == "all weights":
        model = tiny_model(kind)
        params = list(model.parameters())
    model.train()
    enable_checkpointing(model)
    for temperature in (1.0, 0.6):
        generator = torch.Generator().manual_seed(0)
        model.gradient_checkpointing_disable()
        expected, loss, weights = [], 0.0, []
        for p, c in ROWS:
            expected.append(reference_logprobs(model, p + c, temperature)[len(p) - 1:])
            weights.append(torch.randn(len(c), generator=generator) / 17)  # 17 tokens: a mean, of either sign
            loss = loss + (weights[-1] * expected[-1]).sum()
        expected_grad = gradients(loss, params)
        assert expected_grad.abs().max() > 0.01  # else the comparison below says nothing

        for checkpointing in (False, True):
            if checkpointing:
                enable_checkpointing(model)
            for side in ("unpadded", "right", "right, with a mask", "left"):
                for chunk_tokens in (0, 5):
                    parts = [[row] for row in ROWS] if side == "unpadded" else [ROWS]
                    got, loss = [], 0.0
                    for part in parts:
                        input_ids, mask, attended = padded(part, side)
                        if side == "unpadded":
                            input_ids, mask, attended = input_ids[:, :-3], mask[:, :-3], None
                        values = token_logprobs(model, input_ids, mask, temperature, attended, chunk_tokens)
                        assert values.dtype == torch.float32 and not values[~mask].any()
                        got += [row[of_row] for row, of_row in zip(values, mask)]
                    loss = sum((w * v).sum() for w, v in zip(weights, got))
                    where = f"{side}, chunks of {chunk_tokens}, checkpointing {checkpointing}"
                    assert (torch.cat(got) - torch.cat(expected)).abs().max() <= 1e-5, where
                    assert_close(gradients(loss, params), expected_grad, 1e-5)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_positions_count_real_tokens_only(kind):
    """With learned positions a padded row that counted its padding would read other embeddings (C-6)."""
    sizes = {"opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "max_position_embeddings": 64},
             "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=384, **sizes[kind])).eval()
    spread(model)
    params = list(model.parameters())
    expected = [reference_logprobs(model, p + c)[len(p) - 1:] for p, c in ROWS]
    expected_grad = gradients(torch.cat(expected).mean(), params)
    for side in ("right", "left"):
        input_ids, mask, attended = padded(ROWS, side)
        values = token_logprobs(model, input_ids, mask, attention_mask=attended)
        got = torch.cat([row[of_row] for row, of_row in zip(values, mask)])
        assert (got - torch.cat(expected)).abs().max() <= 1e-5, side  # float32 sums in another order
        assert_close(gradients(got.mean(), params), expected_grad, 1e-5)


def test_each_logprob_belongs_to_its_own_token():
    """C-7: by hand on four tokens, over all next tokens, and by replacing each token in turn."""
    model = tiny_model("llama", vocab_size=50)
    row = [7, 3, 41, 12]
    logits = model(torch.tensor([row])).logits[0]
    mask = torch.tensor([[False, False, True, True]])
    values = token_logprobs(model, torch.tensor([row]), mask)[0]
    assert values[:2].tolist() == [0, 0]
    for t in (2, 3):  # 1e-5: float32
        assert values[t].item() == pytest.approx(logits[t - 1].log_softmax(-1)[row[t]].item(), abs=1e-5)

    every_next = torch.tensor([row[:3] + [token] for token in range(50)])
    last = token_logprobs(model, every_next, torch.tensor([[False, False, False, True]]).expand(50, 4))[:, 3]
    assert last.exp().sum().item() == pytest.approx(1, abs=1e-5)

    everything = torch.ones(1, 4, dtype=torch.bool)
    before = token_logprobs(model, torch.tensor([row]), everything)[0]
    assert before[0] == 0  # nothing stands before the first token, and it must not wrap around to the last
    for t in range(4):
        changed = [*row[:t], (row[t] + 1) % 50, *row[t + 1:]]
        after = token_logprobs(model, torch.tensor([changed]), everything)[0]
        assert torch.equal(after[:t], before[:t])
        assert t == 0 or after[t] != before[t]
        assert (after[t + 1:] != before[t + 1:]).all()


def test_what_the_mask_leaves_out_changes_nothing_not_even_nan():
    """C-8: hidden states that predict no completion token are NaN; and a mask with nothing in it."""
    model, params = adapted_model("qwen2")
    input_ids, mask, _ = padded(ROWS, "right")
    clean = token_logprobs(model, input_ids, mask)
    clean_grad = gradients(clean.sum(), params)
    needed = torch.zeros_like(mask)
    needed[:, :-1] = mask[:, 1:]

    def poison(module, arguments, output):
        output.last_hidden_state = torch.where(needed[:, :, None], output.last_hidden_state, torch.nan)
        return output

    handle = model.base_model.register_forward_hook(poison)
    values = token_logprobs(model, input_ids, mask)
    assert torch.equal(values, clean) and torch.equal(gradients(values.sum(), params), clean_grad)
    handle.remove()

    nothing = token_logprobs(model, input_ids, torch.zeros_like(mask))
    assert not nothing.any() and not gradients(nothing.sum(), params).any()


def test_logprobs_write_into_none_of_their_arguments():
    """C-9: the inputs' versions and values are as before, and a pass in between changes no later one."""
    model, _ = adapted_model("qwen2")
    arguments = input_ids, mask, attended = padded(ROWS, "left")
    before = [(t.clone(), t._version) for t in arguments]
    first = token_logprobs(model, input_ids, mask, 0.7, attended)
    kept = first.clone()
    with use_adapter(model, None), torch.no_grad():
        reference = token_logprobs(model, input_ids, mask, 0.7, attended)
    again = token_logprobs(model, input_ids, mask, 0.7, attended)
    again.sum().backward()
    assert not torch.equal(reference, first)
    assert torch.equal(first, kept) and torch.equal(again, kept)
    for tensor, (values, version) in zip(arguments, before):
        assert torch.equal(tensor, values) and tensor._version == version


@pytest.mark.parametrize("end", [0, 2])
def test_an_end_token_that_is_also_the_padding_is_trained(end):
    """C-1, C-2: masks come from lengths; a finished row's last token is its end token, and gets gradient."""
    model = tiny_model("llama", pad_token_id=end)
    prompts, completions = some_prompts((4, 2)), [[9, 8, 7, end], [5, end]]
    input_ids, mask = make_batch(prompts, completions, CPU)
    assert mask.sum(1).tolist() == [4, 2]
    for row, of_row, p, c in zip(input_ids, mask, prompts, completions):
        assert row[:len(p)].tolist() == p and not of_row[:len(p)].any()
        assert row[of_row].tolist() == c and row[of_row][-1] == end
    grads = []
    for pad in (end, 100):
        padded_ids = input_ids.clone()
        padded_ids[1, 4:] = pad
        loss = token_logprobs(model, padded_ids, mask).sum()
        grads.append(torch.autograd.grad(loss, model.lm_head.weight)[0])
    assert grads[0][end].abs().max() > 0.1
    assert_close(grads[1], grads[0], 1e-6)  # the same rows; only what follows them differs


def test_the_soft_cap_of_the_logits_is_applied():
    """C-53: here the cap moves log-probs by far more than any tolerance, so leaving it out would show."""
    model = tiny_model("gemma2")
    input_ids, mask, _ = padded(ROWS, "right")
    capped = token_logprobs(model, input_ids, mask)
    model.config.final_logit_softcapping = None
    assert (token_logprobs(model, input_ids, mask) - capped).abs().max() > 0.1


def test_logprobs_are_taken_in_float32_from_bfloat16_weights():
    """C-44: a log-softmax in bfloat16 is off by thousandths. The logits are rounded alike, so 1e-5 holds."""
    model = tiny_model("qwen2").to(torch.bfloat16)
    prompt, completion = some_prompts((12, 30))
    input_ids, mask = make_batch([prompt], [completion], CPU)
    values = token_logprobs(model, input_ids, mask)
    assert values.dtype == torch.float32
    assert (values[mask] - reference_logprobs(model, prompt + completion)[11:]).abs().max() <= 1e-5


MEASURE = """
import resource, torch
torch.set_num_threads(1)
from grpo import token_logprobs
from tests.tiny_models import tiny_model
model = tiny_model("llama", vocab_size=151936, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
                   intermediate_size=16, num_hidden_layers=1)
ids = torch.randint(151936, (4, 1024))
mask = torch.arange(1024).expand(4, 1024) >= 768
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for trained in (False, True):
    model.lm_head.requires_grad_(trained)
    token_logprobs(model, ids, mask).sum().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_the_memory_of_logprobs_is_a_few_chunks():
    """C-44: a few times a chunk's 64 MiB, with a frozen lm_head or not.

    The logits of [4, 1024] over 151,936 tokens are 2,374 MiB, those of the 1,024 completion tokens 593 MiB,
    before any copy.
    """
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    frozen_head, trained_head = map(float, done.stdout.split())
    assert frozen_head < 450 and trained_head < 450


# ---- the sampler: noise ----

def splitmix64(key, position):
    """Vigna's splitmix64 in Python's whole numbers: the state after `position` increments, mixed."""
    x = (key + position * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_noise_is_splitmix64_of_key_and_position():
    assert splitmix64(0, 1) == 0xE220A8397B1DCDAF  # the first output of the published code for seed 0
    for key in (0, 1, -1, 2**63 - 1, -2**63, noise_key(0, 1, 2, 3)):
        for position in (0, 1, 2, 1000):
            u = uniform(torch.tensor([key]), torch.tensor([position])).item()
            assert u == ((splitmix64(key % 2**64, position) >> 41) + 0.5) / 2**23 and 0 < u < 1


def test_noise_keys_differ_in_every_part_and_do_not_depend_on_the_process():
    parts = itertools.product(range(3), range(5), range(20), range(8))  # seed, step, prompt, sample
    keys = {noise_key(*part) for part in parts}
    assert len(keys) == 3 * 5 * 20 * 8 and all(-2**63 <= key < 2**63 for key in keys)
    assert noise_key(1, 23) != noise_key(12, 3) and noise_key(-1) != noise_key(1)
    assert noise_key(0, 1, 2, 3) == -8093313811743536749  # a row of an old samples.csv can still be replayed


def test_noise_is_uniform_and_independent_of_position_and_key():
    keys = torch.tensor([noise_key(0, k) for k in range(500)])
    u = uniform(keys[:, None], torch.arange(40)[None])  # [500 keys, 40 positions]
    counts = torch.histc(u.flatten(), 50, 0, 1)
    assert chi_square_p(counts, torch.full((50,), 1 / 50)) > 1e-3
    centred = (u - 0.5) * 12**0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        correlation = ((a - 0.5) * (b - 0.5)).mean().item() * 12
        assert abs(correlation) < 4 / a.numel()**0.5  # four standard errors
    assert centred.mean().abs() < 4 / u.numel()**0.5


def chi_square_p(counts, probs):
    """The chance of counts this far from probs or further; outcomes expected less than 5 times are pooled."""
    counts, expected = counts.double().flatten(), probs.double().flatten() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(len(counts) - 1, dtype=torch.float64)
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


@pytest.mark.parametrize("vocab", [7, 512, 1300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draw_inverts_the_cumulative_distribution(vocab, temperature):
    """Against a float64 inversion: u lies between the sums before and after its token, to 1e-5 (float32)."""
    generator = torch.Generator().manual_seed(0)
    logits, u = 3 * torch.randn(400, vocab, generator=generator), torch.rand(400, generator=generator)
    tokens, logprobs = draw(logits.clone(), temperature, u)
    expected = (logits / temperature).log_softmax(-1)
    assert (logprobs - expected.gather(1, tokens[:, None])[:, 0]).abs().max() <= 1e-5  # float32
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    upper = cumulative.gather(1, tokens[:, None])[:, 0]
    lower = torch.where(tokens > 0, cumulative.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0)
    assert (u >= lower - 1e-5).all() and (u <= upper + 1e-5).all()


def test_draw_takes_only_tokens_that_have_probability():
    """At both ends of the noise, with impossible tokens around the possible ones."""
    ends = torch.tensor([0.5, 2**23 - 0.5]) / 2**23
    generator = torch.Generator().manual_seed(0)
    for possible in ([5], [700], [3, 1100], [511, 512], list(range(600, 640))):
        for trial in range(20):
            logits = torch.full((2, 1300), -torch.inf)
            logits[:, possible] = 4 * torch.randn(len(possible), generator=generator)
            tokens, logprobs = draw(logits.clone(), 1.0, ends)
            assert tokens[0] == min(possible) or torch.softmax(logits[0], -1)[min(possible)] < 1e-6
            assert tokens[1] in possible and logprobs.isfinite().all()
    tokens, logprobs = draw(torch.full((2, 512), torch.nan), 1.0, ends)  # a broken model
    assert (tokens < 512).all() and logprobs.isnan().all()
    token, logprob = draw(torch.tensor([[0.0, 2.0, 1.0]]), 0, torch.tensor([0.99]))
    assert token.item() == 1
    assert logprob.item() == pytest.approx(torch.tensor([0.0, 2.0, 1.0]).log_softmax(-1)[1].item(), abs=1e-6)


# ---- the sampler: completions ----

@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_that_of_generate(kind):
    """Token for token, with an adapter, two stop ids, and slots fewer than, as many as and more than rows."""
    model, _ = adapted_model(kind)
    free = greedy_by_generate(model, PROMPTS, 24)
    assert all(len(row) == 24 for row in free) and len({token for row in free for token in row}) > 10
    assert [c.ids for (c,) in Sampler(model, ()).sample(PROMPTS, [[0]] * 7, 24, temperature=0)] == free
    stop_ids = free[0][5], free[3][11]  # some rows end early
    expected = greedy_by_generate(model, PROMPTS, 24, stop_ids)
    assert len(expected[0]) <= 6 and len(expected[3]) <= 12
    for slots in (2, 7, 16):
        samples = Sampler(model, stop_ids, slots).sample(PROMPTS, [[0]] * 7, 24, temperature=0)
        assert [c.ids for (c,) in samples] == expected, f"{slots} slots"


def test_layers_with_biases_and_scaled_rope_are_sampled_alike():
    """Llama with biases on every projection and Llama 3's rope scaling; all weights, no adapter."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model("llama", attention_bias=True, mlp_bias=True, head_dim=12, rope_parameters=rope)
    expected = greedy_by_generate(model, PROMPTS, 24)
    assert [c.ids for (c,) in Sampler(model, (), 3).sample(PROMPTS, [[0]] * 7, 24, temperature=0)] == expected


def trainer_gap(model, samples, prompts, temperature):
    """|trainer's log-prob - sampler's| of every sampled token."""
    rows = [(p, c) for p, row in zip(prompts, samples) for c in row]
    values = completion_logprobs(model, [p for p, _ in rows], [c.ids for _, c in rows], temperature, 512, CPU)
    return (torch.cat(values) - torch.tensor([x for _, c in rows for x in c.logprobs])).abs()


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_logprobs_are_the_trainers(kind):
    """C-16, C-6: at the temperature of sampling, for every token. 1e-4: float32, other kernels and shapes."""
    model, _ = adapted_model(kind)
    for temperature in (0.5, 1.0, 1.7):
        samples = Sampler(model, (), 5).sample(PROMPTS, KEYS, 12, temperature)
        assert all(len(c.ids) == len(c.logprobs) == 12 for row in samples for c in row)
        assert trainer_gap(model, samples, PROMPTS, temperature).max() <= 1e-4
        assert trainer_gap(model, samples, PROMPTS, 1.1 * temperature).mean() > 0.01  # it does matter


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax_whatever_the_generation_config_says(temperature):
    """C-17: chi-square of 20,000 first and second tokens (prefill, decode) against the model's softmax."""
    model = tiny_model("qwen2", vocab_size=40, tie_word_embeddings=False)
    model.generation_config.update(
        do_sample=True, temperature=0.7, top_k=2, top_p=0.3, repetition_penalty=1.5)
    assert model.generation_config.top_k == 2
    prompt = [5, 17, 3]
    keys = [noise_key(1, g) for g in range(20_000)]
    (samples,) = Sampler(model, (), slots=4096).sample([prompt], [keys], 2, temperature)
    counts = torch.zeros(40, 40)
    for c in samples:
        counts[c.ids[0], c.ids[1]] += 1

    def expected(temperature):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, token] for token in range(40)])).logits / temperature
        return logits[0, 2].softmax(-1), logits[:, 3].softmax(-1)  # [V]; [V, V]: second, given the first

    first, second = expected(temperature)
    assert chi_square_p(counts.sum(1), first) > 1e-3
    assert chi_square_p(counts, first[:, None] * second) > 1e-3
    first, second = expected(1.1 * temperature)  # 20,000 draws tell a temperature from one a tenth higher
    assert chi_square_p(counts.sum(1), first) < 1e-3 and chi_square_p(counts, first[:, None] * second) < 1e-3


def assert_same(samples, expected):
    """The same tokens and ends; log-probs to 1e-12, because sums depend on the shapes of the batch: float64."""
    for row, expected_row in zip(samples, expected, strict=True):
        for c, e in zip(row, expected_row, strict=True):
            assert c.ids == e.ids and c.finished == e.finished
            assert c.logprobs == pytest.approx(e.logprobs, abs=1e-12)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_samples_depend_on_prompt_and_key_alone(kind, float64):
    """C-43, C-55: not on slots, order, other rows, how often the host looks, or what was sampled before."""
    model, _ = adapted_model(kind)
    stop_ids = range(0, 384, 16)  # rows end at all times
    expected = Sampler(model, stop_ids).sample(PROMPTS, KEYS, 24)
    rows = [c for row in expected for c in row]
    assert len({len(c.ids) for c in rows}) > 5 and len({tuple(c.ids) for c in rows}) == len(rows) == 21
    for slots, sync_every in ((1, 1), (4, 1), (4, 3), (8, 3), (64, 3)):  # 3: the host looks late
        samples = Sampler(model, stop_ids, slots, sync_every=sync_every).sample(PROMPTS, KEYS, 24)
        assert_same(samples, expected)

    order = [3, 0, 6, 2, 5, 1, 4]
    prompts, keys = [PROMPTS[p] for p in order], [KEYS[p][::-1] for p in order]
    assert_same(Sampler(model, stop_ids, 4).sample(prompts, keys, 24), [expected[p][::-1] for p in order])

    sampler = Sampler(model, stop_ids, 8)  # one from here on: nothing of an earlier call may be left over
    ranks = [sampler.sample(PROMPTS[part], KEYS[part], 24) for part in (slice(0, 3), slice(3, 7))]
    assert_same(ranks[0] + ranks[1], expected)
    assert_same(sampler.sample([PROMPTS[4]], [[KEYS[4][1]]], 24), [[expected[4][1]]])  # a replay of one row
    sampler.slots = 2  # as after running out of memory
    assert_same(sampler.sample(PROMPTS, KEYS, 24), expected)
    longer = sampler.sample(PROMPTS, KEYS, 40)  # a longer limit changes no token before it
    assert all(c.ids[:24] == e.ids for row, of_row in zip(longer, expected) for c, e in zip(row, of_row))


def test_every_stop_id_ends_a_row_and_belongs_to_it(float64):
    """C-2, C-3, C-4: a stop token is the last of its row and only that; a row without is marked cut off."""
    model = tiny_model("llama")
    stop_ids = set(range(0, 384, 24))
    prompts = [prompt + sorted(stop_ids)[:3] for prompt in PROMPTS]  # stop ids in a prompt end nothing
    keys = [[noise_key(p, g) for g in range(20)] for p in range(len(prompts))]
    samples = [c for row in Sampler(model, stop_ids, 32).sample(prompts, keys, 20) for c in row]
    for c in samples:
        assert len(c.ids) == len(c.logprobs) and not stop_ids & set(c.ids[:-1])
        assert c.finished == (c.ids[-1] in stop_ids) and (c.finished or len(c.ids) == 20)
    ends = {c.ids[-1] for c in samples if c.finished}
    assert len(ends) > 10  # of 16: each of them counts, not one
    assert any(not c.finished for c in samples) and any(len(c.ids) == 1 for c in samples)

    longest = max((c for c in samples if c.finished), key=lambda c: len(c.ids))
    index = next(i for i, c in enumerate(samples) if c is longest)
    p, g = divmod(index, 20)
    for limit, finished in ((len(longest.ids), True), (len(longest.ids) - 1, False)):
        ((c,),) = Sampler(model, stop_ids).sample([prompts[p]], [[keys[p][g]]], limit)
        assert c.ids == longest.ids[:limit] and c.finished == finished  # a stop token at the limit is a stop


def test_the_stop_ids_are_the_tokenizers_and_the_generation_configs():
    """C-3: Qwen2.5 has <|im_end|> in the one and <|endoftext|> in the other."""
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    assert models.stop_ids(model, tokenizer) == [2]
    for given, expected in ((7, [2, 7]), ([9, 2, 7], [2, 7, 9]), (None, [2])):
        model.generation_config.eos_token_id = given
        assert models.stop_ids(model, tokenizer) == expected


def test_free_slots_of_a_row_block_stay_inside_the_cache(float64):
    """As on CUDA, free slots step with the live ones: here one for longer than a whole completion takes."""
    prompts, keys = some_prompts([3] * 30), [[noise_key(25, p)] for p in range(30)]
    model = tiny_model("qwen2")
    unstopped = [row[0].ids for row in Sampler(model, ()).sample(prompts, keys, 24)]
    stop = next(token for token in unstopped[0][3:12]  # ends row 0 early and no other
                if token not in unstopped[0][:3] and not any(token in ids for ids in unstopped[1:]))
    sampler = Sampler(model, [stop], 16)
    sampler.row_block = 16  # 16 rows, of which one ends; the next 14 are admitted when the rest do
    samples = [row[0] for row in sampler.sample(prompts, keys, 24)]
    assert [c.finished for c in samples] == [True] + [False] * 29
    assert [c.ids for c in samples[1:]] == unstopped[1:]


def test_progress_counts_and_empty_calls():
    model = tiny_model("qwen2")
    seen, rows, sampler = [], {}, Sampler(model, range(0, 384, 16), 4)

    def progress(done, total, ended):
        seen.append((done, total))
        rows.update(((p, g), row.ids[:]) for p, g, row in ended)

    samples = sampler.sample(PROMPTS, KEYS, 8, progress=progress)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1] == (21, 21)
    assert rows == {(p, g): row.ids for p, of in enumerate(samples) for g, row in enumerate(of)}
    assert sampler.sample(PROMPTS[:2], [[], []], 8) == [[], []] and sampler.sample([], [], 8) == []
    with pytest.raises(ValueError, match="no tokens"):
        sampler.sample([[3], []], [[0], [0]], 8)


@pytest.mark.parametrize("case", ["adapter", "all weights", "adapter on bfloat16"])
def test_the_sampler_follows_every_optimizer_step(case):
    """C-46: one sampler before and after steps large enough to show; biases too, which are copied apart."""
    bf16 = case == "adapter on bfloat16"
    model = tiny_model("qwen2").to(torch.bfloat16 if bf16 else torch.float32)
    if case == "all weights":
        params = list(model.parameters())
    else:
        params = add_lora(model, "policy", 3, 5, models.PROJECTIONS)
    sampler = Sampler(model, (), 8)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    input_ids, mask, _ = padded(ROWS, "right")
    for _ in range(3):
        samples = sampler.sample(PROMPTS, KEYS, 6)
        gap = trainer_gap(model, samples, PROMPTS, 1.0)
        # bfloat16 keeps 8 bits: the logits, a few nats wide, are each off by some hundredths
        assert gap.mean() < 0.05 if bf16 else gap.max() <= 1e-4
        (-token_logprobs(model, input_ids, mask).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert trainer_gap(model, samples, PROMPTS, 1.0).mean() > 0.3  # a stale sampler would be seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_runs_with_the_adapter_that_is_active(dtype):
    """Base and adapter by turns with one sampler: its tokens are as likely under the model as that stands."""
    model = tiny_model("llama").to(dtype)
    shake(add_lora(model, "policy", 3, 5, models.PROJECTIONS))
    sampler = Sampler(model, (), 8)
    for name in ("policy", None, "policy"):
        with use_adapter(model, name):
            samples = sampler.sample(PROMPTS, KEYS, 6)
            gap = trainer_gap(model, samples, PROMPTS, 1.0)
            assert gap.mean() < (1e-4 if dtype == torch.float32 else 0.05)  # as above
        with use_adapter(model, None if name else "policy"):  # the other one does differ
            assert trainer_gap(model, samples, PROMPTS, 1.0).mean() > 0.2


# ---- the sampler's weights ----

def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def test_the_sampler_copies_no_weights_in_bfloat16():
    """The modules' weights become views of the fused ones: nothing is held twice, a tied head stays tied."""
    model = tiny_model("qwen2").to(torch.bfloat16)
    add_lora(model, "policy", 3, 5, models.PROJECTIONS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sampler = Sampler(model, ())
    attn, layer = model.base_model.layers[0].self_attn, sampler.layers[0]
    for part in (attn.q_proj, attn.k_proj, attn.v_proj):
        assert storage(part.base.weight) == storage(layer.qkv.weight)
    assert storage(attn.o_proj.base.weight) == storage(layer.out.weight)
    assert storage(model.lm_head.weight) == storage(model.get_input_embeddings().weight)
    assert storage(model.lm_head.weight) == storage(sampler.head.weight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    sampler.sample(PROMPTS[:2], KEYS[:2], 4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in lora_modules(model).values():
        assert module.A["policy"].dtype == module.B["policy"].dtype == torch.float32


def test_float32_adapters_are_merged_into_a_copy():
    """C-34: the pristine base is merged into a buffer of the sampler's own, never in place."""
    model, _ = adapted_model("llama")
    attn, sampler = model.base_model.layers[0].self_attn, Sampler(model, ())
    sampler.layers[0].refresh()
    assert storage(sampler.layers[0].qkv.weight) != storage(attn.q_proj.base.weight)
    merged = attn.q_proj.base.weight + 5 / 3 * attn.q_proj.B["policy"] @ attn.q_proj.A["policy"]
    assert (sampler.layers[0].qkv.rows[0] - merged).abs().max() <= 1e-6  # float32


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_fused_projections_equal_the_modules(dtype, tolerance):
    """Some parts adapted, some not, before and after the adapter moves. 0.1: bfloat16 at values up to 8."""
    generator = torch.Generator().manual_seed(0)
    parts = [nn.Linear(16, n, dtype=dtype) for n in (12, 8, 4)]
    for part in parts:
        part.weight.data.copy_(torch.randn(part.weight.shape, generator=generator) / 4)
    parts[0], parts[2] = LoRALinear(parts[0]), LoRALinear(parts[2])
    for part, r in ((parts[0], 2), (parts[2], 5)):
        part.add("policy", r, 3.0)
        part.active = "policy"
    fused, x = FusedLinear(parts, dtype), torch.randn(6, 16, generator=generator).to(dtype)
    for seed in (1, 2):
        for part in (parts[0], parts[2]):
            shake([part.A["policy"], part.B["policy"]], seed)
        fused.refresh()
        expected = torch.cat([part(x) for part in parts], 1)
        assert (fused(x).float() - expected.float()).abs().max() <= tolerance
    assert fused.merge == (dtype == torch.float32) and (fused.rank == 0) == fused.merge


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2"])
def test_bfloat16_sampler_and_trainer_agree_on_average(kind):
    """C-18: bfloat16 has 8 bits: log-probs from logits a few nats wide are off by hundredths, either way."""
    model = tiny_model(kind).to(torch.bfloat16)
    shake(add_lora(model, "policy", 3, 5, models.PROJECTIONS))
    gap = trainer_gap(model, Sampler(model, (), 8).sample(PROMPTS, KEYS, 12), PROMPTS, 1.0)
    assert gap.mean() < 0.05 and gap.max() < 0.5


def test_all_weights_in_float32_compute_in_bfloat16():
    """`--full`: a bfloat16 copy in the sampler, autocast in the trainer; gradients in float32, close."""
    model = tiny_model("qwen2")
    params, sampler = list(model.parameters()), Sampler(model, (), 8, torch.bfloat16)
    input_ids, mask, _ = padded(ROWS, "right")
    exact = gradients(token_logprobs(model, input_ids, mask).mean(), params)
    with torch.autocast("cpu", torch.bfloat16):
        samples = sampler.sample(PROMPTS, KEYS, 6)
        assert trainer_gap(model, samples, PROMPTS, 1.0).mean() < 0.05  # as above
        rounded = gradients(token_logprobs(model, input_ids, mask).mean(), params)
    assert all(p.dtype == torch.float32 for p in params) and rounded.dtype == torch.float32
    # each product is rounded to 8 bits: errors of a few percent, so a cosine some thousandths below 1
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.995
    assert storage(sampler.head.weight) != storage(model.lm_head.weight)  # the masters are not touched


# ---- the check at the start of a run ----

def adapted(kind, layers=None):
    """In bfloat16, with embeddings as small as pretrained ones (epsilon counts) and a fresh adapter."""
    model = tiny_model(kind, num_hidden_layers=3)
    model.get_input_embeddings().weight.data.mul_(0.1)
    return model.to(torch.bfloat16), add_lora(model, "policy", 3, 5, models.PROJECTIONS, layers)


def refused(model, params, seed=0):
    """Names of the checks that are off."""
    sampler, args = Sampler(model, (2,), 8, torch.bfloat16), SimpleNamespace(seed=seed, resume=False)
    found = checks.before_training(
        model, params, sampler, some_prompts((4, 40, 25), seed=seed), args, 1.0, token_logprobs,
        completion_logprobs, make_batch, use_adapter)
    assert "in float64" in found
    return [name for name, (value, limit) in found.items() if not value <= limit]


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_never_refuses_a_right_model_in_bfloat16(kind):
    """Nor does it leave anything behind: in weights, gradients, torch's random numbers."""
    for seed in range(2):
        torch.manual_seed(seed)
        model, params = adapted(kind, range(2, 3) if seed else None)
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        enable_checkpointing(model.train())
        assert refused(model, params, seed) == []
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())


def test_the_self_check_under_autocast():
    """--full in bfloat16: the weights are float32, and autocast does not reach into what is in float64."""
    model = tiny_model("qwen2", vocab_size=1536, pad_token_id=1500)  # the cut-out has not that token
    with torch.autocast("cpu", torch.bfloat16):
        assert refused(model, list(model.parameters())) == []


def shift_positions(monkeypatch):
    """By one, of sampled tokens; of the prompt's, too, it would change nothing: the encoding is relative."""
    decode = Sampler._decode

    def shifted(self, *args):
        cos, sin = self.cos, self.sin
        self.cos, self.sin = cos.roll(-1, 0), sin.roll(-1, 0)
        decode(self, *args)
        self.cos, self.sin = cos, sin

    monkeypatch.setattr(Sampler, "_decode", shifted)


def leave_out_adapters(end, monkeypatch):
    """Of the projections whose name ends so, once the prompt is prefilled."""
    sample, refresh = Sampler.sample, SamplerLayer.refresh

    def partly(self, *args, **more):
        left_out = [module for path, module in lora_modules(self.model).items() if path.endswith(end)]

        def refresh_without(layer):
            for module in left_out:
                module.active = None
            refresh(layer)
            for module in left_out:
                module.active = "policy" if module.A else None

        monkeypatch.setattr(SamplerLayer, "refresh", refresh_without)
        return sample(self, *args, **more)

    monkeypatch.setattr(Sampler, "sample", partly)


def change_norms(name, change, monkeypatch):
    init = SamplerLayer.__init__

    def changed(self, *args, **more):
        init(self, *args, **more)
        setattr(self, name, copy.deepcopy(getattr(self, name)))
        change(getattr(self, name))

    monkeypatch.setattr(SamplerLayer, "__init__", changed)


def heavier(norm):
    norm.weight.data.mul_(1.05)


def other_epsilon(norm):
    name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
    assert getattr(norm, name) == 1e-6
    setattr(norm, name, 1e-5)


FAULTS = [  # not the epsilon of an mlp_norm: next to what a layer puts out it is nothing
    shift_positions, *(partial(leave_out_adapters, end) for end in ("", "k_proj", "up_proj", "o_proj")),
    *(partial(change_norms, *of) for of in (("attn_norm", heavier), ("mlp_norm", heavier),
                                            ("attn_norm", other_epsilon)))]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_the_self_check_refuses_a_sampler_that_differs_from_the_trainer(kind):
    """Where rounding to bfloat16 hides the fault, and though the adapter is zero, and in one layer alone."""
    model, params = adapted(kind, range(2, 3))
    assert refused(model, params) == []
    for fault in FAULTS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault(monkeypatch)
            assert "in float64" in refused(model, params), fault


# ---- LoRA ----

@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_off_and_merged(kind):
    """Fresh it changes no logit; off, the base is back bit by bit; merged equals active to 1e-5 (float32)."""
    model = tiny_model(kind)
    ids = torch.tensor(some_prompts((20, 20)))
    plain_state = {key: value.clone() for key, value in model.state_dict().items()}
    base = model(ids).logits
    params = add_lora(model, "policy", 4, 6, models.PROJECTIONS)
    assert torch.equal(model(ids).logits, base)
    shake(params)
    adapted = model(ids).logits
    assert (adapted - base).abs().max() > 0.1
    with use_adapter(model, None):
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, adapted)

    merged = merged_state_dict(model)
    assert merged.keys() == plain_state.keys()
    plain = tiny_model(kind, seed=5)
    plain.load_state_dict(merged)
    assert_close(plain(ids).logits, adapted, 1e-5)
    with use_adapter(model, None):
        assert torch.equal(model(ids).logits, base)  # merging left the base as it was
        assert all(torch.equal(value, plain_state[key]) for key, value in merged_state_dict(model).items())


def test_use_adapter_puts_back_what_was_there():
    model, _ = adapted_model("qwen2")
    shake(add_lora(model, "critic", 2, 2, ["q_proj"]))
    for module in lora_modules(model).values():
        module.active = "policy"
    ids = torch.tensor(some_prompts((9,)))
    policy = model(ids).logits
    with pytest.raises(KeyError), use_adapter(model, "critic"):
        critic = model(ids).logits
        with use_adapter(model, None):
            base = model(ids).logits
        assert torch.equal(model(ids).logits, critic)
        raise KeyError
    assert torch.equal(model(ids).logits, policy)
    assert not torch.equal(policy, critic) and not torch.equal(base, critic)


def test_where_an_adapter_goes():
    model = tiny_model("qwen2", num_hidden_layers=3)
    params = add_lora(model, "policy", 4, 8, ["q_proj", "down_proj"], layers=range(1, 3))
    assert list(lora_modules(model)) == [f"model.layers.{i}.{name}" for i in (1, 2)
                                         for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert [p.shape for p in params[:4]] == [(4, 32), (32, 4), (4, 48), (32, 4)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in params} and len(params) == 8
    assert all(p.dtype == torch.float32 for p in params)
    with pytest.raises(ValueError, match="k_projj.*no such linear layer.*q_proj"):
        add_lora(tiny_model("qwen2"), "policy", 4, 8, ["q_proj", "k_projj"])
    with pytest.raises(ValueError, match="--lora-r 0"):
        add_lora(tiny_model("qwen2"), "policy", 0, 8, ["q_proj"])


def test_one_seed_starts_the_same_adapter():
    starts = []
    for _ in range(2):
        torch.manual_seed(3)
        starts.append(add_lora(tiny_model("qwen2"), "policy", 4, 8, ["q_proj", "up_proj"]))
    assert all(torch.equal(a, b) for a, b in zip(*starts))
    assert len({p.flatten()[0].item() for p in starts[0][::2]}) == 4  # the layers do not start alike
    assert not any(p.any() for p in starts[0][1::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_leaves_the_base_weights_bit_identical(dtype):
    """C-33, C-34: 100 steps with a sampler in between; after the first, every B has moved."""
    model = tiny_model("qwen2").to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    params = add_lora(model, "policy", 3, 5, models.PROJECTIONS)
    sampler, optimizer = Sampler(model, (), 8), torch.optim.AdamW(params, lr=1e-2)
    input_ids, mask, _ = padded(ROWS, "right")
    losses = []
    for step in range(100):
        if step % 25 == 0:
            sampler.sample(PROMPTS[:2], KEYS[:2], 3)
        loss = -token_logprobs(model, input_ids, mask)[mask].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 0:
            assert all(p.any() for p in params[1::2])
    assert losses[-1] < losses[0] / 2
    with use_adapter(model, None):
        after = merged_state_dict(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_small_steps_are_not_lost_in_bfloat16():
    """C-35: adapters and AdamW's state are float32 on a bfloat16 base; a step at 1e-6 moves nearly all."""
    model = tiny_model("qwen2").to(torch.bfloat16)
    params = shake(add_lora(model, "policy", 3, 5, models.PROJECTIONS))
    optimizer = torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    input_ids, mask, _ = padded(ROWS, "right")
    token_logprobs(model, input_ids, mask).sum().backward()
    optimizer.step()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in params)
    assert all(value.dtype == torch.float32 for state in optimizer.state.values() for value in state.values())
    moved = torch.cat([(p != old).flatten() for p, old in zip(params, before)])
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_checkpointing_recomputes_with_the_adapter_of_its_forward(kind):
    """C-33: gradients with = without (1e-6), also if base and another adapter ran in between or are on."""
    model, policy = adapted_model(kind)
    critic = shake(add_lora(model, "critic", 2, 3, models.PROJECTIONS), seed=2)
    for p in policy:
        p.requires_grad_()  # adding the critic froze all else
    model.train()
    input_ids, mask, _ = padded(ROWS, "right")

    def run(between):
        calls = []
        handle = model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        with use_adapter(model, "policy"):
            logprobs = token_logprobs(model, input_ids, mask)
        if between:
            with use_adapter(model, None), torch.no_grad():
                token_logprobs(model, input_ids, mask)
            with use_adapter(model, "critic"):
                token_logprobs(model, input_ids, mask).mean().backward()
        n_forward = len(calls)
        grads = [None if p.grad is None else p.grad.clone() for p in critic]
        for p in critic:
            p.grad = None
        with use_adapter(model, "critic"):  # whatever is active by the time of the backward pass
            logprobs.mean().backward()
        handle.remove()
        assert all(p.grad is None for p in critic)
        policy_grad = torch.cat([p.grad.flatten() for p in policy])
        for p in policy:
            p.grad = None
        critic_grad = torch.cat([g.flatten() for g in grads]) if between else None
        return policy_grad, critic_grad, len(calls) - n_forward

    expected, expected_critic, recomputed = run(between=True)
    assert recomputed == 0
    enable_checkpointing(model)
    for between in (False, True):
        grad, critic_grad, recomputed = run(between)
        assert recomputed == 1  # else nothing was checkpointed
        assert_close(grad, expected, 1e-6)
        if between:
            assert_close(critic_grad, expected_critic, 1e-6)
