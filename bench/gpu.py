"""Check and time a CUDA machine for this project in one run of minutes: right first, then how fast.

    python bench/gpu.py --out runs/gpu              # all of it, in about --seconds 330
    python bench/gpu.py --only "3B: decode" OOM     # the parts whose names hold one of these words
    python bench/gpu.py --small                     # toy sizes on any machine: does it run to its end?

Needs torch and transformers, and neither the network nor any other package. Prints a JSON line for each
figure as it is found, then Markdown tables; exit code 1 if a check fails or a part breaks (the rest goes on).
In --out: gpu.jsonl, a line at once for each figure; gpu.md, the tables; kernels.md, the slowest kernels;
scripts.log, what the scripts print. A part that would end after --seconds is left out and named. SIGTERM,
Ctrl-C or a part that hangs for 45 seconds past the budget end the run with the tables of what there is.

A decode step's limit is the larger of bytes / copy bandwidth (the weights once, the keys and values that are
read once) and operations / matrix rate; both ceilings are measured first, on this card. Training counts two
operations per weight and token forward and two backward (--full: four), with lm_head on completion tokens
alone; what is recomputed does not count.

On a CPU a stand-in takes the place of CUDA's graphs: it records the operators of a capture and replays them
on the same tensors. So the sampler's graph path runs there as on a card, eight steps between two looks.
"""

import time

IMPORTS_BEGAN = time.monotonic()  # they take long enough on a fresh machine to count

import gc
import math
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from bench import gpu_parts as parts
from bench.gpu_tools import attempt, counted_graphs, figures, here, printing, watch
from common import dist, models

IMPORTS_TOOK = time.monotonic() - IMPORTS_BEGAN


# ---- tables ----


def table(kind, columns, cells):
    rows = [cells(figure) for figure in figures if figure["figure"] == kind]
    lines = [" | ".join(row) for row in [columns, ["---"] * len(columns), *rows]]
    return "\n" + "\n".join(f"| {line} |" for line in lines) + "\n" if rows else ""


def against_generate(f):
    """How many times as fast the Sampler, which has an adapter, was: in generate's own rows."""
    return next((f"{g['ratio']:.1f} x" for g in figures if g["figure"] == "against generate" and (
        f["what"], f["shape"], f["slots"]) == (g["what"], g["shape"], g["slots"])), "")


