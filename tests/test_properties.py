"""Random files and completions: each ends in a right value or in a ValueError of one line, in linear time.

Hypothesis draws the same ones every time: FILES files that may be broken in any way, VALID files whose content
is known, MISTAKES files with one bad row, COMPLETIONS texts, of which LONG have 20,000 characters.
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common.data
from common import rewards
from common.data import SCHEMAS, TASKS, load_examples, load_generations, load_preferences, train_validation
from common.rewards import extract_answer, normalize_number, safe_arithmetic, same_answer

FILES, VALID, MISTAKES, COMPLETIONS, LONG = 800, 150, 150, 400, 60
SECONDS = 0.5  # of CPU time for 20,000 characters: ten times what is wanted, for a slow machine


def examples(n):
    return settings(max_examples=n, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


# ---- Files: any columns, any cells, any format, broken anywhere.

HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
ODD_TEXT = st.sampled_from([
    "", " ", "\ud800", "a\0b", "\u202eab", "e\u0301", "a\r\nb", "a\rb", "\x1b[31m", "\u2028", "A", "e", "0", "1",
    "1.0", "nan", "inf", "-1", "1e999", "True", "false", "{}", '{"numbers": [1, 2]}', '{"numbers": ["1"]}', "[1]",
    "so\n#### 1,234", "#### \u0667", "\\boxed{7}", "\\boxed 7", "{" * 500, "[" * 3000, "9" * 5000, "x" * 3000, HH,
    "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "math", "countdown", "choice", "<<1+1=2>>", "Level 5", "None"])
TEXT = st.text(max_size=6) | ODD_TEXT
ROLE = st.sampled_from(["user", "assistant", "system"]) | TEXT | st.none() | st.integers()
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": TEXT}, optional={"name": TEXT, "tool_calls": st.none()})
RAW = {"@huge@": "9" * 5000, "@deep@": "[" * 900 + "]" * 900, "@deepest@": "[" * 90_000 + "]" * 90_000,
       "@bare@": "nope", "@inf@": "1e999", "@twice@": '{"a": 1, "a": 2}'}  # what json.dumps does not write
SCALAR = TEXT | st.sampled_from([
    None, math.nan, math.inf, -math.inf, 0, 1, -3, 2**70, 1.0, 2.5, 1e22, True, False, b"\xff", date(2001, 2, 3),
    datetime(2001, 2, 3), *RAW])
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    TEXT, inner, max_size=2), max_leaves=4) | st.lists(MESSAGE, max_size=3)

# Of each column what it should hold, as far as that goes.
GOOD = st.sampled_from(["a", "b", "q?", "日本", "e\u0301 ", "\u202eab", "two\r\nlines", "1+1", "\x1b[31m"])
CHAT = st.builds(lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}], GOOD, GOOD)
OPTIONS = st.lists(GOOD, min_size=2, max_size=5)
FLAG, SCORE = st.sampled_from([0, 1, True, False, "0", "1", "0.0", 1.0]), st.integers(-2, 2) | st.floats()
IDS = st.lists(st.integers(0, 50_000), min_size=1, max_size=3)
META = st.fixed_dictionaries({"numbers": st.lists(st.integers(1, 9), max_size=3)}, optional={"a": SCALAR})
LIKELY = {
    "answer": st.sampled_from(["7", "so\n#### 1,234", "#### -7.5"]), "Answer": st.sampled_from("ABCD"), "correct": FLAG,
    "solution": GOOD.map("{} so \\boxed{{7}}".format),
    "messages": CHAT, "chosen": GOOD | CHAT, "rejected": GOOD | CHAT, "prompt": GOOD | GOOD | CHAT.map(lambda c: c[:1]),
    "choices": OPTIONS, "options": OPTIONS, "label": FLAG, "finished": FLAG, "level": st.integers(0, 5) | st.text(),
    "task": st.sampled_from(TASKS), "meta": META | META.map(lambda meta: json.dumps(meta, default=str)),
    "score_chosen": SCORE, "score_rejected": SCORE, "choice": st.integers(0, 1), "best": st.integers(0, 1),
    "info": st.fixed_dictionaries({"subreddit": GOOD, "title": GOOD, "post": GOOD}, optional={"article": GOOD}),
    "summaries": st.lists(st.fixed_dictionaries({"text": GOOD}), min_size=2, max_size=2),
    "query": IDS, "sample0": IDS, "sample1": IDS}
PAIRS = [("chosen", "rejected"), ("prompt", "chosen", "rejected"), ("info", "summaries", "choice"),
         ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
         ("prompt", "completion", "answer", "correct"), ("prompt", "completion", "answer", "correct", "finished"),
         ("query", "sample0", "sample1", "best"), ("prompt", "completion", "label")]
NAMES = sorted({name for names in [*SCHEMAS, *PAIRS] for name in names} | {*LIKELY, "system"})
UNKNOWN = ["", "a\nb", "\ud800", "x" * 300, "ANSWER", "0"]


@st.composite
def tables(draw):
    """(columns, rows of cells): mostly those of a schema, and in one column anything."""
    columns = list(draw(st.sampled_from([*SCHEMAS, *PAIRS, *PAIRS])))
    columns += draw(st.just([]) | st.lists(st.sampled_from(NAMES + UNKNOWN), max_size=2))
    likely = LIKELY | {name: st.sampled_from("AB") for name in ("answer", "correct") if {*"ABCD"} <= {*columns}
                       or {"choices", "options"} & {*columns}}
    odd = draw(st.sampled_from([None] * len(columns) + columns))
    columns = draw(st.permutations(columns))[draw(st.sampled_from([0] * 9 + [1])):]
    cells = [likely.get(name, GOOD) | VALUE if name == odd else likely.get(name, GOOD) for name in columns]
    return columns, draw(st.lists(st.tuples(*cells), min_size=draw(st.sampled_from([0, 2, 2])), max_size=5))


def as_json(value):
    text = json.dumps(value, default=str, ensure_ascii=len(str(value)) % 2 == 0)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def as_bytes(suffix, columns, rows):
    """The file's content: pyarrow's types where its columns have one, else text."""
    if suffix == ".csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows([columns, *([c if isinstance(c, str) else as_json(c) for c in r] for r in rows)])
        return file.getvalue().encode("utf-8", "surrogatepass")
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        def column(values):
            try:
                return pa.array(values)
            except (pa.ArrowException, ValueError, TypeError, OverflowError):  # mixed
                raw = [value if isinstance(value, str) else as_json(value) for value in values]
                return pa.array([text.encode("utf-8", "surrogatepass") for text in raw]).view(pa.string())

        arrays = [column([row[i] for row in rows]) for i in range(len(columns))]
        names, file = [name.encode("utf-8", "replace").decode() for name in columns], io.BytesIO()
        try:
            pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, names), file)
        except (pa.ArrowException, NotImplementedError):  # no column, or a struct without fields
            return b""
        return file.getvalue()
    rows = ["{" + ", ".join(f"{as_json(n)}: {as_json(v)}" for n, v in zip(columns, row)) + "}" for row in rows]
    text = "[" + ", ".join(rows) + "]" if suffix == ".json" else "".join(row + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


DAMAGES = [
    lambda content, at: content, lambda content, at: b"\xef\xbb\xbf" + content,
    lambda content, at: content.replace(b"\n", b"\r\n"),
    lambda content, at: content[:at], lambda content, at: content[:at] + b"\xff" + content[at + 1:],
    lambda content, at: content[:at] + b"\0" + content[at:],
    lambda content, at: content.decode("latin1").encode("utf-16"),
    lambda content, at: content[at:] + content[:at]]
SUFFIXES = st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".csv", ".parquet"])


@st.composite
def files(draw):
    suffix = draw(SUFFIXES)
    damage = draw(st.sampled_from(DAMAGES[:1] * 16 + DAMAGES[1:] * (suffix != ".parquet") + DAMAGES[3:]))
    content = as_bytes(suffix, *draw(tables()))
    content = damage(content, draw(st.integers(0, max(1, len(content)))))
    if draw(st.sampled_from([False, False, True])):
        content, suffix = gzip.compress(content, 1), suffix + ".gz"
        content = draw(st.sampled_from(DAMAGES[:1] * 6 + DAMAGES[3:6]))(content, draw(st.integers(0, len(content))))
    return suffix, content


def loaded(call, path, **options):
    """What a loader returns, or None where it refuses the file: in one line that names it."""
    try:
        return call(path, **options)
    except ValueError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert path.name in message and len(message) < 2000, message


def encodable(prompt):
    """Whether a prompt is one that `encode_prompt` takes."""
    if isinstance(prompt, str):
        return bool(prompt.encode())
    return prompt[-1]["role"] != "assistant" and all(
        isinstance(m["role"], str) and isinstance(m["content"], str) and f"{m}".encode() for m in prompt)


def check_examples(found):
    assert found and len({e.id for e in found}) == len(found) and all(encodable(e.prompt) for e in found)
    for e in found:
        assert isinstance(e.answer, str) and isinstance(e.completion, str) and isinstance(e.level, int)
        assert e.level >= 0 and e.task in TASKS and json.dumps(e.meta) and f"{e.answer}{e.completion}".encode() is not None
    check_rewards([e.completion for e in found], [e.answer for e in found], [e.task for e in found],
                  [e.meta for e in found])


class Letters:
    """Stands in for GPT-2's tokenizer: like it, it wants ids."""

    def decode(self, ids, **_):
        return "".join(chr(97 + i % 26) for i in ids)


