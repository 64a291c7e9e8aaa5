"""The plain path (common/generic.py): families of transformers against their own classes, and whole runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common import generic, models
from common.draws import StopTexts, noise_key
from grpo import Sampler, adapter_tensors, add_lora, make_batch, merged_state_dict, token_logprobs
from tests.families import FAMILIES, config
from tests.processes import column, eval_lines, metrics, rows
from tests.tiny_models import (
    adapted_model,
    greedy_by_generate,
    shake,
    some_prompts,
    spread,
    tiny_model,
    tiny_tokenizer,
)

torch.set_num_threads(1)
PAGE = Path(__file__).resolve().parents[1] / "docs/models.md"
CPU = torch.device("cpu")
PROMPTS = some_prompts((4, 1, 9, 17, 12))
KEYS = [[noise_key(0, p, g) for g in range(3)] for p in range(len(PROMPTS))]
STOPS = range(0, 384, 16)  # rows end at all times
# where a recurrent layer takes the tokens in chunks, of other sizes in a padded batch
LOGPROBS = dict.fromkeys(("Qwen3-Next", "Qwen3.5 (text)"), 5e-5)
NOT_IN_PEFT = ("Qwen3-Next", "DeepSeek-V3")  # PEFT 0.21 takes shared experts for parameters of the experts


def path_of(name):
    """Of a run of 64 tokens."""
    kind = FAMILIES[name][0]
    return "fast" if kind in models.SUPPORTED and not models.window_shorter_than(64, config(name)) else "plain"


def family(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name)).eval()
    spread(model)
    return model


def own_logprobs(model, prompt, completion):
    ids = torch.tensor(prompt + completion)
    logprobs = model(ids[None]).logits[0].float().log_softmax(-1)[:-1]
    return logprobs.gather(1, ids[1:, None])[len(prompt) - 1:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_logprobs_and_gradients_are_the_models_own(name):
    """Greedy: generate's, token for token, on ragged prompts; samples whatever the slots; log-probs, too."""
    model, near = family(name), LOGPROBS.get(name, 1e-5)
    expected = greedy_by_generate(model, PROMPTS, 10)
    greedy = generic.PlainSampler(model, ()).sample(PROMPTS, [[0]] * 5, 10, temperature=0)
    assert [c.ids for (c,) in greedy] == expected
    if path_of(name) == "fast":
        assert [c.ids for (c,) in Sampler(model, ()).sample(PROMPTS, [[0]] * 5, 10, temperature=0)] == expected
    samples = generic.PlainSampler(model, STOPS, 64).sample(PROMPTS, KEYS, 10)
    few = generic.PlainSampler(model, STOPS, 4).sample(PROMPTS, KEYS, 10)
    flat = [(PROMPTS[p], c) for p, row in enumerate(samples) for c in row]
    assert [c.ids for row in few for c in row] == [c.ids for _, c in flat]
    assert len({len(c.ids) for _, c in flat}) > 1 and any(c.finished for _, c in flat)

    input_ids, mask = make_batch([p for p, _ in flat], [c.ids for _, c in flat], CPU)
    values = generic.token_logprobs(model, input_ids, mask, chunk_tokens=7)
    assert not values[~mask].any()
    if path_of(name) == "fast":
        assert (token_logprobs(model, input_ids, mask) - values).abs().max() <= near
    weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(0))
    (values.sum(1) * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own = [own_logprobs(model, p, c.ids) for p, c in flat]
    for row, of_row, reference, (_, c) in zip(values, mask, own, flat):
        assert (row[of_row] - reference).abs().max() <= near
        assert (torch.tensor(c.logprobs) - reference).abs().max() <= 1e-4
    sum(weight * row.sum() for weight, row in zip(weights, own)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == found.keys()
    largest = max(g.abs().max() for g in gradients.values())
    assert max((gradients[name] - found[name]).abs().max() for name in found) <= near * largest


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_merge_load_in_peft_and_are_trained(name, tmp_path, go):
    """On all linear layers but routers; merged by --merge, when loaded, and by PEFT: the same logits."""
    peft = pytest.importorskip("peft")
    model, folder = family(name), tmp_path / "base"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    params = shake(add_lora(model, "policy", 3, 5, ("all-linear",)))
    assert params and not any("router" in path for path in adapter_tensors(model, "policy"))
    ids, base = torch.tensor([PROMPTS[3]]), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = adapter_tensors(model, "policy")
    models.save_adapter(tmp_path / "adapter", tensors, 5, str(folder), model)
    merged = AutoModelForCausalLM.from_config(model.config)
    merged.load_state_dict(merged_state_dict(model))
    others = [merged, models.load_model(str(tmp_path / "adapter"), torch.float32, CPU, max_tokens=64)]
    with torch.no_grad():
        ours, plain = model(ids).logits, base(ids).logits
        if name not in NOT_IN_PEFT:
            others.append(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
        assert (ours - plain).abs().max() > 1e-3
        for other in others:
            gap = (ours - other.eval()(ids).logits).abs().max()
            assert gap <= LOGPROBS.get(name, 1e-5) * (1 + ours.abs().max())

    process = go("run", bare=True, model=folder, **SMALL | RUNS["grpo"] | {"rewards": "answer-prob", "eval_questions": 1})
    assert "ok" in process.out and ("plain path" in process.out) == (path_of(name) == "plain")
    after = load_file(process.folder / "final" / "adapter_model.safetensors")
    assert any(after[key].any() for key in after if "lora_B" in key)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_both_paths_draw_the_same(kind, float64):
    """Samples and log-probs, with an adapter, an end token and a stop text."""
    model, _ = adapted_model(kind)
    texts = StopTexts(tiny_tokenizer(), ("e", "1"))
    fast = Sampler(model, STOPS, 8, None, texts).sample(PROMPTS, KEYS, 20)
    plain = generic.PlainSampler(model, STOPS, 8, None, texts).sample(PROMPTS, KEYS, 20)
    for c, other in zip(sum(fast, []), sum(plain, [])):
        assert (c.ids, c.finished, c.cut) == (other.ids, other.finished, other.cut)
        assert c.logprobs == pytest.approx(other.logprobs, abs=1e-9)
    assert any(c.cut is not None for row in plain for c in row)


def test_which_path_a_model_takes(tmp_path):
    assert models.is_fast(tiny_model("qwen3")) and not models.is_fast(family("Phi-3, Phi-4"))
    settings = (), 8, None, None
    assert isinstance(generic.sampler(Sampler, tiny_model("llama"), *settings), Sampler)
    assert isinstance(generic.sampler(Sampler, family("OLMo"), *settings), generic.PlainSampler)


@pytest.fixture(scope="module", params=["Qwen3-MoE", "GPT-2"])
def plain(tmp_path_factory, request):
    """A folder with a tiny random model and the embedded model's tokenizer; GPT-2's has no chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("plain") / "model", tiny_tokenizer()
    family(request.param).save_pretrained(folder)
    if request.param == "GPT-2":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


SMALL = {"data": "arithmetic", "level": 1, "train_questions": 20, "eval_questions": 4, "max_new_tokens": 12,
         "lora_r": 4, "warmup_steps": 0, "max_steps": 2}
PAIRS = {"pairs": "pairs.jsonl", "pairs_per_step": 4, "train_questions": None, "level": None, "data": None}
RUNS = {"sft": {"batch_size": 5}, "grpo": {"prompts_per_step": 3, "num_generations": 4, "rewards": "mark"},
        "grpo --full": {"prompts_per_step": 3, "num_generations": 4, "rewards": "mark", "full": True},
        "ppo": {"prompts_per_step": 4, "num_generations": 2, "rewards": "mark"},
        "star": {"num_generations": 2, "strategy": "soft", "rewards": "answer-prob", "iterations": 1, "max_steps": None},
        "dpo": PAIRS, "reward_model": PAIRS | {"eval_questions": None, "max_new_tokens": None, "eval_pairs": 4}}


@pytest.mark.parametrize("name", RUNS)
def test_every_script_runs_on_the_plain_path(go, plain, tmp_path, name):
    """With its self-check; what is trained differs from the start, and eval.py takes it."""
    (tmp_path / "pairs.jsonl").write_text("".join(
        f'{{"prompt": "{i}?", "chosen": "{i % 7}", "rejected": "no"}}\n' for i in range(24)))
    script = name.split()[0]
    flags = {key: value for key, value in (SMALL | RUNS[name]).items() if value is not None}
    process = go("a", script=f"{script}.py", bare=True, model=plain, **flags)
    assert "self-check" in process.out and "ok" in process.out and (process.folder / "final").exists()
    if script != "reward_model":
        go("e", script="eval.py", bare=True, model=["base", "a"] if "full" not in name else "a", limit=4, level=1,
           max_new_tokens=8, data="arithmetic")
        assert len(rows(tmp_path / "e")) == (4 if "full" in name else 8)
    if script == "grpo" and "full" not in name:
        two = go("b", script="grpo.py", ranks=2, bare=True, model=plain, **flags).folder
        completions = [column(rows(folder, step=1), "completion", str) for folder in (process.folder, two)]
        assert completions[0] == completions[1]


@pytest.mark.parametrize("plain", ["GPT-2"], indirect=True)
@pytest.mark.parametrize("full", [None, True])
def test_rlhf_from_preferences(go, plain, tmp_path, full):
    """GPT-2, reward_model.py and ppo.py on prompts without gold answers; with --full the reward goes up.

    An adapter of rank 16 under a random frozen head learns too little in 16 steps to tell.
    """
    (tmp_path / "pairs.jsonl").write_text("".join(
        f'{{"prompt": "{i}?", "chosen": "{i % 10}77", "rejected": "{i % 10}ab"}}\n' for i in range(40)))
    shared = {"bare": True, "model": plain, "full": full, "lr": 3e-3, "warmup_steps": 0}
    go("rm", script="reward_model.py", pairs="pairs.jsonl", pairs_per_step=16, max_steps=20, **shared)
    go("ppo", script="ppo.py", data="pairs.jsonl", rewards="model:rm", eval_questions=8, pay_truncated=True,
       prompts_per_step=16, num_generations=2, max_new_tokens=4, max_steps=16, beta=0.01, **shared)
    before, after = (line["eval/reward"] for line in eval_lines(tmp_path / "ppo"))
    assert not full or after > before + 0.5, (before, after)
    assert "correct" not in metrics(tmp_path / "ppo")[-1]


@pytest.mark.parametrize("flag", ["--shard", "--quantize nf4"])
def test_what_does_not_work_there_is_refused(go, plain, flag):
    words = flag.split()
    said = go(None, *words, bare=True, model=plain, data="arithmetic", max_new_tokens=12, fails=True).err
    assert words[0] in said and "docs/models.md" in said


def table():
    """docs/models.md's: what the tests above hold of each family."""
    rows = ["| family | model_type | path | greedy | log-probs | LoRA | merge | PEFT | GRPO |", "| --- " * 9 + "|"]
    for name, (kind, _) in FAMILIES.items():
        rows.append(f"| {name} | `{kind}` | {path_of(name)} | equal | {LOGPROBS.get(name, 1e-5):.0e} | yes | equal "
                    f"| {'no: --merge' if name in NOT_IN_PEFT else 'equal'} | ok |")
    return "\n".join(rows) + "\n"


def test_the_page_has_the_table():
    assert table() in PAGE.read_text()


if __name__ == "__main__":  # write it
    page = PAGE.read_text()
    PAGE.write_text(page[:page.index("| family |")] + table())
