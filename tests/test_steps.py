"""The reward `steps` (common/steps.py): worked solutions earn 1, a slip costs its step, real workings are read."""

import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from common import data, rewards
from common.matrices import row_reduce, text
from common.steps import true_row_operations

GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k/train.jsonl"
TASKS = [("arithmetic", 4), ("countdown", 2), ("matrix-inverse", 2), ("matrix-inverse", 6), ("rref", 3), ("rref", 4)]


def steps(examples, responses):
    return rewards.steps([e.text for e in examples], responses, [e.answer for e in examples],
                         [e.task for e in examples], [e.meta for e in examples])


@pytest.mark.parametrize("task, level", TASKS)
def test_a_worked_solution_earns_1_and_one_without_working_nothing(task, level):
    examples = data.load_examples(task, level=level, limit=60)
    assert steps(examples, [e.completion for e in examples]) == [1.0] * 60
    assert steps(examples, [f"<answer>{e.answer}</answer>" for e in examples]) == [0.0] * 60


@pytest.mark.parametrize("task, level", TASKS)
def test_a_slip_at_the_end_costs_one_step(task, level):
    """The last number of the last step of a working of at least two: nothing stands on it."""
    for e in data.load_examples(task, level=level, limit=60):
        working, end = e.completion.split("</think>")
        separator = "\n" if task in ("matrix-inverse", "rref") else " "
        n = len(working.split(separator))
        if n < 2 or "<->" in working.rpartition(separator)[2]:
            continue
        wrong = re.sub(r"(\d+)(\]?)$", lambda m: f"{int(m[1]) + 1}{m[2]}", working)
        assert wrong != working
        assert steps([e], [f"{wrong}</think>{end}"]) == pytest.approx([(n - 1) / n])


def test_after_a_slip_the_rows_are_those_that_are_written():
    """A row that is wrong once does not make the steps after it wrong; the same slip twice costs two."""
    e = data.Example(0, "m", task="rref", meta={"matrix": [[1, 2, 3], [2, 4, 8]]})
    right, slip = "R2-2*R1=[0,0,2]\nR2/2=[0,0,1]\nR1-3*R2=[1,2,0]", "R2-2*R1=[0,0,4]\nR2/4=[0,0,1]\nR1-3*R2=[1,2,0]"
    assert steps([e] * 3, [right, slip, slip.replace("[1,2,0]", "[1,2,1]")]) == pytest.approx([1, 2 / 3, 1 / 3])


def test_other_ways_to_the_end_earn_1_and_stopping_early_does_not():
    """[[2,1],[1,1]] in other steps than the worked ones, in more, and two true steps with a guess."""
    e = data.Example(0, "m", task="matrix-inverse", meta={"matrix": [[2, 1], [1, 1]]})
    other = "R1-R2=[1,0,1,-1]\nR2-R1=[0,1,-1,2]"
    longer = "R1/2=[1,1/2,1/2,0]\nR2-R1=[0,1/2,-1/2,1]\nR2/(1/2)=[0,1,-1,2]\nR1-1/2*R2=[1,0,1,-1]\nR1<->R2\nR1<->R2"
    short = "R1/2=[1,1/2,1/2,0]\nR2-R1=[0,1/2,-1/2,1]"
    n = len(row_reduce([[2, 1], [1, 1]])[1])
    assert steps([e] * 3, [other, longer, short]) == pytest.approx([1, 5 / 6, 2 / n])
    assert steps([e], [short + "\nR2-2*R1=[0,0,1,1]"]) == pytest.approx([2 / n]) and n == 4


def test_every_row_operation_keeps_the_solutions():
    """What counts as true has the same reduced form: by random operations, right and wrong ones."""
    rng = random.Random(0)
    for _ in range(300):
        rows = [[Fraction(rng.randint(-4, 4)) for _ in range(3)] for _ in range(2)]
        i, j = rng.sample(range(2), 2)
        factor = Fraction(rng.randint(0, 3), rng.randint(1, 3))
        sign = rng.choice((-1, 1))
        row = [x + sign * factor * y for x, y in zip(rows[i], rows[j])]
        row[rng.randrange(3)] += rng.choice((0, 1))
        line = f"R{i + 1}{'+' if sign > 0 else '-'}{factor}*R{j + 1}={text(row)}"
        true, n, _ = true_row_operations(line, "rref", rows)
        after = [row if k == i else rows[k] for k in range(2)]
        assert n == 1 and (not true or row_reduce(after)[0] == row_reduce(rows)[0])
        assert true == (row == [x + sign * factor * y for x, y in zip(rows[i], rows[j])] and after != rows)


def test_the_annotations_of_gsm8k_are_read():
    """4 of 5 worked solutions have equations without words in them, and nearly all of those are true."""
    if not GSM8K.exists():
        pytest.skip("no GSM8K here")
    examples = data.load_examples(GSM8K, limit=1000)
    values = steps(examples, [e.completion for e in examples])
    some = [value for value in values if value]
    assert len(some) > 800 and sum(some) / len(some) > 0.95
    assert sum(steps(examples, [e.completion for e in examples[1:] + examples[:1]])) < 0.75 * sum(values)  # another question's