@examples(FILES)
@given(files(), st.integers(0, 3), st.integers(0, 9), st.sampled_from([None, None, "1-4", 3]))
def test_any_file_is_read_rightly_or_refused_in_one_line(tmp_path_factory, monkeypatch, file, limit, seed, level):
    """FILES files, each by five loaders."""
    monkeypatch.setattr(common.data, "load_tokenizer", lambda *_: Letters())
    suffix, content = file
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    found = loaded(load_examples, path)
    if found is not None:
        check_examples(found)
        ids = [e.id for e in found]
        few = load_examples(path, limit=limit, seed=seed)
        assert [e.id for e in few] == sorted(e.id for e in few) and len(few) == min(limit or len(ids), len(ids))
        assert repr(few) == repr(load_examples(path, limit=limit, seed=seed))
    for options in ({"level": level}, {"filter": "correct"}):
        some = loaded(load_examples, path, **options)
        assert some is None or {e.id for e in some} <= ({e.id for e in found} if found else {e.id for e in some})
    parts = loaded(train_validation, path, n_validation=1, seed=seed)
    if parts is not None:
        train, validation = parts
        assert len(validation) == 1 and train and not {e.text for e in train} & {e.text for e in validation}
    pairs = loaded(load_preferences, path, limit=limit, seed=seed)
    for pair in pairs or ():
        assert encodable(pair.prompt) and pair.chosen.strip() and pair.rejected.strip()
        assert pair.chosen != pair.rejected and 0 <= pair.margin < math.inf
        assert f"{pair.chosen}{pair.rejected}".encode()
    generations = loaded(lambda path: load_generations([path]), path)
    for e, right in generations or ():
        assert e.completion.strip() and right in (True, False) and encodable(e.prompt)
        check_rewards([e.completion], [e.answer], [e.task], [e.meta])


