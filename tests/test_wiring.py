"""Wiring: that a flag or a role reaches the weights, rows, metrics and lines of a run, by the commands alone.

Each test fails if one line of a script's main is changed, which no function's own test would see.
"""

import json
import re

import pytest
import torch

import dpo
import eval
import grpo
import ppo
import sft
import star
from common import data, models
from common.run import paired_interval
from tests.processes import column, launcher, metrics, rows, train_lines, weights

# ------------------------------------------------------------------------------------------------------------
# One step of every script, looked at from all sides

PROMPTS = ["Compute 1" + "1" * n for n in range(60)]  # each a token longer than the one before
SAMPLING = {"data": "questions.jsonl", "eval_questions": 4, "max_new_tokens": 12, "rewards": "mark=1"}
PAIRS = {"pairs": "pairs.jsonl", "pairs_per_step": 4}
ONE_STEP = {
    "grpo": SAMPLING | {"prompts_per_step": 3, "num_generations": 5},
    "ppo": SAMPLING | {"prompts_per_step": 6, "minibatches": 1, "ppo_epochs": 1},
    "ppo --full": SAMPLING | {"prompts_per_step": 6, "minibatches": 1, "ppo_epochs": 1, "full": True},
    "dpo": PAIRS | {"eval_questions": 4},
    "star": SAMPLING | {"questions": 4, "batch_size": 8, "strategy": "reinforce"},
    "sft": {"data": "questions.jsonl", "eval_questions": 4, "max_new_tokens": 12, "batch_size": 5},
    "reward_model": PAIRS}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiring")
    good, bad = "<answer>1</answer>", "<answer>2</answer>"
    lines = {"questions": [{"prompt": p, "answer": "1", "completion": good} for p in PROMPTS],
             "pairs": [{"prompt": p, "chosen": good, "rejected": bad} for p in PROMPTS]}
    for name, of in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of))
    return folder


@pytest.fixture(scope="module", params=ONE_STEP)
def one_step(request, start, tiny, texts):
    """(its name, how many tokens were the most allowed, the Process), with checkpointing and a trace."""
    name, tokenizer = request.param, models.load_tokenizer(str(tiny))
    longest = len(data.encode_prompt(tokenizer, PROMPTS[30]))
    limit = {"max_prompt_tokens": longest}
    if name in ("dpo", "sft", "reward_model"):
        completion = data.encode_completion(tokenizer, "<answer>1</answer>", tokenizer.eos_token_id)
        longest += len(completion)
        limit = {"max_tokens": longest}
    process = launcher(start, tiny, texts)(
        name, script=f"{name.split()[0]}.py", bare=True, model=tiny, max_steps=1, lora_r=4, system="none",
        profile=1, gradient_checkpointing=True, **ONE_STEP[name] | limit)
    return name, longest, process


def test_every_layer_is_computed_again_in_the_backward_pass(one_step):
    """With --gradient-checkpointing, by the trace: as many activations inside the engine as gradients."""
    events = json.loads((one_step[2].folder / "trace-1.json").read_text())["traceEvents"]

    def named(pattern):
        return [event for event in events if re.fullmatch(pattern, event.get("name", ""))]

    engine = [(e["ts"], e["ts"] + e["dur"]) for e in named("autograd::engine::evaluate_function.*")]
    again = [e for e in named("aten::silu_?") if any(a <= e["ts"] < b for a, b in engine)]
    assert len(again) == len(named("aten::silu_backward")) > 0


def test_the_betas_of_adamw(one_step):
    """Of every optimizer in the checkpoint, and by its moments: the first are (1 - beta) g and its square."""
    name, _, process = one_step
    saved = torch.load(process.folder / "checkpoints/step-1/training.pt", weights_only=True)
    optimizers = [value for value in saved.values() if isinstance(value, dict) and "param_groups" in value]
    assert len(optimizers) == (2 if name.startswith("ppo") else 1)
    betas = (0.9, 0.95) if name == "sft" else (0.9, 0.999)
    for optimizer in optimizers:
        assert [tuple(group["betas"]) for group in optimizer["param_groups"]] == [betas]
        for state in optimizer["state"].values():
            torch.testing.assert_close(state["exp_avg"] ** 2 / (1 - betas[0]) ** 2,
                                       state["exp_avg_sq"] / (1 - betas[1]), rtol=1e-3, atol=1e-30)


