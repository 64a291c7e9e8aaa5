"""Matrix tasks in exact fractions: problems by level with their worked solutions, and the checks of answers.

    matrix-inverse    Invert the matrix [[2,1],[1,1]], or answer: not invertible.
    rref              Bring the matrix [[1,2,3],[2,4,7]] to reduced row echelon form.

A matrix is a list of rows of Fractions.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

SINGULAR = "not invertible"
SINGULAR_SHARE = 0.2  # of matrix-inverse's draws, unless its name says another: matrix-inverse/0.5


@dataclass(frozen=True)
class Level:
    """What a problem has to be; a draw that is not is drawn again."""

    rows: int
    columns: int
    entry: int  # entries are whole, from -entry to entry
    whole: bool  # the answer's entries are whole: of an inverse, the determinant is 1 or -1
    largest: int  # numerators and denominators of the answer's entries are at most this
    condition: int = 0  # of an inverse: |A| |A^-1| is at most this, |A| the largest sum of a row's |entries|
    steps: tuple[int, int] = (1, 99)  # of the worked solution, from and to; of a singular matrix any


LEVELS = {
    "matrix-inverse": [
        Level(2, 2, 20, True, 20, 1600, (1, 3)), Level(2, 2, 20, True, 20, 1600, (4, 4)),
        Level(2, 2, 20, True, 20, 1600, (5, 5)), Level(2, 2, 20, True, 20, 1600, (6, 9)),
        Level(2, 2, 9, False, 100, 200), Level(3, 3, 3, True, 9, 80), Level(3, 3, 5, False, 200, 500),
        Level(4, 4, 3, True, 20, 200)],
    "rref": [
        Level(2, 3, 9, True, 9, steps=(1, 2)), Level(2, 3, 9, True, 9, steps=(3, 3)),
        Level(2, 3, 9, True, 9, steps=(4, 9)), Level(2, 3, 9, False, 200), Level(3, 4, 9, True, 9),
        Level(3, 4, 5, False, 200), Level(4, 5, 4, False, 500)]}


def inverse_problem(rng, level, singular_share=SINGULAR_SHARE):
    """A square matrix to invert; of `singular_share` of them the answer is that there is no inverse."""
    criteria = LEVELS["matrix-inverse"][level - 1]
    n, singular = criteria.rows, rng.random() < singular_share
    while True:
        A = _unimodular(rng, criteria) if criteria.whole and not singular else _draw(rng, criteria)
        if singular:  # a row that the others make
            i, *others = rng.sample(range(n), n)
            factors = [Fraction(rng.choice((-3, -2, -1, 1, 2, 3)), rng.choice((1, 2, 3))) for _ in others]
            A[i] = [sum(f * A[j][column] for f, j in zip(factors, others)) for column in range(n)]
            if all(abs(x) <= criteria.entry and x.denominator == 1 for x in A[i]) and all(map(any, A)):
                break
            continue
        solved, steps = row_reduce([row + unit for row, unit in zip(A, identity(n))], columns=n)
        inverse = [row[n:] for row in solved]
        if [row[:n] for row in solved] == identity(n) and _fits(inverse, criteria, steps) and (
                _norm(A) * _norm(inverse) <= criteria.condition):
            break
    solved, steps = row_reduce([row + unit for row, unit in zip(A, identity(n))], columns=n)
    answer = SINGULAR if singular else text([row[n:] for row in solved])
    prompt = f"Invert the matrix {text(A)}, or answer: {SINGULAR}."
    return _problem("matrix-inverse", prompt, A, steps, answer)


def rref_problem(rng, level):
    """A matrix with more columns than rows, of any rank above 0, to reduce."""
    criteria = LEVELS["rref"][level - 1]
    while True:
        full_rank = rng.random() > 0.2
        if criteria.whole:  # drawn from its answer, or those with a column of zeros would be many
            A = _from_reduced(rng, criteria, criteria.rows - (not full_rank))
        else:
            A = _draw(rng, criteria)
            A[-1] = A[-1] if full_rank else [rng.choice((-1, 1)) * x for x in A[0]]
        solved, steps = row_reduce(A)
        if _fits(solved, criteria, steps) and _fits(A, replace(criteria, largest=criteria.entry), steps):
            break
    prompt = f"Bring the matrix {text(A)} to reduced row echelon form."
    return _problem("rref", prompt, A, steps, text(solved))


def _draw(rng, criteria):
    return [[Fraction(rng.randint(-criteria.entry, criteria.entry)) for _ in range(criteria.columns)]
            for _ in range(criteria.rows)]


def _unimodular(rng, criteria):
    """A random walk by row operations from a signed permutation: its determinant stays 1 or -1."""
    n = criteria.rows
    A = rng.sample([[rng.choice((-1, 1)) * int(x) for x in row] for row in identity(n)], n)
    for _ in range(rng.randint(1, 4 * n * n)):
        (i, j), factor = rng.sample(range(n), 2), rng.choice((-1, 1)) * int(criteria.entry ** rng.random())
        row = [x + factor * y for x, y in zip(A[i], A[j])]
        A[i] = row if max(row) <= criteria.entry and min(row) >= -criteria.entry else A[i]
    return [list(map(Fraction, row)) for row in A]


def _from_reduced(rng, criteria, rank):
    """A matrix that reduces to a drawn one of whole entries, its last column free."""
    pivots = sorted(rng.sample(range(criteria.columns - 1), rank))
    R = [[Fraction(0)] * criteria.columns for _ in range(criteria.rows)]
    for i, pivot in enumerate(pivots):
        for j in range(pivot, criteria.columns):
            drawn = rng.randint(-criteria.largest, criteria.largest)
            R[i][j] = Fraction(int(j == pivot) if j in pivots else drawn)
    M = _unimodular(rng, replace(criteria, entry=2))
    return [[sum(m * row[j] for m, row in zip(of_row, R)) for j in range(criteria.columns)] for of_row in M]


def _fits(answer, criteria, steps):
    fewest, most = criteria.steps
    entries = [x for row in answer for x in row]
    return fewest <= len(steps) <= most and all(
        max(abs(x.numerator), x.denominator) <= criteria.largest for x in entries) and (
        not criteria.whole or all(x.denominator == 1 for x in entries))


def _norm(matrix):
    return max(sum(map(abs, row)) for row in matrix)


def _problem(task, prompt, A, steps, answer):
    working = "\n".join(steps) or "nothing to do"
    meta = {"matrix": [[int(x) for x in row] for row in A]}
    return dict(prompt=prompt, answer=answer, task=task, meta=meta,
                completion=f"<think>{working}</think><answer>{answer}</answer>")


def is_whole(matrix) -> bool:
    """Whether it is a list of equally long lists of int."""
    return bool(isinstance(matrix, list) and matrix and all(isinstance(row, list) and row for row in matrix)
                and len(set(map(len, matrix))) == 1 and all(type(x) is int for row in matrix for x in row))


def identity(n):
    return [[Fraction(int(i == j)) for j in range(n)] for i in range(n)]


def row_reduce(matrix, columns=None):
    """(the reduced row echelon form, the steps to it as text), by Gauss-Jordan over the first `columns`.

    A step is "R1<->R2", "R2/3=[...]" or "R2-3*R1=[...]", with the row as it is then. Whole numbers stay whole
    as long as they can: the pivot is the greatest common divisor of its column, found by Euclid's steps.
    """
    rows, steps, top = [[Fraction(x) for x in row] for row in matrix], [], 0

    def subtract(factor, source, i):
        rows[i] = [x - factor * y for x, y in zip(rows[i], rows[source])]
        times = "" if abs(factor) == 1 else f"{abs(factor)}*"
        steps.append(f"R{i + 1}{'-' if factor > 0 else '+'}{times}R{source + 1}={text(rows[i])}")

    for column in range(columns or len(rows[0])):
        while below := [i for i in range(top, len(rows)) if rows[i][column]]:
            best = min(below, key=lambda i: (abs(rows[i][column]), i))
            pivot = rows[best][column]
            uneven = [i for i in below if (rows[i][column] / pivot).denominator > 1]
            if not uneven or any(rows[i][column].denominator > 1 for i in below):
                break
            for i in uneven:
                subtract(Fraction(round(rows[i][column] / pivot)), best, i)
        if not below:
            continue
        if best != top:
            rows[top], rows[best] = rows[best], rows[top]
            steps.append(f"R{top + 1}<->R{best + 1}")
        if pivot != 1:
            rows[top] = [x / pivot for x in rows[top]]
            steps.append(f"R{top + 1}/{pivot if pivot > 0 and pivot.denominator == 1 else f'({pivot})'}"
                         f"={text(rows[top])}")
        for i in range(len(rows)):
            if i != top and rows[i][column]:
                subtract(rows[i][column], top, i)
        top += 1
        if top == len(rows):
            break
    return rows, steps


def text(value) -> str:
    """[[1/2,0],[0,1]], without spaces; of a row or a number alike."""
    return f"[{','.join(map(text, value))}]" if isinstance(value, list) else str(value)


# ---- Answers

_NUMBER = r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:/\d{1,40})?"
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: "-"}  # of full width; a minus
_LATEX = re.compile(r"\\begin\{([bpvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end\{\1\}", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([+-]?\d{1,40})\s*\}\s*\{\s*([+-]?\d{1,40})\s*\}")


def parse(written: str):
    """The matrix that is written, else None: rows in brackets, a LaTeX matrix, or a row a line.

    Entries are whole numbers, decimals and fractions, all exact. Nothing else may stand there, but dollar
    signs and a name in front ("A^{-1} = "). None, too, for unequal rows and more than 4,000 characters.
    """
    written = written[:4001].translate(_ASCII)
    if len(written) > 4000 or not written.isascii():
        return None
    written = re.sub(r"^[A-Z]\s?(?:\^\{?-1\}?)?\s?=", "", written.strip().strip("$").strip()).strip()
    written = _FRACTION.sub(lambda m: f"{m[1]}/{m[2]}", written)
    if latex := _LATEX.fullmatch(re.sub(r"\\left\s?[\[(]|\\right\s?[\])]", "", written).strip()):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?", latex[2]) if row.strip()]
    elif written.startswith("["):
        compact = re.sub(r"\s+", "", written)
        if not re.fullmatch(rf"\[(?:\[{_NUMBER}(?:,{_NUMBER})*\],?)+(?<!,)\]", compact):
            return None
        rows = [row.split(",") for row in re.findall(r"\[([^\[\]]+)\]", compact)]
    else:
        lines = [line.strip() for line in re.split(r"[;\n]", written) if line.strip()]
        rows = [re.split(r"\s*[,&]\s*|\s+", line) for line in lines]
    try:
        matrix = [[_number(entry.strip()) for entry in row] for row in rows]
    except (ValueError, ZeroDivisionError):
        return None
    return matrix if matrix and len({len(row) for row in matrix}) == 1 else None


def _number(entry):
    if not re.fullmatch(_NUMBER, entry):
        raise ValueError(entry)
    number, _, below = entry.partition("/")
    return Fraction(number) / Fraction(below or 1)


def says_singular(written: str) -> bool:
    """"not invertible", "singular", "no inverse", as the whole answer."""
    return bool(re.fullmatch(r"(?i)(?:(?:the|this) matrix |it |[A-Z] )?(?:is )?"
                             r"(?:not invertible|singular|non-?invertible|(?:there is |has )?no inverse)\.?",
                             written.strip()))


def right_rows(task, written, matrix) -> list[bool]:
    """Which parts of an answer to `matrix` are right; [] where it is no answer of the right shape.

    matrix-inverse: column j of X, where A x_j is column j of the identity; of a singular matrix the one part
    is that it says so. rref: the rows of the one reduced row echelon form.
    """
    A = [[Fraction(x) for x in row] for row in matrix]
    if task == "rref":
        given, (gold, _) = parse(written), row_reduce(A)
        shaped = given and (len(given), len(given[0])) == (len(gold), len(gold[0]))
        return [row == right for row, right in zip(given, gold)] if shaped else []
    n = len(A)
    if [row[:n] for row in row_reduce(A)[0]] != identity(n):
        return [says_singular(written)]
    X = parse(written)
    if not X or len(X) != n or len(X[0]) != n:
        return []
    return [all(sum(a * X[k][j] for k, a in enumerate(row)) == int(i == j) for i, row in enumerate(A))
            for j in range(n)]


def credit(task, written, matrix) -> float:
    """1 for a right answer; for a part of it, half the square of the share of right columns or rows.

    Rows of zeros, and rows that hold a pivot alone, are no part: they would be worth guessing.
    """
    right = right_rows(task, written, matrix)
    if not right or all(right):
        return float(bool(right))
    if task == "rref":
        gold, _ = row_reduce([[Fraction(x) for x in row] for row in matrix])
        right = [ok for ok, row in zip(right, gold) if sum(map(bool, row)) > 1]
    return 0.5 * (sum(right) / len(right)) ** 2 if right else 0.0
