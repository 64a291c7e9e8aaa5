"""What a response is worth: answer extraction, exact comparison, and reward functions to weigh and add up.

A reward is a plain function `(prompts, responses, answers) -> list of numbers`, called once per batch. Yours
goes into any file and is named with its weight, `path/my_rewards.py:brevity=0.5`:

    def brevity(prompts, responses, answers):
        return [1.0 if len(response) < 400 else 0.0 for response in responses]

It may name any of the columns `tasks`, `metas`, `ids` as further parameters. It runs in a process of its own,
which can be killed: a function that raises or hangs costs the rows it fails on (reward NaN), not the run. The
built-in rewards never evaluate model text, take time linear in its length, and run in this process but for
`math`.
"""

import ast
import atexit
import faulthandler
import importlib.util
import inspect
import json
import operator
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite, isnan, nan
from pathlib import Path

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LOAD_TIMEOUT_S = 120.0  # for importing a user's reward file, which may import torch

# ------------------------------------------------------------------------------------------------------------
# Comparing answers: as exact fractions where both are numbers, never as floats.

# Dressing without meaning, removed in this order: typography, LaTeX markup, currency, a leading "x =".
_DRESSING = (
    (r"[\u2212\u2013]", "-"),
    (r"[\u00a0\u2009\u202f]|(?<!\\)\\ |~", " "),
    (r"\*\*|`|\\(?:left|right|displaystyle|[Bb]igg?)(?![A-Za-z])|(?<!\\)\\[()\[\]]", ""),
    (r"(?<!\\)\\[!,;:]\s*|\\q?quad(?![A-Za-z])", ""),
    (r"\{,\}", ","),
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))", r"\\frac{\1\2}{\3\4}"),
    (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1"),
    (r"\^ ?\{? ?\\circ ?\}?|°", " "),
    (r"\\?[$%]|[£€₹¥]", ""),
    (r"^\s*(?:[A-Za-z][A-Za-z ]{0,30}(?:_\{?\w\}?)?(?:\([a-z]\))?\s*=|[a-z]\s*\\in(?![A-Za-z]))", ""),
)


def _undress(text):
    text = _last_boxed(text) or text
    for pattern, replacement in _DRESSING:
        text = re.sub(pattern, replacement, text)
    text = text.strip(" \t\r\n*")
    return text[:-1].rstrip() if text.endswith((".", ",", ";")) else text


_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"  # 1080, 1,080 or 1 080, but not 1,08
_PLAIN = rf"{_WHOLE}(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{{1,2}})?|\.[0-9]+"
_NUMBER = re.compile(rf"([-+]?)(?:([0-9]+) +(?=[0-9]+/))?({_PLAIN})(?:\s*/\s*({_PLAIN}))?(.*)")
# Words may follow as a unit ("5 per day", "15 cm^2"), but no variable ("6ab", "5 x") and no "million".
_UNIT = re.compile(
    r"(?:\s*(?:kg|km|cm|mm|ft|lbs?|oz|m[lL]|mph|hrs?|mins?|secs?|[AaPp][Mm])\b|\s+(?:[A-Za-z]{3,}|of\b|[mgLhs]\b))"
    r"(?:[\s/-]+[A-Za-z]+\.?){0,6}\s*(?:\^?\{?[23²³]\}?)?"
)
_NOT_A_UNIT = re.compile(
    r"(?i)\b(?:and|or|plus|minus|times|not|but|hundred|thousand|[mbtr]+illion|dozen|half|halves|thirds?|"
    r"sin|cos|tan|log)\b"
)


def normalize_number(text: str) -> Fraction | None:
    """The number that `text` states and nothing else, exactly; None where it states none, or several.

    Currency, percent and degree signs, thousands separators, LaTeX and bold dressing, "x =" before and units
    behind are dropped: "$1,080.00", "\\boxed{1080}" and "1080 clips" are all 1080, and "50%" is 50.
    """
    if len(text) > 200:
        return None
    text = re.sub(r"\s*\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", _undress(text)).strip()
    text = re.sub(r"^([-+]) (?=[0-9]+/)", r"\1", text)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, numerator, denominator, units = match.groups()
    if units.strip() and (not _UNIT.fullmatch(units) or _NOT_A_UNIT.search(units)):
        return None
    value = Fraction(re.sub("[, ]", "", numerator))
    if denominator is not None:
        divisor = Fraction(re.sub("[, ]", "", denominator))
        if divisor == 0:
            return None
        value /= divisor
    value += int(whole or 0)
    return -value if sign == "-" else value


