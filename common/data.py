"""Data sets and generated tasks, as Example (prompt, gold answer) or Preference (prompt, two replies).

    load_examples("gsm8k", "test")                            # the hub
    load_examples("runs/grpo/samples.csv", filter="correct")  # a local file, here what a run sampled
    train_validation("arithmetic", n_train=5000, n_validation=500, level="1-3")
    load_preferences("ultrafeedback")
    load_preferences("runs/a/samples.csv,runs/b/samples.csv")  # right against wrong; commas join sources

The columns decide how a row is read: see SCHEMAS and `_pair`. A user's mistake is a ValueError of one line.
"""

import csv
import gzip
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import urllib.request
from collections import Counter, defaultdict
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache, partial
from math import isfinite
from pathlib import Path
from types import SimpleNamespace

from jinja2 import TemplateError

from common import dist, matrices
from common.draws import answer_opening, answer_prefix
from common.models import load_tokenizer, offline_without_hub
from common.rewards import last_boxed

TASKS = ("arithmetic", "countdown", "gsm8k", "math", "choice", "text", *matrices.LEVELS)


@dataclass(frozen=True)
class Example:
    id: int  # unique in a data set, fixed by (data, seed): keys the sampling noise and the groups
    prompt: str | list[dict]  # what the user says, or chat messages [{"role": ..., "content": ...}, ...]
    answer: str = ""  # gold final answer: "72", "\\frac{1}{2}", "B"
    completion: str = ""  # worked solution to imitate, "" where there is none
    level: int = 0  # difficulty, 0 where the data has none
    task: str = "text"  # one of TASKS: picks the answer check
    meta: dict = field(default_factory=dict)  # JSON-able; countdown: {"numbers": [...], "target": ...},
    # matrix-inverse and rref: {"matrix": [[...], ...]}

    @property
    def text(self):
        return prompt_text(self.prompt)


@dataclass(frozen=True)
class Preference:
    id: int  # row number in the data set
    prompt: str | list[dict]
    chosen: str
    rejected: str
    margin: float = 0.0  # score of chosen minus score of rejected, 0 where the data has no scores
    others: tuple[str, ...] = ()  # further replies that lost to chosen, where the best of N was labelled


# ------------------------------------------------------------------------------------------------------------
# Generated tasks. The text of a problem alone decides its split, so no seed puts a validation problem into a
# training set.

SPLITS = ("validation", "test", "train", "train", "train")  # by hash of the prompt, modulo 5
HINT = "{prompt} (The answer is {answer}.)"  # of arithmetic-hinted; star.py asks again in these words
GIVEN_UP = 3  # highest level that arithmetic-hinted's authors try without a hint
WORKED_SHARE = 0.4  # of arithmetic-mixed's demonstrations: a corpus where most authors skip the working ...
SLIP = 2  # ... and then are off by up to this much, each error as likely as the right answer
GENERATED_ROWS = 10_000  # where no number is asked for
PATIENCE = 200  # draws in a row that bring nothing new before a level of a task counts as exhausted


def _arithmetic(rng, level):
    """A chain of level + 1 numbers, 1 to 9, joined by + and -, worked from left to right."""
    total, *numbers = rng.choices(range(1, 10), k=level + 1)
    problem, steps = str(total), []
    for sign, number in zip(rng.choices("+-", k=level), numbers):
        result = total + number if sign == "+" else total - number
        steps.append(f"{total}{sign}{number}={result}")
        problem += f"{sign}{number}"
        total = result
    completion = f"<think>{' '.join(steps)}</think><answer>{total}</answer>"
    return dict(prompt=f"Compute {problem}.", answer=str(total), completion=completion, task="arithmetic")