def tables():
    """All of them as Markdown."""
    def ms(value):
        return "" if value is None else f"{value:.2f}"

    def share(f, name):
        return f"{f['shares'][name]:.0%}" if name in f["shares"] else ""

    machine = next((f for f in figures if f["figure"] == "machine"), {})
    ceilings = next((f for f in figures if f["figure"] == "ceilings"), {})
    lines = [f"{key}: {value}" for key, value in (machine | ceilings).items() if key != "figure"]
    return "; ".join(lines) + "\n" + "".join([
        table("check", ("check", "value", "at most", ""), lambda f: (
            f["name"].replace("|", "\\|"), f"{f['value']:.2g}", f"{f['limit']:.2g}",
            "ok" if f["ok"] else "**FAILED**")),
        table("decode", ("decode", "slots", "mean length", "keys read", "ms per step", "replayed alone, ms",
                         "limit, ms", "share of the limit", "tokens/s", "Sampler is", "peak GB"),
              lambda f: (f"{f['shape']}, {f['what']}", str(f["slots"]), str(f["length"]), str(f["keys_read"]),
                         ms(f["ms_per_step"]), ms(f.get("replay_ms")), ms(f["limit_ms"]), f"{f['share']:.0%}",
                         f"{f['tokens_per_s']:,}", against_generate(f), str(f["peak_gb"]))),
        table("step", ("GRPO step", "rows", "tokens", "sample s", "reference s", "update s", "step s",
                       "sampled tokens/s", "reference, share of the matrix rate", "update, share",
                       "tokens per batch", "peak GB"), lambda f: (
            f"{f['shape']}, {f['what']}", f"{f['prompts']} x {f['group']}",
            f"{f['prompt_tokens']} + {f['mean_new']} (longest {f['longest']})",
            *(ms(f["seconds"].get(name)) for name in ("sample", "reference", "update")), ms(f["step_s"]),
            f"{f['sample_tokens_per_s'] or 0:,}", share(f, "reference"), share(f, "update"),
            f"{f['tokens_per_batch']:,}", str(f["peak_gb"]))),
        table("kernels", ("where the time goes", "ms", "as a graph, ms", "of it"), lambda f: (
            f["what"], ms(f["total_ms"]), ms(f.get("as_graph_ms")), ", ".join(
                f"{kind} {value:.2f} ({f['calls'][kind]})" for kind, value in f["ms"].items()))),
        table("captures", ("captures", "slots", "graphs", "seconds", "reserved GB before", "after"),
              lambda f: (f["shape"], str(f["slots"]), str(f["number"]), ms(f["seconds"]),
                         str(f["reserved_gb_before"]), str(f["reserved_gb_after"]))),
        table("gap", ("trainer - sampler", "mean size", "largest", "mean"), lambda f: (
            f["shape"], f"{f['mean']:.4f}", f"{f['largest']:.3f}", f"{f['bias']:.5f}")),
        table("same update twice", ("same update twice", "equal to the bit", "difference, relative"),
              lambda f: (f["shape"], str(f["bit_equal"]), f"{f['relative']:.1g}")),
        table("cudnn attention", ("training's attention", "rows x tokens", "first call, ms", "second, ms"),
              lambda f: (f"cuDNN {'on' if f['enabled'] else 'off'}", f"{f['rows']} x {f['tokens']}",
                         ms(f["first_ms"]), ms(f["second_ms"]))),
        table("decode attention", ("decode's attention", "mean live keys", "limit, us", "us of a layer"),
              lambda f: (f"{f['rows']} x {f['columns']}", str(f["mean_live"]), str(f["limit_us"]), ", ".join(
                  f"{name} {value}" for name, value in f["us"].items()))),
        table("script", ("script", "step", "sampler gap", "seconds of the last step"), lambda f: (
            f["name"], str(f.get("step", "")), f"{f.get('sampler_gap') or 0:.2g}", ms(f.get("seconds")))),
        table("part", ("part", "seconds", "expected", "done at"), lambda f: (
            f["name"], f"{f['seconds']:.1f}", str(f["expected"]), str(f["at"]))),
        table("left out", ("left out: no time", "expected s"), lambda f: (f["part"], str(f["needs"]))),
        table("broken", ("broken", "why"), lambda f: (f["part"], f["error"].replace("\n", " ")))])


def finish():
    """The tables, to the terminal and to --out."""
    with printing:
        text = tables()
        if here.out:
            (here.out / "gpu.md").write_text(text)
        print("\n" + text, file=here.stdout, flush=True)


# ---- the run ----


def large_shape(s):
    """What the project is for: speed first, then where the time goes."""
    for slots in s.a.slots[:2]:
        attempt(f"{s.shape}: decode, {slots} slots", 10, s.decode, slots)
    for adapter in (None, "policy"):
        attempt(f"{s.shape}: generate, {s.a.slots[0]} slots, adapter {adapter}", 3, s.generate, s.a.slots[0],
                adapter)
    n_prompts, group, new = (4, 4, 16) if here.small else (64, 8, 512)
    attempt(f"{s.shape}: GRPO step", 40, partial(s.step, "with KL", n_prompts, group, new, beta=0.04))
    attempt(f"{s.shape}: step of the defaults", 15, s.default_step, "the defaults")
    for slots in s.a.slots[:2]:
        attempt(f"{s.shape}: kernels of a step, {slots} slots", 4, s.step_kernels, slots)
    attempt(f"{s.shape}: kernels of a micro-batch", 6, s.batch_kernels)
    for slots in s.a.slots[2:]:
        attempt(f"{s.shape}: decode, {slots} slots", 10, s.decode, slots)