_SPELLINGS = {"\\leq": "\\le", "\\geq": "\\ge", "\\neq": "\\ne", "π": "\\pi", "∞": "\\infty", "\\cdot": "*"}


def _plain_text(text):
    if len(text) > 1000:  # no final answer; and the patterns need not be fast on it
        return text.strip()
    text = _undress(text)
    for old, new in _SPELLINGS.items():
        text = text.replace(old, new)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"\s+", "", text))
    text = re.sub(r"\\frac\{(-?\w+)\}\{(\w+)\}", r"\1/\2", text)
    text = re.sub(r"^\((\w)\)$", r"\1", text)  # the choice "(C)"
    return text.casefold() if text.isalpha() and len(text) > 2 else text


def same_answer(given: str, gold: str) -> bool:
    """Whether two final answers are equal, as exact numbers where both are numbers, else as normalised text.

    LaTeX that only looks different is equal; an empty gold answer equals nothing; "x+1" and "1+x" differ: the
    reward `math` does algebra, this function does not.
    """
    number, gold_number = normalize_number(given), normalize_number(gold)
    if number is not None and gold_number is not None:
        return number == gold_number
    text, gold_text = _plain_text(given), _plain_text(gold)
    return text == gold_text != ""


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def safe_arithmetic(expr: str) -> Fraction | None:
    """Exact value of an expression of non-negative integers, + - * / and parentheses; None for anything else.

    Nothing is evaluated by Python: the syntax tree is walked, and powers, floor division, names, calls, other
    number forms, a division by zero, and more than 200 characters or 12 digits in a number all give None.
    """
    expr = expr.strip(" \n")
    if not re.fullmatch(r"[0-9+\-*/() ]{1,200}", expr) or re.search(r"[0-9]{13}", expr):
        return None

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not arithmetic")

    try:
        return value(ast.parse(expr, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


# ------------------------------------------------------------------------------------------------------------
# Extraction. Only explicit marks count: taking the last number of the text would reward echoing the question.

# "the answer is", "Final Answer:", "**Answer**:", "the answer to the question is", then the rest of its line
_STATED = re.compile(
    r"(?i)\banswer(?: (?:to|for|of) [^\n.?!:=]{1,80}?)?[ *_]{0,8}"
    r"(?:\b(?:is|will be)\b(?: therefore| thus)?|[:=])[\s*_:]{0,8}(?=([^\n]{1,300}))"
)
_SENTENCE_END = re.compile(r"[.;!?](?=\s|$)|,? (?:because|since|so|which|as|where)\b")
_MATH_SPAN = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_HASHES = re.compile(r"#### *([^\n]{1,200})")
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*")


def _last_boxed(text):
    """Content of the last balanced, non-empty \\boxed{...}, in one pass over the braces."""
    if "boxed" not in text:
        return None
    opened, last = [], None  # opened: start of the content for a box, -1 for any other brace
    for match in re.finditer(r"\\f?boxed\s{0,4}\{|\\[{}]|[{}]", text):
        if match[0] == "{":
            opened.append(-1)
        elif match[0].endswith("{") and "box" in match[0]:
            opened.append(match.end())
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start >= 0 and text[start : match.start()].strip():
                last = text[start : match.start()].strip()
    return last


def _marked(text):
    """Content of the last non-empty <answer>...</answer>, else of the last box."""
    end = text.rfind("</answer>")
    while end >= 0 and (start := text.rfind("<answer>", 0, end)) >= 0:
        inner = text[start + len("<answer>") : end].strip()
        if inner:  # "<answer>The answer is \boxed{5}.</answer>" happens
            return _last_boxed(inner) or _stated(inner) or inner
        end = text.rfind("</answer>", 0, start)
    return _last_boxed(text)


def _after_thinking(text):
    """What follows the last </think>; nothing where thinking never ended; all of it where there was none."""
    _, closed, tail = text.rpartition("</think>")
    return tail if closed or "<think>" not in text else ""


def _stated(text):
    """x of the last "the answer is x" or "Answer: x"."""
    value = None
    for match in _STATED.finditer(text):
        value = match[1].strip()
    if value is None:
        return None
    span = _MATH_SPAN.match(value)
    if span:
        return span[span.lastindex].strip()
    return _SENTENCE_END.split(value, maxsplit=1)[0].strip(" *_`\"'") or None


def _last_line(text):
    return text.rstrip()[-400:].rpartition("\n")[2].strip()


def _last_line_number(text):
    """A last line that is a number, holds one bold number, or is a short equation ending in "= number"."""
    line = _last_line(text)
    bold = _BOLD.findall(line)
    candidates = [line.rpartition("=")[2]] if "=" in line and len(line) <= 120 else []
    candidates += (bold if len(bold) == 1 else []) + [line]
    return next((value.strip() for value in candidates if normalize_number(value) is not None), None)


def extract_answer(text: str, choices: bool = False) -> str | None:
    """The final answer a response states by an explicit mark, as it is written; None where there is none.

    In this order: the last <answer>...</answer>, the last balanced \\boxed{...}, the last "#### x", the last
    "the answer is x" or "Answer: x", a last line that is a number, has one bold number or ends in "= number".
    What follows </think> is searched first; inside the thinking only the tag and the box count.
    choices=True: the answer is a letter A to E (`extract_choice`).
    """
    if choices:
        return extract_choice(text)
    tail = _after_thinking(text)
    if marked := _marked(tail):
        return marked
    hashes = [value for value in _HASHES.findall(tail) if normalize_number(value) is not None]  # no headings
    unmarked = hashes[-1].strip() if hashes else _stated(tail) or _last_line_number(tail)
    return unmarked or _marked(text)


_LETTER = r"[\s*_(\[$\"'`]{0,6}([A-E])(?![A-Za-z0-9'\u2019])(?!\s*(?:,|/|or\b|and\b)\s*\(?[A-E]\b)"
_LINK_WORD = r"\b(?i:is|be|will|would|must|therefore|thus|the|correct|option|choice|letter)\b"
_LINK = rf"(?:[ *_]{{0,4}}(?:[:=,-]|{_LINK_WORD})){{0,5}}"
_CHOICE_FORMS = (  # the first form found counts, and of that form the last
    re.compile(rf"\b(?i:ans(?:wer)?)\b(?: (?i:to|for) [^\n.?!:=]{{1,80}}?)?{_LINK}{_LETTER}"),
    re.compile(rf"\b(?i:option|choice)\b{_LINK}{_LETTER}(?![\s*)\]]{{1,4}}(?:is (?:not|in|wrong)|can))"),
    re.compile(r"\b([A-E])[)\]*]{0,4} (?:is|must be) (?:the )?(?:correct|right|true|best|answer)\b"),
)
_LETTERED = re.compile(r"(?m)^[ \t*_(\[$]{0,6}([A-E])[)\].:]")


def extract_choice(text: str) -> str | None:
    """The letter "A" to "E" that a response settles on, None where it settles on none.

    Marks as in `extract_answer`, then "the answer is (B)", "option B", "B is correct", then a last line that
    is a letter alone, or "B) 65" where no line starts with another letter (that would be a list of options).
    """
    tail = _after_thinking(text)
    marked = _marked(tail)
    if marked is None:
        found = next((found for form in _CHOICE_FORMS if (found := form.findall(tail))), None)
        if found:
            return found[-1]
        line = _last_line(tail)
        match = re.fullmatch(r"[*_(\[$]{0,4}([A-E])[*_)\].$:]{0,4}", line)
        if match or (_LETTERED.match(line) and len(set(_LETTERED.findall(tail))) == 1):
            return match[1] if match else _LETTERED.match(line)[1]
        marked = _marked(text)
    if marked is None:
        return None
    marked = _undress(marked[:300])
    match = re.match(rf"(?i:option |choice )?{_LETTER}", marked[0].upper() if len(marked) == 1 else marked)
    found = match or next((match for form in _CHOICE_FORMS if (match := form.search(marked))), None)
    return found[1] if found else None


# ------------------------------------------------------------------------------------------------------------
# The built-in rewards, each 0 to 1 per row.


def _uses_numbers(expression, numbers):
    """Whether every number in the expression is one of `numbers`, each used at most once."""
    used = Counter(int(digits) for digits in re.findall(r"[0-9]+", expression))
    return not used - Counter(numbers)


def correctness(prompts, responses, answers, tasks=None, metas=None, **columns) -> list[float]:
    """1 where the extracted answer equals the gold answer, else 0.

    `tasks` picks the check: "choice" compares letters; "countdown" wants an expression over
    `metas[i]["numbers"]`, each used at most once, worth the gold answer; all others use `same_answer`.
    """
    rewards = []
    for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
        task = tasks[i] if tasks else "math"
        given = extract_answer(response, choices=task == "choice")
        if given is None:
            right = False
        elif task == "countdown":
            value = safe_arithmetic(given)
            right = value is not None and value == int(answer) and _uses_numbers(given, metas[i]["numbers"])
        else:
            right = same_answer(given, answer)
        rewards.append(float(right))
    return rewards


def format(prompts, responses, answers, **columns) -> list[float]:
    """1 for exactly "<think>...</think><answer>...</answer>", 0.5 with text before, between or after, else 0.

    All four tags must stand exactly once, in order, and hold something: an empty answer earns 0. Where a chat
    template already opens <think>, pass the response with it.
    """
    rewards, tags = [], "|".join(TAGS)
    for response in responses:
        if re.findall(tags, response) != list(TAGS):
            rewards.append(0.0)
            continue
        before, thought, between, answer, after = (piece.strip() for piece in re.split(tags, response))
        filled, outside = thought and answer, before or between or after
        rewards.append(0.0 if not filled else 0.5 if outside else 1.0)
    return rewards


def digit(prompts, responses, answers, **columns) -> list[float]:
    """1 where the extracted answer is a number, right or wrong."""
    extracted = [extract_answer(response) for response in responses]
    return [float(given is not None and normalize_number(given) is not None) for given in extracted]


def mark(prompts, responses, answers, **columns) -> list[float]:
    """A quarter for each of <think> </think> <answer> </answer> that stands exactly once."""
    return [sum(response.count(tag) == 1 for tag in TAGS) / len(TAGS) for response in responses]


def math(prompts, responses, answers, **columns) -> list[float]:
    """1 where the extracted answer equals the gold answer, by `same_answer` or by math_verify."""
    import math_verify

    rewards = []
    for response, answer in zip(responses, answers, strict=True):
        given = extract_answer(response)
        right = given is not None and same_answer(given, answer)
        if given is not None and not right and len(given) <= 1000:
            parsed, gold = (math_verify.parse(f"\\boxed{{{text}}}") for text in (given, answer))
            right = bool(parsed and gold) and math_verify.verify(gold, parsed)
        rewards.append(float(right))
    return rewards


BUILT_IN = {function.__name__: function for function in (correctness, format, digit, mark, math)}

# ------------------------------------------------------------------------------------------------------------
# Weighing and adding up.


@dataclass(frozen=True)
class RewardFunction:
    """A weighted reward: function(prompts, responses, answers, columns, timeout_s) -> (values, error)."""

    name: str
    weight: float
    function: Callable


def parse_rewards(specs: list[str]) -> list[RewardFunction]:
    """Reward functions from "name", "name=weight" or "path/file.py:name=weight" (weight 1 unless given).

    A file is imported here, in its own process, so that its mistakes end the run before anything expensive.
    Errors: ValueError for an unknown name, a missing file or function, a bad weight, a name used twice.
    """
    parsed = []
    for spec in specs:
        target, equals, weight = spec.rpartition("=")
        target = target if equals else spec
        try:
            weight = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"the weight of reward {spec!r} is not a number: write it as name=0.5") from None
        if not isfinite(weight):
            raise ValueError(f"the weight of reward {spec!r} is not finite")
        path, colon, name = target.rpartition(":")
        if any(name == other.name for other in parsed):
            raise ValueError(f"two rewards are named {name!r}: each needs a name of its own")
        if not colon and name not in BUILT_IN:
            known = ", ".join(BUILT_IN)
            raise ValueError(f"unknown reward {name!r}: take {known} or path/file.py:function")
        if colon and not Path(path).is_file():
            raise ValueError(f"reward {spec!r}: no file {path!r} (write path/file.py:function=weight)")
        if not colon and name == "math" and importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward 'math' needs the package math_verify: pip install math-verify")
        if colon or name == "math":
            function = _Worker(str(Path(path).resolve()) if colon else "", name)
        else:
            function = _in_process(BUILT_IN[name])
        parsed.append(RewardFunction(name, weight, function))
    return parsed


def _in_process(function):
    def call(prompts, responses, answers, columns, timeout_s):
        return function(prompts, responses, answers, **columns), ""

    return call


def score(reward_functions, prompts, responses, answers, columns=None, timeout_s: float = 30.0) -> dict:
    """Every reward of every row, and their weighted total.

    columns: dict of further per-row lists ("tasks", "metas", "ids"); timeout_s: seconds for one call.
    Returns {"rewards": {name: raw values}, "total": sums of weight * raw, "correct": 0/1 by `correctness`,
    "failed": number of rows whose total is NaN, "error": one line on the first failure, or ""}.
    A row is NaN in a column that failed on it, and in the total unless that column weighs 0: leave it out.
    """
    columns = columns or {}
    for name, values in {"responses": responses, "answers": answers, **columns}.items():
        if len(values) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(values)} {name}")
    rewards, error = {}, ""
    for reward in reward_functions:
        rewards[reward.name], problem = reward.function(prompts, responses, answers, columns, timeout_s)
        error = error or (problem and f"reward {reward.name!r}: {problem}")
    weighted = [[r.weight * value for value in rewards[r.name]] for r in reward_functions if r.weight != 0]
    total = [float(sum(row)) for row in zip(*weighted, strict=True)] if weighted else [0.0] * len(prompts)
    correct = correctness(prompts, responses, answers, **columns)  # the reward of this name may be a user's
    failed = sum(isnan(value) for value in total)
    return {"rewards": rewards, "total": total, "correct": correct, "failed": failed, "error": error}