def _countdown(rng, level):
    """level + 2 numbers, 1 to 25, and a target, 1 to 200, that all of them together reach."""
    while True:
        # Sorted, or the same problem could stand in training and validation under two orders.
        numbers = sorted(rng.choices(range(1, 26), k=level + 2))
        pool, steps = [(number, str(number)) for number in numbers], []
        while len(pool) > 1:
            rng.shuffle(pool)
            (b, right), (a, left) = sorted([pool.pop(), pool.pop()])  # a >= b: no step goes below zero
            results = [("+", a + b), ("*", a * b)]
            if a > b:
                results.append(("-", a - b))
            if a % b == 0:
                results.append(("/", a // b))
            sign, result = rng.choice(results)
            steps.append(f"{a}{sign}{b}={result}")
            pool.append((result, f"({left}{sign}{right})"))
        target, expression = pool[0]
        if target <= 200 and target not in numbers:  # a target among the numbers needs no arithmetic
            break
    rules = "Use each number at most once, with + - * / and parentheses."
    prompt = f"Using the numbers {', '.join(map(str, numbers))}, make {target}. {rules}"
    completion = f"<think>{' '.join(steps)}</think><answer>{expression[1:-1]}</answer>"
    meta = {"numbers": numbers, "target": target}
    return dict(prompt=prompt, answer=str(target), completion=completion, task="countdown", meta=meta)


GENERATED = {  # name: (problem maker, highest level, level where none is given)
    "arithmetic": (_arithmetic, 8, 3),
    "arithmetic-mixed": (_arithmetic, 8, 3),  # the same problems; all but WORKED_SHARE state a guess alone
    "arithmetic-hinted": (_arithmetic, 8, 3),  # half have a hint and are worked; a hard one without is not
    "countdown": (_countdown, 4, 1),
    "matrix-inverse": (matrices.inverse_problem, len(matrices.LEVELS["matrix-inverse"]), 1),
    "rref": (matrices.rref_problem, len(matrices.LEVELS["rref"]), 1),
}


def is_generated(data) -> bool:
    """A name in GENERATED; matrix-inverse/0.5 as well, with the share of singular matrices."""
    return re.sub(r"(?<=^matrix-inverse)/.*", "", str(data)) in GENERATED


def every_level(data) -> str:
    """All levels of a generated task, "1-8"; "" of other data."""
    return f"1-{GENERATED[data.partition('/')[0]][1]}" if is_generated(data) else ""


def _levels(level):
    """3, "3" or "1-4" as a range."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(level).strip())
    levels = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not levels:
        raise ValueError(f"level {level!r} is neither a number nor a range such as 1-4")
    return levels


def _generate(data, split, level, limit, seed, filter):
    if filter:
        raise ValueError(f"filter {filter!r} is for a run's samples.csv; {data} is generated")
    name, _, share = data.partition("/")
    make, highest, default = GENERATED[name]
    if share:
        if not re.fullmatch(r"0(\.\d{1,9})?|1(\.0)?", share):
            raise ValueError(f"{data}: the share of singular matrices is a number from 0 to 1, not {share}")
        make = partial(make, singular_share=float(share))
    if split not in SPLITS:
        raise ValueError(f"{data} has no split {split!r}: use train, validation or test")
    levels = _levels(default if level is None else level)
    if not 1 <= levels[0] <= levels[-1] <= highest:
        raise ValueError(f"{data} has levels 1 to {highest}, not {level!r}")
    rng = random.Random(f"{GENERATED[name][0].__name__} {levels} {seed}")
    examples, seen, old, drawn, singular = [], set(), Counter(), Counter(), Counter()
    for draw in itertools.count():
        left = [level for level in levels if old[level] < PATIENCE]
        if len(examples) == (limit or GENERATED_ROWS) or not (left or limit):
            return examples
        if not left:
            found = f"{data} has {len(examples)} different {split} problems of level {level or default}"
            raise ValueError(f"{found}, but {limit} were asked for: ask for fewer, or for a higher level")
        row_level = rng.choice(left)
        problem = make(rng, row_level)
        prompt = problem["prompt"]
        old[row_level] += 1
        if prompt in seen:
            continue
        if problem["answer"] == matrices.SINGULAR:  # or they would be more where the others run out
            if singular[row_level] + 1 > float(share or matrices.SINGULAR_SHARE) * (drawn[row_level] + 1):
                continue
            singular[row_level] += 1
        drawn[row_level] += 1
        seen.add(prompt)
        old[row_level] = 0
        digest = hashlib.sha256(prompt.encode()).digest()
        if SPLITS[int.from_bytes(digest[:8], "big") % len(SPLITS)] != split:
            continue
        if data in ("arithmetic-mixed", "arithmetic-hinted"):
            author, hinted = random.Random(f"author {seed} {prompt}"), data == "arithmetic-hinted"
            if hinted and author.random() < 0.5:
                problem["prompt"] = HINT.format(**problem)
            elif hinted and row_level > GIVEN_UP:
                problem["completion"] = "<answer>?</answer>"
            elif author.random() >= WORKED_SHARE:
                guess = int(problem["answer"]) + author.randint(-SLIP, SLIP)
                problem["completion"] = f"<answer>{guess}</answer>"
        # All splits read one stream of draws, so their ids never meet either.
        examples.append(Example(id=draw, level=row_level, **problem))


# ------------------------------------------------------------------------------------------------------------
# Rows of files and of the hub, as (place, row): the place is what an error message names.

MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
HUB = {  # name: what it is on the hub, org/name[:config], read one after the other
    "gsm8k": ["openai/gsm8k:main"],
    "math": [f"EleutherAI/hendrycks_math:{subject}" for subject in MATH.split()],
    "math500": ["HuggingFaceH4/MATH-500"],  # what "math" reads as its test split
    "aqua": ["deepmind/aqua_rat:raw"],
    "mmlu": ["cais/mmlu:all"],
    "ultrafeedback": ["trl-lib/ultrafeedback_binarized"],
    "hh": ["Anthropic/hh-rlhf"],
    "summarize-from-feedback": ["trl-lib/tldr-preference"],
}
OPENAI = "https://openaipublic.blob.core.windows.net/lm-human-preferences/labels"
URLS = {f"lm-human-preferences{name}": f"{OPENAI}/{file}.json" for name, file in {
    "": "sentiment/offline_5k", "/sentiment": "sentiment/offline_5k",
    "/descriptiveness": "descriptiveness/offline_5k", "/tldr": "tldr/offline_60k",
    "/cnndm": "cnndm/offline_60k"}.items()}


def _rows(data, split):
    path = Path(os.path.expanduser(data))  # os.path: no error where many joined paths are too long for one
    if "," in data and not os.path.exists(path):
        if generated := [part for part in data.split(",") if is_generated(part.strip())]:
            raise ValueError(f"{generated[0]} is generated: no part of other data, as in {data}")
        return itertools.chain.from_iterable(_rows(part.strip(), split) for part in data.split(","))
    if data in URLS or data.startswith(("https://", "http://")):
        return _file_rows([_download(URLS.get(data, data))])
    if data in HUB:
        if (data, split) == ("mmlu", "train"):  # its auxiliary_train is other people's data
            split = "dev+validation"
        return _hub_rows(HUB["math500" if (data, split) == ("math", "test") else data], split)
    if data.startswith("mmmlu/"):  # which has no other split
        return _hub_rows([data.replace("mmmlu/", "openai/MMMLU:")], "test")
    if os.path.isdir(path):
        return _file_rows(_split_files(path, split))
    if os.path.exists(path) or _suffix(path) in READERS:
        return _file_rows([path])
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data):
        return _hub_rows([data], split)
    names = f"{', '.join([*GENERATED, *HUB, *URLS])}, mmmlu/LOCALE, an org/name[:config] on the hub, a URL"
    raise ValueError(f"unknown data {data!r}: use {names}, or a local {' '.join(READERS)} file or folder")


def _download(url):
    """The file behind a URL, fetched once into $UNROLLED_CACHE; its sha256 is printed, to be compared."""
    shown = re.sub(r"//[^/@]*@", "//", url)  # without a password
    cache = Path(os.environ.get("UNROLLED_CACHE") or "~/.cache/unrolled").expanduser()
    path = cache / hashlib.sha256(url.encode()).hexdigest()[:8] / url.rpartition("/")[2]
    if not path.exists():
        aside = path.with_name(f".{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=60) as reply, open(aside, "wb") as file:
                shutil.copyfileobj(reply, file)
            length = reply.headers.get("Content-Length")
            if length and int(length) != aside.stat().st_size:
                raise ValueError(f"{aside.stat().st_size} of {length} bytes came")
            if reply.headers.get_content_type() == "text/html":
                raise ValueError("it is a web page, not data: perhaps one to log in")
            os.replace(aside, path)
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            aside.unlink(missing_ok=True)
            reason = re.sub(r"[^/\s'\"]*@", "", str(error))
            raise ValueError(f"cannot download {shown} ({reason}): fetch it where there is a network and "
                             "pass the local file") from None
    if dist.is_main():
        print(f"{shown}: sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}, kept as {path}")
    return path


def _suffix(path):
    return Path(path.name.removesuffix(".gz")).suffix


def _split_files(folder, split):
    """train.jsonl, train-00000-of-00002.parquet, data/train-*.parquet, or all files of the folder train/.

    Where there is no train split (MMLU), dev and validation together.
    """
    names = ("validation", "valid", "val", "dev") if split == "validation" else (split,)
    for name in names if re.fullmatch(r"\w[\w.-]*", split) else ():  # "" and "/" are no part of a pattern
        patterns = (f"{name}.*", f"{name}-*", f"data/{name}-*", f"{name}/*")
        files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        files = [file for file in files if _suffix(file) in READERS]
        if files:
            return files
    if split == "train":
        files = []
        for other in ("dev", "validation"):
            with suppress(ValueError):
                files += [file for file in _split_files(folder, other) if file not in files]
        if files:
            return files
    raise ValueError(f"no split {split!r}: {_listing(folder)}")


def _listing(folder):
    names = sorted(path.name for path in folder.glob("*"))
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{folder} holds {', '.join(names[:12]) or 'nothing'}{more}"


def _file_rows(paths):
    for path in paths:
        suffix = _suffix(path)
        if not os.path.exists(path):
            raise ValueError(f"no file {path}: {_listing(path.parent)}")
        if suffix not in READERS:
            raise ValueError(f"{path} is none of {' '.join(READERS)}")
        # utf-8-sig drops the mark Excel puts in front; newline="" leaves the line ends in CSV cells alone.
        text = {"mode": "rt", "encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
        mode = {"mode": "rb"} if suffix == ".parquet" else text
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, **mode) as file:
                for number, row in READERS[suffix](file if suffix == ".parquet" else _lines(file)):
                    yield f"{path}: line {number}", row
        except Exception as error:  # gzip, json and pyarrow raise many kinds
            raise ValueError(f"{path}: {_line(error)}") from None


def _line(error):
    """What an error says, on one line that can be read."""
    return f"{' '.join((str(error) or type(error).__name__).split()):.1000}"


def _lines(file):
    for number, line in enumerate(file, 1):
        try:
            line.encode()
        except UnicodeEncodeError:  # bytes that are no UTF-8 were read as halves of characters
            raise ValueError(f"line {number}: not utf-8: save the file as UTF-8") from None
        yield line


def _object(pairs):
    """A JSON object, in which no name stands twice."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError(f"a name stands twice in an object: {', '.join(name for name, _ in pairs)}")
    return row


def _json_rows(lines):
    for number, line in enumerate(lines, 1):
        if number == 1 and line.lstrip().startswith("["):  # one JSON list instead of lines
            yield from enumerate(json.loads(line + "".join(lines), object_pairs_hook=_object), 1)
        elif line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: not a JSON line: {getattr(error, 'msg', error)}") from None
            yield number, row


def _csv_rows(lines):
    csv.field_size_limit(2**31 - 1)  # completions can be long
    reader, header = csv.reader(lines, strict=True), None
    try:
        for cells in filter(None, reader):  # an empty line has no cells
            if header is None and len(cells) == 6 and re.fullmatch("[A-D]", cells[5]) and not (
                    {"question", "answer"} <= {cell.lower() for cell in cells}):
                header = ["question", "A", "B", "C", "D", "answer"]  # MMLU's own files have no header
            if header is None:
                header = cells
                if twice := [name for name, n in Counter(header).items() if n > 1]:
                    raise ValueError(f"line {reader.line_num}: two columns are named {twice[0]!r}")
                continue
            if len(cells) != len(header):
                raise ValueError(f"line {reader.line_num}: {len(cells)} cells under {len(header)} columns")
            yield reader.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _parquet_rows(file):
    from pyarrow.parquet import ParquetFile

    yield from enumerate((row for batch in ParquetFile(file).iter_batches() for row in batch.to_pylist()), 1)


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _hub_rows(sources, split):
    for source in sources:
        hub_id, _, config = source.partition(":")
        offline_without_hub()
        try:
            import datasets

            rows = datasets.load_dataset(hub_id, config or None, split=split)
        except Exception as error:  # the hub's clients raise many kinds, over many lines
            reason = (str(error) or type(error).__name__).splitlines()[0]
            what = "reach the hub for" if isinstance(error, ConnectionError) else f"load split {split} of"
            way_out = "pass --data a local .jsonl/.csv/.parquet file instead"
            raise ValueError(f"cannot {what} {source} ({reason}): {way_out}") from None
        for number, row in enumerate(rows, 1):
            yield f"{hub_id} {split} row {number}", row


# ------------------------------------------------------------------------------------------------------------
# Row -> fields of an Example, one small function per published schema.


def _text(row, column):
    value = row.get(column)
    if value is None or value != value:  # NaN, as pandas writes what is missing
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"column {column} holds a {type(value).__name__}, not text")
    return str(value)


def _with_thinking(message):
    """What an answer's reasoning_content says, written into its content as templates write it."""
    if message["role"] != "assistant" or not (thinking := message.get("reasoning_content")):
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return rest | {"content": f"<think>\n{thinking.strip()}\n</think>\n\n{message['content']}"}


def _messages(messages):
    try:
        messages = [_with_thinking(m) for m in messages]
        for message in messages:
            if more := [key for key, value in message.items() if value and key not in ("role", "content")]:
                raise ValueError(f"a chat message has {more[0]}, which is not read: write it into its "
                                 "content, or leave it out")
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    except (TypeError, KeyError, AttributeError):
        messages = []
    if not messages or not all(isinstance(text, str) for m in messages for text in m.values()):
        raise ValueError("chat messages must be a list of {role, content}, both being text")
    return messages


def _with_system(row, prompt):
    """The prompt, behind what a column `system` says."""
    system = _text(row, "system")
    if not system:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        raise ValueError("a column system, and a system message among the others")
    return [{"role": "system", "content": system}, *messages]


def _ends_in_reply(prompt):
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def _check(prompt, *texts):
    said = [prompt] if isinstance(prompt, str) else [text for turn in prompt for text in turn.values()]
    if not said[-1]:
        raise ValueError("the prompt is empty")
    if _ends_in_reply(prompt):
        raise ValueError("the prompt ends in an assistant turn: there is nothing to reply to")
    for text in (*said, *texts):
        text.encode()  # UnicodeEncodeError, a ValueError, of half a character: no tokenizer takes it


def _prompt(prompt):
    """Text, or checked chat messages; a single user message becomes its text."""
    if isinstance(prompt, str):
        return prompt
    messages = _messages(prompt)
    return messages[0]["content"] if [m["role"] for m in messages] == ["user"] else messages


def _split_reply(messages, prompt=None):
    """(prompt, reply) of chat messages; the prompt precedes the reply or has its own column."""
    *turns, last = _messages(messages)
    if last["role"] != "assistant" or not (turns or prompt):
        raise ValueError("chat messages must end in an assistant turn, after a prompt")
    return _prompt(turns or prompt), last["content"]


def _gsm8k(row):
    solution, mark, answer = _text(row, "answer").rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", answer):
        found = f"the answer ends in {_text(row, 'answer')[-20:]!r}, not in '#### number' as in GSM8K"
        raise ValueError(f"{found}; if it is a plain answer, name the columns prompt and answer")
    solution = re.sub(r"<<[^<>]*>>", "", solution).strip()  # without the calculator annotations
    completion = f"{solution}\n#### {answer}"
    return dict(prompt=_text(row, "question"), answer=answer, completion=completion, task="gsm8k")


def _math(row):
    solution = _text(row, "solution")
    bare = re.findall(r"\\(?:boxed|fbox) +([^\s${}]+)", solution)[-1:]  # \boxed 2
    answer = _text(row, "answer") or last_boxed(solution) or "".join(bare)
    if not answer:
        raise ValueError(r"no answer: neither in a column answer nor as \boxed{...} in the solution")
    return dict(prompt=_text(row, "problem"), answer=answer, completion=solution, task="math")


def _choice(row):
    """AQuA's options, or MMLU's choices or columns A to D (MMMLU writes Question, A, Answer)."""
    row = {column.lower(): value for column, value in row.items()}
    answer, completion = row["correct" if "options" in row else "answer"], ""
    if "options" in row:  # published as "A)61"
        choices = [re.sub(r"^[A-E]\)\s*", "", option) for option in row["options"]]
        completion = _text(row, "rationale").strip()
        if not re.search(rf"\b{re.escape(str(answer))}\W*$", completion):  # most end in "Answer: E"
            completion += f"\nAnswer: {answer}"
    else:
        choices = row["choices"] if "choices" in row else [row[letter] for letter in "abcd"]
    if not _text(row, "question"):
        raise ValueError("the question is empty")
    texts = [c for c in choices if isinstance(c, str | int | float) and c == c]  # no null, no NaN
    if not isinstance(choices, list) or not texts == choices or len(texts) > 10:
        raise ValueError("the choices must be a list of at most 10 texts")
    letters = "ABCDEFGHIJ"[: len(choices)]
    if type(answer) is int and 0 <= answer < len(letters):
        answer = letters[answer]
    if answer not in tuple(letters):
        raise ValueError(f"the answer is {answer!r}, not one of {', '.join(letters)}")
    lines = [_text(row, "question"), *(f"{letter}) {choice}" for letter, choice in zip(letters, choices))]
    meta = {"choices": len(choices)} | ({"subject": row["subject"]} if row.get("subject") else {})
    return dict(prompt="\n".join(lines), answer=answer, completion=completion, task="choice", meta=meta)


def _plain(row):
    """prompt and answer, completion or both, and whatever else of an Example a run's samples.csv has kept.

    Of a list of right answers the first is the answer, and all are in meta["answers"]; none may be empty.
    """
    task, meta = row.get("task"), row.get("meta") or {}
    meta = json.loads(meta) if isinstance(meta, str) else meta
    if not isinstance(meta, dict):
        raise ValueError(f"meta is a {type(meta).__name__}, not an object with names")
    if isinstance(row.get("answer"), list):
        answers = [_text({"answer": answer}, "answer") for answer in row["answer"]]
        if not all(answers):
            raise ValueError("one of the answers is empty")
        row, meta = row | {"answer": answers[0] if answers else None}, meta | {"answers": answers}
    answer = _text(row, "answer")
    task = task if task in TASKS else "math" if answer else "text"
    numbers = meta.get("numbers")
    whole = isinstance(numbers, list) and all(type(number) is int for number in numbers)
    if task == "countdown" and not (whole and re.fullmatch(r"-?\d{1,50}", answer)):
        raise ValueError("a countdown problem needs a whole number as its answer and whole meta.numbers")
    if task in matrices.LEVELS and not matrices.is_whole(meta.get("matrix")):
        raise ValueError(f"a {task} problem needs meta.matrix, rows of whole numbers")
    prompt, completion = _prompt(row["prompt"]), _text(row, "completion")
    return dict(prompt=prompt, answer=answer, completion=completion, task=task, meta=meta)


def _chat(row):
    prompt, completion = _split_reply(row["messages"])
    return dict(prompt=prompt, completion=completion)


def _response(row):
    return _plain({"completion": row["response"]} | row)


def _alpaca(row):
    """Stanford Alpaca's: the input, if there is one, below the instruction."""
    if row.get("history"):
        raise ValueError("column history is not read: write the turns as messages")
    parts = _text(row, "instruction"), _text(row, "input")
    return dict(prompt="\n\n".join(filter(None, parts)), completion=_text(row, "output"))


def _sharegpt(row):
    """Vicuna's conversations: turns of human and gpt."""
    roles = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
    names, turns = {"from": "role", "value": "content"}, []
    for turn in row["conversations"]:
        turn = {names.get(key, key): value for key, value in turn.items()}
        turns.append(turn | {"role": roles.get(turn["role"], turn["role"])})
    return _chat({"messages": turns})


def _verl(row):
    """verl's parquet: chat messages, and what its rule-based reward compares with."""
    judged = row["reward_model"]
    if judged.get("style", "rule") != "rule" or judged.get("ground_truth") is None:
        raise ValueError(f"reward_model is {judged!r:.60}: only style rule, with a ground_truth, is read")
    return _plain({"prompt": row["prompt"], "answer": judged["ground_truth"]})


def _prompt_of_pair(row):
    return dict(prompt=_pair(row)[0])


SCHEMAS = {  # columns that must be there: reader; the first that fits is taken
    ("question", "A", "B", "C", "D", "answer"): _choice,
    ("Question", "A", "B", "C", "D", "Answer"): _choice,
    ("question", "choices", "answer"): _choice,
    ("question", "options", "rationale", "correct"): _choice,
    ("problem", "solution"): _math,
    ("problem", "answer"): _math,
    ("messages",): _chat,
    ("conversations",): _sharegpt,
    ("instruction", "output"): _alpaca,
    ("prompt", "reward_model"): _verl,
    ("prompt", "completion"): _plain,
    ("prompt", "response"): _response,
    ("prompt", "answer"): _plain,
    ("question", "answer"): _gsm8k,
    ("chosen", "rejected"): _prompt_of_pair,
    ("info", "summaries", "choice"): _prompt_of_pair,
    ("prompt",): _plain,
}
BESIDE_A_PROMPT = {"prompt", "system", "level", "id"}  # another column may be an answer by a wrong name


def _fields(row):
    for columns, read in SCHEMAS.items():
        if row.keys() >= set(columns) and (columns != ("prompt",) or row.keys() <= BESIDE_A_PROMPT):
            fields = read(row)
            fields["prompt"] = _with_system(row, fields["prompt"])
            _check(fields["prompt"], fields.get("answer", ""), fields.get("completion", ""))
            json.dumps(fields.get("meta"))  # TypeError of a date or bytes, which samples.csv could not hold
            level = re.search(r"\d+", _word(row.get("level")))  # 3, "3", "Level 3"; MATH has a few "Level ?"
            return fields | dict(level=int(level[0]) if level else 0)
    known = " | ".join(",".join(columns) for columns in SCHEMAS)
    raise ValueError(f"the columns {','.join(row)} fit none of the known schemas: {known}")


def _read(read, place, row):
    """read(row), with the place in front of any complaint."""
    try:
        if not isinstance(row, dict):
            raise ValueError(f"a row must be an object with named columns, not a {type(row).__name__}")
        return read(row)
    except KeyError as error:
        raise ValueError(f"{place}: {error} is missing") from None
    except (TypeError, AttributeError, LookupError, RecursionError) as error:  # a number where a list belongs
        raise ValueError(f"{place}: a cell is not what its column should hold: {_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{place}: {_line(error)}") from None


TRUE, FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")  # as csv, JSON and pandas write them


def _word(value):
    """A cell as a word, such as "true", "0.0" or "level 3"; "" where it is neither text nor a number."""
    return str(value).lower() if isinstance(value, str | int | float) else ""


def _is_correct(row):
    if "correct" not in row:
        raise ValueError(f"there is no column correct, only {','.join(row)}")
    if _word(row["correct"]) not in TRUE + FALSE:
        raise ValueError(f"correct is {row['correct']!r}, neither 1 nor 0")
    return _word(row["correct"]) in TRUE


def _sample(rows, limit, seed):
    if not limit or limit >= len(rows):
        return rows
    # Not simply the first ones: MMLU is sorted by subject.
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def load_examples(data, split="train", *, level=None, limit=0, seed=0, filter="", dropped=None,
                  label_tokenizer="openai-community/gpt2") -> list[Example]:
    """The examples of a data set, in its own order.

    data: a name in GENERATED or HUB, "mmmlu/LOCALE", "org/name[:config]" on the hub, a local .jsonl, .json,
    .csv or .parquet file (whole, whatever the split), a URL of one, a folder with a file per split, or
    several of these joined by commas.
    level: 3 or "1-4". limit: at most so many rows, drawn with the seed; 0 for all (10,000 generated ones).
    filter="correct": of a run's samples.csv, the rows with correct = 1, each (prompt, completion) once.
    dropped: a Counter, which counts what was left out: label is false, prompt ends in a reply (a few pairs of
    HH); by the filter: wrong, repeated. Of preferences the prompts are taken; label_tokenizer: as there.
    Errors: ValueError, one line with file and line number.
    """
    data = str(data)
    if filter not in ("", "correct"):
        raise ValueError(f"unknown filter {filter!r}: the only one is correct")
    if limit < 0:
        raise ValueError(f"limit {limit} is negative: use 0 for all rows")
    if is_generated(data):
        return _generate(data, split, level, limit, seed, filter)
    dropped = Counter() if dropped is None else dropped
    examples, seen, tokenizer, number = [], set(), None, -1
    for number, (place, row) in enumerate(_rows(data, split)):
        if filter and not _read(_is_correct, place, row):
            dropped["wrong"] += 1
            continue
        if isinstance(row, dict) and "completion" in row and _word(row.get("label")) in FALSE:
            dropped["label is false"] += 1
            continue
        if isinstance(row, dict) and row.keys() >= {"query", "sample0", "sample1", "best"}:
            tokenizer = tokenizer or load_tokenizer(label_tokenizer, "--label-tokenizer")
            row = {"prompt": _read(partial(_best_of, tokenizer=tokenizer), place, row)[0]}
        elif isinstance(row, dict) and row.keys() >= {"chosen", "rejected"} and _ends_in_reply(
                _read(_pair, place, row)[0]):
            dropped["prompt ends in a reply"] += 1
            continue
        example = Example(id=number, **_read(_fields, place, row))
        key = example.text, example.completion
        if filter and key in seen:
            dropped["repeated"] += 1
        else:
            examples.append(example)
        seen.add(key)
    if not examples:
        raise ValueError(f"{data} has no rows" + (f" with correct = 1 among {number + 1}" if filter else "")
                         + (f"; left out: {dict(dropped)}" if dropped else ""))
    if level is not None:
        levels = _levels(level)
        examples = [example for example in examples if example.level in levels]
        if not examples:
            raise ValueError(f"{data} has no row of level {level}")
    return _sample(examples, limit, seed)


def answered_turns(example) -> list[Example]:
    """An example for each answer in a conversation; the last is the example itself, the ids of others are
    below 0.
    """
    if isinstance(example.prompt, str):
        return [example]
    earlier = [i for i, turn in enumerate(example.prompt) if turn["role"] == "assistant" and i]
    return [*(replace(example, id=-1 - 1000 * example.id - i, prompt=_prompt(example.prompt[:i]), answer="",
                      completion=example.prompt[i]["content"]) for i in earlier), example]


def carve(rows, *, n_train=0, n_validation=0, seed=0, name="the data"):
    """(train, validation) of exactly these sizes, of examples or preferences; no prompt text is in both.

    n_train = 0 takes all the rest, less the rows that repeat a validation prompt.
    Errors: ValueError if there are too few rows.
    """
    if n_train < 0 or n_validation < 0:
        raise ValueError(f"sizes cannot be negative: n_train {n_train}, n_validation {n_validation}")
    rows = random.Random(seed).sample(rows, len(rows))
    validation = {}
    for row in rows:
        if len(validation) < n_validation:
            validation.setdefault(prompt_text(row.prompt), row)
    train = [row for row in rows if prompt_text(row.prompt) not in validation]
    if len(validation) < n_validation or len(train) < max(n_train, 1):
        asked = f"{n_train or 'some'} training and {n_validation} validation rows were asked for"
        found = f"{len(rows)} rows with {len({prompt_text(row.prompt) for row in rows})} different prompts"
        raise ValueError(f"{asked}, but {name} has only {found}")
    return train[: n_train or None], list(validation.values())


def train_validation(data, *, n_train=0, n_validation=0, level=None, seed=0, filter="", dropped=None,
                     keep=None, **more):
    """(train, validation): lists of Example of exactly these sizes, shuffled; no prompt text stands in both.

    Validation is carved from the train split (a local file: from that file), never the official test split.
    n_train = 0 takes all the rest. keep: which of the rows to use, before the split (of a generated task,
    whose problems are made in the asked number, after it). more: as in `load_examples`.
    Errors: ValueError as in `load_examples`, or if there are too few rows.
    """
    if not is_generated(data):
        rows = load_examples(data, "train", level=level, filter=filter, dropped=dropped, **more)
        kept = [row for row in rows if keep is None or keep(row)]
        name = f"{data} (left out: {dict(dropped or {}) or len(rows) - len(kept)})"
        return carve(kept, n_train=n_train, n_validation=n_validation, seed=seed,
                     name=name if len(kept) < len(rows) else data)
    train = load_examples(data, "train", level=level, limit=n_train, seed=seed, filter=filter)
    held_out = load_examples(data, "validation", level=level, limit=n_validation,
                             seed=seed) if n_validation else []
    return tuple([row for row in part if keep is None or keep(row)] for part in (train, held_out))


def load_questions(args, tokenizer, per_step, gold=True):
    """(train, held out, {example id: prompt ids}, longest row) of --data; ([], [], {}, 0) without it.

    gold: leave out those without a gold answer; else they count as well, if not one has any.

    Prompts are encoded with --system and --prompt-template, those longer than --max-prompt-tokens left out.
    longest: tokens of the longest prompt and --max-new-tokens. A dry run trains on the `per_step` questions
    with the longest prompts. Errors: ValueError as `train_validation`, or if no question is left.
    """
    if not args.data:
        if getattr(args, "curriculum", 0):
            raise ValueError(f"--curriculum {args.curriculum}: there are no questions to draw by level")
        return [], [], {}, 0
    prompt_ids, left_out, most = {}, Counter(), args.max_prompt_tokens

    def encode(e):
        if e.id not in prompt_ids:
            prompt_ids[e.id] = encode_prompt(tokenizer, e.prompt, args.system, args.prompt_template)
        return prompt_ids[e.id]

    def keep(e):
        left_out["without a gold answer"] += gold and not e.answer
        left_out["with a longer prompt"] += (long := bool(most) and len(encode(e)) > most)
        return (e.answer or not gold) and not long

    more = {} if gold else {"label_tokenizer": args.label_tokenizer}
    train, held_out = train_validation(args.data, n_train=args.train_questions,
                                       n_validation=args.eval_questions, level=args.level or None,
                                       seed=args.seed, dropped=left_out, keep=keep, **more)
    if len({bool(e.answer) for e in train + held_out}) > 1:
        raise ValueError(f"--data {args.data}: some questions have a gold answer and some have none: make "
                         "two files of them")
    if most and not (train and held_out):
        raise ValueError(f"--max-prompt-tokens {most} leaves {len(train)} questions to train on and "
                         f"{len(held_out)} held out")
    if getattr(args, "curriculum", 0) and len({e.level for e in train}) < 2:
        raise ValueError(f"--curriculum {args.curriculum}: the questions of {args.data} have one level only"
                         + (f", --level {args.level}" if args.level else ""))
    if +left_out and dist.is_main():
        print(f"data: left out of {args.data}: {dict(+left_out)}")
    prompt_ids = {e.id: encode(e) for e in train + held_out}
    longest = max(map(len, prompt_ids.values())) + args.max_new_tokens
    if args.dry_run:
        train = sorted(train, key=lambda e: -len(prompt_ids[e.id]))[:per_step]
    return train, held_out, prompt_ids, longest


def questions_of_runs(all_args, data, tokenizer) -> list[Example]:
    """The questions of `data` that runs with these arguments have trained on; [] if none has trained on it.

    Errors: ValueError if they have trained on different ones, or on a choice of rows that is not made here.
    """
    all_args = [args for args in all_args if args.get("data") == data]
    for name in ("max_tokens", "filter"):
        if any(args.get(name) for args in all_args):
            raise ValueError(f"--split train: a run with --{name.replace('_', '-')} chose its rows by their "
                             "completions; pass the rows as a file of their own")
    chosen = {tuple(args.get(name) for name in ("seed", "level", "train_questions", "eval_questions",
                                                "max_prompt_tokens", "system")) for args in all_args}
    if len(chosen) > 1:
        raise ValueError(f"--split train: the runs have trained on different questions of {data}: evaluate "
                         "one at a time")
    blank = {"max_prompt_tokens": 0, "prompt_template": "{prompt}"}
    return load_questions(SimpleNamespace(**blank | all_args[0] | {"dry_run": False}), tokenizer, 0)[
        0] if all_args else []


def load_generations(sources, dropped=None, left_out=()) -> list[tuple[Example, bool]]:
    """(example with its completion, right?) of every finished answer in runs' samples.csv, in their order.

    sources: paths. An answer that a question has twice counts once; the id is that of the question's first.
    left_out: texts of questions. dropped: a Counter: unfinished, empty reply, repeated, held out.
    Errors: ValueError with file and line number; if no answer is left.
    """
    dropped = Counter() if dropped is None else dropped
    found, ids, seen = [], {}, set()
    for number, (place, row) in enumerate(itertools.chain.from_iterable(_rows(str(s), "") for s in sources)):
        example = _answer_of(number, place, row)
        question = example.text, example.answer
        example = replace(example, id=ids.setdefault(question, number))
        reason = _unusable(row, example, seen)
        if reason or example.text in left_out:
            dropped[reason or "held out"] += 1
        else:
            found.append((example, _read(_is_correct, place, row)))
        seen.add((*question, example.completion))
    if not found:
        raise ValueError(f"{' '.join(map(str, sources))}: no answer is left; left out: {dict(dropped)}")
    return found


def _answer_of(number, place, row):
    """The Example, with completion, that a row of a samples.csv holds."""
    return Example(id=number, **_read(_fields, place, row))


def _unusable(row, example, seen):
    """Why an answer of a samples.csv teaches nothing, or "". seen: (prompt text, gold answer, completion)."""
    if _word(row.get("finished", 1)) not in TRUE:
        return "unfinished"
    if not example.completion.strip():
        return "empty reply"
    return "repeated" if (example.text, example.answer, example.completion) in seen else ""


# ------------------------------------------------------------------------------------------------------------
# Preferences


def _prompt_and_reply(row, column):
    reply, prompt = row[column], row.get("prompt")
    if not isinstance(reply, str):
        return _split_reply(reply, prompt)
    if prompt is not None:
        return _prompt(prompt), reply
    head, *pieces = re.split(r"\n\n(Human|Assistant):", reply)  # Anthropic's HH
    if head or len(pieces) < 4:
        raise ValueError(r"without a column prompt, a reply must read '\n\nHuman: ...\n\nAssistant: ...'")
    turns = []
    for who, said in zip(pieces[::2], pieces[1::2]):
        turns.append({"role": {"Human": "user"}.get(who, "assistant"), "content": said.strip()})
    return _split_reply(turns)


GPT2_TOKENS, GPT2_PAD = 50257, 50259  # lm-human-preferences pads with an id beyond GPT-2's vocabulary


def _best_of(row, tokenizer):
    """(prompt, replies with the best one first) of lm-human-preferences, whose texts are GPT-2 token ids."""

    def text(ids):
        ids = [i for i in ids if i != GPT2_PAD]
        if not all(0 <= i < GPT2_TOKENS for i in ids):
            raise ValueError(f"token id {max(ids)} is neither GPT-2's (0 to {GPT2_TOKENS - 1}) nor the "
                             f"padding {GPT2_PAD}")
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    names = sorted(name for name in row if re.fullmatch(r"sample\d+", name))
    if not (isinstance(row["best"], int) and 0 <= row["best"] < len(names)):
        raise ValueError(f"best is {row['best']!r}, not 0 to {len(names) - 1}")
    replies = [text(row[name]) for name in names]
    return text(row["query"]), [replies[row["best"]], *replies[:row["best"]], *replies[row["best"] + 1:]]


def _pair(row):
    """(prompt of chosen, prompt of rejected, chosen, rejected, margin or None) of a row."""
    if row.keys() >= {"info", "summaries", "choice"}:  # summarize-from-feedback, OpenAI's TL;DR
        info, choice = row["info"], row["choice"]
        if choice not in (0, 1) or len(row["summaries"]) != 2:
            raise ValueError(f"choice is {choice!r} of {len(row['summaries'])} summaries, not 0 or 1 of 2")
        text = _text(info, "article")
        if not text:
            text = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}"
        prompt, replies = f"{text}\n\nTL;DR:", [summary["text"].strip() for summary in row["summaries"]]
        return prompt, prompt, replies[choice], replies[1 - choice], None
    if not row.keys() >= {"chosen", "rejected"}:
        known = ("chosen,rejected (and prompt) | query,sample0,sample1,...,best | info,summaries,choice | "
                 "a run's prompt,completion,correct")
        raise ValueError(f"the columns {','.join(row)} hold no pairs; known schemas: {known}")
    prompt, chosen = _prompt_and_reply(row, "chosen")
    other, rejected = _prompt_and_reply(row, "rejected")
    scores = _text(row, "score_chosen"), _text(row, "score_rejected")
    if any(scores) and not all(scores):
        raise ValueError("only one of score_chosen and score_rejected is a number")
    prompt, other = _with_system(row, prompt), _with_system(row, other)
    margin = float(scores[0]) - float(scores[1]) if all(scores) else None
    if margin is not None and not isfinite(margin):
        raise ValueError(f"the scores {' and '.join(scores)} have no finite difference")
    return prompt, other, chosen, rejected, margin