def test_the_longest_row_is_as_long_as_allowed(one_step):
    """Rows of each length about the limit are there; what has just that many tokens is kept."""
    _, longest, process = one_step
    [said] = re.findall(r"^data: .*up to (\d+) tokens", process.out, re.MULTILINE)
    assert int(said) == longest


def test_how_wide_an_adapter_begins(one_step):
    """A is uniform within 1 / sqrt(in), as in peft; the step has not moved it, for B began at 0."""
    name, _, process = one_step
    if name == "ppo --full":
        return
    A = {key: value for key, value in weights(process.folder).items() if "lora_A" in key}
    drawn = torch.cat([value.flatten() * value.shape[1] ** 0.5 for value in A.values()])
    assert len(A) == 14 and 0.99 < drawn.abs().max() <= 1
    assert drawn.std().item() == pytest.approx(3 ** -0.5, rel=0.05)  # of 2,048 draws: five deviations


# ------------------------------------------------------------------------------------------------------------
# Functions


@pytest.mark.parametrize("script", [grpo, ppo, dpo, star, sft, eval])
def test_the_text_of_an_answer_is_without_its_stop_token(script):
    """Whichever token stopped it; of one that was cut off all is kept but special tokens."""
    tokenizer = models.load_tokenizer("")
    ids = tokenizer("1+2=3.", add_special_tokens=False)["input_ids"]

    def text(ids, finished):
        return script.Completion(ids, [0.0] * len(ids), finished).text(tokenizer)

    assert text(ids, True) == "1+2=3" and text(ids, False) == "1+2=3."
    assert text([*ids, tokenizer.eos_token_id], True) == "1+2=3."
    assert text([*ids, tokenizer.eos_token_id], False) == "1+2=3."


def test_golden_paired_interval():
    """Differences 1, 0, 0, 0: mean 0.25, deviation 0.5, of which a half is the mean's; 1.96 of those."""
    assert paired_interval([0, 1, 0, 1], [1, 1, 0, 1]) == pytest.approx((0.25 - 0.49, 0.25 + 0.49))
    assert paired_interval([1, 0], [0, 0]) == pytest.approx((-0.5 - 0.98, -0.5 + 0.98))
    assert paired_interval([1.0], [0.0]) == (-1, -1)


# ------------------------------------------------------------------------------------------------------------
# The self-check's limits


@pytest.mark.parametrize("script", ["grpo", "ppo", "dpo", "star", "sft", "reward_model"])
def test_a_model_that_fails_the_self_check_is_not_trained(script, go, tiny, tmp_path, texts):
    """Of a layer whose attention's output counts for nothing, three adapters get no gradient."""
    save_changed(tiny, tmp_path / "dead", lambda model: model.model.layers[1].self_attn.o_proj.weight.zero_())
    flags = {name: texts / value if name in ("data", "pairs") else value
             for name, value in ONE_STEP[script].items()}
    process = go("run", script=f"{script}.py", bare=True, fails=True, model=tmp_path / "dead", max_steps=1,
                 lora_r=4, **flags)
    assert process.err.endswith("error: self-check: adapters without gradient is 3, at most 0 is right; "
                                "nothing was trained\n")
    assert not (process.folder / "metrics.jsonl").exists()


def test_a_value_that_is_no_number_fails_the_self_check(go, tiny, tmp_path):
    save_changed(tiny, tmp_path / "nan", lambda model: model.model.norm.weight.fill_(torch.nan))
    process = go("run", model=tmp_path / "nan", fails=True)
    assert "error: self-check: sampler-trainer is nan, at most 0.0001 is right" in process.err


def save_changed(source, folder, change):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    models.load_tokenizer(str(source)).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# Log-probs at the temperature of sampling

ONE_UPDATE = {"ppo_epochs": 1, "minibatches": 1}


