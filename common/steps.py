"""How much of a working is true: equations ("3+5=8", "<<48/2=24>>", "2 x $1.50 = $3") and row operations.

For the reward `steps` of common/rewards.py. Everything is exact, and bounded in time whatever the text is.
"""

import re
from fractions import Fraction

from common import matrices

LONGEST = 20_000  # characters of a response that are read: the last ones for its answer, the first for steps
MOST = 100  # steps that are read
WIDTH = 80  # characters on either side of an equals sign
_NUMBER = r"\$?(?:\d{1,12}(?:,\d{3})*(?:\.\d{1,12})?|\.\d{1,12})"
_SIGN = r"(?:\s?[*/×÷]\s?|\s?(?<=[\s\d])x(?=[\s\d$(])\s?|\s[-−–+]\s|[-−–+])"  # in "5 -4" there is none
_SIDE = rf"[-−]?\(*[-−]?{_NUMBER}%?\)*(?:{_SIGN}\(*-?{_NUMBER}%?\)*){{0,8}}"
_BEFORE = re.compile(rf"(?<![\w.,/*×÷+−–-])({_SIDE})\s*$")
_ASCII = str.maketrans("×x÷−–", "**/--", "$,")
_WORDS = dict(zip("one two three four five six seven eight nine ten eleven twelve half twice double triple "
                  "third quarter dozen".split(), [*range(1, 13), 2, 2, 2, 3, 3, 4, 12]))
_BEHIND = re.compile(rf"\s*({_SIDE})")
_ROW = r"=\[([^\[\]\n]{1,200})\]"
_SWAP = re.compile(r"R(\d)<->R(\d)")
_DIVIDE = re.compile(rf"R(\d)/\(?(-?\d{{1,12}}(?:/\d{{1,12}})?)\)?{_ROW}")
_ADD = re.compile(rf"R(\d)([-+])(?:(\d{{1,12}}(?:/\d{{1,12}})?)\*)?R(\d){_ROW}")


def true_equations(text, question, evaluate) -> tuple[int, int]:
    """(true steps, all steps) among the equations of a text that have an operator on the left.

    A true one is exact, or rounded to the two or more decimals that it writes; one of its numbers at least
    stands in the question, in digits or as a word, or is the result of an earlier one; its left side is new
    or takes up the result before it.
    evaluate: the exact value of "3+5", or None.
    """
    question = question[:LONGEST].lower()
    known = {evaluate(_plain(number)) for number in re.findall(_NUMBER, question)}
    known |= {_WORDS[word] for word in re.findall("[a-z]+", question) if word in _WORDS}
    true = total = 0
    seen, last = set(), None
    for at in [m.start() for m in re.finditer("=", text[:LONGEST])][:MOST]:
        left = _BEFORE.search(text[max(0, at - WIDTH):at])
        right = _BEHIND.match(text[at + 1:at + 1 + WIDTH])
        if not left or not right or not re.search(r"[\d)%]\s?[-−–+*/×÷x]", left[1]):
            continue
        total += 1
        given, wanted = _plain(right[1]), _plain(left[1])
        result, value = evaluate(given), evaluate(wanted)
        if result is None or value is None:
            continue
        places = len(right[1].partition(".")[2].rstrip("%)")) if "." in right[1] else 0
        close = places >= 2 and abs(result - value) * 2 * 10**places <= 1
        used = {evaluate(_plain(number)) for number in re.findall(_NUMBER, left[1])}
        true += bool((result == value or close) and used & known) and (
            wanted not in seen or last in used)
        last = abs(result)
        seen.add(wanted)
        known.add(last)
    return true, total


def _plain(side):
    """With + - * / and whole numbers alone: 2 x $1.50 as 2*(150/100)."""
    side = side.translate(_ASCII)
    side = re.sub(r"(\d*)\.(\d+)", lambda m: f"({int(m[1] + m[2])}/{10 ** len(m[2])})", side)
    side = re.sub(r"(\d+|\([\d/]+\))%", r"(\1/100)", side)
    return re.sub(r"\s|(?<!\d)0+(?=\d)", "", side)


def true_row_operations(text, task, matrix) -> tuple[int, int, bool]:
    """(true steps, all steps, done?) of the lines that are row operations as `matrices.row_reduce` has them.

    Each is judged by the rows as they stand written before it, so that one slip counts once; one that leads
    back to rows that stood there before is not true. done: all are true, and there is nothing left to reduce.
    """
    rows = [[Fraction(x) for x in row] for row in matrix]
    if task == "matrix-inverse":  # with the identity beside it
        rows = [row + unit for row, unit in zip(rows, matrices.identity(len(rows)))]
    n, true, total, seen = len(rows), 0, 0, {str(rows)}
    for line in text[:LONGEST].split("\n"):
        line = re.sub(r"^.*<think>", "", line[:300]).replace("</think>", "").replace(" ", "")
        swap, divide, add = (form.fullmatch(line) for form in (_SWAP, _DIVIDE, _ADD))
        step = swap or divide or add
        if not step or total == MOST:
            continue
        total += 1
        i, right = int(step[1]) - 1, False
        j = int(swap[2] if swap else add[4]) - 1 if not divide else -2
        if not (0 <= i < n and j < n and j not in (i, -1)):
            continue
        if swap:
            rows[i], rows[j], right = rows[j], rows[i], True
        else:
            written = matrices.parse(f"[[{step.group(step.lastindex)}]]")
            if not written or len(written[0]) != len(rows[i]):
                continue
            top, _, bottom = ((divide[2] if divide else add[3]) or "1").partition("/")
            if int(bottom or 1) and (int(top) or add):
                factor = Fraction(int(top), int(bottom or 1)) * (-1 if add and add[2] == "-" else 1)
                right = written[0] == ([x / factor for x in rows[i]] if divide else
                                       [x + factor * y for x, y in zip(rows[i], rows[j])])
            rows[i] = written[0]
        true += right and str(rows) not in seen
        seen.add(str(rows))
    columns = n if task == "matrix-inverse" else None
    return true, total, true == total and not matrices.row_reduce(rows, columns)[1]