FAULTS = {"guess": 2, "cut short": 2, "other answer": 4, "slip": 1}  # of rejected replies, with their shares


def _generated_preferences(data, level, seed):
    """Arithmetic: the worked solution against a wrong reply with one of FAULTS.

    A guess without working; working that lacks its last step; an answer that is not what the working came to;
    a step that is off by 1 or 2, and carried on.
    """
    if data != "arithmetic":
        raise ValueError(f"{data} has no pairs of replies: use arithmetic, or sample pairs with dpo.py")
    pairs = []
    for e in _generate(data, "train", level, 0, seed, ""):
        rng, numbers = random.Random(f"fault {seed} {e.prompt}"), re.findall(r"[+-]?\d+", e.prompt)
        (fault,), off = rng.choices(list(FAULTS), FAULTS.values()), rng.choice((-2, -1, 1, 2))
        fault = "guess" if e.level == 1 and fault == "cut short" else fault
        slip_at = rng.randrange(1, len(numbers)) if fault == "slip" else 0
        total, steps = int(numbers[0]), []
        for i, number in enumerate(numbers[1:len(numbers) - (fault == "cut short")], 1):
            result = total + int(number) + off * (i == slip_at)
            steps.append(f"{total}{number}={result}")
            total = result
        working = "" if fault == "guess" else f"<think>{' '.join(steps)}</think>"
        total += off * (fault in ("guess", "other answer"))
        pairs.append(Preference(e.id, e.prompt, e.completion, f"{working}<answer>{total}</answer>"))
    return pairs