@pytest.mark.parametrize("script, flags", [
    ("grpo.py", {}), ("grpo.py", {"kl_in": "reward"}), ("ppo.py", ONE_UPDATE),
    ("ppo.py", ONE_UPDATE | {"kl_in": "loss", "kl_estimator": "k3"})])
def test_old_and_reference_log_probs_are_at_the_temperature_of_sampling(script, flags, go):
    """In the first step all three are those of one model: no ratio but 1, no KL (float32: 1e-5)."""
    folder = go("run", script=script, max_steps=1, temperature=0.5, beta=0.1, recompute_old=True,
                **flags).folder
    [line] = train_lines(folder)
    for name in ("kl", "clip_low", "clip_high", "sampler_gap", "approx_kl"):
        assert abs(line.get(name, 0.0)) < 1e-5, name
    if script == "grpo.py":  # minus the mean advantage, by rows
        assert abs(line["loss"]) < 1e-5


# ------------------------------------------------------------------------------------------------------------
# PPO's critic, and what adapts


def critic_head(folder, step):
    """The critic's value head [1, hidden size], which starts at 0, from a checkpoint."""
    saved = torch.load(folder / f"checkpoints/step-{step}/training.pt", weights_only=True)
    return saved["critic"][-1]


def largest_step(folder, step=1):
    """Of the policy: the largest entry of its B, which starts at 0."""
    tensors = weights(folder, f"checkpoints/step-{step}")
    return max(value.abs().max().item() for name, value in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize("clipped, policy, critic", [
    ({}, 1, 1), ({"max_grad_norm": 1e-9}, 0, 1), ({"critic_max_grad_norm": 1e-9}, 1, 0)])
def test_the_critic_has_a_rate_and_a_norm_of_its_own(clipped, policy, critic, go):
    """AdamW's first step is as large as the rate, unless the gradient is far below its epsilon, 1e-8."""
    folder = go("run", script="ppo.py", max_steps=1, lr=1e-3, critic_lr=4e-3, **ONE_UPDATE | clipped).folder
    [line] = train_lines(folder)
    assert (line["lr"], line["critic_lr"]) == (1e-3, 4e-3)
    assert line["grad_norm"] > 1e-3 and line["critic_grad_norm"] > 1e-3  # before the clip
    steps = largest_step(folder) / 1e-3, critic_head(folder, 1).abs().max().item() / 4e-3
    assert steps == (pytest.approx(policy, abs=0.01 if policy else 0.2),
                     pytest.approx(critic, abs=0.01 if critic else 0.2))


def test_the_critics_rate_is_twice_the_policys_by_default(go):
    [line] = train_lines(go("run", script="ppo.py", max_steps=1, lr=1e-3).folder)
    assert (line["lr"], line["critic_lr"]) == (1e-3, 2e-3)


def test_the_policy_warms_up_when_its_turn_comes(go):
    """After two steps of the critic alone; the critic's rate rises from the first step on."""
    folder = go("run", script="ppo.py", max_steps=4, lr=1e-3, critic_lr=4e-3, warmup_steps=2, critic_warmup=2,
                save_every=1, keep=9, **ONE_UPDATE).folder
    lines = train_lines(folder)
    assert [line["critic_lr"] for line in lines] == pytest.approx([2e-3, 4e-3, 4e-3, 4e-3])
    assert [line["lr"] for line in lines[2:]] == pytest.approx([0.5e-3, 1e-3])
    assert [largest_step(folder, step) for step in (1, 2)] == [0, 0]
    assert largest_step(folder, 3) == pytest.approx(0.5e-3, rel=0.01)
    assert critic_head(folder, 1).abs().max().item() == pytest.approx(2e-3, rel=0.01)


def test_the_policys_rate_falls_over_its_own_steps(go):
    """Linear: of four steps the last three are the policy's; past the last, the rate would be 0."""
    lines = train_lines(go("run", script="ppo.py", max_steps=4, lr=3e-3, warmup_steps=0, critic_warmup=1,
                           lr_schedule="linear", **ONE_UPDATE).folder)
    assert [line["lr"] for line in lines[1:]] == pytest.approx([2.25e-3, 1.5e-3, 0.75e-3])


ADAPTIVE = {"script": "ppo.py", "beta": 1.0, "lr": 3e-3, "max_steps": 3, **ONE_UPDATE}


def test_beta_adapts_to_the_kl_of_a_whole_answer(go):
    """By a tenth of its relative error, at most 2%; with a target between a token's KL and an answer's."""
    free = train_lines(go("free", **ADAPTIVE).folder)
    target = free[1]["kl"] * free[1]["tokens"] / 1.1
    lines = train_lines(go("run", **ADAPTIVE | {"kl_target": target}).folder)
    assert 0 < 2 * lines[1]["kl"] < target
    of_answers = [line["kl"] * line["tokens"] for line in lines]
    for line, following, kl in zip(lines, lines[1:], of_answers):
        expected = line["beta"] * (1 + 0.1 * min(0.2, max(-0.2, kl / target - 1)))
        assert following["beta"] == pytest.approx(expected, rel=1e-6)
    assert lines[1]["beta"] == pytest.approx(0.98) and lines[2]["beta"] > lines[1]["beta"]


def test_the_adapted_beta_is_the_one_in_the_reward(go):
    """The second step's returns are those of a run whose beta is the adapted one from the start."""
    start, adapted, fixed = (train_lines(go(name, **ADAPTIVE | flags | {"max_steps": 2}).folder)[1]
                             for name, flags in (("start", {}), ("adapted", {"kl_target": 1e9}),
                                                 ("fixed", {"beta": 0.98})))
    assert adapted["kl"] == pytest.approx(start["kl"], rel=1e-5) and start["kl"] > 0.01
    assert adapted["beta"] == pytest.approx(0.98)
    assert adapted["return"] == pytest.approx(fixed["return"], rel=1e-4)
    assert adapted["value_loss"] == pytest.approx(fixed["value_loss"], rel=1e-4)
    assert adapted["return"] != pytest.approx(start["return"], rel=1e-3)


def test_a_steps_updates_end_at_the_kl_of_a_token(go):
    """Of the old policy to the new, k3, over all tokens: that of the weights it leaves behind."""
    flags = {"script": "ppo.py", "model": None, "max_steps": 1, "ppo_epochs": 2, "minibatches": 1, "lr": 1e-3}
    folder = go("run", target_kl=1e-9, **flags).folder
    [line] = train_lines(folder)
    tokenizer = models.load_tokenizer("")
    old, new = (models.load_model(name, torch.float32, torch.device("cpu")) for name in ("", str(folder)))
    k3 = []
    for row in rows(folder):
        prompt = data.encode_prompt(tokenizer, row["prompt"])
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * int(row["finished"])
        with torch.no_grad():
            before, after = (model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
                             .gather(1, torch.tensor(ids)[:, None]) for model in (old, new))
        assert before.sum().item() == pytest.approx(float(row["logprob"]), abs=1e-3)  # these were the tokens
        k3 += (torch.exp(after - before) - 1 - (after - before)).flatten().tolist()
    kl = sum(k3) / len(k3)
    assert line["updates"] == 1 and line["approx_kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    assert len(k3) > 5 * len(rows(folder))  # an answer's is far larger
    [line] = train_lines(go("further", target_kl=1.5 * kl, **flags).folder)
    assert line["updates"] == 2 and line["approx_kl"] == pytest.approx(kl, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Answers that are cut off, hinted, or asked for in another iteration


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A model whose next token depends on the last one alone: letters, then an answer, and then the end.

    Of its answers to any question half are right, and some of both go on until they are cut off. In the
    folder are 40 questions, too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("chain")
    tokenizer = models.load_tokenizer("")

    def token(text):
        [id] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return id

    config = AutoConfig.from_pretrained(models.TINY)
    config.num_hidden_layers, config.layer_types, config.tie_word_embeddings = 1, ["full_attention"], False
    V = config.hidden_size = config.vocab_size
    letters = [token(c) for c in "abcdefghijklmnopqrstuvwxyz"]
    chances = torch.full((V, V), 1e-12)  # [the last token, the next one]
    chances[:, tokenizer.eos_token_id] = 1
    for last in [token("\n"), *letters]:
        chances[last] = 1e-12
        chances[last, letters], chances[last, token("<answer>")] = 0.7 / 26, 0.3
    chances[token("<answer>")] = 1e-12
    chances[token("<answer>"), [token("7"), token("8")]] = 0.5
    for last, following in (("7", "</answer>"), ("8", "</answer>")):
        chances[token(last)] = 1e-12
        chances[token(last), token(following)] = 1
    chances[token("</answer>"), letters], chances[token("</answer>"), tokenizer.eos_token_id] = 0.5 / 26, 0.5
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(std=1e-3)  # next to nothing beside what is written here
        model.get_input_embeddings().weight.copy_(torch.eye(V))
        model.lm_head.weight.copy_(chances.log().T / V ** 0.5)
    model.save_pretrained(folder / "chain")
    tokenizer.save_pretrained(folder / "chain")
    (folder / "questions.jsonl").write_text("".join(
        json.dumps({"prompt": f"Question {i}", "answer": "7"}) + "\n" for i in range(60)))
    return folder


@pytest.fixture(scope="module")
def asked_twice(start, chain):
    """asked_twice(script): two iterations of it, of 20 questions each."""
    def run(script, **flags):
        return launcher(start, "chain", chain)(
            script, script=f"{script}.py", bare=True, model="chain", data="questions.jsonl", eval_questions=4,
            questions=20, iterations=2, max_new_tokens=12, lora_r=4, lr=1e-5, **flags).folder

    return {"dpo": run("dpo", num_generations=4, pairs_per_step=99),
            "star": run("star", num_generations=1, batch_size=99, rationalize=True, hint="{prompt}{answer}")}


@pytest.mark.parametrize("script", ["dpo", "star"])
def test_each_iteration_asks_other_questions(script, asked_twice):
    """As long as there are any."""
    sampled = rows(asked_twice[script])
    first = int(sampled[0]["step"])
    one, other = ({row["id"] for row in sampled if (int(row["step"]) == first) == begins}
                  for begins in (True, False))
    assert len(one) == len(other) == 20 and not one & other


def by_question(of_rows):
    return [[row for row in of_rows if row["id"] == id] for id in dict.fromkeys(column(of_rows, "id", str))]


def test_cut_off_answers_make_no_pairs(asked_twice):
    """Each right answer goes with a wrong one, and all of them came to their end."""
    def pairs(of_rows):
        """A question's: at most four, each answer once."""
        texts = [{row["completion"] for row in of_rows if row["correct"] == right} for right in "10"]
        return min(4, *map(len, texts))

    folder = asked_twice["dpo"]
    for line in train_lines(folder):  # a step an iteration
        step = by_question(rows(folder, step=line["step"]))
        finished = [[row for row in of if row["finished"] == "1"] for of in step]
        assert 0 < line["pairs"] == sum(map(pairs, finished)) < sum(map(pairs, step))


def test_a_cut_off_answer_solves_no_question(asked_twice):
    """Such a question is asked again with the hint, and what is trained on came to its end."""
    folder, cut_off = asked_twice["star"], 0
    for line in [line for line in metrics(folder) if "hinted" in line]:
        step = rows(folder, step=line["step"])
        sampled = [row for row in step if row["source"] == "sampled"]
        right = [row for row in step if row["correct"] == "1"]
        finished = [row for row in right if row["finished"] == "1"]
        solved = {row["id"] for row in finished if row in sampled}
        assert line["solved"] == len(solved) / 20 and line["hinted"] == 20 - len(solved)
        assert line["rows"] == len(finished)
        assert all(row["finished"] == "1" for row in step if row["source"] == "rationalized")
        cut_off += len(right) - len(finished)
    assert cut_off > 3


def test_hinted_answers_have_noise_of_their_own(asked_twice):
    """The hint is a token: by the noise of the first answer they were that, from its second token on."""
    hinted = 0
    for of in by_question(rows(asked_twice["star"])):
        if len(of) == 2:
            first, again = column(of, "completion", str)
            assert not again.startswith(re.sub("^(<[^>]*>|.)", "", first))
            hinted += 1
    assert hinted > 5  # of some 35
