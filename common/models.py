"""Models and tokenizers by name: embedded, a local folder, a run of ours, the hub; the unfit refused by name.

A run starts from a plain model: an adapter in the folder is merged into its base once, in float32, here.
"""

import copy
import hashlib
import json
import os
import re
import socket
import sys
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import curves, dist, shard
from common.tables import read_config

TINY = Path(__file__).parent / "tiny"  # the embedded model

# The decoder layer that the sampler writes out by hand is the layer of these families and of no other.
# recurrent, and padding on the left changes their state; or without a cache that generation could use
REFUSED = ("mamba", "nemotron_h", "kimi_linear", "lfm3")
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "seed_oss")
REWARD_FILE = "reward.json"  # beside the weights of a reward model: how it is asked, and its scores' scale
HEAD = "score.weight"  # its head [1, D], under the name that transformers' sequence classifiers give it
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def resolve(name: str) -> str:
    """The folder or hub id that `--model` means: "" is the embedded model, a run directory its final model.

    Errors: ValueError if the name looks like a path and nothing is there, or a run has no saved model yet.
    """
    if not name:
        return str(TINY)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "metrics.jsonl").exists() or (path / "checkpoints").is_dir():  # a run of ours
            saved = [path / "final"] + sorted(path.glob("checkpoints/step-*"), key=lambda p: -int(p.name[5:]))
            ready = [p for p in saved if p.is_dir()]
            if not ready:
                raise ValueError(f"--model {name}: that run has neither final/ nor a checkpoint yet")
            return str(ready[0])
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ValueError(f"--model {name}: no such folder "
                         "(and not a hub id such as Qwen/Qwen2.5-3B-Instruct)")
    return name


def absolute(name: str) -> str:
    """`resolve`, a local folder as an absolute path: what a saved adapter names as its base."""
    folder = resolve(name)
    return str(Path(folder).absolute()) if Path(folder).is_dir() else folder


def use_token() -> None:
    """Give the hub's clients a token: HF_TOKEN, else that of ~/.huggingface_token or HF_TOKEN=... in ./.env.

    It goes into this process's environment and nowhere else. A file that others can read is warned of.
    """
    for name, pattern in (("~/.huggingface_token", r"(\S+)"),
                          (".env", r"""(?m)^\s*(?:export\s+)?HF_TOKEN\s*=\s*["']?([^\s"']+)""")):
        path = Path(os.path.expanduser(name))
        try:
            found = not os.environ.get("HF_TOKEN") and re.search(pattern, path.read_text(errors="replace"))
        except OSError:
            continue
        if found:
            if path.stat().st_mode & 0o077 and dist.is_main():
                print(f"warning: others can read the token in {path}: chmod 600 {path}", file=sys.stderr)
            os.environ["HF_TOKEN"] = found[1]