def load_preferences(data, split="train", *, limit=0, seed=0, level=None, pairs_per_question=0,
                     label_tokenizer="openai-community/gpt2", dropped=None) -> list[Preference]:
    """The pairs of a data set that carry a preference, in its own order.

    data, split, limit, seed: as in `load_examples`; level: of generated pairs. A run's samples.csv gives
    pairs of a correct and a wrong finished completion of one question, each used once, at most
    pairs_per_question (0: all there are).
    label_tokenizer: hub id or folder of GPT-2's tokenizer, for rows of token ids (lm-human-preferences).
    dropped: a Counter, which counts what was left out: prompts differ, prompt ends in a reply, same reply,
    empty reply, equal scores, rejected has the higher score; of a samples.csv: unfinished, repeated.
    Errors: ValueError, one line with file and line number.
    """
    data = str(data)
    if limit < 0 or pairs_per_question < 0:
        raise ValueError(f"limit {limit}, pairs_per_question {pairs_per_question}: use 0 for all")
    if data in GENERATED:
        return _sample(_generated_preferences(data, level, seed), limit, seed)
    dropped = Counter() if dropped is None else dropped
    pairs, sampled, seen, tokenizer, number = [], defaultdict(lambda: ([], [])), set(), None, -1
    for number, (place, row) in enumerate(_rows(data, split)):
        others = ()
        if isinstance(row, dict) and row.keys() >= {"prompt", "completion", "correct"}:
            example = _answer_of(number, place, row)
            if reason := _unusable(row, example, seen):
                dropped[reason] += 1
            else:
                sampled[example.text, example.answer][_read(_is_correct, place, row)].append(example)
            seen.add((example.text, example.answer, example.completion))
            continue
        if isinstance(row, dict) and row.keys() >= {"query", "sample0", "sample1", "best"}:
            tokenizer = tokenizer or load_tokenizer(label_tokenizer, "--label-tokenizer")
            prompt, (chosen, *replies) = _read(partial(_best_of, tokenizer=tokenizer), place, row)
            rejected, *others = dict.fromkeys(r for r in replies if r != chosen and r.strip()) or [chosen]
            other, margin = prompt, None
        else:
            prompt, other, chosen, rejected, margin = _read(_pair, place, row)
        if prompt != other or _ends_in_reply(prompt):  # as of a few rows of HH
            dropped["prompts differ" if prompt != other else "prompt ends in a reply"] += 1
            continue
        _read(lambda row: _check(prompt, chosen, rejected), place, row)
        if chosen == rejected:
            dropped["same reply"] += 1
        elif not chosen.strip() or not rejected.strip():
            dropped["empty reply"] += 1
        elif margin == 0:
            dropped["equal scores"] += 1
        elif margin is not None and margin < 0:
            dropped["rejected has the higher score"] += 1
        else:
            pairs.append(Preference(number, prompt, chosen, rejected, margin or 0.0, tuple(others)))
    for wrong, right in sampled.values():
        for good, bad in list(zip(right, wrong))[:pairs_per_question or None]:
            pairs.append(Preference(good.id, good.prompt, good.completion, bad.completion))
    if not pairs:
        raise ValueError(f"{data} has no pairs among its {number + 1} rows; left out: {dict(dropped)}")
    return _sample(pairs, limit, seed)