# ---- Files whose content is known.

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
PLAIN = st.text("abc \"',;\n\r\t#<>{}[]\\é日\u202e", max_size=12)
NUMBER = st.integers(-10**9, 10**9)
LETTERS = "ABCD"


def gsm8k(question, solution, number):
    solution = solution.replace("#", "").replace("<<", "").strip()
    return ({"question": question, "answer": f"{solution}<<1+1=2>>\n#### {number:,}"},
            (question, str(number), f"{solution}\n#### {number}", "gsm8k"))


def math_row(problem, solution, number):
    solution = f"{re.sub(r'[{}]', '', solution)} \\boxed{{{number}}}"
    return {"problem": problem, "solution": solution}, (problem, str(number), solution, "math")


def choice(question, options, right):
    text = "\n".join([question, *(f"{letter}) {option}" for letter, option in zip(LETTERS, options))])
    return {"question": question, **dict(zip(LETTERS, options)), "answer": LETTERS[right]}, (
        text, LETTERS[right], "", "choice")


ROWS = [  # strategies of (row, (prompt, answer, completion, task))
    st.builds(lambda p, a, c: ({"prompt": p, "answer": a, "completion": c}, (p, a, c, "math")), WORDS, WORDS, PLAIN),
    st.builds(lambda p, c: ({"prompt": p, "completion": c}, (p, "", c, "text")), WORDS, WORDS),
    st.builds(gsm8k, WORDS, PLAIN, NUMBER), st.builds(math_row, WORDS, PLAIN, NUMBER),
    st.builds(choice, WORDS, st.lists(WORDS, min_size=4, max_size=4), st.integers(0, 3)),
    st.builds(lambda p, c: ({"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]},
                            (p, "", c, "text")), WORDS, PLAIN)]


@st.composite
def valid_files(draw):
    """(suffix, content, what should be read, whether each row is on its own line)."""
    kind = draw(st.sampled_from(ROWS))
    rows = draw(st.lists(kind, min_size=1, max_size=5))
    columns = list(rows[0][0])
    suffix = draw(st.sampled_from([".jsonl", ".json", ".parquet"] + [".csv"] * ("messages" not in columns)))
    columns = draw(st.permutations(columns))
    content = as_bytes(suffix, columns, [[row[name] for name in columns] for row, _ in rows])
    if draw(st.booleans()) and suffix != ".parquet":
        content = b"\xef\xbb\xbf" + content
    if draw(st.booleans()):
        content, suffix = gzip.compress(content), suffix + ".gz"
    return suffix, content, [expected for _, expected in rows]


@examples(VALID)
@given(valid_files(), st.integers(0, 4), st.integers(0, 4), st.integers(0, 9))
def test_what_is_written_is_read(tmp_path_factory, file, limit, n_validation, seed):
    """VALID files: every field comes back; a split has the asked sizes, and no question on both sides."""
    suffix, content, expected = file
    path = tmp_path_factory.getbasetemp() / f"valid{suffix}"
    path.write_bytes(content)
    found = load_examples(path, dropped=(dropped := Counter()))
    assert [(e.prompt, e.answer, e.completion, e.task) for e in found] == expected and not dropped
    assert [e.id for e in found] == list(range(len(expected)))
    few = load_examples(path, limit=limit, seed=seed)
    assert len(few) == min(limit or len(found), len(found)) and [e for e in found if e in few] == few
    try:
        train, validation = train_validation(path, n_validation=n_validation, seed=seed)
    except ValueError:
        assert len({e.prompt for e in found}) < n_validation + 1
        return
    assert len(validation) == n_validation == len({e.prompt for e in validation})
    held_out = {e.prompt for e in validation}
    assert sorted(e.id for e in train) == [e.id for e in found if e.prompt not in held_out]
    assert train_validation(path, n_validation=n_validation, seed=seed) == (train, validation)


BAD_ROWS = [
    {"prompt": None, "answer": "1"}, {"prompt": "", "answer": "1"}, {"prompt": 5, "answer": "1"},
    {"prompt": "q", "answer": {"a": 1}}, {"prompt": "q", "answer": ["1"]}, {"prompt": "\ud800", "answer": "1"},
    {"prompt": "q", "answer": "@huge@"}, {"prompt": "q", "answer": "@deepest@"}, {"prompt": "q", "answer": "@bare@"},
    {"prompt": "q", "answer": "1", "meta": "[" * 3000}, {"prompt": "q", "answer": "1", "meta": [1]},
    {"prompt": "q", "answer": "1", "task": "countdown", "meta": {"numbers": [[1]]}},
    {"prompt": "q", "answer": "9" * 5000, "task": "countdown", "meta": {"numbers": [1]}},
    {"prompt": "q", "answer": "1", "system": ["s"]}, {"prompt": [{"role": None, "content": "q"}], "answer": "1"},
    {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "answer": "1"},
    {"a\nb": "q"}, {}, 3, None, "text", {"question": "q", "answer": 5}, {"question": "q", "answer": "5"},
    {"question": "q", "choices": "abcd", "answer": 0}, {"question": "q", "choices": ["a", None], "answer": 0},
    {"question": "q", "choices": ["a", "b"], "answer": True}, {"question": "", "choices": ["a", "b"], "answer": 0},
    {"question": "q", "choices": ["a"] * 11, "answer": 0}, {"question": "q", "choices": None, "answer": 0},
    {"problem": "p", "solution": 5}, {"problem": "p", "answer": None}, {"messages": [{"role": "user"}]}]


@examples(MISTAKES)
@given(st.sampled_from(BAD_ROWS), st.lists(st.sampled_from(["1", "\u2028", " x"]), max_size=4), st.integers(0, 4),
       st.sampled_from([".jsonl", ".json", ".jsonl.gz"]))
def test_a_mistake_is_named_by_file_and_line(tmp_path_factory, bad, answers, at, suffix):
    """MISTAKES files of good rows and one bad one."""
    rows = [as_json({"prompt": "q", "answer": answer}) for answer in answers]
    rows.insert(at, as_json(bad))
    number = rows.index(as_json(bad)) + 1
    text = f"[{', '.join(rows)}]" if suffix == ".json" else "\r\n".join(rows)
    path = tmp_path_factory.getbasetemp() / f"mistake{suffix}"
    content = text.encode("utf-8", "backslashreplace")
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    with pytest.raises(ValueError) as caught:
        load_examples(path)
    message = str(caught.value)
    unread = suffix == ".json" and any(mark in rows[number - 1] for mark in map(RAW.get, RAW))  # json's own words
    assert message.startswith(f"{path}: " if unread else f"{path}: line {number}: ")
    assert len(message.splitlines()) == 1


# ---- Completions.

PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "\\fbox {", "{", "}", "\\{", "####", "#### ", "\n",
    "The answer is ", "answer: ", "Answer: (B)", "答案是B", "so ", "option C", "**7**", "= ", "7", "42", "1,080",
    "-3", "1/2", "0", "9" * 13, "+", "-", "*", "/", "(", ")", " ", ".", ",", "$", "%", "\\frac{1}{2}", "\\frac12",
    "\\text{m}", "\\sqrt2", "\\left(", "x", "A", "B", "C", "D", "E", "e", "é", "e\u0301", "\u0301" * 20, "\u200b",
    "\u202e", "٣", "²", "\ud800", "\0", "１", "million", "x = ", " " * 30, "\t", "((((", "1e9", "and "]
