"""Random files and completions: each ends in a right value or in a ValueError of one line, in linear time.

Hypothesis draws the same ones every time: FILES files that may be broken in any way, VALID files whose
content is known, MISTAKES files with one bad row, COMPLETIONS texts, MARKED texts whose answer is known, and
LONG texts of 20,000 characters.
"""

import csv
import gzip
import io
import json
import math
import re
import time
from collections import Counter
from datetime import date, datetime
from fractions import Fraction

import pytest

pytest.importorskip("hypothesis")
pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common.data
from common import rewards
from common.data import SCHEMAS, TASKS, load_examples, load_generations, load_preferences, train_validation
from common.rewards import extract_answer, normalize_number, safe_arithmetic, same_answer

FILES, VALID, MISTAKES, COMPLETIONS, MARKED, LONG = 1000, 150, 150, 400, 200, 120
SECONDS = 0.5  # of CPU time for 20,000 characters: ten times what is wanted, for a slow machine


def examples(n):
    return settings(max_examples=n, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


# ---- Files: the columns of a schema and more, any cells, any format, broken anywhere.

HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
TEXT = st.text(max_size=6) | st.sampled_from([
    "", " ", "\ud800", "a\0b", "\u202eab", "e\u0301", "a\r\nb", "a\rb", "\x1b[31m", "\u2028", "A", "e", "0",
    "1", "1.0", "nan", "inf", "-1", "1e999", "True", "false", "{}",
    '{"numbers": [1, 2]}', '{"numbers": ["1"]}',
    "so\n#### 1,234", "#### \u0667", "\\boxed{7}", "\\boxed 7", "{" * 500, "[" * 3000, "9" * 5000, "x" * 3000,
    HH, "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "countdown", "choice", "<<1+1=2>>", "Level 5", "[1]"])
ROLE = st.sampled_from(["user", "assistant", "system"]) | TEXT | st.none() | st.integers()
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": TEXT}, optional={"name": TEXT, "x": st.none()})
RAW = {  # what json.dumps does not write
    "@huge@": "9" * 5000, "@deep@": "[" * 900 + "]" * 900, "@deepest@": "[" * 90_000 + "]" * 90_000,
    "@bare@": "nope", "@inf@": "1e999", "@twice@": '{"a": 1, "a": 2}'}
SCALAR = TEXT | st.sampled_from([
    None, math.nan, math.inf, -math.inf, 0, 1, -3, 2**70, 1.0, 2.5, 1e22, True, False, b"\xff",
    date(2001, 2, 3), datetime(2001, 2, 3), *RAW])
NESTED = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    TEXT, inner, max_size=2), max_leaves=4)
VALUE = NESTED | st.lists(MESSAGE, max_size=3)

# Of each column what it should hold, as far as that goes.
GOOD = st.sampled_from([
    "a", "b", "q?", "日本", "e\u0301 ", "\u202eab", "two\r\nlines", "1+1", "\x1b[31m"])
CHAT = st.tuples(*(st.fixed_dictionaries({"role": st.just(role), "content": GOOD})
                   for role in ("user", "assistant"))).map(list)
OPTIONS = st.lists(GOOD, min_size=2, max_size=5)
IDS = st.lists(st.integers(0, 50_000), min_size=1, max_size=3)
FLAG = st.sampled_from([0, 1, True, False, "0", "1", "0.0", 1.0])
META = st.fixed_dictionaries({"numbers": st.lists(st.integers(1, 9), max_size=3)},
                             optional={"a": SCALAR, "day": st.just(date(2001, 2, 3))})
POST = {"subreddit": GOOD, "title": GOOD, "post": GOOD}
LIKELY = {
    "answer": st.sampled_from(["7", "so\n#### 1,234", "#### -7.5"]), "Answer": st.sampled_from("ABCD"),
    "solution": GOOD.map("{} so \\boxed{{7}}".format), "messages": CHAT, "chosen": GOOD | CHAT,
    "rejected": GOOD | CHAT, "prompt": GOOD | GOOD | CHAT.map(lambda chat: chat[:1]), "choices": OPTIONS,
    "options": OPTIONS, "correct": FLAG, "label": FLAG, "finished": FLAG,
    "level": st.sampled_from([0, 1, 3, "Level 4", "3"]), "task": st.sampled_from(TASKS),
    "meta": META,
    "score_chosen": st.sampled_from([1, 2, 2.5, "3", 4, "nan", math.inf]),
    "score_rejected": st.sampled_from([1, 0, -0.5, "-1", -2, "1e999"]), "choice": st.integers(0, 1),
    "best": st.integers(0, 1), "query": IDS, "sample0": IDS, "sample1": IDS,
    "info": st.fixed_dictionaries(POST, optional={"article": GOOD}),
    "summaries": st.lists(st.fixed_dictionaries({"text": GOOD}), min_size=2, max_size=2)}
PAIRS = [("chosen", "rejected"), ("prompt", "chosen", "rejected"), ("info", "summaries", "choice"),
         ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
         ("prompt", "completion", "answer", "correct"), ("prompt", "completion", "label"),
         ("prompt", "completion", "answer", "correct", "finished"), ("query", "sample0", "sample1", "best")]
KINDS = [*SCHEMAS, *PAIRS, ("prompt", "answer", "task", "meta"), ("prompt", "answer", "level")]
NAMES = sorted({name for names in KINDS for name in names} | {*LIKELY, "system"})
UNKNOWN = ["", "a\nb", "\ud800", "x" * 300, "ANSWER", "0"]


DICE = st.randoms(use_true_random=True)  # evenly spread, which what hypothesis draws is not


@st.composite
def tables(draw, columns):
    """(columns, rows of cells): mostly these columns, and in one of them anything."""
    dice, columns = draw(DICE), list(columns)
    others = [name for name in NAMES if name not in columns or dice.random() < 0.1]  # or twice the same
    columns += dice.sample(others + UNKNOWN, dice.choice([0, 0, 1, 2]))
    letters = {*"ABCD"} <= {*columns} or {"choices", "options"} & {*columns}
    likely = LIKELY | {name: st.sampled_from("AB") for name in ("answer", "correct") if letters}
    odd = dice.choice([None, dice.choice(columns)])
    dice.shuffle(columns)
    columns = columns[dice.random() < 0.1:]
    cells = [likely.get(name, GOOD) | VALUE if name == odd else likely.get(name, GOOD) for name in columns]
    n = dice.choice([0, 1, 2, 3, 4, 5])
    return columns, draw(st.lists(st.tuples(*cells), min_size=n, max_size=n))


def as_json(value):
    text = json.dumps(value, default=str, ensure_ascii=len(str(value)) % 2 == 0)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def as_text(value):
    return value if isinstance(value, str) else as_json(value)


def as_array(values):
    """A column of pyarrow's, of texts where the values are of several kinds."""
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        texts = [as_text(value).encode("utf-8", "surrogatepass") for value in values]
        return pyarrow.array(texts).view(pyarrow.string())


def as_bytes(suffix, columns, rows):
    """The content of a file with these rows."""
    if suffix == ".parquet":
        names, file = [name.encode("utf-8", "replace").decode() for name in columns], io.BytesIO()
        arrays = [as_array([row[i] for row in rows]) for i in range(len(columns))]
        try:
            parquet.write_table(pyarrow.Table.from_arrays(arrays, names), file)
        except (pyarrow.ArrowException, NotImplementedError):  # no column, or a struct without fields
            return b""
        return file.getvalue()
    if suffix == ".csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows([columns, *(map(as_text, row) for row in rows)])
        text = file.getvalue()
    else:
        pairs = [[f"{as_json(name)}: {as_json(cell)}" for name, cell in zip(columns, row)] for row in rows]
        rows = ["{" + ", ".join(row) + "}" for row in pairs]
        text = f"[{', '.join(rows)}]" if suffix == ".json" else "".join(f"{row}\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


SAME = [lambda content, at: content]
MARKED_OR_CRLF = [lambda content, at: b"\xef\xbb\xbf" + content,
                  lambda content, at: content.replace(b"\n", b"\r\n")]
BROKEN = [lambda content, at: content[:at], lambda content, at: content[:at] + b"\xff" + content[at + 1:],
          lambda content, at: content[:at] + b"\0" + content[at:],
          lambda content, at: content[at:] + content[:at],
          lambda content, at: content.decode("latin1").encode("utf-16")]


@st.composite
def files(draw, columns):
    """(suffix, content)"""
    dice = draw(DICE)
    suffix = dice.choice([".jsonl", ".jsonl", ".json", ".csv", ".csv", ".parquet"])
    content = as_bytes(suffix, *draw(tables(columns)))
    damage = dice.choice(SAME * 20 + MARKED_OR_CRLF * (suffix != ".parquet") + BROKEN)
    content = damage(content, dice.randrange(len(content) + 1))
    if dice.random() < 0.3:
        content, suffix = gzip.compress(content, 1), suffix + ".gz"
        content = dice.choice(SAME * 8 + BROKEN[:3])(content, dice.randrange(len(content)))
    return suffix, content


def loaded(call, path, **options):
    """What a loader returns, or None where it refuses the file, in one line that names it."""
    try:
        return call(path, **options)
    except ValueError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and path.name in message and len(message) < 2000, message


def encodable(prompt):
    """Whether a prompt is one that `encode_prompt` takes."""
    if isinstance(prompt, str):
        return bool(prompt.encode())
    return prompt[-1]["role"] != "assistant" and all(
        isinstance(text, str) and text.encode() is not None for turn in prompt for text in turn.values())


def check(found):
    """Examples can be encoded, told apart, scored and written down."""
    assert found and len({e.id for e in found}) == len(found)
    for e in found:
        assert encodable(e.prompt) and f"{e.answer}{e.completion}".encode() is not None
        assert isinstance(e.answer, str) and isinstance(e.completion, str) and type(e.level) is int
        assert e.level >= 0 and e.task in TASKS and json.loads(json.dumps(e.meta)).keys() == e.meta.keys()
    check_rewards(*([getattr(e, name) for e in found] for name in ("completion", "answer", "task", "meta")))


class Letters:
    """Stands in for GPT-2's tokenizer: like it, it wants ids."""

    def decode(self, ids, **_):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize("columns", KINDS, ids=" ".join)
@examples(FILES // len(KINDS))
@given(st.data(), st.integers(0, 3), st.integers(0, 9), st.sampled_from([("1-4", range(1, 5)), (3, [3])]))
def test_any_file_is_read_or_refused_in_one_line(tmp_path, monkeypatch, columns, data, limit, seed, level):
    """FILES files, as many of each kind, each read by every loader."""
    monkeypatch.setattr(common.data, "load_tokenizer", lambda *_: Letters())
    suffix, content = data.draw(files(columns))
    path = tmp_path / f"any{suffix}"
    path.write_bytes(content)
    found = loaded(load_examples, path)
    if found is not None:
        check(found)
        ids = [e.id for e in found]
        few = load_examples(path, limit=limit, seed=seed)
        assert [e.id for e in few] == sorted(e.id for e in few) and {e.id for e in few} <= {*ids}
        assert len(few) == min(limit or len(ids), len(ids))
        assert repr(few) == repr(load_examples(path, limit=limit, seed=seed))
        of_level = loaded(load_examples, path, level=level[0]) or []
        assert [e.id for e in of_level] == [e.id for e in found if e.level in level[1]]
    if correct := loaded(load_examples, path, filter="correct"):
        check(correct)
    if parts := loaded(train_validation, path, n_validation=1, seed=seed):
        train, validation = parts
        assert len(validation) == 1 and train and validation[0].text not in {e.text for e in train}
    pairs = loaded(load_preferences, path, limit=limit, seed=seed) or []
    assert len({pair.id for pair in pairs}) == len(pairs) and (not limit or len(pairs) <= limit)
    for pair in pairs:
        assert encodable(pair.prompt) and f"{pair.chosen}{pair.rejected}".encode()
        assert pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected
        assert 0 <= pair.margin < math.inf
    for e, right in loaded(lambda path: load_generations([path]), path) or ():
        assert e.completion.strip() and type(right) is bool
        check([e])


# ---- Files whose content is known.

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
MAYBE = st.text("abc \"',;\n\r\t#<>{}[]\\é日\u202e", max_size=12)
NUMBER = st.integers(-10**9, 10**9)


def plain(prompt, answer, completion):
    return ({"prompt": prompt, "answer": answer, "completion": completion},
            (prompt, answer, completion, "math"))


def text(prompt, completion):
    return {"prompt": prompt, "completion": completion}, (prompt, "", completion, "text")


def chat(prompt, reply):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {"messages": turns}, (prompt, "", reply, "text")


def gsm8k(question, solution, number):
    solution = re.sub("[#<]", "", solution).strip()
    return ({"question": question, "answer": f"{solution}<<1+1=2>>\n#### {number:,}"},
            (question, str(number), f"{solution}\n#### {number}", "gsm8k"))


def boxed(problem, solution, number):
    solution = f"{re.sub('[{}]', '', solution)} \\boxed{{{number}}}"
    return {"problem": problem, "solution": solution}, (problem, str(number), solution, "math")


def choice(question, options, right):
    asked = "\n".join([question, *(f"{letter}) {option}" for letter, option in zip("ABCD", options))])
    row = {"question": question, **dict(zip("ABCD", options)), "answer": "ABCD"[right]}
    return row, (asked, "ABCD"[right], "", "choice")


ROWS = [  # (row, (prompt, answer, completion, task))
    st.builds(plain, WORDS, WORDS, MAYBE), st.builds(text, WORDS, WORDS), st.builds(chat, WORDS, MAYBE),
    st.builds(gsm8k, WORDS, MAYBE, NUMBER), st.builds(boxed, WORDS, MAYBE, NUMBER),
    st.builds(choice, WORDS, st.lists(WORDS, min_size=4, max_size=4), st.integers(0, 3))]


@st.composite
def valid_files(draw):
    """(suffix, content, what should be read)"""
    rows = draw(st.lists(draw(st.sampled_from(ROWS)), min_size=1, max_size=5))
    columns = draw(st.permutations(list(rows[0][0])))
    suffix = draw(st.sampled_from([".jsonl", ".json", ".parquet"] + [".csv"] * ("messages" not in columns)))
    content = as_bytes(suffix, columns, [[row[name] for name in columns] for row, _ in rows])
    if draw(st.booleans()) and suffix != ".parquet":
        content = b"\xef\xbb\xbf" + content
    if draw(st.booleans()):
        content, suffix = gzip.compress(content), suffix + ".gz"
    return suffix, content, [expected for _, expected in rows]


@examples(VALID)
@given(valid_files(), st.integers(0, 4), st.integers(0, 4), st.integers(0, 9))
def test_what_is_written_is_read(tmp_path, file, limit, n_validation, seed):
    """VALID files: every field comes back; a split has the asked sizes, and no question on both sides."""
    suffix, content, expected = file
    path = tmp_path / f"valid{suffix}"
    path.write_bytes(content)
    found = load_examples(path, dropped=(dropped := Counter()))
    assert [(e.prompt, e.answer, e.completion, e.task) for e in found] == expected and not dropped
    assert [e.id for e in found] == list(range(len(expected)))
    few = load_examples(path, limit=limit, seed=seed)
    assert len(few) == min(limit or len(found), len(found)) and [e for e in found if e in few] == few
    if len({e.prompt for e in found}) <= n_validation:
        with pytest.raises(ValueError, match="rows were asked for"):
            train_validation(path, n_validation=n_validation, seed=seed)
        return
    train, validation = train_validation(path, n_validation=n_validation, seed=seed)
    held_out = {e.prompt for e in validation}
    assert len(validation) == n_validation == len(held_out)
    assert sorted(e.id for e in train) == [e.id for e in found if e.prompt not in held_out]
    assert train_validation(path, n_validation=n_validation, seed=seed) == (train, validation)


QUESTION = {"prompt": "q", "answer": "1"}
REPLIED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
OF_CHOICE = {"question": "q", "choices": ["a", "b"], "answer": 0}
BAD_ROWS = [
    *(QUESTION | {"prompt": prompt} for prompt in (None, "", 5, "\ud800", [], REPLIED, [{"role": "user"}],
                                                   [{"role": None, "content": "q"}])),
    *(QUESTION | {"answer": answer} for answer in ({"a": 1}, ["1"], "\ud800", *RAW) if answer != "@inf@"),
    *(QUESTION | {"meta": meta} for meta in ("[" * 3000, [1], "x", 3)), QUESTION | {"system": ["s"]},
    *(QUESTION | {"task": "countdown", "meta": {"numbers": numbers}}
      for numbers in ([[1]], ["1"], None, [1.5])),
    {"prompt": "q", "answer": "9" * 5000, "task": "countdown", "meta": {"numbers": [1]}},
    {"a\nb": "q"}, {}, 3, None, "text", {"question": "q", "answer": 5}, {"question": "q", "answer": "5"},
    *(OF_CHOICE | {"choices": choices}
      for choices in ("abcd", ["a", None], ["a", math.nan], ["a"] * 11, None, [])),
    OF_CHOICE | {"answer": True}, OF_CHOICE | {"answer": -1}, OF_CHOICE | {"question": ""},
    {"problem": "p", "solution": 5}, {"problem": "p", "answer": None}, {"messages": REPLIED[:1]},
    {"messages": "hello"}, {"question": "q", "options": [1, 2], "rationale": "r", "correct": "A"}]


@examples(MISTAKES)
@given(st.sampled_from(BAD_ROWS), st.integers(0, 4), st.integers(0, 4),
       st.sampled_from([".jsonl", ".json", ".jsonl.gz"]))
def test_a_mistake_is_named_by_file_and_line(tmp_path, bad, before, after, suffix):
    """MISTAKES files of good rows and a bad one. A JSON list that json cannot parse has no lines."""
    good = as_json({"prompt": "q\u2028", "answer": "1"})
    rows = [good] * before + [as_json(bad)] + [good] * after
    text = f"[{', '.join(rows)}]" if suffix == ".json" else "\r\n".join(rows)
    content = text.encode("utf-8", "backslashreplace")
    path = tmp_path / f"mistake{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    with pytest.raises(ValueError) as caught:
        load_examples(path)
    message, unparsed = str(caught.value), suffix == ".json" and any(mark in str(bad) for mark in RAW)
    assert message.startswith(f"{path}: " if unparsed else f"{path}: line {before + 1}: ")
    assert len(message.splitlines()) == 1


# ---- Completions.

PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "\\fbox {", "{", "}", "\\{", "####", "#### ",
    "\n", "The answer is ", "answer: ", "Answer: (B)", "答案是B", "so ", "option C", "**7**", "= ", "7", "42",
    "1,080", "-3", "1/2", "0", "9" * 13, "+", "-", "*", "/", "(", ")", " ", ".", ",", "$", "%",
    "\\frac{1}{2}",
    "\\frac12", "\\text{m}", "\\sqrt2", "\\left(", "x", "A", "B", "C", "D", "E", "e", "é", "e\u0301",
    "\u0301" * 20, "\u200b", "\u202e", "٣", "²", "\ud800", "\0", "１", "million", "x = ", " " * 30, "\t",
    "((((", "1e9", "and "]
PIECE = st.sampled_from(PIECES) | st.sampled_from(PIECES) | st.text(max_size=3)
COMPLETION = st.lists(PIECE, max_size=14).map("".join)
GOLD = COMPLETION | st.sampled_from(["7", "42", "1080", "1/2", "\\frac{1}{2}", "B", "x+1", "0", "-3", ""])
EXPRESSION = st.lists(st.sampled_from([*"0123456789+-*/() ", "12", "("]), max_size=20).map("".join)


def check_rewards(responses, golds, tasks=None, metas=None, finished=None):
    """Each cheap reward is 0 to 1 and the same again; what is read of a response stands in it."""
    for name in ("correctness", "format", "digit", "mark"):
        columns = dict(tasks=tasks, metas=metas, finished=finished)
        values, again = (rewards.BUILT_IN[name](responses, responses, golds, **columns) for _ in range(2))
        assert values == again and len(values) == len(responses)
        assert all(type(value) is float and 0 <= value <= 1 for value in values)
    for response in responses:
        for done in (True, False):
            found, letter = extract_answer(response, finished=done), extract_answer(response, True, done)
            assert found is None or found and found in response
            assert letter is None or letter in ("A", "B", "C", "D", "E")
        assert rewards.rationale(response).removesuffix("</think>") in response
        assert isinstance(rewards.language(response), str)


@examples(COMPLETIONS)
@given(COMPLETION, GOLD, EXPRESSION, st.lists(st.integers(0, 2), max_size=20))
def test_any_completion_has_a_reward_between_0_and_1(response, gold, expression, ids):
    """COMPLETIONS texts: for a question of numbers, of letters and of countdown; cut off and finished."""
    check_rewards([response] * 2, [gold, "B"], ["math", "choice"], [{}, {}], [True, False])
    given = f"<answer>{expression}</answer>"
    check_rewards([response, given], ["42", "7"], ["countdown"] * 2, [{"numbers": [4, 2]}] * 2)
    assert same_answer(response, gold) == same_answer(gold, response)
    number = normalize_number(response)
    assert number is None or same_answer(response, str(number)) and same_answer(response, response)
    for text in (response, expression):
        if (exact := safe_arithmetic(text)) is not None:  # digits, operators and parentheses alone
            assert exact == eval(re.sub("([0-9]+)", r"Fraction(\1)", text.strip()))
    assert 0 <= rewards.repetition(ids) < 1 and rewards.repetition(ids) <= rewards.repetition(ids * 2)


UNMARKED = st.sampled_from([piece for piece in PIECES if "<" not in piece])
AROUND = st.lists(UNMARKED | st.text("ab1 \n\\{}", max_size=3), max_size=8).map("".join)
FRACTION = st.builds(Fraction, NUMBER, st.integers(1, 10**6))


@examples(MARKED)
@given(NUMBER | FRACTION, NUMBER, AROUND, AROUND, st.sampled_from("ABCDE"))
def test_what_is_marked_is_the_answer_whatever_stands_around_it(number, other, before, after, letter):
    """MARKED texts."""
    marked = f"<answer>{number}</answer>"
    responses = [f"<think>x</think>{marked}", f"<think>{before}</think>{marked}", before + marked + after]
    for response in [*responses, f"<answer>{other}</answer>{before}{marked}"]:  # the last counts
        for finished in (True, False):
            assert extract_answer(response, finished=finished) == str(number)
            for gold in (number, other):
                right = rewards.correctness([""], [response], [str(gold)], finished=[finished])
                assert right == [float(number == gold)]
        assert rewards.digit([""], [response], [""]) == [1.0]
    assert extract_answer(f"{before}<answer>{letter}</answer>{after}", choices=True) == letter
    assert same_answer(str(number), str(number)) and same_answer(letter, letter)
    whole = f"<think>{before}x</think>{marked}"
    assert rewards.format([""] * 3, [whole, whole + after, before + whole], [""] * 3) == [
        1.0, 0.5 if after.strip() else 1.0, 0.5 if before.strip() else 1.0]
    assert rewards.mark([""] * 2, [whole, marked + marked], [""] * 2) == [1.0, 0.0]


@examples(LONG)
@given(PIECE | st.lists(PIECE, max_size=3).map("".join), COMPLETION, COMPLETION, st.sampled_from("7B"))
def test_twenty_thousand_characters_are_read_at_once(tmp_path, piece, before, after, gold):
    """LONG texts of one piece over and over, as a completion and as the cells of a file."""
    text = f"{before}{(piece or 'x') * 20_000}"[:20_000 - len(after)] + after
    calls = [lambda task=task: rewards.correctness([""], [text], ["7"], [task], [{"numbers": [7]}])
             for task in ("math", "choice", "countdown")]
    calls += [lambda reward=reward: reward([""], [text], [gold])
              for reward in (rewards.format, rewards.digit, rewards.mark)]
    calls += [lambda read=read: read(text) for read in (rewards.rationale, rewards.language, safe_arithmetic)]
    calls += [lambda: normalize_number(text), lambda: normalize_number(text[:200])]
    calls += [lambda: same_answer(text, gold), lambda: same_answer(text[:1000], text[:999]),
              lambda: extract_answer(f"<answer>{text}</answer>", choices=True)]
    for n, row in enumerate((
            {"prompt": text, "answer": text}, {"problem": text, "solution": text}, {"messages": text},
            {"question": text, "answer": f"{text}\n#### 7"}, {"chosen": HH + text, "rejected": HH + "x"},
            {"question": text, "options": [text], "rationale": text, "correct": "A"})):
        path = tmp_path / f"{n}.jsonl"
        path.write_text(as_json(row), encoding="utf-8", errors="surrogatepass")
        load = load_preferences if "chosen" in row else load_examples
        calls.append(lambda load=load, path=path: loaded(load, path))
    for call in calls:
        begun = time.process_time()
        call()
        assert time.process_time() - begun < SECONDS