# ------------------------------------------------------------------------------------------------------------
# Text -> token ids


THINK_ANSWER_SYSTEM = (
    "Think about the question step by step between <think> and </think>, then give the final answer alone "
    "between <answer> and </answer>."
)


def prompt_text(prompt):
    """A prompt as one text: the string itself, or what the chat messages say."""
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def worked_examples(data, n, asked, *, level=None, seed=0) -> list[Example]:
    """n examples of the train split (MMLU: dev) with a completion to show, none of them in `asked`.

    None without data. Errors: ValueError if there are too few.
    """
    if not n or not data:
        return []
    texts, splits = {e.text for e in asked}, ["train", "dev"]
    if data == "mmlu" or os.path.isdir(data):  # where dev is there to be shown
        splits.reverse()
    try:
        pool = load_examples(data, splits[0], level=level, seed=seed)
    except ValueError:
        pool = load_examples(data, splits[1], level=level, seed=seed)
    pool = [replace(e, completion=e.completion or f"Answer: {e.answer}") for e in pool
            if (e.completion or e.answer) and e.text not in texts]
    if len(pool) < n:
        raise ValueError(f"--few-shot {n}: {data} has {len(pool)} worked examples to show")
    return random.Random(seed).sample(pool, n)


def few_shot_messages(examples, question, preamble=""):
    """The question, after worked examples as earlier turns of the chat; the preamble is in front of each.

    The question's own system message, if it has one, comes first.
    """

    def ask(prompt):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else deepcopy(prompt)
        turns[-1]["content"] = "\n\n".join(filter(None, [preamble, turns[-1]["content"]]))
        return turns

    turns = ask(question)
    messages = [turn for turn in turns if turn["role"] == "system"]
    for e in examples:
        messages += [*(turn for turn in ask(e.prompt) if turn["role"] != "system"),
                     {"role": "assistant", "content": e.completion}]
    messages += [turn for turn in turns if turn["role"] != "system"]
    return messages if len(messages) > 1 else messages[0]["content"]