@lru_cache(maxsize=1)
def offline_without_hub() -> None:
    """Before the hub is asked: its clients get the token; where it cannot be reached, their cache alone.

    They would try again for a minute, and print each attempt. Behind a proxy they are left to find out.
    """
    use_token()
    hub = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        if not getproxies():
            port = hub.port or {"http": 80}.get(hub.scheme, 443)
            socket.create_connection((hub.hostname, port), timeout=10).close()
    except OSError:
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` reads it when it is imported


def _reach(what: str, name: str, load, flag: str = "--model"):
    """Call a transformers loader; turn what can go wrong into one line that says the way out."""
    if not Path(name).is_dir():
        offline_without_hub()
    try:
        return load()
    except Exception as error:  # transformers raises many kinds: OSError, ValueError, KeyError, hub errors
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if Path(name).is_dir():
            raise ValueError(f"{flag} {name}: no usable {what} in that folder ({reason})") from None
        raise ValueError(f"{flag} {name}: cannot reach the hub for its {what} ({reason}); download it "
                         f"where there is a network (hf download {name}) "
                         f"and pass {flag} that folder") from None


def download(name: str) -> None:
    """Put a hub id's configuration, tokenizer and weights into the hub's cache; of an adapter's base, too.

    Nothing is left to do for a local folder, unless it holds an adapter. Errors: ValueError, one line.
    """
    folder = resolve(name)
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        folder = _reach("files", folder, lambda: snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"],
            ignore_patterns=["*/*", "consolidated*"]))  # the same weights in their authors' own formats
        if not any(Path(folder).glob("*.safetensors")):
            raise ValueError(f"--model {name}: no safetensors weights on the hub")
    if base := adapter_settings(folder).get("base_model_name_or_path"):
        download(base)


def load_tokenizer(name: str, flag: str = "--model"):
    """The tokenizer of a folder or hub id. Errors: ValueError, one line, if none or without an end token."""
    from transformers import AutoTokenizer

    name = resolve(name)
    if Path(name).is_dir() and not any(Path(name, file).exists()
                                       for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{flag} {name}: no tokenizer in that folder (tokenizer.json, tokenizer.model or "
                         "vocab.json)")
    tokenizer = _reach("tokenizer", name, lambda: AutoTokenizer.from_pretrained(
        name, trust_remote_code=False), flag)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{flag} {name}: its tokenizer has no eos_token; set one in tokenizer_config.json")
    return tokenizer


def tokenizer_of(args, name: str):
    """--tokenizer, else the model's own, with --chat-template; what a run trains is saved with it.

    Errors: ValueError: no such template, or nothing in it has the name of a value.
    """
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer") if args.tokenizer else load_tokenizer(name)
    for word in args.chat_template:
        key, given, value = word.partition("=")
        if word == "none":
            tokenizer.chat_template = None
        elif given and key.isidentifier():
            if not re.search(rf"\b{key}\b", str(tokenizer.chat_template)):
                raise ValueError(f"--chat-template {word}: nothing in the model's template is called {key}")
            with suppress(ValueError):  # else it is text
                value = json.loads(value)
            template = tokenizer.get_chat_template()
            tokenizer.chat_template = f"{{% set {key} = {json.dumps(value)} %}}{template}"
        elif Path(word).is_file():
            tokenizer.chat_template = Path(word).read_text(encoding="utf-8")
        elif not (template := load_tokenizer(word, "--chat-template").chat_template):
            raise ValueError(f"--chat-template {word}: that model has no chat template")
        else:
            tokenizer.chat_template = template
    return tokenizer


def load_config(name: str):
    """The model's configuration, refused by name where sampler or LoRA would be wrong or the shape unknown.

    Errors: ValueError if the family is not in SUPPORTED or its logits are rescaled in a way not known here.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    name = base_of(name)
    config = _reach("configuration", name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"--model {name}: its weights are quantized ({method}); pass the model that they "
                         "were made from, with --quantize nf4 if it must be small")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ValueError(f"--model {name}: model type {config.model_type!r} is no causal language model of "
                         "transformers")
    if config.model_type in REFUSED:
        raise ValueError(f"--model {name}: model type {config.model_type!r} cannot be sampled here: padding "
                         "changes its recurrent state")
    for key, value in config.to_dict().items() if config.model_type in SUPPORTED else ():
        scales_logits = ("logit" in key and "scal" in key) or (
            "softcap" in key and config.model_type != "gemma2")
        if scales_logits and value not in (None, 1, 1.0):
            raise ValueError(f"--model {name}: its config rescales the logits by {key}={value}, "
                             "which is not known here")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(f"--model {name}: rope type {rope!r} changes with the length of the text; "
                         "not supported")
    return config


def base_of(name: str) -> str:
    """The folder or hub id that holds the weights: for an adapter's folder, the base it names."""
    settings = adapter_settings(name)
    return base_of(settings["base_model_name_or_path"]) if settings else resolve(name)


def adapter_settings(name: str) -> dict:
    """The adapter_config.json of a model that is an adapter; {} for any other. Errors: `check_adapter`'s."""
    path = Path(resolve(name)) / "adapter_config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--model {name}: adapter_config.json is not valid JSON ({error})") from None
    check_adapter(name, config)
    return config


def check_reward_model(name: str) -> str:
    """The name. Errors: ValueError if reward_model.py did not write what is there."""
    try:
        folder = Path(resolve(name))
    except ValueError as error:
        raise ValueError(str(error).replace("--model ", "--rewards model:", 1)) from None
    if not (folder / REWARD_FILE).exists():
        raise ValueError(f"--rewards model:{name}: no reward model; train one with reward_model.py")
    return name


def run_arguments(name: str) -> dict:
    """Arguments of the run that wrote a model's folder (final/ or a checkpoint); {} for any other."""
    folder = Path(absolute(name))
    for run in (folder.parent, folder.parent.parent) if folder.is_dir() else ():
        if (run / "metrics.jsonl").exists() and (run / "config.json").exists():
            return read_config(run)["args"]
    return {}


def step_of(name: str) -> int:
    """The training step that a checkpoint, or the newest state of a run, holds; 0 for a plain model."""
    folder = Path(resolve(name))
    if (folder / "state.json").exists():
        return json.loads((folder / "state.json").read_text())["step"]
    return max((line["step"] for line in curves.read_metrics(folder.parent / "metrics.jsonl")), default=0)


def is_embedded(name: str) -> bool:
    """True for the embedded model and what was trained from it: it knows arithmetic and no system message."""
    of_run = run_arguments(name)
    return is_embedded(of_run["model"]) if of_run else base_of(name) == str(TINY)


def fingerprint(name: str) -> str:
    """A short text that tells models apart: the base's name, then a hash of each adapter on it."""
    folder = Path(absolute(name))
    if not folder.is_dir():
        return str(name)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with open(file, "rb") as handle:
            for place in (0, size // 2, size * 3 // 4):  # first come embeddings, which adapters leave alone
                handle.seek(place)
                digest.update(handle.read(2**20))
    below = adapter_settings(name).get("base_model_name_or_path", "")
    return " + ".join(filter(None, [below and fingerprint(below), digest.hexdigest()[:12]]))


def of_other_models(sources: str, model: str) -> list[str]:
    """Those of the comma-joined samples.csv that a run wrote which started from another model."""
    found = []
    for source in sources.split(","):
        if Path(source).suffix != ".csv":
            continue
        made_by = read_config(Path(source).parent).get("models")
        inside = Path(absolute(model)).is_relative_to(Path(source).parent.absolute())
        if made_by and fingerprint(model) not in made_by and not inside:
            found.append(source)
    return found


def load_model(name: str, dtype: torch.dtype, device: torch.device, max_tokens: int = 0,
               from_scratch: bool = False, scores: bool = False, split: bool = False,
               quantize: str = "none"):
    """A plain causal language model in `dtype` on `device`, dropout off; adapters are merged in float32.

    max_tokens: longest prompt and completion of the run; 0 leaves it unchecked. from_scratch: random weights.
    scores: the body of a reward model, which is refused otherwise. split: over the ranks; rank 0 loads it, on
    the CPU. quantize: "nf4", the linear layers of the decoder in 4 bits.
    Errors: ValueError, one line, if the model is missing, unsupported, or its context is shorter.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # one bar per rank, for files that load in a second
    set_verbosity_error()  # what is missing or left over is said below
    config = load_config(name)
    check_length(name, config, max_tokens)
    fast = config.model_type in SUPPORTED and not window_shorter_than(max_tokens, config)
    for flag, used in (("--shard", split), ("--quantize", quantize != "none")):
        if used and not fast:
            raise ValueError(f"{flag} works on the fast path (docs/models.md), not with {config.model_type}"
                             + (" whose window is shorter than the run" if config.model_type in SUPPORTED
                                else ""))
    if getattr(config, "attn_logit_softcapping", None):  # the fused kernels leave it out
        config._attn_implementation = "eager"
    folder, base = resolve(name), base_of(name)
    if scores:
        check_reward_model(name)
    elif (Path(folder) / REWARD_FILE).exists():
        raise ValueError(f"--model {name}: a reward model, no policy; use it as --rewards model:{name}")
    load_dtype, model = dtype if folder == base else torch.float32, None
    if from_scratch and (dist.is_main() or not split):
        model = AutoModelForCausalLM.from_config(config)
    elif dist.is_main() or not split:  # else its part comes from rank 0
        model, info = _reach("weights", base, lambda: AutoModelForCausalLM.from_pretrained(
            base, dtype=load_dtype, config=config, trust_remote_code=False, output_loading_info=True))
        for what, names in (("lack", info["missing_keys"]), ("hold", info["unexpected_keys"])):
            if names := sorted(set(names) - ({HEAD} if scores else set())):
                raise ValueError(f"--model {name}: its weights {what} {', '.join(names[:3])} "
                                 f"({len(names)} such tensors): not a whole causal language model of its "
                                 "config.json's kind")
        merge_adapters(model, folder)
    if split:
        source = model
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        torch.set_rng_state(dist.broadcast(torch.get_rng_state()))  # loading may have drawn from it
        shard.split(model, source, device)
        model.generation_config = dist.broadcast(source and source.generation_config)
    for module in model.modules():
        for key, value in vars(module).items():  # dropout makes sampler, reference and trainer three models
            if isinstance(value, float) and (isinstance(module, torch.nn.Dropout) or "dropout" in key):
                setattr(module, key, 0.0)
        module.training = hasattr(module, "gradient_checkpointing")  # which acts in this mode alone
    if fast:
        fuse_norms(model)
    model.takes_fast_path = fast
    if quantize == "nf4":
        to_4_bits(model, dtype, device)
    if split or quantize != "none":
        return model.to(device)
    for p in model.parameters():  # not model.to(dtype): rotary frequencies are buffers, and stay float32
        p.data = p.data.to(device=device, dtype=dtype)
    return model.to(device)


def fuse_norms(model) -> None:
    """RMS norms as one kernel instead of seven, and rounded alike: the sampler calls the same modules."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)


def rms_norm(module, x):
    """A transformers RMS norm's output, rounded once. Gemma stores weight - 1 and multiplies in float32."""
    gemma = "Gemma" in type(module).__name__
    wide, weight = (x.float(), module.weight.float() + 1) if gemma else (x, module.weight)
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)  # autocast makes it float32


def head_logits(hidden, weight, out=None):
    """hidden [N, D] @ weight [V, D].T in float32: bfloat16 logits would be off by hundredths of a nat."""
    if hidden.is_cuda and torch.version.cuda and hidden.dtype.itemsize < 4:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    return torch.mm(hidden, weight.T, out=out if hidden.dtype == torch.float32 else None).float()


def decode_kernels(layer, dtype, device):
    """common/kernels.py, on CUDA, if Triton works and it can run SamplerLayers like this one; else None."""
    kernels = working_kernels() if torch.version.cuda and device.type == "cuda" else None
    return kernels if kernels and kernels.fit(layer, dtype) else None


@lru_cache
def working_kernels():
    """common/kernels.py after a first launch, for which Triton needs a C compiler and Python's headers."""
    try:
        from common import kernels

        kernels.swiglu(torch.zeros(1, 2, device="cuda", dtype=torch.bfloat16))
    except Exception as error:  # noqa: BLE001 (an import, a compiler, a driver: the plain forms do it, too)
        print(f"no Triton kernels ({dist.first_line(error)}): sampling takes the plain, slower forms",
              file=sys.stderr)
        return None
    return kernels


def to_4_bits(model, dtype, device) -> None:
    """Replace the linear layers of the decoder by bitsandbytes' NF4 ones, one at a time, and move all there.

    Blocks of 64 weights share an absolute maximum, which is quantized again (arXiv 2305.14314 sec. 3).
    """
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("--quantize nf4 needs bitsandbytes: pip install bitsandbytes") from None
    for p in model.parameters():
        p.data = p.data.to(dtype)
    for layer in model.base_model.layers:
        for path, linear in list(layer.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                small = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype,
                    compress_statistics=True, quant_type="nf4", device="meta")
                small.weight = bitsandbytes.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
                small.bias = linear.bias
                layer.set_submodule(path, small.to(device))


def tokens_that_fit(model, params, dtype, kept_bytes: int = 0, most: int = 16384) -> int:
    """Padded tokens of a forward and backward pass that fit on this CUDA card, from 512 to `most`.

    The same on all ranks. Measured by passes over 512 and 1,024 tokens in `dtype`. On top come `kept_bytes`
    (the sampler's cache), AdamW's two float32 moments of `params`, gradients of those that the pass does not
    reach (a critic's), a tenth of the card for gaps, and 2 GB for a chunk of log-probs.
    """
    device, reached = model.get_input_embeddings().weight.device, 0

    def peak_bytes(tokens):
        nonlocal reached
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != model.dtype):  # --full in bfloat16
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.float().sum().backward()
        reached = sum(shard.local(p).numel() for p in params if p.grad is not None)
        for p in params:
            p.grad = None
        return torch.cuda.max_memory_allocated(device) - before

    try:
        _, small, large = peak_bytes(512), peak_bytes(512), peak_bytes(1024)  # the first makes workspaces
    except torch.OutOfMemoryError:
        small, large = 0, 2**60  # no room: the fewest tokens
    per_token = max(1, (large - small) / 512)
    trained = sum(shard.local(p).numel() for p in params)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = (free - 0.1 * total - 2 * 2**30 - kept_bytes - 8 * trained - 4 * (trained - reached)
            - max(0, small - 512 * per_token))
    return min(dist.gather(max(512, min(most, int(room / per_token) // 512 * 512))))


def check_length(name: str, config, max_tokens: int) -> None:
    limit = getattr(config, "max_position_embeddings", None) or max_tokens
    if max_tokens > limit:
        raise ValueError(f"--model {name}: prompt and completion need {max_tokens} tokens, "
                         f"its context holds {limit}; shorten --max-new-tokens, or leave long texts out with "
                         "--max-prompt-tokens or --max-tokens (see --help)")


def window_shorter_than(n_tokens: int, config) -> bool:
    """Whether a layer would not look at all of so many tokens."""
    window = getattr(config, "sliding_window", None) or n_tokens
    uses_window = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return uses_window and window < n_tokens


def is_fast(model) -> bool:
    """Whether the scripts' Sampler and log-probs know the model's layer (`load_model` says it of a run)."""
    return getattr(model, "takes_fast_path", model.config.model_type in SUPPORTED)


# What an adapter_config.json may say: the first row is read, the rest changes no weight.
ADAPTER_SETTINGS = {
    "alpha_pattern", "base_model_name_or_path", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora",
    "auto_mapping", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type"}
MERGE_FIRST = "merge it into its base with PEFT first (merge_and_unload) and pass the merged model"


def check_adapter(name, config) -> None:
    """Errors: ValueError naming the first setting that is more than LoRA's A and B, or what is missing."""
    strange = {key: value for key, value in config.items() if value and key not in ADAPTER_SETTINGS}
    if config.get("peft_type") != "LORA":
        strange = {"peft_type": config.get("peft_type")}
    if strange.get("init_lora_weights") in (True, "gaussian", "orthogonal"):  # others have changed the base
        del strange["init_lora_weights"]
    if strange:
        key, value = next(iter(strange.items()))
        raise ValueError(f"--model {name}: its adapter has {key} {value!r:.60}, more than LoRA's A and B: "
                         f"{MERGE_FIRST}")
    if not config.get("base_model_name_or_path"):
        raise ValueError(f"--model {name}: its adapter_config.json names no base_model_name_or_path: write "
                         "there which model the adapter stands on")
    if not Path(resolve(name), "adapter_model.safetensors").exists():
        raise ValueError(f"--model {name}: no adapter_model.safetensors in it (other formats are not read)")


def adapter_scale(config, path, r) -> float:
    """The adapter's factor for the layer at `path`, whose A has r rows; patterns match as in PEFT."""
    alpha = next((value for key, value in (config.get("alpha_pattern") or {}).items()
                  if re.match(rf"(.*\.)?({key})$", path)), config["lora_alpha"])
    return alpha / (r ** 0.5 if config.get("use_rslora") else r)


@torch.no_grad()
def merge_adapters(model, folder: str) -> None:
    """Add the adapter in `folder` to `model`'s weights, and first the adapter it stands on."""
    if config := adapter_settings(folder):
        merge_adapters(model, resolve(config["base_model_name_or_path"]))
        for path, A, B, factor in adapter_pairs(model, folder):
            linear = model.get_submodule(path)
            linear.weight.add_(as_weight(linear, factor * (B @ A)))


def adapter_pairs(model, folder: str):
    """Yields (path of the linear layer, A [R, in], B [out, R], factor) of all that an adapter holds.

    folder: in PEFT's format; a plain model's holds none. Errors: ValueError naming the first tensor that is
    not LoRA's A or B of a linear layer of the model, or does not fit it, with both shapes.
    """
    if not (config := adapter_settings(folder)):
        return
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    if (Path(folder) / REWARD_FILE).exists():
        del tensors[f"base_model.model.{HEAD}"]  # `load_head` reads it
    modules = dict(model.named_modules())
    for key in sorted(tensors):
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        path = match[1] if match else key
        pair = [f"base_model.model.{path}.lora_{letter}.weight" for letter in "AB"]
        if not match or not tensors.keys() >= set(pair):
            raise ValueError(f"--model {folder}: its adapter's {key} is no LoRA A with its B: {MERGE_FIRST}")
        if match[2] == "B":
            continue
        A, B = (tensors[name].float() for name in pair)
        linear = modules.get(path)
        if not (size := linear_size(linear)):
            raise ValueError(f"--model {folder}: its adapter has {key}, "
                             f"but the base model has no linear layer {path}")
        if model.config.tie_word_embeddings and linear is model.get_output_embeddings():
            raise ValueError(f"--model {folder}: its adapter has {key}, but the base model's head is its "
                             f"embedding, too: {MERGE_FIRST}")
        if A.dim() != 2 or size != (A.shape[1], B.shape[0]):
            raise ValueError(f"--model {folder}: its adapter's {key} makes {(B.shape[0], A.shape[-1])}, "
                             f"but the base model's {path} is {size[::-1]}")
        yield path, A, B, adapter_scale(config, path, len(A))


def save_adapter(folder, tensors, alpha, base: str, model, head=None) -> None:
    """Write an adapter in PEFT's format.

    tensors: path of the linear layer -> (A [R, in], B [out, R]); base: the folder or hub id it stands on;
    head: a reward model's [1, D].
    """
    os.makedirs(folder, exist_ok=True)
    layers = sorted({int(part) for path in tensors for part in path.split(".") if part.isdigit()})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
              "base_model_name_or_path": base,
              "r": next(iter(tensors.values()))[0].shape[0], "lora_alpha": alpha, "lora_dropout": 0.0,
              "bias": "none", "fan_in_fan_out": model.config.model_type == "gpt2",
              "inference_mode": True, "init_lora_weights": True,
              "modules_to_save": None if head is None else ["score"], "use_rslora": False,
              # in full where PEFT reads the ends of names as parameters of experts
              "target_modules": sorted({path.rpartition(".")[2] for path in tensors}
                                       if model.config.model_type in SUPPORTED else tensors),
              "layers_to_transform": layers if len(layers) < model.config.num_hidden_layers else None}
    flat = {f"base_model.model.{path}.lora_{letter}.weight": tensor.detach().cpu().contiguous()
            for path, pair in tensors.items() for letter, tensor in zip("AB", pair)}
    if head is not None:
        flat[f"base_model.model.{HEAD}"] = head.detach().cpu().contiguous()
    save_file(flat, f"{folder}/adapter_model.safetensors", {"format": "pt"})
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=1))


@torch.no_grad()
def load_adapter(folder, tensors) -> None:
    """Copy a saved adapter into `tensors` (as `save_adapter` takes them).

    Errors: ValueError naming the first tensor that does not fit, with both shapes.
    """
    saved = load_file(f"{folder}/adapter_model.safetensors")
    for path, pair in tensors.items():
        for letter, tensor in zip("AB", pair):
            key = f"base_model.model.{path}.lora_{letter}.weight"
            if key not in saved or saved[key].shape != tensor.shape:
                found = tuple(saved[key].shape) if key in saved else "missing"
                raise ValueError(f"{folder}: {key} is {found}, "
                                 f"this run's adapter needs {tuple(tensor.shape)}")
            tensor.copy_(saved[key])


def stop_ids(model, tokenizer, dry_run=False) -> list[int]:
    """Every token id that ends an answer: the tokenizer's end token and all of the model's generation_config.

    None in a dry run, whose answers all run to full length. Qwen2.5 has two of them (<|im_end|>,
    <|endoftext|>); a sampler that knows one never sees base models stop.
    Errors: ValueError if tokenizer and model do not belong together.
    """
    check_token_ids(model, tokenizer)
    if dry_run:
        return []
    from_config = getattr(model.generation_config, "eos_token_id", None)
    from_config = from_config if isinstance(from_config, list) else [from_config]
    return sorted({tokenizer.eos_token_id, *(i for i in from_config if i is not None)})


@contextmanager
def not_training(model):
    """Within the block no layer is in training mode, in which gradient checkpointing drops the cache."""
    training = [m for m in model.modules() if m.training and hasattr(m, "gradient_checkpointing")]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def decoder_layers(model) -> torch.nn.ModuleList:
    """The decoder's layers, whatever the family calls them: the longest list of modules in its body."""
    return max((m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def linear_size(module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, nn.Linear or GPT-2's Conv1D; None for any other module."""
    if type(module).__name__ == "Conv1D":
        return module.nx, module.nf
    return (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else None


def as_weight(linear, delta):
    """A change [out, in] of the layer's weight as it holds that: a Conv1D's lies as [in, out]."""
    return delta if isinstance(linear, torch.nn.Linear) else delta.T


def linear_names(model) -> set:
    """How the names of the linear layers end that an adapter can be on: `--lora-targets all-linear`.

    Not the routers of experts, which are called `router`, or `gate` alone. Errors: ValueError without any.
    """
    modules = (pair for layer in decoder_layers(model) for pair in layer.named_modules())
    names = {path.rpartition(".")[2] for path, module in modules
             if linear_size(getattr(module, "base", module))} - {"base", "gate", "router"}
    if not names:
        raise ValueError(f"{model.config.model_type} has no linear layers that an adapter could be on: train "
                         "all weights with --full")
    return names


def layer_range(text: str, model) -> range | None:
    """`--train-layers`: "" all (None), "20-27" or "27". Errors: ValueError if there are no such layers."""
    if not text:
        return None
    n = model.config.num_hidden_layers
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first) < n):
        raise ValueError(f"--train-layers {text}: not a range within this model's layers 0-{n - 1}")
    return range(int(first), int(last or first) + 1)


def check_token_ids(model, tokenizer) -> None:
    """Errors: ValueError if the tokenizer makes an id without an embedding row (an opaque crash on CUDA)."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens but the model's embedding "
                         f"only {rows} rows: they do not belong together")


def run_tags(model: str, of_data: str) -> tuple[str, str]:
    """What a run's default directory name says of its model and data."""
    return Path(model).name or "tiny", Path(of_data.partition(",")[0]).stem


def describe(args, model, params, dtype) -> str:
    """One line for the run's head: which weights, how many are trained, at what rate."""
    def size(weights):
        return sum(getattr(p, "quant_state", p).shape.numel() for p in weights) / 1e6

    n_all, n_trained = size(model.parameters()), size(params)
    adapted = [m.base.weight for m in decoder_layers(model).modules() if getattr(m, "active", None)]
    share = size(adapted) / size(p for name, p in decoder_layers(model).named_parameters()
                                 if ".A." not in name and ".B." not in name)
    kind = "all" if args.full else f"LoRA r={args.lora_r}" + (
        f" on {share:.0%} of the layers' weights" if share < 0.98 else "")
    return (f"model: {args.model or 'embedded'}, {n_all:.1f} M weights, {n_trained:.2f} M trained ({kind}), "
            f"{str(dtype)[6:]}, learning rate {args.lr:g}"
            + ("" if is_fast(model) else
               f"; {model.config.model_type} takes the plain path, which is slower (docs/models.md)"))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`--dtype`: auto is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def save_plain(model, tokenizer, state: dict[str, torch.Tensor], folder) -> None:
    """Write a plain Hugging Face model (safetensors, config, tokenizer): transformers, PEFT, vLLM load it.

    All ranks call it, rank 0 writes. With a reward model's HEAD in the state it is a sequence
    classifier of one label.
    """
    config = copy.deepcopy(model.config)
    if HEAD in state:
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        # transformers scores the last token that is no padding: where that is the end token, rather none
        pad_id = tokenizer.pad_token_id
        config.num_labels, config.pad_token_id = 1, None if pad_id == tokenizer.eos_token_id else pad_id
        config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
    if model.config.tie_word_embeddings:
        state = {key: value for key, value in state.items() if key != "lm_head.weight"}
    state = {key: shard.gather(value) if shard.is_split(value) else value for key, value in state.items()}
    if not dist.is_main():
        return
    os.makedirs(folder, exist_ok=True)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_trained(model, tokenizer, adapter, args, folder, head=None) -> None:
    """Write what a run trains: `adapter` (as `save_adapter` takes it), the whole model where it is None.

    head: a reward model's [1, D], which goes into the same file. All ranks call it, rank 0 writes.
    """
    if adapter is None:
        save_plain(model, tokenizer, model.state_dict() | ({} if head is None else {HEAD: head}), folder)
    elif dist.is_main():
        save_adapter(folder, adapter, args.lora_alpha, absolute(args.model), model, head)
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def load_trained(folder, model, adapter, head=None) -> None:
    """Read back what `save_trained` wrote."""
    if adapter is None and shard.is_split(model.get_input_embeddings().weight):
        tied = model.config.tie_word_embeddings
        shard.load(folder, {key: value for key, value in model.state_dict().items()
                            if not (tied and key == "lm_head.weight")})
    elif adapter is None:
        model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    else:
        load_adapter(folder, adapter)
    if head is not None:
        head.copy_(load_head(folder))


def load_head(folder) -> torch.Tensor:
    """The head [1, D] of a reward model, float32."""
    adapter = Path(folder) / "adapter_model.safetensors"
    file, key = (adapter, f"base_model.model.{HEAD}") if adapter.exists() else (
        Path(folder) / "model.safetensors", HEAD)
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key).float()


def last_token_scores(model, head, rows) -> torch.Tensor:
    """Scores [B] of rows of token ids: the head [1, D], float32, on the hidden state of the last token.

    The place is known by length, never by looking for a padding id; padding stands right of it, where
    causal attention does not look.
    """
    lengths = [len(row) for row in rows]
    input_ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, :len(row)] = torch.tensor(row)
    hidden = model.base_model(input_ids=input_ids.to(head.device), use_cache=False).last_hidden_state
    at = torch.tensor(lengths, device=head.device) - 1
    # not a matrix product, which autocast would round
    return (hidden[torch.arange(len(rows), device=head.device), at].float() * head[0]).sum(1)


def autocast(device, dtype, full):
    """Where full training keeps float32 weights, compute in bfloat16; a frozen base is in `dtype` already."""
    return torch.autocast(device.type, torch.bfloat16, enabled=full and dtype == torch.bfloat16,
                          cache_enabled=False)