PIECE = st.sampled_from(PIECES) | st.sampled_from(PIECES) | st.text(max_size=3)
COMPLETION = st.lists(PIECE, max_size=14).map("".join)
GOLD = st.sampled_from(["7", "42", "1080", "1/2", "\\frac{1}{2}", "B", "x+1", "0", "-3", "A", ""]) | COMPLETION
EXPRESSION = st.lists(st.sampled_from([*"0123456789+-*/() ", "12", "("]), max_size=20).map("".join)


def check_rewards(responses, golds, tasks=None, metas=None, finished=None):
    """Every built-in reward but math is 0 to 1 and the same again; what it reads is text of the response."""
    for name in ("correctness", "format", "digit", "mark"):
        values = rewards.BUILT_IN[name](responses, responses, golds, tasks=tasks, metas=metas, finished=finished)
        again = rewards.BUILT_IN[name](responses, responses, golds, tasks=tasks, metas=metas, finished=finished)
        assert values == again and len(values) == len(responses)
        assert all(type(value) is float and 0 <= value <= 1 for value in values)
    for response in responses:
        for done in (True, False):
            found, letter = extract_answer(response, finished=done), extract_answer(response, True, done)
            assert found is None or found == found.strip() and found in response, found
            assert letter in (None, *"ABCDE")
        assert isinstance(rewards.rationale(response), str) and isinstance(rewards.language(response), str)
        assert rewards.rationale(response).removesuffix("</think>") in response


