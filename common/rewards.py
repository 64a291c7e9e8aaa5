"""What a response is worth: answer extraction, exact comparison, and reward functions to weigh and add up.

A reward is a plain function `(prompts, responses, answers) -> list of numbers`, called once per batch. Yours
goes into any file and is named with its weight, `path/my_rewards.py:brevity=0.5`:

    def brevity(prompts, responses, answers):
        return [1.0 if len(response) < 400 else 0.0 for response in responses]

It may name any of the columns `tasks`, `metas`, `ids`, `finished` as further parameters. It runs in a process
of its own: where it raises or hangs, that costs the rows at fault (reward NaN), not the run. The built-in
rewards never evaluate model text and take time linear in its length. `model:runs/rm` is a model of
reward_model.py, and `answer-prob` the probability that the policy itself gives to the gold answer after its
rationale.
"""

import ast
import atexit
import faulthandler
import importlib.util
import inspect
import json
import operator
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb, exp, isfinite, isnan, log, nan
from pathlib import Path

from common import matrices
from common.steps import LONGEST, true_equations, true_row_operations

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and signs that look like nothing
LOAD_TIMEOUT_S = 120.0  # for importing a user's reward file (and torch, perhaps); no call's time includes it

# ---- Comparing answers: as exact fractions where both are numbers, never as floats (docs/answers.md).