def small_shape(s):
    """What needs a second model beside the first, and speed at a size that launches bind."""
    attempt(f"{s.shape}: sampler, trainer and float32", 6, s.gap)
    for slots in s.a.slots:
        attempt(f"{s.shape}: decode, {slots} slots", 5, s.decode, slots)
    attempt(f"{s.shape}: generate, {s.a.slots[0]} slots", 5, s.generate, s.a.slots[0])
    attempt(f"{s.shape}: the same update twice", 3, s.twice)
    attempt(f"{s.shape}: step of the defaults", 8, s.default_step, "the defaults")
    attempt(f"{s.shape}: --gradient-checkpointing", 8, partial(
        s.default_step, "--gradient-checkpointing", checkpointing=True))
    attempt(f"{s.shape}: --full", 12, s.full_step)


def all_parts(a, dtype):
    """Correctness first, then the 3B figures: what the budget leaves out is at the end."""
    ceilings = SimpleNamespace(copy=math.nan, matmul=math.nan)
    attempt("environment", 3, parts.environment, dtype)
    attempt("ceilings", 3, parts.measure_ceilings, dtype, ceilings)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, cost, script, values in parts.SCRIPTS:
            attempt(f"script: {name}", cost, parts.run_script, name, script, folder, values)
        attempt("script: grpo --shard", 25, parts.run_sharded, folder)
    attempt("noise and tokens are the CPU's", 5, parts.check_across_devices)
    attempt("draw", 2, parts.check_draw)
    attempt("float32 against transformers", 6, parts.check_float32)
    for each in (torch.float32, torch.bfloat16):
        attempt(f"graphs, {str(each)[6:]}", 5, parts.check_graphs, each)
    attempt("memory of the log-probs", 3, parts.check_logprob_memory)
    if "3B" in a.shapes:
        large_shape(parts.Shape("toy" if here.small else "3B", a, ceilings, dtype))
    attempt("OOM in sampling", 6, parts.check_oom_sampling)
    attempt("OOM in an update", 4, parts.check_oom_update)
    if "0.5B" in a.shapes:
        small_shape(parts.Shape("toy" if here.small else "0.5B", a, ceilings, dtype))
    attempt("cuDNN attention, on and off", 8, parts.time_cudnn)
    attempt("attention of a decode step", 6, parts.time_decode_attention, ceilings)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes; runs on a CPU, in float32")
    parser.add_argument("--seconds", type=float, default=330, help="begin no part that would end after them")
    parser.add_argument("--out", type=Path, help="folder for the figures, tables and logs")
    parser.add_argument("--only", nargs="+", default=(), help="parts whose names hold one of these words")
    parser.add_argument("--shapes", nargs="+", choices=("0.5B", "3B"), default=["0.5B", "3B"])
    parser.add_argument("--slots", nargs="+", type=int, default=[64, 256, 512], help="multiples of 32")
    parser.add_argument("--steps", type=int, default=1, help="GRPO steps to time of each kind")
    a = parser.parse_args()
    if not a.small and not torch.cuda.is_available():
        parser.error("no CUDA device here; --small runs toy sizes on any machine")
    if a.small:
        a.slots = [32, 64]
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
    figures.clear()
    vars(here).update(small=a.small, only=a.only, out=a.out, seconds=a.seconds, stdout=sys.stdout,
                      imports_took=IMPORTS_TOOK, began=time.monotonic() - IMPORTS_TOOK, device=dist.setup())
    gc.freeze()  # what the imports made stays: a collection between the parts then takes milliseconds
    transformers.logging.set_verbosity_error()
    with watch(finish), counted_graphs():
        all_parts(a, models.choose_dtype("auto", here.device))
        finish()
    sys.exit(any(f["figure"] == "broken" or not f.get("ok", True) for f in figures))


if __name__ == "__main__":
    main()