@examples(COMPLETIONS)
@given(COMPLETION, GOLD, EXPRESSION, st.lists(st.integers(0, 2), max_size=20))
def test_any_completion_has_a_reward_between_0_and_1(response, gold, expression, ids):
    """COMPLETIONS texts: for a question of numbers, of letters and of countdown; cut off and finished."""
    check_rewards([response] * 2, [gold, "B"], ["math", "choice"], [{}, {}], [True, False])
    given = f"<answer>{expression}</answer>"
    check_rewards([response, given], ["42", "7"], ["countdown"] * 2, [{"numbers": [4, 2]}] * 2)
    assert same_answer(response, gold) == same_answer(gold, response)
    number = normalize_number(response)
    assert number is None or (same_answer(response, str(number)) and same_answer(response, response))
    for text in (response, expression):
        exact = safe_arithmetic(text)
        if exact is not None:  # Python agrees: the text is digits, operators and parentheses
            assert exact == eval(re.sub(r"\d+", r"Fraction(\g<0>)", text.strip()))
    assert 0 <= rewards.repetition(ids) < 1 and rewards.repetition(ids * 2) >= rewards.repetition(ids)


NEUTRAL = st.lists(st.sampled_from([p for p in PIECES if "<" not in p]) | st.text("ab1 \n\\{}", max_size=3),
                   max_size=8).map("".join)
