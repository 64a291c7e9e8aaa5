"""Matrix tasks (common/matrices.py): what is generated, what counts as an answer, and what guessing earns."""

import hashlib
import json
import random
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import data, matrices, models, rewards
from common.matrices import credit, identity, parse, right_rows, row_reduce, text
from tests.processes import ROOT, column, eval_lines, rows

ALL = [(task, level) for task in matrices.LEVELS for level in range(1, len(matrices.LEVELS[task]) + 1)]
small = st.integers(-6, 6).map(Fraction)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5))
some_matrix = shapes.flatmap(lambda s: st.lists(st.lists(small, min_size=s[1], max_size=s[1]),
                                                min_size=s[0], max_size=s[0]))
fast = settings(derandomize=True, deadline=None, max_examples=150)


def product(A, B):
    return [[sum(a * b for a, b in zip(row, column)) for column in zip(*B)] for row in A]


def problems(task, level, n=150, **more):
    rng, make = random.Random(f"{task} {level}"), data.GENERATED[task][0]
    return [make(rng, level, **more) for _ in range(n)]


# ---- Problems


@pytest.mark.parametrize("task, level", ALL)
def test_gold_answers_are_right_and_the_criteria_hold(task, level):
    criteria, entries = matrices.LEVELS[task][level - 1], []
    for problem in problems(task, level, 60):
        A = problem["meta"]["matrix"]
        assert (len(A), len(A[0])) == (criteria.rows, criteria.columns) and text(A) in problem["prompt"]
        assert all(abs(x) <= criteria.entry for row in A for x in row)
        assert rewards.correctness([""], [problem["completion"]], [""], [task], [problem["meta"]]) == [1.0]
        if problem["answer"] == matrices.SINGULAR:
            assert len([row for row in row_reduce([list(map(Fraction, r)) for r in A])[0] if any(row)]) < len(A)
            continue
        X = parse(problem["answer"])
        entries += [x for row in X for x in row]
        if task == "matrix-inverse":
            assert product(A, X) == identity(len(A)) == product(X, A)
    assert all(max(abs(x.numerator), x.denominator) <= criteria.largest for x in entries)
    assert all(x.denominator == 1 for x in entries) == criteria.whole


@fast
@given(some_matrix)
def test_the_reduced_form_is_one_and_stays(A):
    """By its definition, with the row space of the matrix; idempotent; the same for shuffled, scaled rows."""
    R, _ = row_reduce(A)
    pivots = [next(j for j, x in enumerate(row) if x) for row in R if any(row)]
    assert pivots == sorted(set(pivots)) and not any(map(any, R[len(pivots):]))
    for i, j in enumerate(pivots):
        assert [row[j] for row in R] == [Fraction(int(k == i)) for k in range(len(R))]
    assert row_reduce(R) == (R, [])
    assert row_reduce([[x * (i + 2) for x in row] for i, row in enumerate(A[::-1])])[0] == R
    assert row_reduce(A + R)[0][:len(pivots)] == R[:len(pivots)]


@pytest.mark.parametrize("task, level", ALL)
def test_every_step_of_a_worked_solution_is_true(task, level):
    """Each is carried out anew on the rows as they are; the last rows are the answer."""
    for problem in problems(task, level, 25):
        state = [list(map(Fraction, row)) for row in problem["meta"]["matrix"]]
        n = len(state)
        if task == "matrix-inverse":
            state = [row + unit for row, unit in zip(state, identity(n))]
        thought = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", problem["completion"], re.DOTALL)
        for step in [] if thought[1] == "nothing to do" else thought[1].split("\n"):
            if swap := re.fullmatch(r"R(\d)<->R(\d)", step):
                i, j = int(swap[1]) - 1, int(swap[2]) - 1
                state[i], state[j] = state[j], state[i]
                continue
            scale = re.fullmatch(r"R(\d)/\(?(-?[\d/]+)\)?=(.*)", step)
            add = re.fullmatch(r"R(\d)([+-])(?:([\d/]+)\*)?R(\d)=(.*)", step)
            i = int((scale or add)[1]) - 1
            if scale:
                state[i] = [x / Fraction(scale[2]) for x in state[i]]
            else:
                factor = Fraction(add[3] or 1) * (1 if add[2] == "+" else -1)
                state[i] = [x + factor * y for x, y in zip(state[i], state[int(add[4]) - 1])]
            assert text(state[i]) == (scale or add)[scale and 3 or 5]
        if thought[2] != matrices.SINGULAR:
            assert text([row[n:] if task == "matrix-inverse" else row for row in state]) == thought[2]


