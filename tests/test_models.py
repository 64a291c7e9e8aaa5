"""common/models.py: adapters and models on disk, what is merged and saved, and what is refused by name."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import eval
from common import data, generic, models
from grpo import Sampler, adapter_tensors, add_lora, merged_state_dict
from tests.commands import run
from tests.tiny_models import (
    EXTRA,
    KINDS,
    SIZES,
    adapted_model,
    assert_close,
    greedy_by_generate,
    shake,
    some_prompts,
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


# ---- adapters and models on disk ----

def saved_base(folder, kind="qwen2", **overrides):
    """A tiny model and the tiny tokenizer in a folder; returns the model."""
    model = tiny_model(kind, **overrides)
    models.save_plain(model, tiny_tokenizer(), model.state_dict(), folder)
    return model


load = partial(models.load_model, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("layers", [None, range(1, 2)])
def test_saved_adapters_are_in_pefts_format(tmp_path, layers):
    """Keys, shapes and configuration as PEFT writes them, and each side reads the other's folder."""
    peft = pytest.importorskip("peft")
    base = saved_base(tmp_path / "base")
    ids = torch.tensor(some_prompts((15,)))
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM",
                        layers_to_transform=list(layers) if layers else None))
    shake([p for name, p in theirs.named_parameters() if "lora_" in name], seed=4)
    theirs.save_pretrained(tmp_path / "theirs")

    params = shake(add_lora(base, "policy", 4, 6, targets, layers))
    models.save_adapter(tmp_path / "ours", adapter_tensors(base, "policy"), 6, str(tmp_path / "base"), base)
    ours, written = ({key: value.shape for key, value in load_file(tmp_path / name).items()}
                     for name in ("ours/adapter_model.safetensors", "theirs/adapter_model.safetensors"))
    assert ours == written
    ours, written = (json.loads((tmp_path / name / "adapter_config.json").read_text())
                     for name in ("ours", "theirs"))
    assert set(ours) <= set(written)
    for config in (ours, written):
        config["target_modules"] = sorted(config["target_modules"])
    assert ours == {key: written[key] for key in ours}

    adapted = base(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    read = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    assert_close(read(ids).logits, adapted, 1e-5)  # float32
    assert_close(load(str(tmp_path / "ours"))(ids).logits, adapted, 1e-5)
    expected = theirs.eval()(ids).logits
    assert (expected - adapted).abs().max() > 0.1
    assert_close(load(str(tmp_path / "theirs"))(ids).logits, expected, 1e-5)
    models.load_adapter(tmp_path / "theirs", adapter_tensors(base, "policy"))
    assert_close(base(ids).logits, expected, 1e-5)
    assert all(p.requires_grad for p in params)


def test_saved_adapters_round_trip_and_name_what_does_not_fit(tmp_path):
    base = saved_base(tmp_path / "base")
    params = shake(add_lora(base, "policy", 4, 6, ["q_proj"]))
    save = partial(models.save_adapter, alpha=6, base=str(tmp_path / "base"), model=base)
    save(tmp_path / "one", adapter_tensors(base, "policy"))
    before = [p.detach().clone() for p in params]
    shake(params, seed=7)
    models.load_adapter(tmp_path / "one", adapter_tensors(base, "policy"))
    assert all(torch.equal(p, old) for p, old in zip(params, before))

    wider = tiny_model("qwen2")
    add_lora(wider, "policy", 5, 6, ["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is \(4, 32\), .* needs \(5, 32\)"):
        models.load_adapter(tmp_path / "one", adapter_tensors(wider, "policy"))
    elsewhere = tiny_model("qwen2")
    add_lora(elsewhere, "policy", 4, 6, ["k_proj"])
    with pytest.raises(ValueError, match="k_proj.lora_A.weight is missing"):
        models.load_adapter(tmp_path / "one", adapter_tensors(elsewhere, "policy"))

    pair = adapter_tensors(base, "policy")["model.layers.0.self_attn.q_proj"]
    save(tmp_path / "lost", {"model.layers.7.self_attn.q_proj": pair})
    with pytest.raises(ValueError, match="layers.7.*the base model has no"):
        load(str(tmp_path / "lost"))
    save(tmp_path / "shape", {"model.layers.0.self_attn.k_proj": pair})
    with pytest.raises(ValueError, match=r"k_proj.*makes \(32, 32\).*is \(16, 32\)"):
        load(str(tmp_path / "shape"))


def test_an_adapter_on_an_adapter_is_merged_from_the_base_up(tmp_path):
    """C-21: `--model` of a run that itself started from an adapter means all of them, added in float32."""
    saved_base(tmp_path / "base", "llama")
    ids = torch.tensor(some_prompts((15,)))
    under = str(tmp_path / "base")
    for name, seed in (("sft", 1), ("grpo", 2)):
        model = load(under)
        shake(add_lora(model, "policy", 3, 5, models.PROJECTIONS), seed)
        models.save_adapter(tmp_path / name, adapter_tensors(model, "policy"), 5, under, model)
        under = str(tmp_path / name)
        expected = model(ids).logits
        assert_close(load(under)(ids).logits, expected, 1e-5)
        assert models.base_of(under) == str(tmp_path / "base")
    config = tmp_path / "grpo" / "adapter_config.json"
    stabilised = {"use_rslora": True, "lora_alpha": 5 / 3**0.5}  # the scale is alpha / sqrt(r)
    config.write_text(json.dumps(json.loads(config.read_text()) | stabilised))
    assert_close(load(under)(ids).logits, expected, 1e-5)
    # merged in float32, rounded once: every weight is the bfloat16 nearest to the float32 merge
    in_float, rounded = load(under).state_dict(), models.load_model(under, torch.bfloat16, CPU).state_dict()
    assert all(torch.equal(value.to(torch.bfloat16), rounded[key]) for key, value in in_float.items())


RUN_ON_A_RUN = """
import sys
import grpo, sft
few = dict(max_steps=1, warmup_steps=1, train_questions=8, eval_questions=2, max_new_tokens=4, lora_r=2)
sft.main(sft.Args(out=sys.argv[1] + "/sft", batch_size=8, lr=0.05, **few))
grpo.main(grpo.Args(out=sys.argv[1] + "/grpo", model=sys.argv[1] + "/sft", data="arithmetic",
                    prompts_per_step=1, num_generations=2, **few))
"""


@pytest.mark.slow
def test_a_run_on_top_of_a_run_keeps_what_the_first_has_learnt(tmp_path):
    """The folder that GRPO saves stands on what it started from, the embedded model with sft.py's adapter."""
    command = [sys.executable, "-c", RUN_ON_A_RUN, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    start, first, second = (list(load(name).parameters())
                            for name in ("", str(tmp_path / "sft"), str(tmp_path / "grpo")))

    def distance(one, other):
        return max((a - b).abs().max().item() for a, b in zip(one, other))

    assert distance(start, first) > 0.1  # a step at 0.05
    assert distance(first, second) < 0.01  # at most a step at 2e-5


def test_merged_and_saved_models_load_in_transformers(tmp_path):
    """`--merge`: a plain folder, whose tokenizer comes with it."""
    model, _ = adapted_model("qwen2")
    ids = torch.tensor(some_prompts((15,)))
    models.save_plain(model, tiny_tokenizer(), merged_state_dict(model), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(plain(ids).logits, model(ids).logits, 1e-5)
    assert len(models.load_tokenizer(str(tmp_path / "merged"))) == 384
    assert_close(load(str(tmp_path / "merged"))(ids).logits, plain(ids).logits, 0)
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert saved and all(torch.equal(value, merged_state_dict(model)[key]) for key, value in saved.items())


# ---- other people's adapters and weights (W1, W2): exact, or refused by name ----


def peft_adapter(folder, base, config):
    """What PEFT saves for `config`, after its tensors have moved."""
    from peft import get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    shake([p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder)


IDS = torch.tensor(some_prompts((15,)))
PATTERN = "layers.0.self_attn.q_proj"
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("more", [
    {}, {"use_rslora": True}, {"rank_pattern": {PATTERN: 7}}, {"alpha_pattern": {PATTERN: 50}},
    {"rank_pattern": {PATTERN: 7}, "alpha_pattern": {"q_proj": 3, "layers.*v_proj": 9}, "use_rslora": True},
    {"target_modules": "all-linear"}, {"target_modules": r".*\.(q_proj|v_proj)"}, {"exclude_modules": [PATTERN]},
    {"layers_to_transform": [1]}, {"init_lora_weights": "gaussian"}],
    ids=str)
def test_other_peoples_adapters_are_merged_exactly(tmp_path, more):
    from peft import LoraConfig, PeftModel

    saved_base(tmp_path / "base", "llama")
    peft_adapter(tmp_path / "one", tmp_path / "base", LoraConfig(**LORA | more))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(base, tmp_path / "one")(IDS).logits
    assert_close(load(str(tmp_path / "one"))(IDS).logits, expected, 1e-5)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    args = eval.Args(model=(str(tmp_path / "one"),))  # where it is put on its base, which others share
    family = eval.OneBase(args.model, torch.float32, CPU, args)
    assert_close(family.sampler(*args.model, tiny_tokenizer(), 0).model(IDS).logits, expected, 1e-5)
    assert (load(str(tmp_path / "base"))(IDS).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("more, named", [
    ({"use_dora": True}, "use_dora"), ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
    ({"modules_to_save": ["input_layernorm"]}, "input_layernorm"), ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True}, "lora_bias"), ({"target_modules": ["q_proj", "embed_tokens"]}, "embed"),
    ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ({"trainable_token_indices": [6]}, "trainable_token"),
    ({"init_lora_weights": "pissa"}, "pissa"), ({"init_lora_weights": "olora"}, "olora"),
    ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication")], ids=str)
def test_an_adapter_that_is_more_than_a_and_b_is_refused_by_name(tmp_path, more, named):
    from peft import LoraConfig

    saved_base(tmp_path / "base", "qwen2")  # whose head is its embedding
    peft_adapter(tmp_path / "one", tmp_path / "base", LoraConfig(**{"bias": "none"} | LORA | more))
    with pytest.raises(ValueError, match=f"--model .*{named}.*PEFT") as caught:
        load(str(tmp_path / "one"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "LoKrConfig", "VeraConfig",
                                  "PromptTuningConfig"])
def test_an_adapter_of_another_kind_is_refused_by_name(tmp_path, kind):
    import peft

    saved_base(tmp_path / "base", "llama")
    more = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"} if "Prompt" in kind else {
        "target_modules": ["k_proj"]} | ({"feedforward_modules": []} if "IA3" in kind else {})
    peft_adapter(tmp_path / "one", tmp_path / "base", getattr(peft, kind)(**more))
    with pytest.raises(ValueError, match="peft_type"):
        load(str(tmp_path / "one"))


@pytest.mark.parametrize("change, named", [
    ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow 3")])
def test_an_adapters_configuration_is_understood_or_refused(tmp_path, change, named):
    saved_base(tmp_path / "base", "llama")
    model = load(str(tmp_path / "base"))
    add_lora(model, "policy", 4, 6, ["q_proj"])
    models.save_adapter(tmp_path / "one", adapter_tensors(model, "policy"), 6, str(tmp_path / "base"), model)
    config = tmp_path / "one/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=named):
        load(str(tmp_path / "one"))
    config.write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not valid JSON"):
        load(str(tmp_path / "one"))
    (tmp_path / "one/adapter_model.safetensors").rename(tmp_path / "one/adapter_model.bin")
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        load(str(tmp_path / "one"))


def without(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("change, named", [
    (without, "lack model.layers.1.mlp.down_proj.weight"),
    (lambda tensors: tensors.update({"score.weight": torch.zeros(1, 32)}), "hold score.weight"),
    (lambda tensors: [tensors.pop(key) for key in [*tensors] if "layers.1" in key], "lack model.layers.1")])
def test_weights_that_are_not_whole_are_refused_by_name(tmp_path, change, named):
    """What is missing would be drawn at random, what is left over would be left out: another model."""
    saved_base(tmp_path, "llama")
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"its weights {named}") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4"])
def test_quantized_weights_are_refused_by_name(tmp_path, method):
    saved_base(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"quantized \\({method}\\)"):
        load(str(tmp_path))


def test_code_that_comes_with_a_model_is_never_run(tmp_path, monkeypatch):
    """transformers would ask on the terminal, and run it on `y`."""
    saved_base(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "odd", "auto_map": {
        "AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="--model"):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# ---- what is refused ----

def config_folder(folder, kind, **overrides):
    config = CONFIG_MAPPING[kind](**(SIZES | EXTRA.get(kind, {}) | overrides))
    config.save_pretrained(folder)
    return str(folder)


def refusal(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)  # one line
    return str(caught.value)


@pytest.mark.parametrize("kind", ["t5", "mamba", "nemotron_h"])
def test_models_that_cannot_work_are_refused_by_name(tmp_path, kind):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    message = refusal(lambda: models.load_config(str(tmp_path)))
    assert repr(kind) in message and ("no causal" in message or "recurrent" in message)


@pytest.mark.parametrize("kind", KINDS)
def test_the_supported_families_are_not_refused(tmp_path, kind):
    assert models.load_config(config_folder(tmp_path, kind)).model_type == kind


@pytest.mark.parametrize("key", ["logits_scaling", "logit_scale", "output_logit_softcapping"])
def test_unknown_changes_of_the_logits_are_refused(tmp_path, key):
    """C-53: whatever the class does to the logits after lm_head, we would have to know."""
    folder = config_folder(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    for value, refused in ((0.25, True), (1.0, False), (None, False)):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        if refused:
            assert f"{key}=0.25" in refusal(lambda: models.load_config(folder))
        else:
            models.load_config(folder)


def test_rope_that_depends_on_the_length_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = config_folder(tmp_path, "llama", rope_parameters=rope)
    assert "'dynamic'" in refusal(lambda: models.load_config(folder))


USED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


@pytest.mark.parametrize("network, proxy, offline", [(False, {}, True), (True, {}, False),
                                                     (False, {"https": "http://proxy"}, False)])
def test_without_a_network_the_hubs_clients_do_not_try_for_a_minute(network, proxy, offline, monkeypatch):
    from huggingface_hub import constants

    asked = []

    def connect(address, timeout):
        asked.append(address)
        if not network:
            raise OSError("Name or service not known")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(models.socket, "create_connection", connect)
    monkeypatch.setattr(models, "getproxies", lambda: proxy)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/x")
    models.offline_without_hub.cache_clear()
    for _ in range(2):  # the second time it knows
        models.offline_without_hub()
    models.offline_without_hub.cache_clear()
    assert constants.HF_HUB_OFFLINE is offline and (os.environ["HF_HUB_OFFLINE"] == "1") is offline
    assert asked == ([] if proxy else [("mirror.example", 443)])


@pytest.mark.parametrize("kind, window", [
    ("qwen2", USED), ("qwen3", USED), ("gemma2", {"sliding_window": 8}),
    ("mistral", {"sliding_window": 8})])
def test_a_window_shorter_than_the_run_takes_the_plain_path(tmp_path, kind, window):
    """C-54: our cache knows no window. Up to it, greedy output still is transformers'; beyond, it is not."""
    folder = config_folder(tmp_path, kind, **window)
    assert models.is_fast(load(folder, max_tokens=8, from_scratch=True))
    assert not models.is_fast(load(folder, max_tokens=9, from_scratch=True))
    message = refusal(lambda: load(folder, max_tokens=9, from_scratch=True, quantize="nf4"))
    assert "--quantize" in message and "window" in message
    model = tiny_model(kind, **window)
    prompts = some_prompts((3, 3, 3, 3), seed=2)
    for new_tokens, same in ((5, True), (37, False)):
        samples = Sampler(model, ()).sample(prompts, [[0]] * 4, new_tokens, temperature=0)
        expected = greedy_by_generate(model, prompts, new_tokens)
        assert ([c.ids for (c,) in samples] == expected) == same
        samples = generic.PlainSampler(model, ()).sample(prompts, [[0]] * 4, new_tokens, temperature=0)
        assert [c.ids for (c,) in samples] == expected


def test_windows_that_are_not_used_change_nothing(tmp_path):
    for kind, window in (("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
                         ("mistral", {"sliding_window": None})):
        folder = config_folder(tmp_path / kind, kind, **window)
        assert models.is_fast(load(folder, max_tokens=100, from_scratch=True))


def test_a_run_longer_than_the_context_is_refused(tmp_path):
    folder = config_folder(tmp_path, "llama", max_position_embeddings=64)
    message = refusal(lambda: load(folder, max_tokens=65, from_scratch=True))
    assert "65 tokens" in message and "64" in message and "--max-prompt-tokens" in message
    load(folder, max_tokens=64, from_scratch=True)


def test_folders_that_lack_something_are_refused_by_what_they_lack(tmp_path):
    assert "no such folder" in refusal(lambda: models.resolve(str(tmp_path / "nowhere")))
    assert "no such folder" in refusal(lambda: models.resolve("runs/one/final"))
    assert models.resolve("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"
    (tmp_path / "empty").mkdir()
    assert "tokenizer" in refusal(lambda: models.load_tokenizer(str(tmp_path / "empty")))
    assert "configuration" in refusal(lambda: models.load_config(str(tmp_path / "empty")))
    assert "weights" in refusal(lambda: load(config_folder(tmp_path / "weightless", "llama")))

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    assert "eos_token" in refusal(lambda: models.load_tokenizer(str(tmp_path / "endless")))
    message = refusal(lambda: models.load_tokenizer("unrolled-tests/no-such-model"))  # the tests are offline
    assert "cannot reach the hub" in message and "--model that folder" in message


def test_a_run_directory_means_its_newest_model(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    run = str(tmp_path / "run")
    assert "neither final/ nor a checkpoint" in refusal(lambda: models.resolve(run))
    for name in ("checkpoints/step-9", "checkpoints/step-10", "final"):
        (tmp_path / "run" / name).mkdir(parents=True)
        assert models.resolve(run) == f"{run}/{name}"


def test_tokenizers_that_do_not_fit_and_layers_that_do_not_exist():
    tokenizer = tiny_tokenizer()
    models.check_token_ids(tiny_model("qwen2"), tokenizer)
    smaller = tiny_model("qwen2", vocab_size=383)
    assert "384 tokens" in refusal(lambda: models.check_token_ids(smaller, tokenizer))
    model = tiny_model("qwen2", num_hidden_layers=3)
    assert models.layer_range("", model) is None
    assert models.layer_range("1", model) == range(1, 2) and models.layer_range("0-2", model) == range(3)
    for text in ("3", "0-3", "2-1", "x", "-1"):
        assert f"--train-layers {text}" in refusal(partial(models.layer_range, text, model))


# ---- what loading leaves ----

def test_dropout_is_off_whatever_the_config_says(tmp_path):
    """C-21: the sampler, the reference and the trainer are one model, in training mode too."""
    model = load(config_folder(tmp_path, "llama", attention_dropout=0.5), from_scratch=True).train()
    ids = torch.tensor(some_prompts((15,)))
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_bfloat16_is_the_one_that_transformers_loads(tmp_path, kind):
    """Bit for bit, but for norms, which round once: the rotary frequencies stay float32; rounded, far tokens
    would turn by the wrong angle."""
    saved_base(tmp_path, kind)
    ours, theirs = (f(str(tmp_path), dtype=torch.bfloat16) for f in (
        partial(models.load_model, device=CPU), AutoModelForCausalLM.from_pretrained))
    norms = [module for module in theirs.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) >= 5
    for norm in norms:
        nn.init.normal_(norm.weight, 1.0)
        x = 30 * torch.randn(7, len(norm.weight))
        for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
            norm.to(dtype)
            torch.testing.assert_close(models.rms_norm(norm, x.to(dtype)), norm(x.to(dtype)), rtol=rounding,
                                       atol=0)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    models.fuse_norms(theirs)
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    ids = torch.tensor(some_prompts((400,)))
    assert torch.equal(ours(ids).logits, theirs.eval()(ids).logits)


# Other tokenizers and chat templates


def template_args(*chat_template, tokenizer=""):
    return SimpleNamespace(tokenizer=tokenizer, chat_template=chat_template)


def test_another_template_and_values_in_it(tmp_path):
    """A file, another model's, none; what nothing in the template is called is refused."""
    (tmp_path / "t.jinja").write_text(
        "{% if thinking is defined and not thinking %}[quick]{% endif %}"
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ level }}")
    file, own = str(tmp_path / "t.jinja"), models.load_tokenizer("")

    def prompt(*words):
        tokenizer = models.tokenizer_of(template_args(*words), "")
        return tokenizer.decode(data.encode_prompt(tokenizer, "x"))

    assert prompt() == own.decode(data.encode_prompt(own, "x"))
    assert prompt(file) == "<x>" and prompt(file, "thinking=false") == "[quick]<x>"
    assert prompt(file, "thinking=true", "level=high") == "<x>high" and prompt("none") == "x"
    tokenizer = models.tokenizer_of(template_args(file, "thinking=false"), "")
    tokenizer.save_pretrained(tmp_path / "saved")  # as beside what a run trains
    assert prompt(str(tmp_path / "saved")) == "[quick]<x>"
    for words, part in ((["depth=3"], "called depth"), ([str(tmp_path)], "no tokenizer in that folder")):
        with pytest.raises(ValueError, match=part):
            models.tokenizer_of(template_args(*words), "")
    other = copy.deepcopy(own)
    other.chat_template = None
    other.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no chat template"):
        models.tokenizer_of(template_args(str(tmp_path / "plain")), "")
    assert models.tokenizer_of(template_args(tokenizer=str(tmp_path / "plain")), "").chat_template is None


def test_a_template_goes_with_what_a_run_trains(tmp_path):
    """Also to the base, in an evaluation beside the run."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} = {{ hint }}")
    run("--max-steps", 1, "--prompts-per-step", 2, "--num-generations", 2, "--max-new-tokens", 4, "--out", "a",
        "--eval-questions", 2, "--train-questions", 4, "--chat-template", "t.jinja", "hint=7", cwd=tmp_path,
        script="grpo.py")
    (tmp_path / "t.jinja").unlink()
    asked = []
    original = eval.Sampler.sample

    def sample(self, prompts, *more):
        asked.extend(models.load_tokenizer("").decode(p) for p in prompts)
        return original(self, prompts, *more)

    with mock.patch.object(eval.Sampler, "sample", sample):
        run("--model", "base", "a", "--limit", 2, "--max-new-tokens", 4, "--out", "e", cwd=tmp_path)
    assert len(asked) >= 4 and all(text.endswith("= 7") for text in asked)
