"""Random files and random completions: a clear ValueError of one line or the right value, never a traceback.

650 files, 660 completions; the same in each run.
"""

import csv
import gzip
import io
import json
import math
import time
from collections import Counter
from fractions import Fraction
from functools import partial

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import data, rewards
from common.rewards import extract_answer, extract_choice, normalize_number, same_answer

FIXED = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

# ---- files ----

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
PLAIN = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=20).filter(
    lambda text: text.strip() == text and not text.startswith("\ufeff"))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-10**40, 10**40), st.floats(), WORDS,
                   st.just("\ud800"), st.just("#### 7"), st.sampled_from(["A", "B", "7", "", " ", "\x00", "1e999"]))
CELLS = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
                     max_leaves=5)
CHAT = st.lists(st.fixed_dictionaries({
    "role": st.sampled_from(["system", "user", "assistant", "tool", "", None]), "content": LEAVES}), max_size=4)
NAMES = ("prompt completion answer question problem solution options rationale correct choices messages label "
         "system chosen rejected score_chosen score_rejected query sample0 sample1 best info summaries choice "
         "level task meta finished id A B C D Question Answer Subject x").split()
SCHEMAS = [{"prompt": PLAIN, "answer": PLAIN}, {"prompt": PLAIN, "completion": PLAIN}, {"messages": CHAT},
           {"question": PLAIN, "answer": st.just("6 * 7 = 42\n#### 42")},
           {"problem": PLAIN, "solution": st.just(r"so \boxed{7}")},
           {"question": PLAIN, "options": st.lists(PLAIN, max_size=5), "rationale": PLAIN, "correct": LEAVES},
           {"question": PLAIN, "choices": st.lists(PLAIN, max_size=5), "answer": LEAVES},
           {"prompt": PLAIN | CHAT, "chosen": PLAIN | CHAT, "rejected": PLAIN | CHAT},
           {"info": CELLS, "summaries": CELLS, "choice": st.sampled_from([0, 1])},
           {"query": st.lists(st.integers(-1, 60000), max_size=3), "sample0": CELLS, "sample1": CELLS,
            "best": st.sampled_from([0, 1])},
           {"prompt": PLAIN, "completion": PLAIN, "correct": LEAVES, "answer": LEAVES, "task": LEAVES,
            "meta": LEAVES, "level": LEAVES, "finished": LEAVES}]
MORE = st.dictionaries(st.sampled_from(NAMES), CELLS | CHAT, max_size=3)
ROWS = st.lists(st.one_of(
    [st.builds(lambda row, more: row | more, st.fixed_dictionaries(schema), MORE | st.just({}))
     for schema in SCHEMAS] + [CELLS]), max_size=5)


def as_csv(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def written(folder, kind, rows):
    """A file of that kind with the rows; those that are no objects, or hold half a letter, where it can be."""
    (folder / "properties").mkdir(exist_ok=True)
    path = folder / f"properties/a.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    elif kind == "csv":
        text = as_csv([row for row in rows if isinstance(row, dict)])
        path.write_bytes(text.encode("utf-8", "replace"))
    else:
        path.write_text(lines)
    return path


def loaded(load, path):
    """What is loaded, or None where the file is refused in one line with its name."""
    try:
        return load(str(path))
    except ValueError as error:
        assert path.name in str(error) and "\n" not in str(error), repr(error)
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), repr(error)
        return None


def check_loaded(path):
    for example in loaded(partial(data.load_examples, label_tokenizer=""), path) or []:
        assert isinstance(example.text, str) and isinstance(example.answer, str) and example.task in data.TASKS
        assert isinstance(example.completion, str) and isinstance(example.level, int)
        (example.text + example.answer + example.completion).encode()
        rewards.judge([example], ["<answer>7</answer>"])
        json.dumps(example.meta)
    for pair in loaded(lambda name: data.load_preferences(name, label_tokenizer=""), path) or []:
        assert pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected
        assert math.isfinite(pair.margin) and pair.margin >= 0
    for example, right in loaded(lambda name: data.load_generations([name]), path) or []:
        assert example.completion.strip() and right in (True, False)


@settings(max_examples=400, **FIXED)
@given(rows=ROWS, kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "csv"]))
def test_files_of_all_columns(tmp_path_factory, rows, kind):
    check_loaded(written(tmp_path_factory.getbasetemp(), kind, rows))


@settings(max_examples=150, **FIXED)
@given(rows=ROWS, kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "csv"]), data_=st.data())
def test_files_that_are_cut_or_changed(tmp_path_factory, rows, kind, data_):
    """As a broken download leaves them: some bytes other ones, the end cut off."""
    path = written(tmp_path_factory.getbasetemp(), kind, rows)
    content = bytearray(path.read_bytes())
    for at in data_.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=3)):
        content[at:at + 1] = data_.draw(st.binary(max_size=3))
    path.write_bytes(content[:data_.draw(st.integers(0, len(content)))])
    check_loaded(path)