@pytest.mark.parametrize("name, share", [("matrix-inverse", 0.2), ("matrix-inverse/0.5", 0.5),
                                         ("matrix-inverse/0", 0), ("matrix-inverse/1", 1)])
def test_the_share_of_singular_matrices(name, share):
    examples = data.load_examples(name, level=5, limit=600, seed=1)  # of so many that few draws are repeated
    found = sum(e.answer == matrices.SINGULAR for e in examples) / 600
    assert abs(found - share) < 0.06 and (found == share or 0 < share < 1)
    always = rewards.correctness([""] * 600, ["<answer>not invertible</answer>"] * 600, [""] * 600,
                                 [e.task for e in examples], [e.meta for e in examples])
    assert sum(always) / 600 == found


@pytest.mark.parametrize("task", matrices.LEVELS)
def test_training_and_evaluation_share_no_matrix_and_need_no_memory_of_each_other(task):
    """Whatever the seed and the number; the same on every call; every level has thousands at once."""
    seen = {}
    for split in ("train", "validation", "test"):
        examples = data.load_examples(task, split, level="1-3", limit=100, seed=3)
        assert examples == data.load_examples(task, split, level="1-3", limit=100, seed=3)
        assert {e.level for e in examples} == {1, 2, 3} and len({e.prompt for e in examples}) == 100
        for e in examples + data.load_examples(task, split, level="1-3", limit=100, seed=4):
            assert seen.setdefault(json.dumps(e.meta), split) == split
            digest = hashlib.sha256(e.prompt.encode()).digest()
            assert data.SPLITS[int.from_bytes(digest[:8], "big") % 5] == split


@pytest.mark.parametrize("name, words", [("matrix-inverse/2", "from 0 to 1"), ("matrix-inverse/x", "from 0 to 1"),
                                         ("rref/0.5", "unknown data|hub")])
def test_a_share_that_is_none_is_refused(name, words, monkeypatch):
    monkeypatch.setattr(models, "offline_without_hub", lambda: None)
    with pytest.raises(ValueError, match=words):
        data.load_examples(name, limit=5)


@pytest.mark.parametrize("meta", [{}, {"matrix": 3}, {"matrix": []}, {"matrix": [[1, 2], [3]]}, {"matrix": [[1.5]]},
                                  {"matrix": [[True]]}])
def test_a_row_without_its_matrix_is_refused(tmp_path, meta):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "answer": "x", "task": "rref", "meta": meta}))
    with pytest.raises(ValueError, match="line 1.*rref problem needs meta.matrix"):
        data.load_examples(tmp_path / "a.jsonl")


# ---- Answers


HALF = [[Fraction(1, 2), Fraction(0)], [Fraction(-3), Fraction(1)]]


@pytest.mark.parametrize("written", [
    "[[1/2,0],[-3,1]]", "[[1/2, 0], [-3, 1]]", "[[.5,0],[-3,1]]", "[[0.50, 0.], [-3.0, +1]]", "[[1/2,０],[−3,1]]", "[\n[1/2,0],\n[-3,1]\n]",
    "[[2/4,0/7],[-3,1]]", "$[[1/2,0],[-3,1]]$", "A^{-1} = [[1/2,0],[-3,1]]", "X = [[1/2,0],[-3,1]]",
    r"\begin{pmatrix} 1/2 & 0 \\ -3 & 1 \end{pmatrix}", r"\begin{bmatrix}\frac{1}{2}&0\\-3&1\\\end{bmatrix}",
    r"$$\begin{pmatrix}\dfrac{1}{2} & 0 \\[4pt] -3 & 1\end{pmatrix}$$", r"\left[\begin{array}{cc}.5&0\\-3&1\end{array}\right]",
    "1/2 0\n-3 1", "1/2, 0; -3, 1", "1/2 0\n\n-3 1\n"])