# Dressing without meaning and second spellings, replaced in this order; the last is a leading "x =".
_DRESSING = (
    (r"[\u2212\u2013]", "-"),
    (r"\{,\}|,\s*\\!\s*", ","),
    (r"(?:°|\^ ?\{? ?\\circ ?\}?) ?(?:(C)|F)(?![A-Za-z])",
     lambda match: " degrees " + ("Celsius" if match[1] else "Fahrenheit")),
    (r"[\u00a0\u2009\u202f~°`]|(?<!\\)\\[ ,;:!]|\^ ?\{? ?\\circ ?\}?", " "),
    (r"\\(?:left|right|displaystyle|[Bb]igg?|q?quad)(?![A-Za-z])", " "),
    (r"\\approx(?![A-Za-z])", "="),
    # not between digits: 7**2, 7$2, 7%2 and 7\(2\) are not 72
    *((rf"{edge[0]}(?:\*\*|(?<!\\)\\[()\[\]]|\\?[$%]|[£€₹¥]){edge[1]}", "")
      for edge in (("", "(?![0-9])"), ("(?<![0-9])", ""))),
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))", r"\\frac{\1\2}{\3\4}"),
    (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
    (r"\\([lgn]e)q(?![A-Za-z])", r"\\\1"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1"),
    (r"^\s*(?:[A-Za-z][A-Za-z ]{0,30}(?:_\w)?(?:\([a-z]\))?\s*=|[a-z]\s*\\in(?![A-Za-z]))", ""),
)
_SIGNS = {"√": r"\sqrt ", "π": r"\pi", "×": r"\times ", "٫": ".", "٬": ",", "：": ":", "＝": "=", "≈": "="}


def _in_ascii(text):
    """½ as 1/2, x² as x^{2}, √ as \\sqrt, and the digits of all scripts as 0 to 9."""
    def plain(c):
        if unicodedata.decomposition(c).startswith("<fraction>"):
            return " " + unicodedata.normalize("NFKC", c).replace("\u2044", "/")
        if unicodedata.category(c) == "Cf":  # zero-width and direction marks
            return ""
        return str(unicodedata.digit(c)) if unicodedata.category(c) == "Nd" else _SIGNS.get(c, c)

    if text.isascii():
        return text
    raised = re.sub("([⁰¹²³⁴-⁹⁻]+)|[₀-₉]+",
                    lambda m: f"{'^' if m[1] else '_'}{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    return "".join(map(plain, raised))


def _undress(text):
    text = _in_ascii(text)
    text = last_boxed(text) or text
    for pattern, replacement in _DRESSING:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"[.,;]$", "", text.strip(" \t\r\n*")).rstrip()


_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"  # 1080, 1,080 or 1 080, but not 1,08
_PLAIN = rf"{_WHOLE}(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{{1,2}})?|\.[0-9]+"
_SCALE = {"dozen": 12, "hundred": 100} | {
    name: 1000**i for i, name in enumerate(("thousand", "million", "billion", "trillion"), 1)}
_NUMBER = re.compile(
    rf"((?:[-+] ?|[Mm]inus |[Nn]egative )?)(?:([0-9]+) +(?=[0-9]+/))?({_PLAIN})(?:\s*/\s*({_PLAIN}))?"
    r"(?:\^\{?([0-9]{1,3})\}?|\s*(?:\\times|\\cdot|\*)\s*10\^\{?(-?[0-9]{1,3})\}?)?"
    rf"(?:\s({'|'.join(_SCALE)})\b)?")
# Words that make another number of the one beside them or take it back: on either side, before it, behind it
_NOT = (r"不|ليس|\b(?:not|no|non|pas|nicht|keine|não|bukan|sio?|ki i se|kì í ṣe|abu?ụ?ghi?ị?|akuyona|ayiyona"
        r"|haisi|hazisi|ba \S{1,9} ba|ba ce)\b")
_VOID = re.compile(
    rf"(?i){_NOT}|n['’]t\b|\b(?:never|cannot|wrong|incorrect|false|or|but|if|unless|except|exclud\w+|plus"
    r"|minus|and (?:an?|one|two|three|(?:up|over|above|more|some|change)(?=\W*$))|negative|times|mod(?:ulo)?"
    r"|sqrt|factorial|squared|cubed|roots?|powers?|doubled|tripled|halved|divided|multiplied|half|halves"
    r"|thirds?|(?:four|fif|six|seven|eigh|nin|ten|hundred|[a-z]+(?:sand|illion))ths|tens|lakh|crore|[bm]n"
    rf"|[a-z]*illions?|(?:{'|'.join(_SCALE)})s?)\b")
_BEFORE = (r"\b(?:than|least|most|between|from|under|almost|nearly|up to|instead of"
           r"|as many as|as much as|twice|thrice|double|triple"
           r"|(?:square|cube|inverse|reciprocal|opposite|multiple|factor|divisor|percent|quarter)s? of)\b")
_VOID_BEFORE = re.compile(
    rf"(?i){_BEFORE}|\b(?:log|ln|lg|sin|cos|tan|cot|exp|over|above|below|beyond)\W*$|[a-z_^\\]$|\b[a-z]-$"
    r"|-\W*$|\b(?:one|two|three|four|five|six|seven|eight|nine|ten"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\W*$")
_VOID_BEHIND = re.compile(
    r"(?i)\b(?:is|was)\b(?! (?:the \w* ?answer|left|needed|required|used|spent|paid)\b)"
    r"|\bover\b(?!\W*$| the\b)|\b(?:isn|would|below zero|at most|at least)\b|^[!?]"
    r"|^\s*(?:grand|thou|pi)\b")
_VARIABLE = re.compile(r"(?<![\w'’])(?![aAIgmhsl])[A-Za-z](?![\w'’])")  # a letter, but no word or unit
_ATTACHED = r"(?:kg|km|cm|mm|ft|lbs?|oz|mph|hrs?|mins?|sec|[ap]m)\b"  # 70cm, but neither 6ab nor 5x
_UNIT = re.compile(rf"(?:\s*{_ATTACHED}|[\s-]*[^\W\d_]*)(?:[\s/-]+[^\W\d_]+\.?){{0,6}}\s*(?:\^?[23])?")
_UNITS = dict(pair.split("=") for pair in (
    "kg=kilogram g=gram km=kilometer m=meter cm=centimeter mm=millimeter ft=foot feet=foot in=inch lb=pound "
    "oz=ounce h=hour hr=hour min=minute sec=second s=second l=liter").split())


def _unit(words):
    """Words behind a number as (set of words in the singular, (exponent, whether it is a rate))."""
    words = re.sub(r"tre(s?)\b", r"ter\1", words.casefold().replace("mph", "miles per hour"))
    power = 2 if re.search(r"2|\bsq(?:uare)?\b", words) else 3 if re.search(r"3|\bcubic\b", words) else 1
    found = {re.sub(r"(?<=[^s])s$", "", word) for word in re.findall(r"[^\W\d_]+", words)}
    rate = "/" in words or "per" in found
    return {_UNITS.get(word, word) for word in found} - {"square", "sq", "cubic", "per"}, (power, rate)


def _alike(unit, gold_unit):
    """Whether two `_unit`s are the same, as "hours" and "working hours", or one is none."""
    (words, power), (gold_words, gold_power) = unit, gold_unit
    return not words or not gold_words or power == gold_power and (words <= gold_words or gold_words <= words)


@lru_cache(10_000)
def _quantity(text, alone=True, decimal_comma=False):
    """(the one number of a phrase, exactly; its unit), or None. alone: nothing is beside it but its unit."""
    if len(text) > 200:
        return None
    money = {"dollar"} if re.search(r"\\\$|^[^$]*\$[^$]*$", text) else set()  # $5$ is 5
    text = re.sub(r"\s*\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", _undress(text)).strip()
    if decimal_comma and re.fullmatch(r"[^\d(]*[0-9.]+,[0-9]{1,2}\D*", text):
        text = re.sub(r"(?<=[0-9])\.(?=[0-9]{3})", "", text).replace(",", ".")  # 1.234,56
    *equals, text = text.split("=")
    found = [match for match in _NUMBER.finditer(text)  # but for the 2 of cm^2
             if match[0] not in "23" or not re.search(r"[A-Za-z]\^?$", text[:match.start()])]
    if len(found) != 1:
        return None
    (match,) = found
    before, behind, value = text[:match.start()], text[match.end():], _value(*match.groups())
    unit = _UNIT.fullmatch(behind)
    around = f"{before} " + (behind if unit else _fold(re.sub(r"\^[23]", "", behind)))
    strange = r"[^\w\s.,:;!?'\"()’“”„。，、።।-]"
    if (value is None or alone and (before.strip() or not unit)
            or match[1].lower() in ("- ", "+ ", "minus ") and before.strip()
            or _VOID.search(around) or _VOID_BEFORE.search(before) or _VOID_BEHIND.search(behind)
            or re.match(rf"(?!{_ATTACHED})[A-Za-z_^\\\u0300-\u036f]", behind) or _VARIABLE.search(around)
            or re.search(strange, before if unit else around)):
        return None
    for side in equals:  # "3 * 5 = 15" says 15; "7 = 0.5", "2x = 10" and "!= 5" nothing
        stated = re.fullmatch(rf"\W*({_PLAIN})\W*", side)
        # "dividing by 2, we get x"
        side = re.sub(r"(?:^|(?<=[A-Za-z])\s|(?<=[,:;(]))\s*[a-z][\s$)]*$", "", side)
        letter = re.search(r"(?<![^\W\d])(?!a [a-z])[a-z](?!\w)", side)
        if (stated and Fraction(re.sub("[, ]", "", stated[1])) != value
                or letter and re.search(r"[\d!^/\\]|^\W*-", side)
                or re.search(rf"(?:[^\w\s)\]}}$:;,(.'\"]|{_NOT}|\b(?:log|ln|sin|cos|tan|sqrt))\s*$", side)):
            return None
    words, exponent = _unit(behind)
    return value, (words | money, exponent)


def _value(sign, whole, top, bottom, power, ten, scale):
    """Of what `_NUMBER` has matched: whole top/bottom, or top^power, times 10^ten and the scale."""
    whole, top, bottom = (re.sub("[, ]", "", part or "") for part in (whole, top, bottom))
    if Fraction(bottom or 1) == 0 or (power and (bottom or len(top) > 6)):
        return None
    value = int(whole or 0) + Fraction(top) ** int(power or 1) / Fraction(bottom or 1)
    value *= Fraction(10) ** int(ten or 0) * _SCALE.get(scale, 1)
    return value if sign.strip() in ("", "+") else -value


def normalize_number(text: str) -> Fraction | None:
    """The number that `text` states and nothing else, exactly; None where it states none, or several.

    Currency, percent and degree signs, thousands separators, LaTeX and bold dressing, "x =" before and units
    behind are dropped: "$1,080.00", "\\boxed{1080}" and "1080 clips" are all 1080, and "50%" is 50.
    """
    found = _quantity(text)
    return found and found[0]


def _plain_text(text):
    text = re.sub(r"(?<![0-9]) | (?![0-9])", "", re.sub(r"\s+", " ", _undress(text)))
    text = re.sub(r"\\frac\{(-?\w+)\}\{(\w+)\}", r"\1/\2", text)
    text = re.sub(r"^\((\w)\)$", r"\1", text)  # the choice "(C)"
    return text.casefold() if text.isalpha() and len(text) > 2 else text


def same_number(given: str, gold: str) -> bool | None:
    """Whether both answers are one number, in the same unit if both have one; None where one is no number."""
    a, b = _quantity(given, False, "," not in gold), _quantity(gold, False)
    return None if a is None or b is None else a[0] == b[0] and _alike(a[1], b[1])


def same_answer(given: str, gold: str) -> bool:
    """Whether two final answers are equal, as exact numbers where both are numbers, else as normalised text.

    LaTeX that only looks different is equal; an empty gold answer equals nothing; "x+1" and "1+x" differ: the
    reward `math` does algebra, this function does not. More than 1000 characters are no final answer.
    """
    if max(len(given), len(gold)) > 1000:
        return False
    names = [re.match(r"\W*([A-Za-z])(?:_\w)?\s*=", text) for text in (given, gold)]
    if all(names) and names[0][1] != names[1][1]:  # x = 5 and y = 5
        return False
    same = same_number(given, gold)
    if same is None:
        return _plain_text(given) == _plain_text(gold) != "" or given.strip() == gold.strip() != ""
    return same


_OPERATOR_SIGNS = str.maketrans("×÷−", "*/-")
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


# ---- Extraction: explicit marks alone count, since taking the last number would reward echoing the question.

# "answer" in the languages of MMMLU and of the African MMLU sets, accents and vowel marks left out (`_fold`)
_ANSWER_WORDS = (
    "ans(?:wer)?", "réponse", "respuesta", "resposta", "risposta", "antwort", "jawaban", "jibu", "ìdáhùn",
    "azịza", "impendulo", "mhinduro", "amsa", "መልስ", "መልሱ", "答案", "答え", "正解", "선택", "정답", "답",
    "إجابة", "اجابة", "جواب", "उत्तर", "উত্তর", "选", "選", "opción", "opção", "opzione", "chaguo")


def _fold(text):
    """Full-width letters as plain ones, without accents and vowel marks, which many writers leave out."""
    def without_marks(text):
        return "".join(c for c in text if unicodedata.category(c) != "Mn")

    return without_marks(unicodedata.normalize("NFKD", without_marks(text)))  # whose sorting of marks is slow


# "the answer is", "Final Answer:", "**Answer**:", "the answer to the question is", then the rest of its line
_STATED = re.compile(
    r"(?i)\banswer(?: (?:to|for|of) [^\n.?!:=]{1,80}?)?[ *_]{0,8}"
    r"(?:\b(?:is|will be)\b(?: therefore| thus)?|[:=])[\s*_:]{0,8}(?=([^\n]{1,300}))"
)
# the same before a number in other languages; "72 is the answer"; a last sentence that concludes
_ELSEWHERE = rf"(?<![A-Za-z])(?i:{'|'.join([*_ANSWER_WORDS[1:], *map(_fold, _ANSWER_WORDS[1:])])})"
_STATED_ELSEWHERE = re.compile(rf"{_ELSEWHERE}([^\n.?!\d]{{0,40}})(?=(\d[^\n]{{0,200}}))")
_IS_THE_ANSWER = re.compile(r"(\S{1,30}(?: \S{1,20})?) is (?:the|my) (?:final |correct )?answer\b")
_CONCLUSION = re.compile(r"(?:^|[.!?:] +)(?:So|Therefore|Thus|Hence),? ((?:(?![.!?] )[^\n])*)\Z")


def last_boxed(text):
    """Content of the last balanced, non-empty \\boxed{...} or \\fbox{...}, in one pass over the braces."""
    opened, last = [], None  # opened: for each open brace, where a box's content starts, or None
    for match in re.finditer(r"\\(?:boxed|fbox)\s{0,4}\{|\\[{}]|[{}]", text):
        if match[0] == "}" and opened:
            start = opened.pop()
            last = (text[start : match.start()].strip() if start else None) or last
        elif match[0] == "{" or "box" in match[0]:
            opened.append(match.end() if "box" in match[0] else None)
    return last


def _marked(text, finished=True):
    """Content of the last <answer>...</answer>, else of the last box, else of an <answer> up to the end."""
    closed, _, rest = text.rpartition("</answer>")
    _, opened, inside = closed.rpartition("<answer>")
    if opened and inside.strip():  # "<answer>The answer is \boxed{5}.</answer>" happens
        return last_boxed(inside) or _stated(inside) or inside.strip()
    _, opened, inside = rest.rpartition("<answer>")
    return last_boxed(text) or (inside.strip() if opened and finished else None)


def _stated(text):
    """x of the last "the answer is x" or "Answer: x", up to the end of the sentence."""
    rest = "".join(_STATED.findall(text)[-1:]).strip()
    parts = re.split(r"[.;!?](?=\s|$)|,? (?:because|since|so|which|as|where)\b", rest)
    worked_out = re.search(r",? which is ([^,;!?]{1,60})", rest)
    if worked_out and normalize_number(parts[0]) is None:  # "16% of 40, which is 4"
        parts = [_first_number([worked_out[1].rstrip(".")]) or parts[0]]
    return parts[0].strip(" *_`\"'")


def _stated_elsewhere(text):
    """The same of "La réponse est x", where x begins with a number."""
    for between, number in reversed(_STATED_ELSEWHERE.findall(text)):
        between = re.split(_ELSEWHERE, between)[-1]
        if not re.search(_NOT, between):
            return re.search(r"(?:(?<![A-Za-z])-)?[$€£]?\Z", between)[0] + number  # -72, but not ngu-72
    return ""


def _first_number(values, alone=True, decimal_comma=False):
    return next((value.strip(" *\t\r") for value in values if _quantity(value.strip(), alone)
                 or decimal_comma and _quantity(value.strip(), alone, True)), None)


def extract_answer(text: str, choices: bool = False, finished: bool = True) -> str | None:
    """The final answer a response states by an explicit mark, as it is written; None where there is none.

    In this order: the last <answer>...</answer> (or one that is not closed, up to the end), the last balanced
    \\boxed{...}, the first "#### x", as GSM8K's own scorer does, the last "the answer is x", "Answer: x" or
    "x is the answer", a last line that is a number, has one bold number, ends in "= number", or whose last
    sentence begins with So, Therefore, Thus or Hence and holds one number. Inside the thinking only the tag
    and the box count, and last. choices=True: see `extract_choice`. docs/answers.md has examples.
    finished=False, of a text that was cut off: only a tag or a box that is closed counts. Of a text of more
    than LONGEST characters the end alone is read.
    """
    text = text[-LONGEST:]
    if not finished:
        text = f"<answer>{_marked(text, False)}</answer>" if _marked(text, False) else ""
    if choices:
        return extract_choice(text)
    tail = text.rpartition("</think>")[2].partition("<think>")[0]  # nothing where thinking never ended
    hashes = re.findall(r"#### *([^\n]{1,200})", tail)
    line = tail.rstrip()[-400:].rpartition("\n")[2]
    right_side = re.split("[=≈]", line)[-1]
    bold = re.findall(r"\*\*([^*]+)\*\*", line)
    return (
        _marked(tail)
        or _first_number(hashes)  # "#### Step 1" is a heading
        or _stated(tail)
        or _first_number([_stated_elsewhere(tail)], False, decimal_comma=True)
        or _first_number(_IS_THE_ANSWER.findall(tail[-400:])[-1:], alone=False)
        or _first_number([right_side, *(bold if len(bold) == 1 else [])])
        or _first_number(_CONCLUSION.findall(line), alone=False)
        or _marked(text, False)
        or None
    )


_LATIN = r"[0-9A-Za-z\u00c0-\u02af\u1e00-\u1eff]"
_TOGETHER = r"(?:[,/、和或與与と]|\b(?:or|and|but|not|nor|y|ou?|et?|oder|und|au|na|tabi|ati|ma)\b)"  # B and C
# neither the article (A protein) nor one of two
_LETTER = (rf"[\s*_(\[$\"'`]{{0,6}}([A-E])(?!{_LATIN}|['\u2019])"
           r"(?!(?<=A) (?!(?:because|since|as|is|by|with|for|due)\b)[a-z])"
           rf"(?![).\]*\s]{{0,4}}(?:{_TOGETHER}[\s(\[*]{{0,4}}[A-E](?!{_LATIN})|[A-E](?!{_LATIN}| [a-z])))")
_WRONG = (r"(?![\s*)\]]{0,4}\?|[\s*)\]]{1,4}(?:is (?:not|in|wrong)|can)"
          rf"|\W{{0,3}}(?:{_fold('ではな|じゃな|가 아니|가 아닙|नहीं|নয়|አይደለ')}))")
_LINK_WORD = (r"\b(?i:is|it|be|will|would|must|therefore|thus|the|correct|option|choice|letter|definitely"
              r"|clearly)\b")
_LINK = rf"(?:[ *_]{{0,4}}(?:[:=,-]|{_LINK_WORD})){{0,5}}"


_WORDS = _fold("|".join(_ANSWER_WORDS[1:]))
_LOWER = re.compile(rf"(?i:{_ANSWER_WORDS[0]}|{_WORDS})(?: ?[:=] ?\W{{0,4}}| is \W?\()([a-e])\W{{0,4}}\Z")
_CHOICE_FORMS = (  # the first form found counts, and of that form the last
    re.compile(rf"\b(?i:ans(?:wer)?)\b(?: (?i:to|for) [^\n.?!:=]{{1,80}}?)?{_LINK}{_LETTER}{_WRONG}"),
    re.compile(rf"(?<![Nn]or )(?<![Nn]ot )(?<![Nn]either )\b(?i:option|choice)\b{_LINK}{_LETTER}{_WRONG}"),
    re.compile(r"(?:^|[^\w\s'’] ?|\n|\b(?i:so|but|and|that|think|answer|letter|hence|thus|therefore|only) )"
               r"[(\[*]{0,4}([A-E])[)\]*]{0,4} (?:is|must be) (?:the )?(?:correct|right|true|best|answer)\b"),
    re.compile(rf"(?i:{_WORDS})(?=[^\nA-E]{{0,48}}[A-E])(?:(?!{_NOT})(?:[^\n.?!A-Z]|[A-Z](?=[a-z]))){{0,40}}?"
               rf"(?:(?<!{_LATIN})|(?<=ndi)){_LETTER}{_WRONG}"),
    re.compile(r"(?:^|\n)(?:(?:So|Thus|Hence|Therefore),? )?"
               r"[*_(\[$]{0,4}([A-E])[*_)\].$:]{0,4}\Z"),  # a last line that is a letter alone ...
    re.compile(rf"[:=]{_LETTER}[^\n\w]{{0,4}}\Z"),  # ... or ends in ": B"
)


def extract_choice(text: str) -> str | None:
    """The letter "A" to "E" that a response settles on, None where it settles on none.

    After </think>: the tag or box, else "the answer is (B)" ("Ìdáhùn ni B", "答案是B"), "option B",
    "B is correct", a last line "B" or "...: B", or "B) ..." if it is the only option that is written out.
    """
    text = re.sub(r"(?<!\w)[À-ÅÇ-Ëà-åç-ë](?!\w)", "", text[-LONGEST:])  # a word of its own, no letter
    tail = _fold(text.rpartition("</think>")[2].partition("<think>")[0].strip())
    if marked := _marked(tail):
        marked = _undress(marked[:300])
        letter = re.match(r"\W{0,4}([A-Ea-e])(?:[)\].:]|\W{0,4}\Z)", marked)
        one = not re.match(r"\W{0,4}[A-E]\W{0,4}(?:or|and|but|not)?\W{0,4}[A-E]\b", marked)
        tail = f"answer: {letter[1].upper() if letter and one else marked}"
    if lower := _LOWER.search(tail[-200:]):
        return lower[1].upper()
    # written out, but not "A:", which may be a speaker's, nor taken back
    options = re.findall(r"(?:^|\n)[\s*_(\[]{0,4}([A-E][)\].:])(?!\W{0,4}(?:[A-E][)\].:]|(?:or|and|but)\b)"
                         r"|[A-Z]\.|\W{0,4}(?:(?:This|It|That) )?is (?:not|in|wrong|false))", tail)
    return next((found[-1] for form in _CHOICE_FORMS if (found := form.findall(tail))),
                options[0][0] if len(options) == 1 and options != ["A:"] else None)


# ---- The built-in rewards, each 0 to 1 per row.


def correctness(prompts, responses, answers, tasks=None, metas=None, finished=None, **columns) -> list[float]:
    """1 where the extracted answer equals the gold answer, else 0. finished: False where it was cut off.

    `tasks` picks the check: "choice" compares letters; "countdown" wants an expression over
    `metas[i]["numbers"]`, each used at most once, worth the gold answer ("= gold" may follow it); a matrix is
    right for `metas[i]["matrix"]` (`matrices.right_rows`); all others use `same_answer`, where
    `metas[i]["answers"]` names several with any of them.
    """
    rewards = []
    for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
        task = tasks[i] if tasks else "math"
        given = extract_answer(response, task == "choice", not finished or finished[i]) or ""
        if task == "countdown":
            expression, equals, result = given.translate(_OPERATOR_SIGNS).partition("=")
            used = Counter(int(digits) for digits in re.findall(r"[0-9]{1,12}", expression))
            right = safe_arithmetic(expression) == int(answer) and not used - Counter(metas[i]["numbers"])
            right = right and (not equals or same_answer(result, answer))
        elif task in matrices.LEVELS:
            right = matrices.credit(task, given, metas[i]["matrix"]) == 1
        else:
            right = any(same_answer(given, gold) for gold in gold_answers(answer, metas, i))
        rewards.append(float(right))
    return rewards


def gold_answers(answer, metas, i):
    """All that are right: of data that names several, else the one."""
    answers = metas[i].get("answers") if metas else None
    return answers if isinstance(answers, list) and all(isinstance(a, str) for a in answers) else [answer]


def partial(prompts, responses, answers, tasks=None, metas=None, finished=None, **columns) -> list[float]:
    """`correctness`, and for a matrix that is right in part up to a half (`matrices.credit`)."""
    columns = dict(tasks=tasks, metas=metas, finished=finished)
    return [matrices.credit(tasks[i], _given(response, finished, i), metas[i]["matrix"])
            if tasks and tasks[i] in matrices.LEVELS else right
            for i, (response, right) in enumerate(zip(
                responses, correctness(prompts, responses, answers, **columns)))]


def steps(prompts, responses, answers, tasks=None, metas=None, **columns) -> list[float]:
    """Share of a working's steps, in front of the answer, that are true and new (common/steps.py); 0 of none.

    Of a matrix its row operations, else equations. As many steps are asked for as the question of arithmetic
    has operators, or as it takes to reduce the matrix, unless they have reduced it: else two true steps and a
    guess would earn more than five honest ones with a slip.
    """
    rewards = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        task, working, asked = tasks[i] if tasks else "", rationale(response[:LONGEST]), 1
        if task in matrices.LEVELS:
            matrix = metas[i]["matrix"]
            true, n, done = true_row_operations(working, task, matrix)
            asked = n if done else len(matrices.row_reduce(matrix)[1])
        else:
            if task == "arithmetic":
                asked = len(re.findall(r"\d\s?[-+*/]", prompt))
            true, n = true_equations(working, prompt, safe_arithmetic)
            true = min(true, asked) if task == "arithmetic" else true  # what is more than needed is useless
        rewards.append(true / max(n, asked, 1))
    return rewards


def _given(response, finished, i):
    return extract_answer(response, finished=not finished or finished[i]) or ""


def format(prompts, responses, answers, **columns) -> list[float]:
    """1 for exactly "<think>...</think><answer>...</answer>", 0.5 with text before, between or after, else 0.

    All four tags must stand exactly once, in order, and hold something that is seen: an empty answer earns 0.
    """
    rewards, tags = [], "|".join(TAGS)
    for response in responses:
        if any(response.count(tag) != 1 for tag in TAGS):
            rewards.append(0.0)
            continue
        pieces = [any(unicodedata.category(c)[0] not in "CZ" and c not in BLANK for c in piece)
                  for piece in re.split(tags, response)]
        if re.findall(tags, response) != list(TAGS) or not pieces[1] or not pieces[3]:
            rewards.append(0.0)
        else:
            rewards.append(0.5 if pieces[0] or pieces[2] or pieces[4] else 1.0)
    return rewards


def digit(prompts, responses, answers, finished=None, **columns) -> list[float]:
    """1 where the extracted answer is a number, right or wrong."""
    given = [extract_answer(response, finished=done) or ""
             for response, done in zip(responses, finished or [True] * len(responses))]
    return [float(normalize_number(text) is not None) for text in given]


def mark(prompts, responses, answers, **columns) -> list[float]:
    """A quarter for each of <think> </think> <answer> </answer> that stands exactly once."""
    return [sum(response.count(tag) == 1 for tag in TAGS) / len(TAGS) for response in responses]


def _told_apart(given, gold):
    """Whether two answers differ in what math_verify drops: words, units, bases of digits, a leading sign."""
    several = re.search(r",|\\cup|\\pm|\b(?:and|or)\b", gold)
    bases, signs, words = [], [], []
    for text in (_in_ascii(given), _in_ascii(gold)):
        bases.append(re.findall(r"(?<![A-Za-z])[0-9A-F]+_\{?([0-9]+)", text))
        signs.append(bool(re.match(
            r"\W*?(?:[<>≤≥≠*/]|!=|\\(?:neq?|not|[gl]eq?|[gl]t|sim|times|div|cdot)(?![a-z]))", text)))
        found = re.findall(r"\\(?:text\w*|mathrm|mbox|operatorname)\s*(\{[^{}]*\}(?:\s*\^\{?[23])?)", text)
        found += re.findall(r"(?<=\s)[^\W\d_]{2,}", text)
        joined = (r"\b(?:and|or)\b", "") if several else (r"\band\b", "or")
        words.append(re.sub(*joined, " ".join(found)))
    void = [{match[0].lower() for match in re.finditer(f"{_VOID.pattern}|{_BEFORE}", text)} for text in words]
    return (bases[0] != bases[1] or signs[0] != signs[1] or not void[0] <= void[1]
            or not _alike(*map(_unit, words)))


def _exactly(a, b):
    """Whether what math_verify has parsed, and holds for equal to six digits, is equal."""
    import sympy

    if isinstance(a, sympy.Equality) and not isinstance(b, sympy.Equality):
        if a.lhs.is_number and a.lhs != a.rhs:  # 7 = 0.5
            return False
        factors = [x for term in sympy.Add.make_args(a.lhs) for x in sympy.Mul.make_args(term)]
        named = [x.is_Symbol or isinstance(x, sympy.core.function.AppliedUndef) for x in factors
                 if not (x.is_Pow and x.exp == -1 and x.base.is_Symbol)]  # a / b
        if not a.lhs.is_number and not (named and all(named)):  # x + 5 = 72
            return False
        a = a.rhs
    if isinstance(a, sympy.Equality) and isinstance(b, sympy.Equality):
        a, b = a.lhs - a.rhs, b.lhs - b.rhs
    floats = {x: sympy.Rational(str(x)) for side in (a, b) if hasattr(side, "atoms")
              for x in side.atoms(sympy.Float)}
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and (floats or (a - b).is_number):
        return sympy.simplify((a - b).xreplace(floats)).equals(0) is True
    return not floats or a.xreplace(floats) == b.xreplace(floats)


def math(prompts, responses, answers, metas=None, finished=None, **columns) -> list[float]:
    """1 where the extracted answer equals the gold answer, by `same_answer` or by math_verify."""
    import math_verify

    def equal(given, gold):
        if same_answer(given, gold):
            return True
        if not 0 < len(given) <= 1000 or same_number(given, gold) is not None or _told_apart(given, gold):
            return False
        a, b = (math_verify.parse(f"\\boxed{{{_in_ascii(text)}}}") for text in (given, gold))
        return bool(a and b) and math_verify.verify(b, a) and _exactly(a[0], b[0])

    rewards = []
    for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
        given = extract_answer(response, finished=not finished or finished[i]) or ""
        rewards.append(float(any(equal(given, gold) for gold in gold_answers(answer, metas, i))))
    return rewards


NEED_GOLD = ("correctness", "partial", "math", "answer-prob")  # of the rewards here; one's own may need none


def need_gold(specs) -> bool:
    """Whether one of these rewards (`parse_rewards`) compares with the gold answer."""
    return any(spec.partition("=")[0].partition(":")[0] in NEED_GOLD for spec in specs)


BUILT_IN = {function.__name__: function
            for function in (correctness, partial, steps, format, digit, mark, math)}

# ---- A model as a reward.


class LearnedReward:
    """What a model of reward_model.py thinks of a response: its score, scaled as its reward.json says.

    It holds weights of its own, in `dtype`, unless it is given `body`, a model that gives the hidden states
    within switched_on(). A row longer than its context is NaN.
    Errors: ValueError if the folder holds no reward model.
    """

    def __init__(self, folder, dtype, device, tokens_per_batch, body=None, switched_on=nullcontext):
        from common import data, models  # here: a user's reward process imports this file without torch

        self.encode_prompt, self.encode_completion = data.encode_prompt, data.encode_completion
        self.scores, self.tokenizer = models.last_token_scores, models.load_tokenizer(folder)
        models.check_reward_model(folder)
        self.model = body or models.load_model(folder, dtype, device, scores=True).requires_grad_(False)
        self.switched_on = switched_on
        self.head = models.load_head(models.resolve(folder)).to(device)
        self.settings = json.loads(Path(models.resolve(folder), models.REWARD_FILE).read_text())
        self.longest = self.model.config.max_position_embeddings
        self.tokens_per_batch = tokens_per_batch

    def __call__(self, examples, responses):
        import torch

        system, template = self.settings["system"], self.settings["prompt_template"]
        rows = [self.encode_prompt(self.tokenizer, p, system, template)
                + self.encode_completion(self.tokenizer, r, self.tokenizer.eos_token_id)
                for p, r in zip([e.prompt for e in examples], responses, strict=True)]
        order = sorted((i for i, row in enumerate(rows) if len(row) <= self.longest),
                       key=lambda i: len(rows[i]))
        values = [nan] * len(rows)
        while order:  # the longest rows first, as many as fit
            n = max(1, self.tokens_per_batch // len(rows[order[-1]]))
            batch, order = order[-n:], order[:-n]
            with torch.no_grad(), self.switched_on():
                scores = self.scores(self.model, self.head, [rows[i] for i in batch]).tolist()
            for i, value in zip(batch, scores):
                values[i] = (value - self.settings["mean"]) / self.settings["std"]
        return values


# ---- The policy's own probability of the gold answer as a reward.


def rationale(response: str) -> str:
    """What a response says before its answer: up to the last <answer>, else the last "####", \\boxed or "the
    answer is", else all there is; thinking closed. "" where there is nothing but tags.
    """
    marks = [response.rfind("<answer>")]
    if marks == [-1]:
        marks += [response.rfind("####"), response.rfind("\\boxed"),
                  *(match.start() for match in _STATED.finditer(response))]
    before = response[:max(marks)] if max(marks) >= 0 else response
    if before.rfind("<think>") > before.rfind("</think>"):
        before += "</think>"
    return before if re.sub("|".join(TAGS), "", before).strip() else ""


def answered(tokenizer, response, answer, longest):
    """(ids up to the answer, ids of it and its closing mark) of a response's rationale with another answer.

    As "...<answer>72</answer>" is tokenized in one piece, the way a policy writes it: a token that holds the
    end of the mark and the answer's beginning is the answer's. A rationale that is too long for `longest`
    tokens, the end token included, is cut, and its thinking closed.
    """
    from common.draws import answer_opening

    def encode(text):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    opening = answer_opening(tokenizer)  # is the prompt's
    before = rationale(response).removeprefix(opening)
    if not before and opening.rstrip().endswith("<think>"):
        before = "</think>"
    while True:
        ids, offsets = encode(f"{before}<answer>{answer}</answer>")
        over = len(ids) + 1 - longest
        if over <= 0 or before in ("", "</think>"):
            at = sum(end <= len(before) + len("<answer>") for _, end in offsets)
            return ids[:at], ids[at:]
        _, offsets = encode(before.removesuffix("</think>"))
        # at a token's end, but never within a character of several tokens, each of which ends where it does
        end = min(offsets[-over - 1][1], offsets[-over][0]) if over < len(offsets) else 0
        before = rationale(opening + before[:end]).removeprefix(opening)


def leave_one_out(values, groups) -> list[float]:
    """Each value minus the mean of the others of its group: sums to 0 over a group; 0 where it is alone.

    As a baseline it leaves the expected policy gradient as it is, for the others do not depend on the sample
    (RLOO, arXiv 2402.14740); minus the mean of all, as in Quiet-STaR, is (n - 1) / n of it. NaN has no part.
    """
    members = {}
    for group, value in zip(groups, values, strict=True):
        if not isnan(value):
            members.setdefault(group, []).append(value)
    left = []
    for group, value in zip(groups, values):
        of = members.get(group, ())
        if isnan(value) or max(of) == min(of):  # equal ones differ by nothing, not by rounding
            left.append(value if isnan(value) else 0.0)
        else:
            left.append((value - sum(of) / len(of)) * len(of) / (len(of) - 1))
    return left


class AnswerProbability:
    """log p(gold answer | prompt, rationale) under the policy that is trained: a reward without a verifier.

    Source: Quiet-STaR, arXiv 2403.09629 section 4.4. The gold answer stands between <answer> and </answer>,
    whose closing mark counts, or "7" would be as probable as "72". options, joined by "+":
    "mean": per token, not the sum; "exp": the probability itself, bounded by 0 and 1; "any": below;
    "prior": minus the same without a rationale; "others": minus the mean of the question's other rationales.
    Where the data names several gold answers, the mean over them of log p; with "any" the log of the mean of
    p, with "exp" that mean. E[log p] rewards rationales that hedge where several answers are equally likely,
    and punishes those that name one; E[p] and its log do not.

    The policy comes later, by `ask_policy`. A rationale is cut where it and the answer would exceed
    max_new_tokens (`answered`); an answer that exceeds them alone is NaN.
    Errors: ValueError for an unknown option.
    """

    OPTIONS = ("mean", "exp", "any", "prior", "others")

    def __init__(self, tokenizer, max_new_tokens, options):
        self.tokenizer, self.prompt_ids, self.logprobs = tokenizer, None, None
        self.max_new_tokens, self.options = max_new_tokens, set(filter(None, options.split("+")))
        if unknown := self.options - set(self.OPTIONS):
            raise ValueError(f"reward answer-prob:{options}: unknown {', '.join(sorted(unknown))}; "
                             f"take {', '.join(self.OPTIONS)}, joined by +")

    def __call__(self, examples, responses):
        rows = list(zip(examples, responses, strict=True))
        if "prior" in self.options:
            rows += [(e, "") for e in {e.id: e for e in examples}.values()]
        prefixes, answers, scored = [], [], []
        for i, (e, response) in enumerate(rows):
            for gold in gold_answers(e.answer, [e.meta], 0):
                before, answer = answered(self.tokenizer, response, gold, self.max_new_tokens)
                if len(before) + len(answer) < self.max_new_tokens:
                    prefixes.append(self.prompt_ids[e.id] + before)
                    answers.append(answer)
                    scored.append(i)
        found = [[] for _ in rows]
        for i, row in zip(scored, self.logprobs(prefixes, answers)):
            found[i].append((row.mean() if "mean" in self.options else row.sum()).item())
        values, n = [self.of_answers(logs) for logs in found], len(examples)
        if "prior" in self.options:
            prior = {e.id: value for (e, _), value in zip(rows[n:], values[n:])}
            values = [value - prior[e.id] for e, value in zip(examples, values)]
        return leave_one_out(values, [e.id for e in examples]) if "others" in self.options else values

    def of_answers(self, logs):
        """The value of a rationale from log p of each gold answer; NaN of none."""
        if not logs or not self.options & {"exp", "any"}:
            return sum(logs) / len(logs) if logs else nan
        if "exp" in self.options:
            return sum(map(exp, logs)) / len(logs)
        most = max(logs)
        return most + log(sum(exp(value - most) for value in logs) / len(logs))


# ---- Weighing and adding up.


@dataclass(frozen=True)
class RewardFunction:
    """A weighted reward; `function`: a built-in, LearnedReward, AnswerProbability, or another's _Worker."""

    name: str
    weight: float
    function: object


def parse_rewards(specs: list[str], learned=LearnedReward, answer_prob=None) -> list[RewardFunction]:
    """Reward functions from "name", "name=weight", "file.py:name", "model:runs/rm" or "answer-prob:options".

    The weight is 1 unless given. A file is imported here, in its own process, and a model is loaded, so that
    mistakes end the run before anything expensive. learned(folder) makes the LearnedReward, and
    answer_prob(options) the AnswerProbability; None where there is no policy to ask.
    Errors: ValueError for an unknown name, a missing file or function, a bad weight, a name used twice.
    """
    parsed = []
    for spec in specs:
        target, _, weight = spec.partition("=")
        path, colon, name = target.rpartition(":")
        is_model, is_prob = target.startswith("model:"), target.partition(":")[0] == "answer-prob"
        if is_prob:
            name, path = "answer-prob", target.partition(":")[2]
            if answer_prob is None:
                raise ValueError(f"reward {spec!r} asks the policy in training, which grpo.py, ppo.py and "
                                 "star.py have")
        if is_model:  # runs/rm, runs/rm/final and runs/rm/checkpoints/step-9 are all called rm
            path, parts = target.removeprefix("model:"), Path(target.removeprefix("model:")).parts
            name = next((part for part in reversed(parts)
                         if part not in ("final", "checkpoints") and not part.startswith("step-")), "model")
        try:
            weight = float(weight or 1)
        except ValueError:
            raise ValueError(f"the weight of reward {spec!r} is not a number: write it as name=0.5") from None
        if any(name == other.name for other in parsed):
            raise ValueError(f"two rewards are named {name!r}: each needs a name of its own")
        if not colon and not is_prob and name not in BUILT_IN:
            raise ValueError(f"unknown reward {name!r}: take {', '.join(BUILT_IN)}, answer-prob, "
                             "path/file.py:function or model:runs/rm")
        if colon and not is_model and not is_prob and not Path(path).is_file():
            raise ValueError(f"reward {spec!r}: no file {path!r} (write path/file.py:function=weight)")
        if target == "math" and importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward 'math' needs the package math_verify: pip install math-verify")
        function = (learned(path) if is_model else answer_prob(path) if is_prob
                    else _Worker(path, name) if colon
                    else _Worker(__file__, name, failed=0.0) if name == "math"  # late: not right
                    else BUILT_IN[name])
        parsed.append(RewardFunction(name, weight, function))
    return parsed


def ask_policy(reward_functions, prompt_ids, logprobs) -> None:
    """Give an AnswerProbability among the rewards the policy that it asks.

    prompt_ids: by example id; logprobs(prefixes, answers): the log-probs [L] of each answer's tokens.
    """
    for reward in reward_functions:
        if isinstance(reward.function, AnswerProbability):
            reward.function.prompt_ids, reward.function.logprobs = prompt_ids, logprobs


def judge(examples, responses, finished=None) -> list[float]:
    """`correctness` of each response to its Example."""
    return correctness([e.text for e in examples], responses, [e.answer for e in examples],
                       [e.task for e in examples], [e.meta for e in examples], finished)


def score(reward_functions, examples, responses, prompts=None, timeout_s=30.0, finished=None) -> dict:
    """Every reward of every row, and their weighted total.

    examples: one per response; prompts: what was asked, where it is not the example's own text; timeout_s:
    seconds for one call; finished: False for a response that was cut off.
    Functions see the columns prompts, responses, answers, tasks, metas, ids, finished.
    Returns {"rewards": {name: raw values}, "total": sums of weight * raw, "correct": 0/1 by `correctness`,
    "failed": number of rows whose total is NaN, "error": one line on the first failure, or ""}.
    A row is NaN in a column that failed on it, and in the total unless that column weighs 0: leave it out.
    """
    prompts, answers = prompts or [e.text for e in examples], [e.answer for e in examples]
    columns = {"tasks": [e.task for e in examples], "metas": [e.meta for e in examples],
               "ids": [e.id for e in examples], "finished": finished or [True] * len(responses)}
    rewards, total, error = {}, [0.0] * len(responses), ""
    for reward in reward_functions:
        if isinstance(reward.function, _Worker):
            values, problem = reward.function(prompts, responses, answers, columns, timeout_s)
            error = error or (problem and f"reward {reward.name!r}: {problem}")
        elif isinstance(reward.function, LearnedReward | AnswerProbability):  # they encode the prompt
            values = reward.function(examples, responses)
        else:
            values = reward.function(prompts, responses, answers, **columns)
        rewards[reward.name] = values
        if reward.weight != 0:
            total = [so_far + reward.weight * value for so_far, value in zip(total, values, strict=True)]
    failed = sum(isnan(value) for value in total)
    correct = judge(examples, responses, finished)  # the reward of that name may be a user's
    return {"rewards": rewards, "total": total, "correct": correct, "failed": failed, "error": error}


# ---- An answer as a row of samples.csv or eval.csv, and what rows come to.


def repetition(ids, n=4) -> float:
    """Share of the n-grams of a completion's tokens that stood in it before; near 1 in a circle."""
    grams = list(zip(*(ids[i:] for i in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@lru_cache(10_000)
def language(text: str) -> str:
    """The code of the language that a text is surely in ("en", "yo", "am"), by CLD2; "" where it is not sure.

    "" too where the text is short, or pycld2 is not installed. Source: github.com/CLD2Owners/cld2.
    """
    if importlib.util.find_spec("pycld2") is None:
        return ""
    import pycld2

    plain = "".join(c if c.isprintable() else " " for c in re.sub("|".join(TAGS), " ", text[:LONGEST]))
    try:
        sure, _, found = pycld2.detect(plain.encode(), isPlainText=True)
    except (pycld2.error, UnicodeEncodeError):  # no text
        return ""
    return found[0][1] if sure else ""


def answer_row(example, sample, completion, text, correct) -> dict:
    """What samples.csv and eval.csv hold of every answer. completion: a script's Completion; text: its text.

    in_language: whether the answer is in the question's language, "" where that cannot be told.
    """
    asked, given = language(example.text), language(text)
    return {"id": example.id, "sample": sample, "prompt": example.text, "completion": text,
            "answer": example.answer,
            "extracted": extract_answer(text, example.task == "choice", completion.finished) or "",
            "correct": int(correct), "logprob": sum(completion.logprobs), "tokens": len(completion.ids),
            "finished": int(completion.finished), "repetition": repetition(completion.ids),
            "in_language": int(asked == given) if asked and given else "",
            "level": example.level, "task": example.task, "meta": json.dumps(example.meta)}


def answer_rows(examples, completions, tokenizer) -> list[dict]:
    """An `answer_row` of the one completion of each example, judged by `correctness`."""
    texts = [c.text(tokenizer) for (c,) in completions]
    correct = judge(examples, texts, [c.finished for (c,) in completions])
    return [answer_row(e, 0, c, text, right)
            for e, text, right, (c,) in zip(examples, texts, correct, completions)]


def text_metrics(rows) -> dict:
    """Means over rows of `answer_row`: tokens, repetition, and in_language where it can be told of some."""
    told = [row["in_language"] for row in rows if row["in_language"] != ""]
    n = max(1, len(rows))
    return {"tokens": sum(row["tokens"] for row in rows) / n,
            "repetition": sum(row["repetition"] for row in rows) / n} | (
                {"in_language": sum(told) / len(told)} if told else {})


def answer_metrics(rows) -> dict:
    """eval/pass@1 and more of held-out answers (rows of `answer_row`), by level if there are several.

    eval/reward, of the rows whose reward worked, where the questions have no gold answers.
    eval/chance: what guessing letters comes to, where all questions are choices.
    """
    if not rows:
        return {}

    def score(rows, name="correct"):
        known = [row[name] for row in rows if not isnan(row[name])]
        return sum(known) / max(1, len(known))

    gold = any(row["answer"] for row in rows)
    levels = sorted({row["level"] for row in rows}) if gold else ()
    choices = [json.loads(row["meta"]).get("choices") for row in rows]  # how many there are
    return {**({"eval/pass@1": score(rows)} if gold else {"eval/reward": score(rows, "reward")}),
            "eval/questions": len(rows),
            **({"eval/chance": sum(1 / n for n in choices) / len(rows)}
               if all(isinstance(n, int) and n > 0 for n in choices) else {}),
            **{f"eval/{name}": value for name, value in text_metrics(rows).items()},
            "eval/truncated": 1 - sum(row["finished"] for row in rows) / len(rows),
            **{f"eval/pass@1 level {level}": score([row for row in rows if row["level"] == level])
               for level in levels if len(levels) > 1}}


def iteration_metrics(samples, counts, rows) -> dict:
    """What an iteration of star.py sampled and kept; shares of questions with a right answer, by level."""
    hinted = counts.get("hinted", 0)
    sampled = [s for s in samples if s.source != "rationalized"]
    solved = {s.question for s in sampled if s.correct and s.completion.finished}
    explained = {s.question for s in samples if s.source == "rationalized"}
    levels = {s.question: s.example.level for s in samples}
    metrics = {"questions": len(levels), "samples": len(sampled), "rows": len(rows),
               "correct": sum(s.correct for s in sampled) / max(1, len(sampled)),
               "solved": len(solved) / max(1, len(levels)), "hinted": hinted,
               "rationalized": len(explained) / max(1, hinted), "unexplained": counts.get("unexplained", 0)}
    for level in sorted(set(levels.values())) if len(set(levels.values())) > 1 else ():
        questions = {q for q in levels if levels[q] == level}
        metrics |= {f"solved level {level}": len(questions & solved) / len(questions),
                    f"kept level {level}": len(questions & (solved | explained)) / len(questions)}
    return metrics


def pass_at_ks(rows, ks) -> dict:
    """eval/pass@k for each of `ks`, from rows of `answer_row`, with their temperature; {} without gold."""
    if not any(row["answer"] for row in rows):
        return {}
    right = {}
    for row in rows:
        right.setdefault(row["id"], []).append(row["correct"])
    return {f"eval/pass@{k} T={rows[0]['temperature']:g}":
            sum(pass_at_k(len(row), sum(row), k) for row in right.values()) / len(right) for k in ks}


def pass_at_k(n, c, k) -> float:
    """Unbiased chance that k of n samples, c of them right, hold a right one (Codex, arXiv 2107.03374 eq. 1).

    Errors: ValueError if k > n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs {k} samples, there are {n}")
    return 1.0 - comb(n - c, k) / comb(n, k)


# ---- Other people's functions, in a process of their own: no fork (CUDA, threads), no pickle, no signals.
# One JSON line per request, [timeout_s, arguments], and one per reply, [values or null, error]. The first
# request loads the function. The worker keeps the time limit: faulthandler prints where the function hangs
# and ends the process, also after its parent's death. What undoes that (a fork, SIGSTOP) the parent ends.

_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from common.rewards import _serve; _serve()"
GRACE_S = 2.0  # the parent's limit is so much longer


class _Worker:
    """One reward function in a process, which starts at once, and again when needed after it has ended.

    failed: the reward of a row for which it fails or is late.
    """

    def __init__(self, path, name, failed=nan):
        root = Path(__file__).resolve().parents[1]
        self.command = [sys.executable, "-uB", "-c", _START,  # B: no bytecode in a user's folder
                        str(root), str(Path(path).resolve()), name]
        self.failed, self.lock, self.process = failed, threading.Lock(), None
        if error := self.load():
            raise ValueError(f"reward {name!r}: {error}")
        atexit.register(self.kill)

    def kill(self):
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it started
            self.process.wait()
            self.process = None

    def load(self):
        """Start the process, unless it runs, until it has loaded the function; what went wrong, or ""."""
        if self.process:
            return ""
        # A session of its own: Ctrl-C reaches the run alone, which needs its rewards to finish the step.
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, start_new_session=True)
        error = self.ask(None, LOAD_TIMEOUT_S)[1]
        if error:
            self.kill()
        return error

    def ask(self, arguments, timeout_s):
        """The reply (values, error) to one request, the time of `load` not counted; no values: it failed."""
        if error := self.load():
            return None, error
        process, reply = self.process, ""
        deadline = threading.Timer(timeout_s + GRACE_S, os.killpg, (process.pid, signal.SIGKILL))
        deadline.start()
        try:
            with suppress(BrokenPipeError):
                print(json.dumps([timeout_s, arguments]), file=process.stdin, flush=True)
                reply = process.stdout.readline()
        finally:
            deadline.cancel()
            if not reply:  # it has ended, or Ctrl-C came: a late reply must not be read as the next call's
                self.kill()
        ended = f"no result within {timeout_s:g} s, or it ended by itself: exit code {process.returncode}"
        return json.loads(reply) if reply else (None, ended)

    def __call__(self, prompts, responses, answers, columns, timeout_s):
        """(values, error) of one call for the batch, else of one per row."""
        with self.lock:
            values, error = self.ask([prompts, responses, answers, columns], timeout_s)
            if values is not None:
                return values, error
            values, loading, calling = [self.failed] * len(prompts), 0.0, 0.0
            for i in range(len(prompts)):
                begun = time.monotonic()
                if calling >= 2 * timeout_s or loading >= LOAD_TIMEOUT_S or self.load():
                    break
                loaded = time.monotonic()
                row = [column[i : i + 1] for column in (prompts, responses, answers)]
                row.append({name: column[i : i + 1] for name, column in columns.items()})
                found, _ = self.ask(row, max(1.0, timeout_s / len(prompts)))
                values[i] = found[0] if found else self.failed
                loading, calling = loading + loaded - begun, calling + time.monotonic() - loaded
            return values, error


def _load(path, name):
    sys.path.insert(0, str(Path(path).parent))  # a reward may import its neighbours
    spec = importlib.util.spec_from_file_location("_reward_" + Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise AttributeError(f"{path} has no function {name}")
    inspect.signature(function).bind_partial([], [], [])  # TypeError where it cannot take the three lists
    if path == str(Path(__file__).resolve()):  # `math`: importing and readying math_verify takes seconds
        function([""], [r"\boxed{1+x}"], ["x+1"])
    return function


def _call(function, prompts, responses, answers, columns):
    """(values, error): a value that is no finite number is NaN, and the error shows the first."""
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        columns = {name: column for name, column in columns.items() if name in parameters}
    raw = list(function(prompts, responses, answers, **columns))
    if len(raw) != len(prompts):
        raise ValueError(f"{len(raw)} values for {len(prompts)} rows")
    values = [float(value) if hasattr(value, "__float__") and isfinite(value) else nan for value in raw]
    failed = [raw[row] for row, value in enumerate(values) if isnan(value)]
    return values, f"{failed[0]!r:.80} is not a finite number" if failed else ""


def _serve():
    """The worker: for each request, load or call the function and reply."""
    path, name = sys.argv[1:]
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints goes to stderr, not among the replies
    function = None
    for line in requests:
        timeout_s, arguments = json.loads(line)
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=2)
        try:
            function = function or _load(path, name)
            reply = _call(function, *arguments) if arguments else (None, "")
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f" ({Path(path).name}, line {frame[1]})" for frame in frames if frame.filename == path]
            reply = None, " ".join(f"{type(error).__name__}: {error}".split())[:300] + "".join(lines[-1:])
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies, flush=True)
    os.killpg(0, signal.SIGKILL)  # the parent has gone: what the function started goes, too
