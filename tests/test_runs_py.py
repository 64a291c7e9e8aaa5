"""runs.py: its statistics against scipy, comparisons by hand, what it shows of real runs."""

import csv
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import runs
from common import curves
from common.run import Run
from common.tables import clock, read_csv
from runs import bootstrap, mcnemar, wilson
from tests.commands import ENV, SMALL, read, run

ROOT = Path(__file__).resolve().parents[1]
look = partial(run, script="runs.py")


def test_a_clock_that_went_backwards():
    assert [clock(seconds) for seconds in (-7199, 0, 62, 3723)] == ["0:00", "0:00", "1:02", "1:02:03"]


def test_mcnemar_and_wilson_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for b, c in [(0, 0), (0, 5), (3, 9), (10, 10), (40, 17)]:
        expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
        assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(expected, abs=1e-12)
    for c, n in [(0, 5), (3, 10), (500, 1000), (7, 7)]:
        expected = stats.binomtest(c, n).proportion_ci(method="wilson")
        assert wilson(c / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_bootstrap_agrees_with_scipy():
    """Two Monte Carlo estimates of a bound with spread 0.04: each is off by about 0.001."""
    stats, np = pytest.importorskip("scipy.stats"), pytest.importorskip("numpy")
    changes = [1] * 30 + [-1] * 12 + [0] * 158
    expected = stats.bootstrap((changes,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    assert bootstrap(changes) == pytest.approx(tuple(expected.confidence_interval), abs=0.006)
    assert bootstrap([0] * 20) == (0.0, 0.0)


def test_no_model_library_is_needed(tmp_path):
    """torch and transformers take seconds to import; a login node may have neither."""
    code = """import sys
sys.modules |= dict.fromkeys(("torch", "transformers"))  # importing them fails
import runs
runs.main(sys.argv[1:])"""
    write_answers(tmp_path / "a", [{"id": 0, "correct": 0, "completion": "6", "extracted": "6", "finished": 1,
                                    "tokens": 1}])
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "seconds": 2.0, "time": 1.0, '
                                                  '"model": "m", "preamble": ""}\n')
    (tmp_path / "a" / "config.json").write_text('{"args": {"max_steps": 3}}')
    for words, expected in ((["compare", "a"], "| a m |"), (["plot", "a"], "curves.png"),
                            (["show", "a", "--step", "1"], "Q: 2+3?"), (["status", "."], "| 1/3 |")):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True,
                              text=True, env=ENV | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr


def test_help_has_a_line_for_each_command():
    env = ENV | {"COLUMNS": "200"}
    help = {name: subprocess.run([sys.executable, ROOT / "runs.py", *name, "--help"], env=env, check=True,
                                 capture_output=True, text=True).stdout
            for name in [(), ("compare",), ("plot",), ("show",), ("status",)]}
    for (name, *_), text in list(help.items())[1:]:
        (line,) = [line.split(maxsplit=1)[1] for line in help[()].splitlines()
                   if line.split()[:1] == [name]]
        assert line == getattr(runs, name).__doc__ and line in text


@pytest.mark.parametrize("words, part", [
    (["compare", "nowhere"], "nowhere"), (["plot", "nowhere"], "nowhere"), (["status", "nowhere"], "nowhere"),
    (["show", "nowhere", "--step", 1], "nowhere"), (["show", "grpo", "--step", 1, "--row", 99], "--row 99")])
def test_mistakes_are_one_line(words, part, trained):
    assert part in look(*words, cwd=trained, fails=True)


def test_a_rollout_is_shown(trained):
    recorded = [row for row in read(trained / "grpo" / "samples.csv") if row["step"] == "2"][5]
    out = look("show", "grpo", "--step", 2, "--row", 5, cwd=trained)
    assert all(recorded[name] in out for name in ("prompt", "completion", "advantage", "answer"))
    assert f"correctness {float(recorded['reward/correctness']):.3g}" in out


def test_a_run_compared_with_itself_does_not_differ(trained):
    run("--limit", 9, "--out", "self", *SMALL, cwd=trained)
    out = look("compare", "self", "self", "--examples", 0, cwd=trained)
    assert "9 questions in common, 0 left out" in out
    same = out.splitlines()[-1]
    assert "| 0.000 [0.000, 0.000] | 1 | 0 | 0 |" in same


def write_answers(folder, rows):
    folder.mkdir()
    common = {"model": "m", "preamble": "", "step": 1, "sample": 0, "answer": "5", "prompt": "2+3?"}
    with open(folder / "samples.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, [*common, "id", "correct", "completion", "extracted", "finished", "tokens"])
        writer.writeheader()
        writer.writerows([common | row for row in rows])


def test_compare_by_hand(tmp_path):
    """Right, then wrong format; wrong, then right; right twice; wrong, then without an answer."""
    good = {"correct": 1, "completion": "<think>a</think><answer>5</answer>", "extracted": "5", "finished": 1,
            "tokens": 10}
    bad = good | {"correct": 0, "completion": "<think>b</think><answer>6</answer>", "extracted": "6"}
    write_answers(tmp_path / "a", [good | {"id": 0}, bad | {"id": 1}, good | {"id": 2}, bad | {"id": 3}])
    write_answers(tmp_path / "b", [bad | {"id": 0, "completion": "6?\n\"ọ̀\", maybe"}, good | {"id": 1},
                                   good | {"id": 2}, bad | {"id": 3, "extracted": "", "completion": "hm"}])
    out = look("compare", "a", "b", cwd=tmp_path)
    header, _, first, second = [line.split(" | ") for line in out.splitlines() if line.startswith("|")]
    cells = dict(zip([name.strip("| ") for name in header], [cell.strip("| ") for cell in second]))
    assert cells["pass@1"].startswith("0.500") and cells["difference"].startswith("0.000")
    assert (cells["wrong→right"], cells["right→wrong"], cells["McNemar p"]) == ("1", "1", "1")
    assert (cells["right"], cells["wrong"], cells["wrong format"], cells["no answer"]) == ("2", "0", "1", "1")
    assert cells["first always right (2)"] == cells["first never right (2)"] == "0.500"
    assert (cells["run"], cells["tokens"], cells["hours"]) == ("b m", "0", "0")  # no run's model
    (tmp_path / "m").mkdir()  # a run of two ranks, evaluated as of its step 1
    (tmp_path / "m/config.json").write_text('{"args": {}, "world_size": 2}')
    (tmp_path / "m/metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "sampled_tokens": tokens, "seconds": 3600}) + "\n"
        for step, tokens in ((1, 30), (2, 70))))
    (tmp_path / "b/config.json").write_text('{"args": {"system": "none"}}')  # which asks for no tags
    *_, second = [line.split(" | ") for line in look("compare", "a", "b", cwd=tmp_path).splitlines()
                  if line.startswith("|")]
    cells = dict(zip(cells, [cell.strip("| ") for cell in second]))
    assert (cells["tokens"], cells["hours"], cells["wrong"], cells["wrong format"]) == ("30", "2", "1", "0")
    assert "### b m: right→wrong, question 0 (gold 5)" in out and "6?\n\"ọ̀\", maybe" in out
    write_answers(tmp_path / "c", [good | {"id": 0, "answer": "8"}])
    assert "different questions" in look("compare", "a", "c", cwd=tmp_path, fails=True)


def test_training_runs_are_compared_by_step(trained):
    out = look("compare", "grpo", "--examples", 0, cwd=trained)
    assert "| grpo@0 |" in out and "| grpo@3 |" in out and "20 questions in common" in out
    assert "| grpo@0 |" in look("compare", "grpo@0", "grpo@3", "--examples", 0, cwd=trained)


def test_models_of_one_directory_are_compared(trained):
    """Tokens are those of each one's training; two directories of one name keep their answers apart."""
    run("--model", "base", "grpo", "--limit", 8, "--max-new-tokens", 40, "--out", "x/e", cwd=trained)
    shutil.copytree(trained / "x", trained / "y", dirs_exist_ok=True)
    sampled = curves.read_metrics(trained / "grpo")[-2]["sampled_tokens"]
    out = look("compare", "x/e", "y/e", cwd=trained)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()
             if line.startswith("|")]
    found = {line[0]: dict(zip(table[0], line)) for line in table[2:]}
    assert list(found) == ["x/e base", "x/e grpo", "y/e base", "y/e grpo"]
    for model, tokens in (("base", 0), ("grpo", sampled)):
        assert found[f"x/e {model}"]["tokens"] == found[f"y/e {model}"]["tokens"] == str(tokens)


def test_status_of_everything(trained):
    run("--model", "grpo", "--limit", 3, "--max-new-tokens", 40, "--out", "st/e", cwd=trained)
    (trained / "st" / "model").mkdir()
    (trained / "st" / "model" / "config.json").write_text("{}")
    line = look("status", "st", cwd=trained).splitlines()[-1]
    assert "| e |" in line and "pass@1" in line and "| ? |" in line


@pytest.mark.parametrize("text", ['{"args": []}', "[]", "{", "\ufffd"])
def test_a_config_that_is_not_a_runs(trained, tmp_path, text):
    """C4: one line with the file's name; among other runs it is no run."""
    shutil.copytree(trained / "grpo", tmp_path / "a")
    (tmp_path / "a/config.json").write_text(text)
    assert "a/config.json: not a run's" in look("compare", "a", cwd=tmp_path, fails=True)
    assert "no runs there" in look("status", ".", cwd=tmp_path, fails=True)


def test_a_picture_has_a_folder(trained):
    assert "nodir" in look("plot", "grpo", "--out", "nodir/x.png", cwd=trained, fails=True)


def test_status(trained):
    out = look("status", ".", cwd=trained)
    line = next(line for line in out.splitlines() if "| grpo |" in line)
    assert "| 3/3 |" in line and "reward" in line and "done" in line and "ago" in line


def test_curves_show_what_the_metrics_hold(trained, tmp_path, monkeypatch):
    """One panel per metric that is there, named axes, a legend for several runs, the line of guessing."""
    figures = []
    from matplotlib import figure

    Figure = figure.Figure
    monkeypatch.setattr(figure, "Figure", lambda **kwargs: figures.append(Figure(**kwargs)) or figures[-1])
    curves.draw([trained / "grpo", trained / "grpo" / "metrics.jsonl"], tmp_path / "c.png", chance=0.25)
    axes = {ax.get_title(): ax for ax in figures[0].axes if ax.get_visible()}
    assert {"reward", "held-out pass@1", "entropy", "length", "gradient norm", "time of a step"} <= set(axes)
    assert all(ax.get_xlabel() == "step" and ax.get_ylabel() for ax in axes.values())
    lines = curves.read_metrics(trained / "grpo")
    expected = [line["reward"] for line in lines if "reward" in line]
    assert list(axes["reward"].lines[0].get_ydata()) == expected
    assert 0.25 in [line.get_ydata()[0] for line in axes["held-out pass@1"].lines]
    assert (trained / "grpo" / "curves.png").exists()  # the run drew its own
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no metrics"):
        curves.draw([tmp_path / "empty"], tmp_path / "d.png")


def test_samples_survive_a_spreadsheet(tmp_path):
    """Newlines, quotes, separators, any Unicode: csv -> rows -> csv is identical."""
    text = 'a\n"b", c;\td\r\n\'=1+1 ṣé 😀 \u2028 \x0b'
    writer = Run.__new__(Run)
    writer.path, writer._wandb = tmp_path, None
    rows = [{"id": 1, "prompt": text, "completion": ""}, {"id": 2, "prompt": "", "completion": text}]
    Run.write_rows(writer, rows)
    once = (tmp_path / "samples.csv").read_bytes()
    again = read_csv(tmp_path / "samples.csv")
    assert [row["prompt"] for row in again] == [text, ""]
    (tmp_path / "samples.csv").unlink()
    Run.write_rows(writer, again)
    assert (tmp_path / "samples.csv").read_bytes() == once
    assert json.loads(json.dumps(again)) == again