def test_forms_of_one_matrix(written):
    assert parse(written) == HALF


@pytest.mark.parametrize("written", [
    "", "[]", "[[]]", "[[1,2],[3]]", "[[1,2],[3,4]", "[[1,,2]]", "[[1,2],]", "[[1/0,2]]", "[[1e3,2]]", "[[1;2]]", "[[a,b]]",
    "[[1,2]] or [[3,4]]", "[[1,2]] [[3,4]]", "[[2**9,1]]", "[[1+1,2]]", "[[--1,2]]", "[[1/2/3,4]]", "[[²,1]]", "[[١,2]]",
    "[[1,–2]]", "[[\u200b1,2]]", "[[0x1,2]]", "[[1_0,2]]", "[[inf,nan]]", "[[" + "9" * 41 + ",1]]", "[" * 3000, "[[1,2],[1,2]]x",
    "[[1,2],[3,4]]" * 400, r"\begin{pmatrix}1&2\end{bmatrix}", "\x00[[1,2]]", "not invertible", "1 2\n3", r"\frac{1}{0} 1"])
def test_what_is_no_matrix(written):
    assert parse(written) is None


def test_what_says_that_there_is_no_inverse():
    for yes in ("not invertible", "Not invertible.", "singular", "The matrix is singular", "no inverse", "non-invertible",
                "It is not invertible", "there is no inverse", "A is singular", "noninvertible"):
        assert matrices.says_singular(yes) and credit("matrix-inverse", yes, [[1, 2], [2, 4]]) == 1, yes
        assert credit("matrix-inverse", yes, [[1, 2], [2, 5]]) == 0
    for no in ("invertible", "not singular", "not invertible or [[1,0],[0,1]]", "maybe not invertible", "", "not"):
        assert not matrices.says_singular(no), no
    assert credit("matrix-inverse", "[[0,0],[0,0]]", [[1, 2], [2, 4]]) == 0


@pytest.mark.parametrize("written", [
    "[[0,1,-4],[1,0,11]]", "[[2,0,22],[0,1,-4]]", "[[1,2,3],[0,1,-4]]", "[[1,2,3],[2,5,2]]", "[[1,0,11],[0,1,-4],[0,0,0]]",
    "[[1,0,11]]", "[[1,0],[0,1]]"])
def test_rows_that_are_swapped_scaled_or_not_reduced_are_not_right(written):
    matrix = [[1, 2, 3], [2, 5, 2]]
    assert credit("rref", "[[1,0,11],[0,1,-4]]", matrix) == 1 > 0.2 > credit("rref", written, matrix)


@pytest.mark.parametrize("task, level", ALL)
def test_more_right_parts_earn_more_and_a_wrong_answer_at_most_a_half(task, level):
    for problem in problems(task, level, 30, **({"singular_share": 0} if task == "matrix-inverse" else {})):
        matrix, gold, earned = problem["meta"]["matrix"], parse(problem["answer"]), []
        parts = len(gold[0]) if task == "matrix-inverse" else len(gold)
        for wrong in range(parts, -1, -1):  # columns, or rows, that are wrong
            written = [[x + 7 if (j if task == "matrix-inverse" else i) < wrong else x for j, x in enumerate(row)]
                       for i, row in enumerate(gold)]
            assert sum(right_rows(task, text(written), matrix)) == parts - wrong
            earned.append(credit(task, text(written), matrix))
        assert earned == sorted(earned) and earned[0] == 0 and earned[-2] <= 0.5 and earned[-1] == 1