@settings(max_examples=100, **FIXED)
@given(rows=st.lists(st.fixed_dictionaries({"prompt": PLAIN, "answer": PLAIN, "completion": PLAIN}), min_size=4,
                     max_size=12, unique_by=lambda row: row["prompt"]),
       kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "csv", "parquet"]), seed=st.integers(0, 9))
def test_what_is_written_is_what_is_read(tmp_path_factory, rows, kind, seed):
    path = str(written(tmp_path_factory.getbasetemp(), kind, rows))
    examples = data.load_examples(path)
    assert [{"prompt": e.prompt, "answer": e.answer, "completion": e.completion} for e in examples] == rows
    train, held_out = data.train_validation(path, n_train=0, n_validation=2, seed=seed)
    assert Counter(e.text for e in train + held_out) == Counter(row["prompt"] for row in rows)
    assert len(held_out) == 2 and not {e.text for e in train} & {e.text for e in held_out}
    assert data.train_validation(path, n_train=0, n_validation=2, seed=seed) == (train, held_out)
    assert len(data.load_examples(path, limit=3, seed=seed)) == 3


# ---- completions ----

PIECES = st.one_of(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "{", "}", "#### ", "\n", " ", "=", "/",
                     "The answer is ", "Answer: ", "So, ", ". ", ", which is ", "**", "$", "%", "\\frac{1}{2}",
                     "\\sqrt", "^", "_", "A) ", "B", " or ", "not ", "½", "²", "٧", "×", "e\u0301", "\u200b", "\u202e",
                     "答案", "Ìdáhùn ni ", " cm", " million", "-", "1,234", "3,5", "\x00", "\ud800", "7" * 30, "(", ")"]),
    st.integers(-10**6, 10**6).map(str), st.text(max_size=8))
TEXTS = st.lists(PIECES, max_size=25).map("".join)


@settings(max_examples=400, **FIXED)
@given(text=TEXTS, gold=PIECES | TEXTS, finished=st.booleans())
def test_rewards_of_any_completion(text, gold, finished):
    for task in ("math", "choice", "gsm8k", "text"):
        (value,) = rewards.correctness([""], [text], [gold], [task], finished=[finished])
        assert value in (0.0, 1.0) and value == rewards.correctness([""], [text], [gold], [task], [{}], [finished])[0]
    for reward in (rewards.format, rewards.mark, rewards.digit):
        assert 0 <= reward([""], [text], [gold])[0] <= 1
    assert extract_answer(text, finished=finished) != ""
    assert extract_choice(text) in (None, *"ABCDE")
    if "," not in text + gold:  # 3,5 may stand for a gold 3.5, but 3.5 for no list
        assert same_answer(text, gold) == same_answer(gold, text)
    assert same_answer(gold, gold) == (0 < len(gold.strip()) and len(gold) <= 1000)
    if not finished and extract_answer(text, finished=False):
        assert "</answer>" in text or "}" in text
    assert len(rewards.rationale(text)) <= len(text) + len("</think>") and 0 <= rewards.repetition(list(text)) <= 1


@settings(max_examples=200, **FIXED)
@given(number=st.integers(-10**9, 10**9) | st.fractions(max_denominator=999), before=WORDS, thought=WORDS)
def test_a_marked_number_is_read_exactly(number, before, thought):
    for text in (f"{before}<think>{thought.replace('<', '')}</think><answer>{number}</answer>",
                 f"{thought.replace('{', '').replace('}', '')} \\boxed{{{number}}}"):
        assert Fraction(extract_answer(text)) == normalize_number(extract_answer(text)) == number
        assert rewards.correctness([""], [text], [str(number)]) == [1.0]
        assert rewards.correctness([""], [text], [str(number + 1)]) == [0.0]


@settings(max_examples=60, **FIXED)
@given(piece=st.lists(PIECES, min_size=1, max_size=3).map("".join).filter(len))
def test_no_reward_takes_long(piece):
    """20,000 characters of anything, again and again: 50 ms, and ten times that on a busy or slow machine."""
    text = (piece * 20_000)[:20_000]
    for call in (extract_answer, extract_choice, rewards.rationale, lambda text: rewards.format([""], [text], [""]),
                 lambda text: same_answer(f"<answer>{text}</answer>", text[:900])):
        begun = time.process_time()
        call(text)
        assert time.process_time() - begun < 0.5, (piece, call)