FRACTIONS = st.builds(lambda a, b: str(Fraction(a, b)), NUMBER, st.integers(1, 10**6))


@examples(COMPLETIONS // 2)
@given(NUMBER.map(str) | FRACTIONS, NUMBER, NEUTRAL, NEUTRAL, st.sampled_from("ABCDE"))
def test_what_is_marked_is_the_answer_whatever_stands_around_it(number, other, before, after, letter):
    """COMPLETIONS // 2 texts."""
    marked = f"<answer>{number}</answer>"
    for response in (f"<think>x</think>{marked}", f"{before}{marked}{after}", f"<think>{before}</think>{marked}"):
        for finished in (True, False):
            assert extract_answer(response, finished=finished) == number
            assert rewards.correctness([""], [response], [number], finished=[finished]) == [1.0]
        assert rewards.correctness([""], [response], [str(other)]) == [float(Fraction(number) == other)]
        assert rewards.digit([""], [response], [""]) == [1.0]
    assert extract_answer(f"{before}<answer>{letter}</answer>{after}", choices=True) == letter
    assert same_answer(number, number) and same_answer(letter, letter)
    assert rewards.format([""], [f"<think>{before}x</think>{marked}"], [""]) == [1.0]


@examples(LONG)
@given(st.lists(PIECE, min_size=1, max_size=3).map("".join), COMPLETION, COMPLETION, st.sampled_from(["7", "B", "x+1"]))
def test_twenty_thousand_characters_are_read_at_once(tmp_path_factory, piece, before, after, gold):
    """LONG texts of one piece over and over, as a completion and as the cells of a file."""
    text = f"{before}{(piece or 'x') * 20_000}"[:20_000 - len(after)] + after
    path = tmp_path_factory.getbasetemp() / "long.jsonl"
    calls = [lambda task=task: rewards.correctness([""], [text], [gold], [task], [{"numbers": [7]}])
             for task in (("math", "choice", "countdown") if gold == "7" else ("math", "choice"))]
    calls += [lambda f=f: f([""], [text], [gold]) for f in (rewards.format, rewards.digit, rewards.mark)]
    calls += [lambda: rewards.rationale(text), lambda: rewards.language(text), lambda: safe_arithmetic(text),
              lambda: same_answer(text, text), lambda: extract_answer(f"<answer>{text[:18_000]}</answer>", True)]
    for row in ({"prompt": text, "answer": text}, {"problem": text, "solution": text},
                {"question": text, "answer": f"{text}\n#### 7"}, {"question": text, "options": [text], "rationale": text,
                                                                 "correct": "A"}):
        path.write_text(as_json(row) + "\n", encoding="utf-8", errors="surrogatepass")
        calls.append(lambda content=path.read_bytes(): path.write_bytes(content) and loaded(load_examples, path))
    calls.append(lambda: path.write_text(json.dumps({"chosen": HH + text, "rejected": HH + "x"})) and loaded(
        load_preferences, path))
    for call in calls:
        begun = time.process_time()
        call()
        assert time.process_time() - begun < SECONDS