@pytest.mark.parametrize("task, level", ALL)
def test_no_constant_answer_is_worth_writing(task, level):
    """By `partial`, which is never below `correctness`, at most 5 %; "not invertible" earns its share alone."""
    found = problems(task, level, 200, **({"singular_share": 0} if task == "matrix-inverse" else {}))
    metas = [problem["meta"] for problem in found]
    criteria = matrices.LEVELS[task][level - 1]
    eye = [[int(i == j) for j in range(criteria.columns)] for i in range(criteria.rows)]
    zero = [[0] * criteria.columns] * criteria.rows
    guesses = [text(eye), text([[-x for x in row] for row in eye]), text(zero), text(eye[::-1]), matrices.SINGULAR,
               *(problem["answer"] for problem in found[:5])]
    for guess in guesses:
        earned = [credit(task, guess, meta["matrix"]) for meta in metas]
        assert sum(earned) / 200 <= 0.05, (guess, sum(earned) / 200)
    for problem in found:  # nor is the question itself
        echo = text(problem["meta"]["matrix"])
        if credit(task, echo, problem["meta"]["matrix"]) == 1:
            assert parse(echo) == parse(problem["answer"])


@fast
@given(st.text(alphabet="[]{}(),;&\\\n .-+/0123456789frac", max_size=80), some_matrix)
def test_whatever_is_written_earns_between_0_and_1(written, A):
    matrix = [[int(x) for x in row] for row in A]
    for task in ("rref", *["matrix-inverse"] * (len(A) == len(A[0]))):
        assert 0 <= credit(task, written, matrix) <= 1


@pytest.mark.parametrize("written", [
    "[[1,2]," * 200_000, "[" * 1_000_000, "1 " * 500_000, "\\frac{1}{2}" * 90_000, "\\begin{pmatrix}" * 60_000,
    "\\begin{pmatrix}" + "1&" * 400_000, "-" * 1_000_000, "\n" * 1_000_000, "." * 1_000_000, "\\left[" * 160_000])
def test_hostile_text_is_quick(written):
    rewards.partial([""], ["warm up"], [""], ["rref"], [{"matrix": [[1, 2, 3], [2, 5, 2]]}])
    start = time.perf_counter()
    for task, matrix in (("rref", [[1, 2, 3], [2, 5, 2]]), ("matrix-inverse", [[1, 2], [2, 5]])):
        assert credit(task, written, matrix) == 0
        assert credit(task, written[:3990], matrix) == 0
    assert time.perf_counter() - start < 0.5


# ---- Runs


@pytest.mark.parametrize("task", ["matrix-inverse/0.5", "rref"])
def test_a_run_on_matrices(go, tiny, task):
    """sft.py and grpo.py take the tasks; a row in samples.csv is read back with its matrix."""
    shared = {"bare": True, "model": tiny, "data": task, "level": 1, "train_questions": 20, "eval_questions": 4,
              "max_steps": 2, "lora_r": 4, "warmup_steps": 0}
    go("sft", script="sft.py", batch_size=5, **shared)
    folder = go("grpo", rewards=["partial=1", "mark=0.1"], prompts_per_step=3, num_generations=4, max_new_tokens=12,
                **shared).folder
    assert len(eval_lines(folder)) == 2 and column(rows(folder, step=1), "reward/partial")
    (example, *_) = data.load_examples(folder / "samples.csv")
    assert example.task == task.partition("/")[0] and example.meta["matrix"]


def test_the_page_says_what_each_level_asks_for():
    page = (ROOT / "docs/data-and-rewards.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `(matrix-inverse|rref)` \| (.+) \|$", page, re.MULTILINE)
    expected = []
    for task, levels in matrices.LEVELS.items():
        for number, level in enumerate(levels, 1):
            low, high = level.steps
            steps = "any" if high == 99 else str(low) if low == high else f"{low} to {high}"
            kind = "whole" if level.whole else "fractions"
            expected.append((task, f"{number} | {level.rows} x {level.columns} | {level.entry} | {kind}, "
                                   f"{level.largest} | {steps} | {level.condition or ''}"))
    assert said == expected
