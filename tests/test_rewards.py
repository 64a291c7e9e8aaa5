"""Answer extraction, comparison, the built-in rewards, and other people's rewards in their own process."""

import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import isnan
from pathlib import Path
from types import SimpleNamespace

import pytest

import common.data
import common.models
from common import rewards
from common.data import Example
from common.rewards import extract_answer, extract_choice, normalize_number, parse_rewards, same_answer, score
from tests.processes import wait_for

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "answer_endings.json").read_text(encoding="utf-8"))


def rows_of(*names):
    if not all((DATA / name).exists() for name in names):
        pytest.skip(f"no sample data in {DATA}")
    return [json.loads(line) for name in names for line in (DATA / name).open(encoding="utf-8")]


# Extraction and comparison


def test_the_fixture_is_large_enough():
    assert all(len(FIXTURE[family]) >= 40 for family in ("endings", "choices", "latex", "african"))
    assert len(FIXTURE["endings"]) >= 60 and len(FIXTURE["equal"]) + len(FIXTURE["unequal"]) >= 40


@pytest.mark.parametrize("case", FIXTURE["endings"], ids=lambda case: case["text"][:40])
def test_extract_answer(case):
    assert extract_answer(case["text"]) == case["answer"]


@pytest.mark.parametrize("case", FIXTURE["latex"], ids=lambda case: case["text"][:40])
def test_latex_endings(case):
    """As mathematics: by math_verify where the text differs."""
    pytest.importorskip("math_verify")
    assert rewards.math([""], [case["text"]], [case["gold"]]) == [case["right"]]


@pytest.mark.parametrize("case", FIXTURE["choices"] + FIXTURE["african"], ids=lambda case: case["text"][:40])
def test_extract_choice(case):
    assert extract_choice(case["text"]) == case["answer"]
    assert extract_answer(case["text"], choices=True) == case["answer"]


@pytest.mark.parametrize("expected, key", [(True, "equal"), (False, "unequal")])
def test_same_answer_in_both_directions(expected, key):
    for a, b in FIXTURE[key]:
        assert (a, b, same_answer(a, b)) == (a, b, expected)
        assert (b, a, same_answer(b, a)) == (b, a, expected)


def test_normalize_number_table():
    table = {
        "$108": 108,
        "108.": 108,
        "1,080": 1080,
        "-5": -5,
        "108.0": 108,
        "108%": 108,
        r"\boxed{108}": 108,
    }
    table |= {"**108**": 108, "5.": 5, "29.00": 29, "no number": None, "": None, ".5": Fraction(1, 2)}
    table |= {r"\frac{3}{4}": Fraction(3, 4), "1.2.3": None, "1,08": None, "1. First": None, "5/0": None}
    assert {text: normalize_number(text) for text in table} == table


def test_gsm8k_gold_scores_one_and_neither_echo_nor_another_rows_number_scores():
    rows = rows_of("gsm8k/train.jsonl", "gsm8k/test.jsonl")
    questions, solutions = [row["question"] for row in rows], [row["answer"] for row in rows]
    golds = [solution.rpartition("####")[2].strip().replace(",", "") for solution in solutions]
    assert len(rows) == 7473 + 1319
    assert rewards.correctness(questions, solutions, golds) == [1.0] * len(rows)
    assert rewards.correctness(questions, questions, golds) == [0.0] * len(rows)
    assert rewards.correctness(questions, [""] * len(rows), golds) == [0.0] * len(rows)
    shifted = golds[1:] + golds[:1]
    expected = [float(int(gold) == int(other)) for gold, other in zip(golds, shifted, strict=True)]
    assert rewards.correctness(questions, solutions, shifted) == expected


def official_gsm8k(response, solution):
    """grade_school_math/dataset.py of its authors: the first "#### number", as text."""
    found, gold = (re.search(r"#### (\-?[0-9\.\,]+)", text) for text in (response, solution))
    return found is not None and found[1].strip().replace(",", "") == gold[1].strip().replace(",", "")


def test_the_official_scorer_of_gsm8k_agrees_on_gold_and_perturbed_solutions():
    rng = random.Random(0)
    sums = [(rng.randrange(10**k), rng.randrange(10**k)) for k in (1, 2, 3, 4, 6) for _ in range(8)]
    solutions = [f"She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} clips.\n#### {a + b:,}" for a, b in sums]
    if (DATA / "gsm8k/test.jsonl").exists():
        solutions += [row["answer"] for row in rows_of("gsm8k/test.jsonl")]
    for solution in solutions:
        working, gold = solution.rsplit("#### ", 1)
        plain = gold.replace(",", "")
        other = str(int(plain) + rng.choice((-100, -1, 1, 10)))
        for response in (
            solution, f"{working}#### {other}", f"{solution}\n#### {other}", f"#### {other}\n{solution}",
            f"{working}#### {gold} in all", f"{working}#### {gold}%", f"{working}#### {plain}0",
            f"{solution}\n\nQuestion: 3 + 4?\nAnswer: 7\n#### 7"):
            expected = float(official_gsm8k(response, solution))
            assert rewards.correctness([""], [response], [plain]) == [expected], response


def test_where_the_official_scorer_of_gsm8k_differs():
    """docs/answers.md says why."""
    docs = " ".join((ROOT / "docs/answers.md").read_text(encoding="utf-8").split())
    for right, response in ((1, "####72"), (1, "#### $72"), (1, "#### 72."), (1, "#### 72.0"),
                            (0, "#### 7,2"), (0, "#### 72 * 2"), (0, "#### 72 thousand"),
                            (0, "#### 72 or 73")):
        assert f"`{response}`" in docs
        assert rewards.correctness([""], [response], ["72"]) == [right]
        assert official_gsm8k(response, "#### 72") == (not right)
    assert rewards.correctness([""], ["The answer is 72"], ["72"]) == [1.0]


def test_last_lines_of_gsm8k_solutions_as_answers():
    """Sentences such as "He will need 5 * 2 = 10 tablespoons to make 80 meatballs": read rightly, or not at all."""
    rows = [row["answer"].rsplit("\n#### ", 1) for row in rows_of("gsm8k/train.jsonl", "gsm8k/test.jsonl")]
    lines = [(re.sub("<<[^>]*>>", "", working).rsplit("\n", 1)[-1], gold) for working, gold in rows]
    read = [(rewards.same_number(line, gold), line, gold) for line, gold in lines]
    assert sum(right is True for right, *_ in read) >= 0.8 * len(rows)
    wrong = [row for row in read if row[0] is False]  # data at fault, cents for dollars, "14 dozen" for 14
    assert len(wrong) <= 0.005 * len(rows), wrong