@lru_cache(maxsize=16)
def _epoch(n, seed, epoch):
    return random.Random(f"epoch {epoch} of {n}, seed {seed}").sample(range(n), n)


def batch_indices(n, position, count, seed):
    """Rows position .. position + count - 1 of an endless sequence of shuffled epochs over n rows.

    A function of its arguments alone: the position is all that a checkpoint has to hold.
    """
    return [_epoch(n, seed, i // n)[i % n] for i in range(position, position + count)]


def encode_prompt(tokenizer, prompt, system="", template="{prompt}") -> list[int]:
    """Ids of a prompt, ready for the reply: by the chat template if the tokenizer has one, else plain text.

    template: the user's words around the last message, with {prompt} in its place; in plain text around each
    of the user's (`plain_text`). system: goes in front,
    unless it is "none" or the messages bring their own; templates that know no system turn (Gemma) get it as
    the first words of the user's. At most one BOS.
    Errors: ValueError for a template without {prompt}, or for messages that end in an assistant turn.
    """
    if "{prompt}" not in template:
        raise ValueError(f"the template {template!r} has no {{prompt}} where the question should go")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("a prompt of chat messages must end in a user turn, which the model is to answer")
    if system not in ("", "none") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if tokenizer.chat_template:
        # not format(): braces
        messages[-1]["content"] = template.replace("{prompt}", messages[-1]["content"])
        text = render(tokenizer, messages)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(plain_text(messages, template))["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids = ids[:-1]
    return ids


def plain_text(messages, template) -> str:
    """Messages for a model without a chat template: each user's in the words of `template`, then its answer.

    A blank line ends an answer. Where there are answers, of --few-shot or a conversation, and no words of
    the user's, they are "Question: ...\nAnswer: ...".
    """
    if template == "{prompt}" and any(m["role"] == "assistant" for m in messages):
        template = "Question: {prompt}\nAnswer:"
    text = ""
    for m in messages:
        if m["role"] == "assistant":
            text += m["content"] if text[-1:].isspace() else f" {m['content']}"
        else:
            said = template.replace("{prompt}", m["content"]) if m["role"] == "user" else m["content"]
            text += f"\n\n{said}" if text else said
    return text


now = datetime.now()  # of the run, also when it is resumed: some chat templates write the date


def render(tokenizer, messages) -> str:
    """The prompt by the chat template, with every message's words in it.

    A system message that the template refuses or leaves out stands in front of the user's words instead.
    Errors: ValueError if it refuses or leaves out another.
    """
    if "strftime_now" in str(tokenizer.chat_template):  # transformers gives it today's date
        from transformers.utils import chat_template_utils

        template = chat_template_utils._compile_jinja_template(tokenizer.get_chat_template())
        template.globals["strftime_now"] = now.strftime
    try:
        # As text first: tokenize=True returns a dict in transformers 5. The template writes the BOS, if any.
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # of earlier answers templates drop the thinking
        left_out = [m for m in messages if m["content"].rpartition("</think>")[2].strip() not in text]
        if not left_out:
            return text
        problem = f"leaves out the {left_out[0]['role']} message {left_out[0]['content'][:60]!r}"
    except TemplateError as error:
        left_out, problem = messages, f"refuses the messages: {error}"
    first, second, *rest = [*messages, None]
    if left_out[0] is not first or first["role"] != "system" or second is None:
        raise ValueError(f"the model's chat template {problem}")
    return render(tokenizer, [second | {"content": f"{first['content']}\n\n{second['content']}"}, *rest[:-1]])


def encode_completion(tokenizer, completion, eos_id) -> list[int]:
    """Ids of a completion, with one eos_id at the end; apart from the prompt, so no token spans both.

    What the prompt has begun of it already (`answer_opening`) is left out; what the template writes in front
    of an answer (`answer_prefix`) goes there, unless the completion brings its own thinking.
    """
    opening, prefix = answer_opening(tokenizer), answer_prefix(tokenizer)
    if "</think>" not in completion and not completion.lstrip().startswith(prefix.partition(">")[0] or " "):
        completion = prefix + completion
    if completion.startswith(opening):
        completion = completion[len(opening):]
    elif completion.lstrip().startswith(opening.strip()):  # written with other spaces
        completion = completion.lstrip()[len(opening.strip()):].lstrip()
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    while ids and ids[-1] == eos_id:
        ids = ids[:-1]
    return ids + [eos_id]