# ------------------------------------------------------------------------------------------------------------
# Other people's functions, in a process that can be killed. No fork (CUDA, threads), no pickle, no signal
# handlers: JSON lines over pipes. The process lives as long as the run, and ends when its stdin closes.

_START = "import sys; sys.path.insert(0, sys.argv[1]); from common.rewards import _serve; _serve()"


class _Worker:
    """One reward function in a process of its own, started at once and again after it had to be killed."""

    def __init__(self, path, name):
        self.path, self.name, self.process = path, name, None
        self.lock = threading.Lock()
        atexit.register(self.kill)
        error = self.start()
        if error:
            raise ValueError(f"reward {path + ':' if path else ''}{name}: {error}")

    def start(self):
        root = str(Path(__file__).resolve().parents[1])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        # A session of its own: Ctrl-C reaches the run alone, which needs its rewards to finish the step.
        self.process = subprocess.Popen([sys.executable, "-c", _START, root], start_new_session=True, **pipes)
        error = self.ask({"path": self.path, "name": self.name}, LOAD_TIMEOUT_S).get("error", "")
        if error:
            self.kill()
        return error

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it started
            self.process.wait()

    def ask(self, request, timeout_s):
        """The worker's reply, or {"error": ...} with the process killed where it did not reply in time."""
        late = threading.Event()
        timer = threading.Timer(timeout_s, lambda: (late.set(), self.kill()))
        timer.start()
        reply = ""
        try:
            self.process.stdin.write(json.dumps({**request, "timeout_s": timeout_s}) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            pass  # it died: reported below
        except BaseException:  # Ctrl-C: the reply on its way must not be read as the next call's
            self.kill()
            raise
        finally:
            timer.cancel()
            timer.join()  # from here on it cannot kill the process any more
        if reply.endswith("\n") and not late.is_set():
            return json.loads(reply)
        self.kill()
        code = self.process.wait()
        with suppress(BrokenPipeError):  # bytes it did not take
            self.process.stdin.close()
        self.process.stdout.close()
        ended = f"its process ended with code {code}"
        return {"error": f"no result within {timeout_s:g} s" if late.is_set() else ended}

    def call(self, prompts, responses, answers, columns, timeout_s):
        if self.process.poll() is not None:
            error = self.start()
            if error:
                return {"error": error}
        arguments = {"prompts": prompts, "responses": responses, "answers": answers, "columns": columns}
        return self.ask(arguments, timeout_s)

    def __call__(self, prompts, responses, answers, columns, timeout_s):
        """One call for the batch; where that fails, one call per row, so that only the rows at fault are NaN.

        Takes at most about three times timeout_s, however many rows hang.
        """
        with self.lock:
            reply = self.call(prompts, responses, answers, columns, timeout_s)
            error = reply.get("error", "")
            if "values" in reply:
                return [nan if value is None else value for value in reply["values"]], error
            rows, values = len(prompts), []
            row_timeout_s = min(timeout_s, max(1.0, timeout_s / max(rows, 1)))
            deadline = time.monotonic() + 2 * timeout_s
            for i in range(rows):
                if rows == 1 or time.monotonic() > deadline:
                    values.append(nan)
                    continue
                row = {name: [column[i]] for name, column in columns.items()}
                reply = self.call([prompts[i]], [responses[i]], [answers[i]], row, row_timeout_s)
                value = reply.get("values", [None])[0]
                values.append(nan if value is None else value)
            return values, error


def _as_reward(value):
    """A finite float, or None (JSON has no NaN) for whatever is not one."""
    try:
        value = None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if value is not None and isfinite(value) else None


def _load(path, name):
    if not path:
        return BUILT_IN[name]
    sys.path.insert(0, str(Path(path).parent))  # a reward may import its neighbours
    spec = importlib.util.spec_from_file_location("_reward_" + Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"the file has no function {name!r}")
    inspect.signature(function).bind_partial([], [], [])  # TypeError where it cannot take the three lists
    return function


def _call(function, request):
    """The reply to one batch: {"values": floats, None where a value is no finite number} or an exception."""
    columns, parameters = request["columns"], inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        columns = {name: column for name, column in columns.items() if name in parameters}
    raw = list(function(request["prompts"], request["responses"], request["answers"], **columns))
    if len(raw) != len(request["prompts"]):
        raise ValueError(f"{len(raw)} values for {len(request['prompts'])} rows")
    values = [_as_reward(value) for value in raw]
    if None not in values:
        return {"values": values}
    row = values.index(None)
    return {"values": values, "error": f"row {row} of the batch: {raw[row]!r:.80} is not a finite number"}


def _one_line(error, path):
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    place = f" ({Path(path).name}, line {lines[-1]})" if lines else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300] + place


def _serve():
    """The worker: read a request, call the function, reply. The first request names the function to load."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints goes to stderr, not among the replies
    sys.stdout = sys.stderr
    inbox = queue.SimpleQueue()

    def read():
        for line in requests:
            inbox.put(json.loads(line))
        os._exit(0)  # the run has ended, whatever the function is doing

    threading.Thread(target=read, daemon=True).start()
    function = path = None
    while True:
        request = inbox.get()
        # If the run is killed while the function holds the interpreter's lock, read() cannot end us.
        faulthandler.dump_traceback_later(request["timeout_s"] + 10, exit=True)
        try:
            if function is None:
                path = request["path"]
                function, reply = _load(path, request["name"]), {}
            else:
                reply = _call(function, request)
        except Exception as error:
            reply = {"error": _one_line(error, path)}
        faulthandler.cancel_dump_traceback_later()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