ANSWERS = [json.loads(line) for line in (
    Path(__file__).parent / "fixtures" / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def counts(text, gold, task="math"):
    if task == "latex":
        return rewards.math([""], [text], [gold]) == [1.0]
    return rewards.correctness([""], [text], [gold], [task]) == [1.0]


def test_no_wrong_answer_is_accepted_and_few_right_ones_are_missed():
    """W9 to W11: what a careful reader says of texts that are made, or a small model's own (their ends)."""
    pytest.importorskip("math_verify")
    by_a_model = sum("SmolLM2" in row["from"] for row in ANSWERS)
    docs = " ".join((ROOT / "docs/answers.md").read_text(encoding="utf-8").split())
    assert f"{len(ANSWERS)} labelled texts of `tests/fixtures/answers.jsonl`, {by_a_model} of them" in docs
    found = {right: [row for row in ANSWERS if row["right"] == right
                     and counts(row["text"], row["gold"], row["task"]) != right] for right in (True, False)}
    assert found[False] == []
    assert len(found[True]) <= 0.02 * sum(row["right"] for row in ANSWERS), found[True]


def test_the_tables_of_the_docs():
    pytest.importorskip("math_verify")
    n, task = 0, "math"
    for line in (ROOT / "docs/answers.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| response"):
            task = "latex" if "math" in line else "choice" if "choice" in line else "math"
        if row := re.fullmatch(r"\| `(.*)` \| `(.*)` \| (yes|no) \|.*", line):
            n += 1
            assert counts(row[1], row[2], task) == (row[3] == "yes"), line
    assert n >= 30


def test_math500_gold_scores_one_and_echo_none():
    rows = rows_of("math500/test.jsonl")
    golds = [row["answer"] for row in rows]
    assert rewards.correctness(golds, [row["solution"] for row in rows], golds) == [1.0] * 500
    assert rewards.correctness(golds, [row["problem"] for row in rows], golds) == [0.0] * 500
    shifted = golds[1:] + golds[:1]
    expected = [float(other in (gold, "x=" + gold)) for gold, other in zip(golds, shifted, strict=True)]
    assert rewards.correctness(golds, [row["solution"] for row in rows], shifted) == expected


def test_aqua_rationales_and_the_echoed_options():
    rows = rows_of("aqua_rat/dev.json", "aqua_rat/test.json")
    found = [extract_choice(row["rationale"]) for row in rows]
    right = sum(letter == row["correct"] for letter, row in zip(found, rows, strict=True))
    wrong = sum(letter not in (None, row["correct"]) for letter, row in zip(found, rows, strict=True))
    assert right >= 470 and wrong <= 1  # of 508; the others name no letter, or not in so many words
    for row in rows:
        assert extract_choice(row["question"] + "\n" + "\n".join(row["options"])) is None


HOSTILE = {
    "answer tags": "<answer>" * 12_500,
    "empty answers": "<answer></answer>" * 6_000,
    "closing tags": "</answer>" * 11_000,
    "boxes": "\\boxed{" * 14_000,
    "closed boxes": "\\boxed{" * 7_000 + "}" * 50_000,
    "answer is": "the answer is " * 7_000,
    "answer words": "answer to " * 10_000,
    "options": "option is " * 10_000,
    "lettered lines": "A) \n" * 25_000,
    "digits": "9" * 100_000,
    "commas": "1,000" * 20_000,
    "spaces": "answer" + " " * 100_000,
    "newlines": "answer:" + "\n" * 100_000,
    "stars": "*" * 100_000,
    "hashes": "#### 1 " * 14_000,
    "equals": "=" * 100_000,
    "backslashes": "\\" * 100_000,
    "fractions": "<answer>" + "\\frac{" * 16_000 + "</answer>",
    "carets": "<answer>" + "^ " * 50_000 + "</answer>",
    "one caret": "<answer>^" + " " * 900 + "1</answer>",
    "dollars": "The answer is " + "$" * 99_000,
    "parentheses": "The answer is \\(" + "(" * 99_000,
    "written options": "\n" + "B) " * 33_000,
    "answers in Yoruba": "ìdáhùn " * 14_000,
    "answers in Chinese": "答案" * 50_000,
    "answers in Chinese and a letter": "答案Ax" * 25_000,
    "numbers in French": "réponse 1 " * 10_000,
    "is the answer": "1 is the answer " * 6_000,
    "conclusions": "So, 1. " * 14_000,
    "bold numbers": "**1**" * 20_000,
    "equal numbers": "1 = " * 25_000,
    "open braces": "{" * 100_000,
    "letters": "B, " * 33_000,
    "halves": "½" * 100_000,
    "squares": "x²" * 50_000,
    "zero width": "\u200b" * 100_000,
    "which is": "the answer is 1 + 1, which is " * 3_000,
    "marks": "A" + "\u0301" * 99_000,
    "marks to be sorted": "A" + "\u0301\u0327" * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_linear(name):
    def seconds(text):
        """Of the process, not of the clock: the machine may be busy."""
        rewards._quantity.cache_clear()
        start = time.process_time()
        for task in ("math", "choice", "countdown"):
            rewards.correctness([""], [text], ["7"], tasks=[task], metas=[{"numbers": [7]}])
        rewards.digit([""], [text], ["7"])
        rewards.format([""], [text], ["7"])
        rewards.rationale(text)
        same_answer(text, "7")
        return time.process_time() - start

    text = HOSTILE[name]
    part = text[:len(text) // 16] + text[-len(text) // 16:]
    # eight times as long: linear is 8 times the time, quadratic 64
    assert seconds(text) < 24 * max(0.01, min(seconds(part) for _ in range(3)))


# Arithmetic


def test_safe_arithmetic_is_exact():
    table = {
        "1+2*3": 7,
        "(1+2)*3": 9,
        "1/3+1/3+1/3": 1,
        "-3+5": 2,
        "7/2": Fraction(7, 2),
        "10-4-3": 3,
        " 2 * 3\n": 6,
    }
    assert {expr: rewards.safe_arithmetic(expr) for expr in table} == table


ATTACKS = [
    *(
        "2**3",
        "7//2",
        "9**9**9**9",
        "7%2",
        "1<<9",
        "5&4",
        "5|4",
        "5^4",
        "~5",
        "5,4",
        "[5]",
        "{5}",
        "5==5",
        "+5",
    ),
    *(
        "__import__('os').system('id')",
        "(lambda: 5)()",
        "abs(5)",
        "exit()",
        "print(5)",
        "import os",
        "3(4)",
        "()",
    ),
    *(
        "1_0",
        "0x10",
        "007",
        "1e9",
        "1.5",
        "True",
        "None",
        "...",
        "a",
        "x:=5",
        "5 if 1 else 2",
        "not 5",
        "await 5",
    ),
    *(
        "\u0667+1",
        "\u00b2",
        "\uff11+\uff11",
        "\\x35",
        "'5'",
        'f"5"',
        "5!",
        "5;5",
        "5 5",
        "5\n+2",
        "*5",
        "5 #5",
    ),
    *(
        "1/0",
        "1/(2-2)",
        "",
        " ",
        "9" * 13,
        "1+" * 200 + "1",
        "(" * 150 + "5" + ")" * 150,
        "(" * 190,
        "-" * 100_000,
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack[:20])
def test_attacks_score_nothing_fast(attack):
    start = time.process_time()
    assert rewards.safe_arithmetic(attack) is None
    assert time.process_time() - start < 0.05


def test_there_are_at_least_thirty_attacks():
    assert len(set(ATTACKS)) >= 30


def test_deep_but_legal_arithmetic_does_not_raise():
    for expr in ("-" * 199 + "1", "1" + "+1" * 99, "(" * 90 + "5" + ")" * 90):
        rewards.safe_arithmetic(expr)
    assert rewards.safe_arithmetic("1" + "+1" * 99) == 100


def test_countdown_wants_the_value_and_each_number_at_most_once():
    def reward(expression, numbers=(3, 7, 12), target="60"):
        response = f"<think>hm</think><answer>{expression}</answer>"
        columns = {"tasks": ["countdown"], "metas": [{"numbers": list(numbers)}]}
        return rewards.correctness([""], [response], [target], **columns)[0]

    assert reward("12*(7-3)+12") == 0  # 60, with 12 twice
    assert reward("12*(7-3)+12", numbers=(3, 7, 12, 12)) == 1
    assert reward("12*7-3*8", numbers=(3, 7, 12)) == 0  # 8 is not among them
    assert reward("(7+3)*12", target="120") == 1
    assert reward("(7+3)*12") == 0  # wrong value
    assert reward("60") == 0  # the target itself is not a given number
    assert reward("12*5", numbers=(1, 25, 12)) == 0  # a piece of a given number is not that number
    assert reward("2**3", numbers=(2, 3), target="8") == 0
    assert reward("7//2", numbers=(7, 2), target="3") == 0
    assert reward("7/2*2", numbers=(7, 2, 2), target="7") == 1
    assert reward("(3+7)*6 = 60", numbers=(3, 6, 7)) == reward("(3+7)*6=60", numbers=(3, 6, 7)) == 1
    assert reward("(3+7)*6 = 61", numbers=(3, 6, 7)) == reward("(3+7)*6 =", numbers=(3, 6, 7)) == 0
    assert reward("3+7 = 60", numbers=(3, 7)) == reward("60 = (3+7)*6", numbers=(3, 6, 7)) == 0


# The built-in rewards

EIGHT = [  # response to "Compute 8+17-5." (20), then correctness, format, digit, mark by hand
    ("<think>8+17=25 25-5=20</think><answer>20</answer>", 1, 1, 1, 1),
    ("<think>8+17=25</think>\n<answer>\n20\n</answer>\n", 1, 1, 1, 1),
    ("<think>8+17=25</think><answer>21</answer>", 0, 1, 1, 1),
    ("Sure! <think>25</think><answer>20</answer> Done.", 1, 0.5, 1, 1),
    ("<think>25</think><answer>about twenty</answer>", 0, 1, 0, 1),
    ("<answer>20</answer>", 1, 0, 1, 0.5),
    ("<think>25</think><answer>20</answer><answer>20</answer>", 1, 0, 1, 0.5),
    ("", 0, 0, 0, 0),
]


def test_totals_of_eight_responses_worked_out_by_hand():
    functions = parse_rewards(["correctness=2.0", "format=0.5", "digit=0.5", "mark=0.5"])
    result = score(functions, [Example(0, "Compute 8+17-5.", "20")] * 8, [row[0] for row in EIGHT])
    for column, name in enumerate(["correctness", "format", "digit", "mark"], start=1):
        assert result["rewards"][name] == [row[column] for row in EIGHT], name
    assert result["total"] == [3.5, 3.5, 1.5, 3.25, 1.0, 2.75, 2.75, 0.0]
    assert result["correct"] == [1, 1, 0, 1, 0, 1, 1, 0]
    assert result["failed"] == 0 and result["error"] == ""


@pytest.mark.parametrize(
    "response, expected",
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>a\nb</think>\n\n<answer>b\n</answer>  \n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.5),
        ("<think>a</think><answer>b</answer>!", 0.5),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think>a</think><answer>\u200b</answer>", 0.0),
        ("<think>\u3164</think><answer>\u2800</answer>", 0.0),
        ("<think></think><answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>" * 30_000, 0.0),
    ],
)
def test_format(response, expected):
    assert rewards.format([""], [response], [""]) == [expected]


def test_choices_compare_letters():
    def reward(response, answer):
        return rewards.correctness([""], [response], [answer], tasks=["choice"])[0]

    assert reward("So option B is correct.", "B") == 1 and reward("So option B is correct.", "C") == 0
    assert reward("The answer is (B) 65.", "B") == 1 and reward("The answer is 65.", "B") == 0


def test_an_empty_gold_answer_is_never_met():
    for response in ("", "<answer></answer>", "<answer> </answer>", "\\boxed{}"):
        assert rewards.correctness([""], [response], [""]) == [0.0]


# Specs


def test_weights_and_names():
    functions = parse_rewards(["correctness", "format=0.2", "mark=0"])
    assert [(f.name, f.weight) for f in functions] == [("correctness", 1.0), ("format", 0.2), ("mark", 0.0)]


def test_a_column_of_weight_zero_is_computed_and_adds_nothing():
    result = score(parse_rewards(["format=0", "digit=0.5"]), [Example(0, "q", "5")], ["<answer>5</answer>"])
    assert result["rewards"] == {"format": [0.0], "digit": [1.0]} and result["total"] == [0.5]
    assert score(parse_rewards(["digit=0"]), [Example(0, "q", "5")], ["<answer>5</answer>"])["total"] == [0.0]


def test_correct_is_there_without_the_reward():
    result = score([], [Example(0, "q", "5")] * 2, ["<answer>5</answer>", ""])
    assert result["correct"] == [1.0, 0.0] and result["total"] == [0.0, 0.0]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("corectness", "unknown reward 'corectness': take correctness, partial, steps, format, digit, mark, math"),
        ("format:0.2", "path/file.py:function=weight"),
        ("format=much", "not a number"),
        ("nowhere.py:f=1", "no file 'nowhere.py'"),
        ("{dir}/r.py:g", "r.py has no function g"),
        ("{dir}/r.py:value", "r.py has no function value"),
        ("{dir}/r.py:two", "TypeError"),
        ("{dir}/broken.py:f", "SyntaxError"),
        ("{dir}/raises.py:f", "KeyError: 'no such key' (raises.py, line 2)"),
    ],
)
def test_a_bad_spec_is_one_line_before_anything_expensive(tmp_path, monkeypatch, spec, message):
    popen, started = subprocess.Popen, []
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[-1]
    )
    (tmp_path / "r.py").write_text("value = 3\ndef two(prompts, responses): return [0.0]\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("table = {}\ntable['no such key']\n")
    with pytest.raises(ValueError) as caught:
        parse_rewards([spec.replace("{dir}", str(tmp_path))])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert all(process.poll() is not None for process in started)  # none is left behind


def test_a_name_used_twice_is_refused():
    with pytest.raises(ValueError, match="two rewards are named 'format'"):
        parse_rewards(["format=1", "format=2"])


@pytest.mark.parametrize("text, task, cut", [
    ("So 9 * 8 = 72", "math", None), ("The answer is 72", "math", None), ("#### 72", "math", None),
    ("72", "math", None), ("<answer>72", "math", None), ("\\boxed{72", "math", None),
    ("<think>a</think><answer>72</answer> and", "math", "72"), ("Thus \\boxed{72}, which", "math", "72"),
    ("The answer is B", "choice", None), ("B) seventy", "choice", None), ("<answer>B</answer>", "choice", "B"),
    ("<answer>B) seventy</answer> as", "choice", "B"), ("\\boxed{B} since", "choice", "B")])
def test_a_response_that_was_cut_off_has_an_answer_only_where_a_mark_is_closed(text, task, cut):
    """W12: it was on its way to another."""
    gold = "B" if task == "choice" else "72"
    assert extract_answer(text, task == "choice", finished=False) == cut
    for finished, right in (([True], text != "\\boxed{72"), ([False], cut is not None)):
        examples = [Example(0, "q", gold, task=task)]
        result = score(parse_rewards(["correctness=1", "digit=0"]), examples, [text], finished=finished)
        assert result["correct"] == result["rewards"]["correctness"] == [float(right)]
        assert result["rewards"]["digit"] == [float(right and task == "math")]


# Other people's functions


@pytest.fixture
def user(tmp_path):
    """user(source) -> [the reward function of a file with that source]; its process ends with the test."""
    made = []

    def make(source, name="f", weight=1.0):
        path = tmp_path / f"reward{len(made)}.py"
        path.write_text(source)
        made.extend(parse_rewards([f"{path}:{name}={weight}"]))
        return made[-1:]

    yield make
    for reward in made:
        reward.function.kill()


def run(functions, responses, timeout_s=30.0, **columns):
    examples = [Example(i, f"q{i}", "5") for i in range(len(responses))]
    for field, name in (("id", "ids"), ("task", "tasks"), ("meta", "metas")):
        if name in columns:
            examples = [replace(e, **{field: value}) for e, value in zip(examples, columns[name])]
    return score(functions, examples, responses, timeout_s=timeout_s)


def test_a_reward_of_ones_own_in_under_ten_lines(user):
    functions = parse_rewards(["correctness=2"]) + user(
        "def brevity(prompts, responses, answers):\n"
        "    return [1.0 if len(response) < 20 else 0.0 for response in responses]\n",
        "brevity",
        0.5,
    )
    result = run(functions, ["<answer>5</answer>", "<answer>5</answer> and then some", "6"])
    assert result["rewards"]["brevity"] == [1.0, 0.0, 1.0]
    assert result["total"] == [2.5, 2.0, 0.5]


def test_it_is_called_once_per_batch_and_sees_the_columns_it_names(user):
    source = (
        "calls = 0\n"
        "def f(prompts, responses, answers, tasks, ids=None):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    assert prompts == ['q0', 'q1'] and answers == ['5', '5'] and tasks == ['gsm8k', 'math']\n"
        "    return [calls + i for i in ids]\n"
    )
    functions = user(source)
    columns = {"tasks": ["gsm8k", "math"], "ids": [10, 20], "metas": [{}, {}]}
    assert run(functions, ["a", "b"], **columns)["rewards"]["f"] == [11, 21]
    assert run(functions, ["a", "b"], **columns)["rewards"]["f"] == [12, 22]  # the process persists


def test_var_keywords_take_every_column(user):
    functions = user("def f(prompts, responses, answers, **columns): return [len(columns)] * len(prompts)")
    assert run(functions, ["a"], tasks=["math"], metas=[{"numbers": [1]}])["rewards"]["f"] == [4]


def test_a_row_that_raises_is_nan_and_the_others_keep_their_score(user):
    functions = user(
        "def f(prompts, responses, answers):\n    return [1 / len(response) for response in responses]\n"
    )
    result = run(functions, ["ab", "", "abcd"])
    assert result["rewards"]["f"][0] == 0.5 and result["rewards"]["f"][2] == 0.25
    assert isnan(result["rewards"]["f"][1]) and isnan(result["total"][1])
    assert result["failed"] == 1
    assert result["error"].startswith("reward 'f': ZeroDivisionError: division by zero (reward0.py, line 2)")


def test_a_row_that_hangs_is_nan_and_costs_its_share_of_time(user):
    functions = user(
        "import time\n"
        "def f(prompts, responses, answers):\n"
        "    if 'hang' in responses: time.sleep(1000)\n"
        "    return [float(len(response)) for response in responses]\n"
    )
    first = functions[0].function.process.pid
    result = run(functions, ["a", "hang", "abc"], timeout_s=1.0)
    assert result["rewards"]["f"][0] == 1.0 and result["rewards"]["f"][2] == 3.0 and result["failed"] == 1
    assert isnan(result["total"][1]) and "no result within 1 s" in result["error"]
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert run(functions, ["ab"])["total"] == [2.0]  # and the next batch has a process


def test_all_rows_hanging_costs_at_most_about_three_limits(user, tmp_path):
    """The whole batch's, then two of single rows, which last a second at least: of 40 one is asked."""
    functions = user(
        "import time\n"
        "def f(prompts, responses, answers):\n"
        f"    print(len(prompts), file=open({str(tmp_path / 'calls')!r}, 'a'), flush=True)\n"
        "    time.sleep(1000)\n"
    )
    assert run(functions, ["a"] * 40, timeout_s=0.5)["failed"] == 40
    assert (tmp_path / "calls").read_text().split() == ["40", "1"]


def test_loading_is_outside_the_limit_and_bounded(user, tmp_path, monkeypatch):
    """A file that takes longer to import than a call may last loses no row; endless reloading ends."""
    functions = user(
        "import os, time\n"
        "time.sleep(0.6)\n"
        f"print('loaded', file=open({str(tmp_path / 'loads')!r}, 'a'), flush=True)\n"
        "def f(prompts, responses, answers):\n"
        "    'exit' in responses and os._exit(3)\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    values = run(functions, ["a", "exit", "abc"], timeout_s=0.5)["rewards"]["f"]
    assert values[::2] == [1.0, 3.0] and isnan(values[1])
    monkeypatch.setattr(rewards, "LOAD_TIMEOUT_S", 2.0)  # of at most four
    before = len((tmp_path / "loads").read_text().split())
    assert run(functions, ["exit"] * 40, timeout_s=30.0)["failed"] == 40
    assert len((tmp_path / "loads").read_text().split()) <= before + 4


def test_a_hang_that_never_lets_go_of_the_interpreter_is_ended(user):
    functions = user("def f(prompts, responses, answers): return [9**9**9 % 2 for _ in prompts]\n")
    assert run(functions, ["a"], timeout_s=0.5)["failed"] == 1


@pytest.mark.parametrize("exit_call", ["import sys; sys.exit(3)", "import os; os._exit(3)"])
def test_a_row_that_exits_is_nan(user, exit_call):
    functions = user(
        "def f(prompts, responses, answers):\n"
        f"    if 'x' in responses: {exit_call}\n"
        "    return [1.0] * len(responses)\n"
    )
    result = run(functions, ["a", "x", "b"])
    assert result["rewards"]["f"][0] == result["rewards"]["f"][2] == 1.0 and result["failed"] == 1


@pytest.mark.parametrize("value", ["None", "float('nan')", "float('inf')", "'1'", "[1]"])
def test_what_is_no_finite_number_is_a_failed_row(user, value):
    result = run(user(f"def f(prompts, responses, answers): return [1, {value}, True, False]"), list("abcd"))
    assert isnan(result["rewards"]["f"][1]) and result["failed"] == 1
    assert [result["rewards"]["f"][i] for i in (0, 2, 3)] == [1.0, 1.0, 0.0]
    assert "is not a finite number" in result["error"]


def test_a_list_of_the_wrong_length_falls_back_to_rows(user):
    functions = user("def f(prompts, responses, answers): return [float(len(responses[0]))]")
    result = run(functions, ["a", "bb"])
    assert result["rewards"]["f"] == [1.0, 2.0] and "1 values for 2 rows" in result["error"]


def test_a_failed_column_of_weight_zero_costs_no_row(user):
    functions = user("def f(prompts, responses, answers): return [None]", weight=0) + parse_rewards(
        ["digit=1"]
    )
    result = run(functions, ["<answer>5</answer>"])
    assert result["total"] == [1.0] and result["failed"] == 0 and "not a finite number" in result["error"]


def test_prints_and_odd_text_do_not_disturb_the_replies(user, capfd):
    functions = user(
        "import os, sys\n"
        "print('loaded')\n"
        "def f(prompts, responses, answers):\n"
        "    print('{\"values\": [9]}')\n"
        "    os.write(1, b'raw bytes\\n')\n"
        "    assert sys.stdin.read() == ''\n"
        "    return [float(len(response)) for response in responses]\n"
    )
    texts = [
        "a\nb\r\u2028c",
        "\ud800",
        "\x00",
        "é" * 100_000,
    ]  # a lone surrogate is what a broken decode leaves
    assert run(functions, texts)["total"] == [6.0, 1.0, 1.0, 100_000.0]
    captured = capfd.readouterr()
    assert "raw bytes" in captured.err and "loaded" in captured.err and captured.out == ""


def test_a_users_own_correctness_does_not_replace_the_measured_one(user):
    functions = user(
        "def correctness(prompts, responses, answers): return [1.0] * len(prompts)", "correctness"
    )
    result = run(functions, ["wrong"])
    assert result["total"] == [1.0] and result["correct"] == [0.0]


def test_it_works_from_threads(user):
    functions = user("def f(prompts, responses, answers): return [float(r) for r in responses]")
    totals = {}

    def work(k):
        totals[k] = [run(functions, [str(k), str(k + 0.5)])["total"] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals == {k: [[k, k + 0.5]] * 5 for k in range(4)}


def test_an_interrupted_call_leaves_no_reply_for_the_next(user, tmp_path):
    functions = user(
        "import pathlib, time\n"
        "def f(prompts, responses, answers):\n"
        "    if responses == ['slow']:\n"
        f"        pathlib.Path({str(tmp_path / 'called')!r}).touch()\n"
        "        time.sleep(3.0)\n"
        "    return [float(len(r)) for r in responses]\n"
    )

    def interrupt():
        wait_for((tmp_path / "called").exists)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in this process took it over
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(functions, ["slow"])
    signal.signal(signal.SIGINT, before)
    assert run(functions, ["ab"])["total"] == [2.0]


def alive(pid):
    try:  # a zombie waits for its parent, and has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_process_dies_with_its_parent_even_in_the_middle_of_a_call(tmp_path):
    (tmp_path / "r.py").write_text(
        "import os, pathlib, time\n"
        "def f(prompts, responses, answers):\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
    )
    code = (
        "import sys; from common.data import Example; from common.rewards import parse_rewards, score\n"
        "score(parse_rewards([sys.argv[1]]), [Example(0, 'q', 'a')], ['r'], timeout_s=3.0)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, f"{tmp_path / 'r.py'}:f"], cwd=ROOT)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    worker = int((tmp_path / "pid").read_text())
    assert alive(worker)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(worker))


def group_lives(group):
    """Whether a process of the group is left that has not ended."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("wrong", [
    "os.fork(); time.sleep(1000)", "os.kill(os.getpid(), signal.SIGSTOP)",
    "faulthandler.cancel_dump_traceback_later(); time.sleep(1000)"])
def test_what_undoes_the_limit_is_ended_by_the_parent_with_all_that_it_started(user, tmp_path, monkeypatch,
                                                                               wrong):
    monkeypatch.setattr(rewards, "GRACE_S", 0.3)
    functions = user(
        "import faulthandler, os, signal, time\n"
        "def f(prompts, responses, answers):\n"
        f"    {wrong}\n"
    )
    group = functions[0].function.process.pid
    assert run(functions, ["a"], timeout_s=0.5)["failed"] == 1
    wait_for(lambda: not group_lives(group))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["", "; import time; time.sleep(1000)"])
def test_what_a_reward_started_ends_with_the_run(tmp_path, end):
    (tmp_path / "r.py").write_text(
        "import pathlib, subprocess\n"
        "def f(prompts, responses, answers):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "    return [1.0]\n"
    )
    code = ("import sys; from common.data import Example; from common.rewards import parse_rewards, score\n"
            f"score(parse_rewards([sys.argv[1]]), [Example(0, 'q', 'a')], ['r']){end}\n")
    parent = subprocess.Popen([sys.executable, "-c", code, f"{tmp_path / 'r.py'}:f"], cwd=ROOT)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    if end:
        parent.kill()
    parent.wait()
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_built_in_rewards_start_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("started a process"))
    functions = parse_rewards(["correctness=2", "format", "digit", "mark"])
    run(functions, ["<answer>5</answer>"])


def test_importing_rewards_imports_the_standard_library_alone():
    code = "import sys, common.rewards; print([m for m in ('torch', 'numpy', 'sympy') if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_math_does_algebra_in_its_process():
    pytest.importorskip("math_verify")
    functions = parse_rewards(["math"])
    responses = ["\\boxed{1+x}", "\\boxed{x+1}", "\\boxed{x+2}", "", "\\boxed{" + "(" * 5000 + "}"]
    result = score(functions, [Example(0, "q", "x+1")] * 5, responses)
    functions[0].function.kill()
    assert result["rewards"]["math"] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert result["correct"] == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_an_answer_that_cannot_be_judged_in_time_is_not_right():
    """0, not NaN: a row that is left out of its group would be one that was never wrong."""
    pytest.importorskip("math_verify")
    functions = parse_rewards(["math"])
    bomb = "\\boxed{9^{9^{9^{9}}}}"
    result = score(functions, [Example(0, "q", "x+1")] * 2, ["\\boxed{1+x}", bomb], timeout_s=3.0)
    functions[0].function.kill()
    assert result["rewards"]["math"][1] == 0.0 and result["failed"] == 0
    assert "no result within 3 s" in result["error"]


def test_the_countdown_and_arithmetic_demonstrations_are_correct():
    data = pytest.importorskip("common.data")
    for name in ("arithmetic", "countdown"):
        examples = data.load_examples(name, limit=100)
        random.Random(0).shuffle(examples)
        columns = {"tasks": [e.task for e in examples], "metas": [e.meta for e in examples]}
        arguments = (
            [e.prompt for e in examples],
            [e.completion for e in examples],
            [e.answer for e in examples],
        )
        assert rewards.correctness(*arguments, **columns) == [1.0] * len(examples)
        echoed = rewards.correctness(arguments[0], arguments[0], arguments[2], **columns)
        assert echoed == [0.0] * len(examples)


# ---- choices and texts in many languages ----


@pytest.mark.parametrize("text, letter", [
    ("Ìdáhùn tó tọ́ ni B.", "B"), ("Idahun: C", "C"), ("Azịza ya bụ B.", "B"), ("Impendulo ngu-B", "B"),
    ("Mhinduro ndeyekuti D.", "D"), ("መልሱ B ነው።", "B"), ("答案是B。", "B"), ("答案：Ｂ", "B"),
    ("正解はBです", "B"), ("정답은 B입니다", "B"), ("الإجابة الصحيحة هي B", "B"), ("La respuesta es (B)", "B"),
    ("La bonne réponse est C.", "C"), ("Die richtige Antwort ist A.", "A"), ("Jibu sahihi ni B.", "B"),
    ("सही उत्तर B है", "B"), ("সঠিক উত্তর: B", "B"), ("Jawaban: B", "B"), ("Kariya: D", "D"), ("B) ATP", "B"),
    ("Mo rò bẹ́ẹ̀.\nB. ATP ni.", "B"), ("<think>A)</think><answer>Ìdáhùn B</answer>", "B"),
    ("<answer>(b)</answer>", "B"), ("<answer>b) blue</answer>", "B"), ("Answer: b", "B"), ("Jibu: b.", "B"),
    ("我选B", "B"), ("Die Antwort auf die Frage lautet B.", "B"),
    ("Answer B is correct; answer A is wrong.", "B"),
    ("The answer is (A) or (B).", None), ("答案不是A", None), ("La réponse n'est pas A", None),
    ("A) x\nB) y\nC) z\nD) w", None),  # the question echoed
    ("Bẹ́ẹ̀ni, o dára", None), ("Ìdáhùn: Bẹ́ẹ̀ni", None), ("ṣe ṣe ṣe", None), ("Ìdáhùn", None), ("", None)])
def test_letters_are_found_in_the_languages_of_mmlu(text, letter):
    assert extract_choice(text) == letter
    assert extract_choice(unicodedata.normalize("NFD", text)) == letter


def rows_of_text(*pairs):
    completion = SimpleNamespace(ids=[1, 2], logprobs=[-0.5, -0.25], finished=True)
    return [rewards.answer_row(Example(i, prompt, "B", task="choice", meta={"choices": 4}, level=i % 2), 0,
                               completion, text, i == 0) for i, (prompt, text) in enumerate(pairs)]


YORUBA = "Èwo nínú àwọn wọ̀nyí ni olú ìlú orílẹ̀-èdè Nàìjíríà tí gbogbo ènìyàn mọ̀ sí?"


def test_the_language_of_an_answer():
    """Where the question's and the answer's can be told, and are the same or not."""
    pytest.importorskip("pycld2")
    assert rewards.language(YORUBA) == "yo" and rewards.language("The capital of Nigeria is Abuja.") == "en"
    assert rewards.language("Compute 3+4.") == rewards.language("") == rewards.language("\ud800\x00") == ""
    answer = "<think>Ìlú Àbújá ni olú ìlú orílẹ̀-èdè Nàìjíríà báyìí.</think><answer>B</answer>"
    rows = rows_of_text((YORUBA, answer),
                        (YORUBA, "The capital of Nigeria is the city of Abuja, so B."), (YORUBA, "B"))
    assert [row["in_language"] for row in rows] == [1, 0, ""]
    metrics = rewards.answer_metrics(rows)
    assert metrics["eval/in_language"] == 0.5 and "eval/in_language" not in rewards.answer_metrics(rows[2:])


def test_without_the_detector_nothing_is_said_of_language(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(rewards, "language", rewards.language.__wrapped__)  # which remembers nothing
    assert rewards.language(YORUBA) == "" and rows_of_text((YORUBA, YORUBA))[0]["in_language"] == ""


def test_answer_rows_and_what_they_come_to():
    rows = rows_of_text(("q", "so B"), ("q", "nothing"), ("q", "<answer>C</answer>"))
    assert [row["extracted"] for row in rows] == ["", "", "C"] and rows[0]["logprob"] == -0.75
    assert rewards.answer_metrics(rows) == pytest.approx({
        "eval/pass@1": 1 / 3, "eval/chance": 0.25, "eval/questions": 3, "eval/tokens": 2,
        "eval/repetition": 0, "eval/truncated": 0, "eval/pass@1 level 0": 0.5, "eval/pass@1 level 1": 0})
    assert rewards.answer_metrics([]) == {}
    rows[0]["meta"] = "{}"
    assert "eval/chance" not in rewards.answer_metrics(rows)


# ---- the probability of the answer as a reward ----


@pytest.mark.parametrize("response, expected", [
    ("<think>1+1=2</think><answer>2</answer>", "<think>1+1=2</think>"), ("1+1=2 <answer>", "1+1=2 "),
    ("<think>1+1=", "<think>1+1=</think>"), ("so it is 2", "so it is 2"), ("<answer>2</answer>", ""),
    ("", ""), ("#### 72", ""), ("so \\boxed{72}", "so "), ("It is 7. The answer is 7.", "It is 7. The "),
    ("<think></think><answer>2</answer>", ""),
    ("in <answer> tags: <answer>2</answer>", "in <answer> tags: ")])
def test_rationale(response, expected):
    assert rewards.rationale(response) == expected


def answer_probability(options="", max_new_tokens=64):
    """The reward under the embedded model, and what its model and tokenizer are."""
    torch, grpo = pytest.importorskip("torch"), importlib.import_module("grpo")
    cpu, tokenizer = torch.device("cpu"), common.models.load_tokenizer("")
    model = common.models.load_model("", torch.float32, cpu)
    (reward,) = made = parse_rewards([f"answer-prob:{options}"], answer_prob=partial(
        rewards.AnswerProbability, tokenizer, max_new_tokens))
    rewards.ask_policy(made, {e.id: common.data.encode_prompt(tokenizer, e.prompt) for e in ASKED},
                       lambda prompts, answers: grpo.completion_logprobs(model, prompts, answers, 1.0, 60, cpu))
    return reward.function, model, tokenizer


ASKED = [Example(0, "Compute 3+4-5+6.", "8")] * 3 + [Example(1, "Compute 9+9+9+9.", "36")] * 2
ANSWERED = ["<think>3+4=7 7-5=2 2+6=8</think><answer>8</answer>", "<answer>9</answer>", "<think>3+4=7 7-",
            "<think>9+9=18 18+9=27 27+9=36</think><answer>36</answer>", ""]


def test_answer_probability_is_brute_force():
    """Rationale, none, cut off; log p of "8</answer>" by transformers' own forward pass, token by token."""
    import torch

    reward, model, tokenizer = answer_probability()
    rationales = ["<think>3+4=7 7-5=2 2+6=8</think>", "", "<think>3+4=7 7-</think>",
                  "<think>9+9=18 18+9=27 27+9=36</think>", ""]
    expected = []
    for e, before in zip(ASKED, rationales):
        prefix = common.data.encode_prompt(tokenizer, e.prompt) + tokenizer(
            f"{before}<answer>", add_special_tokens=False)["input_ids"]
        total = []
        for token in tokenizer(f"{e.answer}</answer>", add_special_tokens=False)["input_ids"]:
            total.append(model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)[token].item())
            prefix = prefix + [token]
        expected.append(total)
    assert [len(row) for row in expected] == [2, 2, 2, 3, 3]
    sums = [sum(row) for row in expected]
    assert reward(ASKED, ANSWERED) == pytest.approx(sums, abs=1e-4)
    assert sums[0] > -0.1 > sums[1] and sums[3] > -0.1 > sums[4]  # working makes the answer all but certain
    for options, values in (
            ("mean", [total / len(row) for total, row in zip(sums, expected)]),
            ("exp", [math.exp(total) for total in sums]),
            ("prior", [total - sums[1 if i < 3 else 4] for i, total in enumerate(sums)]),
            ("others", [sums[0] - (sums[1] + sums[2]) / 2, sums[1] - (sums[0] + sums[2]) / 2,
                        sums[2] - (sums[0] + sums[1]) / 2, sums[3] - sums[4], sums[4] - sums[3]])):
        assert answer_probability(options)[0](ASKED, ANSWERED) == pytest.approx(values, abs=1e-4), options
    assert answer_probability("exp+prior")[0](ASKED, ANSWERED)[1] == pytest.approx(0, abs=1e-6)


def test_a_rationale_that_fills_the_context_is_cut():
    """The answer still fits; one that would not alone has no reward."""
    reward, model, tokenizer = answer_probability(max_new_tokens=10)
    seen = []
    reward.logprobs = lambda prompts, answers: seen.extend(zip(prompts, answers)) or [
        importlib.import_module("torch").zeros(len(answer)) for answer in answers]
    reward.prompt_ids = dict.fromkeys((0, 1), common.data.encode_prompt(tokenizer, "Q"))
    long = "<think>" + "3+4=7 " * 50
    values = reward([Example(0, "Q", "8"), Example(1, "Q", "8" * 9)], [long, "x"])
    assert values[0] == 0 and math.isnan(values[1]) and len(seen) == 1
    prompt = common.data.encode_prompt(tokenizer, "Q")
    assert len(seen[0][0]) + len(seen[0][1]) == len(prompt) + 9  # and the end token
    text = tokenizer.decode(seen[0][0][len(prompt):])
    assert text.startswith("<think>3+4=") and text.endswith("</think><answer>")  # its thinking is closed
    assert reward([], []) == []


@pytest.mark.parametrize("longest", range(7, 40, 3))
@pytest.mark.parametrize("response", ["<think>ሰላም ነው", "ṣe <think>日本 😀 <think>日本</think>", "3+4 �\x10� x"])
def test_a_rationale_is_cut_between_characters(response, longest):
    """Each is three tokens here, all of which end where it ends: once, nothing was cut then, for ever."""
    tokenizer, calls = common.models.load_tokenizer(""), []

    def counted(text, **options):
        calls.append(text)
        assert len(calls) < 100
        return tokenizer(text, **options)

    before, answer = rewards.answered(counted, response, "8", longest)
    kept = tokenizer.decode(before).removesuffix("<answer>")
    assert (len(before) + len(answer) < longest or not kept) and tokenizer.decode(answer) == "8</answer>"
    assert response.startswith(kept) or response.startswith(kept.removesuffix("</think>"))


def test_the_answer_is_asked_as_a_policy_writes_it():
    """Qwen2.5 has one token for ">B" and one for "><": they are asked for, not "B" after ">"."""
    folder = DATA / "tokenizers" / "qwen2.5"
    if not folder.exists():
        pytest.skip(f"no tokenizer in {folder}")
    tokenizer = common.models.load_tokenizer(str(folder))
    for response, answer in (("<think>x</think><answer>C</answer>", "B"), ("", "-3"),
                             ("<think>" + "a b " * 99, "7")):
        before, after = rewards.answered(tokenizer, response, answer, 40)
        whole = tokenizer.decode(before + after)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert before + after == ids and len(ids) < 40 and whole.endswith(f"<answer>{answer}</answer>")
        assert tokenizer.decode(after).lstrip(">") == f"{answer}</answer>"
        assert tokenizer.decode(before).rstrip(">").endswith("<answer")
        assert whole.count("<think>") == whole.count("</think>") == bool(response)


def test_leave_one_out_is_a_baseline_that_leaves_the_gradient():
    """It sums to 0 over a question; over all pairs of samples the expected gradient is that without it."""
    values = [0.3, -1.0, 2.5, math.nan, 4.0]
    left = rewards.leave_one_out(values, "aabab")
    assert left[:2] == pytest.approx([1.3, -1.3]) and math.isnan(left[3])
    assert left[2] + left[4] == pytest.approx(0) and rewards.leave_one_out([7.0], [0]) == [0.0]
    assert rewards.leave_one_out([0.1] * 8, [0] * 8) == [0.0] * 8
    p, r = [0.2, 0.5, 0.3], [1.0, -2.0, 0.5]  # a softmax policy over three rationales

    def score(action):  # d log p(action) / d logits
        return [(i == action) - p[i] for i in range(3)]

    plain = [sum(p[z] * r[z] * score(z)[i] for z in range(3)) for i in range(3)]
    with_baseline = [0.0] * 3
    for pair in itertools.product(range(3), repeat=2):
        weights = rewards.leave_one_out([r[z] for z in pair], [0, 0])
        for z, w in zip(pair, weights):
            for i in range(3):
                with_baseline[i] += p[pair[0]] * p[pair[1]] * w * score(z)[i] / 2
    assert with_baseline == pytest.approx(plain)


def test_where_answers_are_random_the_log_probability_rewards_hedging():
    """Four answers equally likely; a rationale names one (p = 0.97 for it) or none (1/4 each).

    By E[log p] the optimum is the one that says nothing; by E[p] ("exp") and log E[p] all are alike.
    """
    torch = pytest.importorskip("torch")
    named = [[0.97 if y == z else 0.01 for y in range(4)] for z in range(4)]
    table = [*named, [0.25] * 4]  # p(answer y | rationale z)

    def rewards_by(options):
        """Mean over the answers that may come, through the reward itself."""
        given = [torch.tensor([math.log(p)]) for row in table for p in row]
        reward = rewards.AnswerProbability(
            lambda text, **_: {"input_ids": [0], "offset_mapping": [(0, len(text))]}, 9, options)
        reward.prompt_ids, reward.logprobs = {0: [0]}, lambda prompts, answers: given
        values = reward([Example(0, "q", "a")] * 20, ["r"] * 20)
        return [sum(values[4 * z:4 * z + 4]) / 4 for z in range(5)]

    log = rewards_by("")
    assert log[:4] == pytest.approx([(math.log(0.97) + 3 * math.log(0.01)) / 4] * 4)  # -3.46
    assert log[4] == pytest.approx(math.log(0.25)) and max(log) == log[4]
    assert rewards_by("exp") == pytest.approx([0.25] * 5)
    assert [math.log(sum(row) / 4) for row in table] == pytest.approx([math.log(0.25)] * 5)


def test_of_several_gold_answers_the_mean_of_log_p_or_the_log_of_the_mean():
    """A rationale that names one of two right answers (0.9 and 0.001) or hedges between them (0.3 and 0.3)."""
    torch = pytest.importorskip("torch")
    tokenizer = lambda text, **_: {"input_ids": [len(text)], "offset_mapping": [(0, len(text))]}  # noqa: E731
    examples = [Example(0, "q", "red", meta={"answers": ["red", "blue!"]}), Example(1, "q", "red")]

    def values(table, options):
        reward = rewards.AnswerProbability(tokenizer, 9, options)
        reward.prompt_ids = {0: [0], 1: [0]}
        reward.logprobs = lambda prompts, answers: [torch.tensor([math.log(p)]) for p in table[:len(answers)]]
        return reward(examples, ["r", "r"])

    for table, mean, any_, exp in (([0.9, 0.001, 0.5], -3.506558, -0.797397, 0.4505), ([0.3, 0.3, 0.5], *[
            math.log(0.3)] * 2, 0.3)):
        assert values(table, "") == pytest.approx([mean, math.log(0.5)], abs=1e-5)
        assert values(table, "any") == pytest.approx([any_, math.log(0.5)], abs=1e-5)
        assert values(table, "exp") == pytest.approx([exp, 0.5])
    assert math.isnan(values([0.5], "any")[1])  # of which there is none


def test_only_a_policy_can_be_asked_for_the_probability():
    with pytest.raises(ValueError, match="asks the policy in training"):
        parse_rewards(["answer-prob"])
    made = parse_rewards(["answer-prob:exp+mean=0.5", "correctness"], answer_prob=lambda options: options)
    assert [(f.name, f.weight, f.function) for f in made][0] == ("answer-prob", 0.5, "exp+mean")
