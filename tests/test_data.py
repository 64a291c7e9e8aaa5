import csv
import gzip
import hashlib
import http.server
import json
import threading
import time
from collections import Counter
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

import common.data
from common import rewards
from common.data import (
    answered_turns,
    Example,
    batch_indices,
    carve,
    encode_completion,
    encode_prompt,
    load_examples,
    load_generations,
    load_preferences,
    prompt_text,
    train_validation,
    worked_examples,
)
from common.draws import Completion, answer_opening
from common.models import load_tokenizer
from common.rewards import correctness, last_boxed

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the repository")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(call, *args, **options):
    """The message of the ValueError that call raises; one line."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and caught.value.__suppress_context__ | (caught.value.__context__ is None)
    return message


@pytest.fixture(scope="module")
def qwen():
    if not DATA.is_dir():
        pytest.skip("the sample data is not beside the repository")
    transformers = pytest.importorskip("transformers")
    template = (DATA / "tokenizers" / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(
        DATA / "tokenizers" / "qwen2.5", eos_token="<|im_end|>", chat_template=template
    )


# Generated tasks


def value(expression):
    """Exact value of an expression of integers, + - * / and parentheses, and the integers in it."""
    tokens = iter([*expression.replace("(", " ( ").replace(")", " ) ").translate(
        {ord(sign): f" {sign} " for sign in "+-*/"}).split(), "end"])  # fmt: skip
    numbers, token = [], next(tokens)

    def parse(level):
        nonlocal token
        if level == 2:
            if token == "(":
                token = next(tokens)
                result = parse(0)
            else:
                result = Fraction(int(token))
                numbers.append(int(token))
            token = next(tokens)
            return result
        result = parse(level + 1)
        while token in ("+-", "*/")[level]:
            sign, token = token, next(tokens)
            other = parse(level + 1)
            result = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
                      "/": lambda a, b: a / b}[sign](result, other)  # fmt: skip
        return result

    result = parse(0)
    assert token == "end"
    return result, numbers


def test_arithmetic_is_exact_and_every_step_of_the_working_is_true():
    for example in load_examples("arithmetic", level="1-8", limit=500, seed=3):
        problem = example.prompt.removeprefix("Compute ").removesuffix(".")
        result, numbers = value(problem)
        assert result == int(example.answer)
        assert len(numbers) == example.level + 1 and all(1 <= number <= 9 for number in numbers)
        working, _, answer = example.completion.partition("</think>")
        assert answer == f"<answer>{example.answer}</answer>"
        steps = working.removeprefix("<think>").split(" ")
        assert len(steps) == example.level and steps[-1].endswith(f"={example.answer}")
        total = numbers[0]
        for step, sign, number in zip(steps, [c for c in problem if c in "+-"], numbers[1:]):
            result = total + number if sign == "+" else total - number
            assert step == f"{total}{sign}{number}={result}"
            total = result


def test_countdown_solutions_use_the_numbers_and_reach_the_target():
    for example in load_examples("countdown", level="1-4", limit=300, seed=1):
        numbers, target = example.meta["numbers"], example.meta["target"]
        listed = ", ".join(map(str, numbers))
        assert example.prompt == (
            f"Using the numbers {listed}, make {target}. "
            "Use each number at most once, with + - * / and parentheses."
        )
        expression = example.completion.partition("</think><answer>")[2].removesuffix("</answer>")
        result, used = value(expression)
        assert result == target == int(example.answer) and sorted(used) == sorted(numbers)
        assert len(numbers) == example.level + 2 and all(1 <= number <= 25 for number in numbers)
        assert 1 <= target <= 200 and target not in numbers
        for step in example.completion.partition("<think>")[2].partition("</think>")[0].split(" "):
            left, right = step.split("=")
            assert value(left)[0] == int(right) > 0  # so every division is exact


@pytest.mark.parametrize("data", ["arithmetic", "countdown"])
def test_generated_splits_never_meet_whatever_the_seeds(data):
    by_split = {
        split: [e for seed in range(3) for e in load_examples(data, split, level=2, limit=100, seed=seed)]
        for split in ("train", "validation", "test")
    }
    prompts = {split: {example.prompt for example in examples} for split, examples in by_split.items()}
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]
    one_seed = [e.id for split in prompts for e in load_examples(data, split, level=2, limit=50, seed=9)]
    assert len(set(one_seed)) == 150  # ids of different splits do not meet either


def test_generated_data_is_fixed_by_its_seed_and_a_longer_set_begins_like_a_shorter_one():
    first = load_examples("arithmetic", level=2, limit=50, seed=5)
    assert first == load_examples("arithmetic", level="2", limit=80, seed=5)[:50]
    assert first != load_examples("arithmetic", level=2, limit=50, seed=6)
    # Fixed across releases as well: a change here moves problems between splits or changes published runs.
    assert first[0].prompt == "Compute 8+9-6."


def test_twenty_thousand_problems_differ_and_are_fast():
    seconds = []
    for _ in range(2):  # the better of two: the machine may be busy
        start = time.process_time()
        examples = load_examples("arithmetic", limit=20_000)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 5  # comparing each with all takes minutes
    assert (
        len({example.prompt for example in examples}) == len({example.id for example in examples}) == 20_000
    )
    assert {example.level for example in examples} == {3}


def test_arithmetic_mixed_shows_the_working_in_its_share_of_the_same_problems():
    mixed, worked = (load_examples(data, limit=4000) for data in ("arithmetic-mixed", "arithmetic"))
    assert [example.prompt for example in mixed] == [example.prompt for example in worked]
    share = sum("<think>" in example.completion for example in mixed) / 4000
    assert abs(share - common.data.WORKED_SHARE) < 0.03  # 4 standard errors
    for one, other in zip(mixed, worked):
        guesses = [f"<answer>{int(one.answer) + slip}</answer>" for slip in range(-2, 3)]
        assert one.completion in (other.completion, *guesses)
    guesses = [example for example in mixed if "<think>" not in example.completion]
    right = sum(example.completion == f"<answer>{example.answer}</answer>" for example in guesses) / len(
        guesses
    )
    assert abs(right - 1 / 5) < 0.04  # 5 standard errors
    one, other = (
        {e.prompt: e for e in load_examples("arithmetic-mixed", level=2, limit=400, seed=s)} for s in (0, 1)
    )
    assert any(one[prompt].completion != other[prompt].completion for prompt in one.keys() & other.keys())


def test_a_range_of_levels_is_mixed_uniformly():
    counts = Counter(example.level for example in load_examples("arithmetic", level="3-6", limit=4000))
    assert set(counts) == {3, 4, 5, 6} and all(abs(count - 1000) < 120 for count in counts.values())


def test_an_exhausted_task_says_how_many_problems_there_are(monkeypatch):
    monkeypatch.setattr(common.data, "PATIENCE", 20_000)
    everything = load_examples("arithmetic", level=1)
    every_split = [
        e.prompt for s in ("train", "validation", "test") for e in load_examples("arithmetic", s, level=1)
    ]
    assert len(every_split) == len(set(every_split)) == 162  # 9 x 9 numbers x 2 signs
    message = refusal(load_examples, "arithmetic", level=1, limit=700)
    assert f"{len(everything)} different train problems" in message and "700" in message


def test_mistakes_with_generated_data():
    assert "levels 1 to 8" in refusal(load_examples, "arithmetic", level=9)
    assert "levels 1 to 4" in refusal(load_examples, "countdown", level="0-2")
    assert "'3-1'" in refusal(load_examples, "arithmetic", level="3-1")
    assert "'hard'" in refusal(load_examples, "arithmetic", level="hard")
    assert "'dev'" in refusal(load_examples, "arithmetic", "dev")
    assert "-1" in refusal(load_examples, "arithmetic", limit=-1)


# The publishers' files


@needs_data
def test_gsm8k():
    train, test = (load_examples(DATA / "gsm8k", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 1319)
    assert [example.id for example in train] == list(range(7473))
    assert train[0].answer == "72" and train[0].task == "gsm8k"
    assert train[0].completion.split("\n") == [
        "Natalia sold 48/2 = 24 clips in May.",
        "Natalia sold 48+24 = 72 clips altogether in April and May.",
        "#### 72",
    ]
    for example in train + test:
        assert str(int(example.answer)) == example.answer  # no commas, no spaces
        assert "<<" not in example.completion and example.completion.endswith(f"\n#### {example.answer}")
        assert example.completion not in example.prompt
    rows = [json.loads(line) for line in (DATA / "gsm8k" / "train.jsonl").open(encoding="utf-8")]
    assert [example.prompt for example in train] == [row["question"] for row in rows]
    with_comma = [i for i, row in enumerate(rows) if "," in row["answer"].rpartition("####")[2]]
    assert len(with_comma) == 79
    assert all(train[i].answer == rows[i]["answer"].split("#### ")[1].replace(",", "") for i in with_comma)
    assert sum(example.answer.startswith("-") for example in train) == 3


@needs_data
def test_math():
    test = load_examples(DATA / "math500", "test")
    assert len(test) == 500 and test[3].answer == "9" and test[3].level == 3 and test[3].task == "math"
    sample = load_examples(DATA / "math500" / "hendrycks_math_sample.jsonl")
    assert len(sample) == 140 and all(example.answer and 1 <= example.level <= 5 for example in sample)
    assert all(f"{{{e.answer}}}" in e.completion or f" {e.answer}" in e.completion for e in sample)
    # Where there is an answer column, the box in the solution says the same, up to how LaTeX is written.
    boxed = [last_boxed(example.completion) for example in test]
    assert sum(box == example.answer for box, example in zip(boxed, test)) > 400 and all(boxed)
    hard = load_examples(DATA / "math500", "test", level="4-5")
    assert hard == [example for example in test if example.level >= 4] and 0 < len(hard) < 500


@pytest.mark.parametrize(
    "solution, answer",
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\left\{1, \{2\}\right\}}", r"\left\{1, \{2\}\right\}"),
        (r"\boxed{[0, 1\}} and \boxed{x", r"[0, 1\}"),
        (r"$\boxed 7$", "7"),
        (r"\fbox{x+1}", "x+1"),
        (r"\boxed{3}, not \boxed{4", "3"),
    ],
)
def test_the_last_balanced_box(solution, answer):
    assert common.data._math({"problem": "?", "solution": solution})["answer"] == answer


@needs_data
def test_aqua():
    for split in ("validation", "test"):  # the owner calls the first dev.json
        examples = load_examples(DATA / "aqua_rat", split)
        assert len(examples) == 254
        path = DATA / "aqua_rat" / ("dev.json" if split == "validation" else "test.json")
        for example, line in zip(examples, path.open(encoding="utf-8")):
            row = json.loads(line)
            assert example.answer == row["correct"] and example.task == "choice"
            question, *options = example.prompt.rsplit("\n", 5)
            assert question == row["question"]
            assert [option.replace(") ", ")") for option in options] == [
                option.replace(") ", ")") for option in row["options"]
            ]
            assert row["rationale"].strip() not in example.prompt
            assert example.completion.startswith(row["rationale"].strip())
            assert example.answer in example.completion.splitlines()[-1]


@needs_data
def test_mmlu():
    splits = {split: load_examples(DATA / "mmlu", split) for split in ("dev", "validation", "test")}
    assert {split: len(examples) for split, examples in splits.items()} == dict(
        dev=285, validation=1531, test=14042
    )
    none = sum(
        line in ("A) None", "B) None", "C) None", "D) None")
        for example in splits["validation"] + splits["test"]
        for line in example.prompt.split("\n")[-4:]
    )
    assert none == 12
    assert all(example.answer in ("A", "B", "C", "D") for example in splits["test"])
    question = "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q."
    assert splits["test"][0].prompt == f"{question}\nA) 0\nB) 4\nC) 2\nD) 6"
    subset = load_examples(DATA / "mmlu", "test", limit=1000, seed=0)
    assert len(subset) == 1000 and [e.id for e in subset] == sorted({e.id for e in subset})
    assert subset[-1].id > 13_000  # from all subjects, not from the first ones
    assert subset == load_examples(DATA / "mmlu", "test", limit=1000) != splits["test"][:1000]


@needs_data
def test_mmlu_in_three_layouts():
    with (DATA / "mmlu" / "test" / "anatomy_test.csv").open(newline="", encoding="utf-8") as file:
        question, *choices, answer = next(csv.reader(file))
    owner = load_examples(DATA / "mmlu" / "test" / "anatomy_test.csv")[0]
    for row in (
        {"question": question, "subject": "anatomy", "choices": choices, "answer": "ABCD".index(answer)},
        {"": 0, "Question": question, **dict(zip("ABCD", choices)), "Answer": answer, "Subject": "anatomy"},
    ):
        fields = common.data._fields(row)
        assert fields.pop("meta") == {"subject": "anatomy", "choices": 4}
        assert Example(id=0, **fields, meta={"choices": 4}) == owner


def test_other_scripts_survive_the_tokenizer_byte_for_byte(qwen):
    amharic = load_examples(DATA / "mmlu_african" / "am", "test")
    igbo = load_examples(DATA / "mmlu_african" / "mmmlu_layout" / "mmlu_IG.csv")
    assert len(amharic) == len(igbo) == 604
    assert igbo[0].meta == {"subject": "clinical_knowledge", "choices": 4} and igbo[0].answer == "A"
    for example in amharic[:100] + igbo[:100]:
        text = qwen.decode(encode_prompt(qwen, example.prompt))
        assert text.endswith(f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n")
    raw = b"".join(path.read_bytes() for path in (DATA / "mmlu_african" / "am" / "test").glob("*.csv"))
    assert all(
        e.prompt.split("\n")[-1].removeprefix("D) ").replace('"', '""').encode() in raw for e in amharic
    )


@needs_data
def test_preference_files_and_what_they_drop():
    for split, rows, equal, left_out in (("train", 500, 57, 58), ("test", 100, 17, 17)):
        dropped = Counter()
        pairs = load_preferences(DATA / "ultrafeedback_binarized", split, dropped=dropped)
        raw = [
            json.loads(line)
            for line in (DATA / f"ultrafeedback_binarized/{split}.jsonl").open(encoding="utf-8")
        ]
        ties = [row for row in raw if row["score_chosen"] == row["score_rejected"]]
        assert len(ties) == equal and dropped["same reply"] == 1 and dropped.total() == left_out
        assert len(pairs) == rows - left_out and dropped["empty reply"] == (split == "train")
        for pair in pairs:
            row = raw[pair.id]
            assert pair.prompt == row["chosen"][0]["content"] and pair.chosen == row["chosen"][1]["content"]
            assert pair.rejected == row["rejected"][1]["content"] and pair.chosen != pair.rejected
            assert pair.margin == row["score_chosen"] - row["score_rejected"] != 0
    dropped = Counter()
    pairs = load_preferences(DATA / "hh_rlhf" / "harmless-base" / "test.jsonl.gz", dropped=dropped)
    assert dropped == {"prompts differ": 5, "empty reply": 4} and len(pairs) == 2312 - 9
    for pair in pairs:
        assert isinstance(pair.prompt, str) or pair.prompt[-1]["role"] == "user"


@needs_data
def test_summarize_from_feedback():
    path = DATA / "summarize_from_feedback" / "comparisons_example.json"
    row = json.loads(path.read_text(encoding="utf-8"))
    [pair] = load_preferences(path)
    assert (
        pair.chosen == row["summaries"][1]["text"].strip()
        and pair.rejected == row["summaries"][0]["text"].strip()
    )
    assert pair.prompt.startswith(
        f"SUBREDDIT: r/legaladvice\n\nTITLE: {row['info']['title']}\n\nPOST: I had a car"
    )
    assert pair.prompt.endswith("\n\nTL;DR:")
    news = {"info": {"article": "Long."}, "summaries": [{"text": " a"}, {"text": " b"}], "choice": 0}
    assert common.data._pair(news) == ("Long.\n\nTL;DR:", "Long.\n\nTL;DR:", "a", "b", None)


# Local files


QA = {"prompt": "1+1?", "answer": "2"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_every_file_format_gives_the_same_examples(tmp_path):
    rows = [QA, {"prompt": 'A "quoted", two\r\nline prompt', "answer": "ናይ"}]
    lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n\n" for row in rows))
    for name, encoding in (("a.csv", "utf-8"), ("excel.csv", "utf-8-sig")):
        with (tmp_path / name).open("w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    names = ["a.jsonl", "list.json", "a.jsonl.gz", "a.csv", "excel.csv", "a.parquet"]
    for name in names:
        examples = load_examples(tmp_path / name)
        assert [(e.id, e.prompt, e.answer, e.task) for e in examples] == [
            (i, row["prompt"], row["answer"], "math") for i, row in enumerate(rows)
        ], name


def test_a_folder_holds_one_file_or_folder_per_split(tmp_path):
    lines(tmp_path / "train.jsonl", [QA])
    (tmp_path / "data").mkdir()
    for part in range(2):
        lines(
            tmp_path / "data" / f"test-0000{part}-of-00002.jsonl", [{"prompt": f"part {part}", "answer": "1"}]
        )
    (tmp_path / "val").mkdir()
    lines(tmp_path / "val" / "x.jsonl", [{"prompt": "v", "answer": "1"}])
    assert [example.prompt for example in load_examples(tmp_path, "train")] == ["1+1?"]
    assert [example.prompt for example in load_examples(tmp_path, "test")] == ["part 0", "part 1"]
    assert [example.prompt for example in load_examples(tmp_path, "validation")] == ["v"]
    message = refusal(load_examples, tmp_path, "tset")
    assert "'tset'" in message and "train.jsonl" in message and "val" in message


def test_text_and_chat_schemas(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    path = lines(
        tmp_path / "x.jsonl",
        [
            {"prompt": "Say hi", "completion": "Hi"},
            {"messages": CHAT},
            {
                "messages": [
                    system,
                    *CHAT,
                    {"role": "user", "content": "Bye"},
                    {"role": "assistant", "content": "So long"},
                ]
            },
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello"},
            {"prompt": "2+2?", "answer": 4, "completion": "2+2=4", "level": "Level 2", "task": "arithmetic"},
            {"problem": "P", "answer": "7"},
        ],
    )
    e = load_examples(path)
    assert (e[0].prompt, e[0].completion, e[0].task) == ("Say hi", "Hi", "text")
    assert (e[1].prompt, e[1].completion) == ("Hi", "Hello")
    assert e[2].prompt == [system, *CHAT, {"role": "user", "content": "Bye"}] and e[2].completion == "So long"
    assert e[3].prompt == "Hi"
    assert (e[4].answer, e[4].level, e[4].task) == ("4", 2, "arithmetic")
    assert (e[5].answer, e[5].completion, e[5].task) == ("7", "", "math")


OTHER = {"role": "assistant", "content": "b"}
HH = "\n\nHuman: a\n\nAssistant: c\n\nHuman: d\n\nAssistant: "
HH_PROMPT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a", "b")),
        ({"prompt": "q", "chosen": CHAT, "rejected": [CHAT[0], OTHER]}, ("Hi", "Hello", "b")),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [OTHER]}, ("Hi", "Hello", "b")),
        ({"chosen": HH + "e", "rejected": HH + "f\n\n\n"}, (HH_PROMPT, "e", "f")),
    ],
)
def test_forms_of_a_pair(tmp_path, row, expected):
    [pair] = load_preferences(lines(tmp_path / "x.jsonl", [row]))
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_each_reason_to_leave_a_pair_out(tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2.0, "score_rejected": 0.5}
    rows = [
        good,
        good | {"rejected": "a"},
        good | {"rejected": " \n"},
        good | {"score_rejected": 2.0},
        good | {"chosen": CHAT, "rejected": [{"role": "user", "content": "Ho"}, CHAT[1]]},
    ]
    dropped = Counter()
    [pair] = load_preferences(lines(tmp_path / "x.jsonl", rows), dropped=dropped)
    assert pair.margin == 1.5
    assert dropped == {"same reply": 1, "empty reply": 1, "equal scores": 1, "prompts differ": 1}
    assert "{'same reply': 1}" in refusal(load_preferences, lines(tmp_path / "y.jsonl", rows[1:2]))


def test_hinted_arithmetic_gives_up_where_it_is_hard_and_not_told():
    """What STaR's start model is taught by: half of the problems have a hint, and are worked."""
    hinted = load_examples("arithmetic-hinted", level="3-4", limit=2000)
    plain = {e.prompt: e for e in load_examples("arithmetic", level="3-4", limit=2000)}
    told = [e for e in hinted if "The answer is" in e.prompt]
    assert 900 < len(told) < 1100
    for e in told:
        problem = e.prompt.removesuffix(f" (The answer is {e.answer}.)")
        assert problem != e.prompt and plain[problem].completion == e.completion
    rest = [e for e in hinted if e not in told]
    assert {e.completion for e in rest if e.level == 4} == {"<answer>?</answer>"}
    worked = [e.completion == plain[e.prompt].completion for e in rest if e.level == 3]
    assert 0.3 < sum(worked) / len(worked) < 0.6  # as arithmetic-mixed; some guesses are lucky
    assert [e.answer for e in hinted] == [plain[e.prompt.partition(" (")[0]].answer for e in hinted]


def test_generations_of_runs(tmp_path):
    path, dropped = write_samples(tmp_path / "samples.csv"), Counter()
    found = load_generations([path, path], dropped)
    assert [(e.id, e.text, e.completion, right) for e, right in found] == [
        (0, "q1", "r", True), (0, "q1", "w", False), (0, "q1", "s\n,", True), (4, "q2", "w", False),
        (4, "q2", "v", False), (6, "q3", "r", True), (6, "q3", "w", False)]
    assert dropped == {"repeated": 9} and {e.task for e, _ in found} == {"countdown"}
    with path.open("w") as file:
        file.write("prompt,completion,answer,correct,finished\nq,a,1,1,0\nq, ,1,1,1\n")
    assert "{'unfinished': 1, 'empty reply': 1}" in refusal(load_generations, [path])
    with path.open("w") as file:
        file.write("prompt,completion\nq,a\n")
    assert "line 2: there is no column correct" in refusal(load_generations, [path])


def write_samples(path):
    rows = [
        # step, prompt, completion, answer, correct
        (0, "q1", "r", "1", 1), (0, "q1", "r", "1", 1), (0, "q1", "w", "1", 0), (0, "q1", "s\n,", "1", 1),
        (0, "q2", "w", "2", 0), (0, "q2", "v", "2", 0), (1, "q3", "r", "3", 1), (1, "q3", "w", "3", 0),
    ]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "prompt", "completion", "answer", "correct", "task", "level", "meta"])
        for row in rows:
            writer.writerow([*row, "countdown", 2, json.dumps({"numbers": [1, 2, 3]})])
    return path


def test_a_runs_samples(tmp_path):
    path = write_samples(tmp_path / "samples.csv")
    assert len(load_examples(path)) == 8
    kept = load_examples(path, filter="correct")
    assert [(e.id, e.prompt, e.completion) for e in kept] == [
        (0, "q1", "r"),
        (3, "q1", "s\n,"),
        (6, "q3", "r"),
    ]
    assert kept[0].task == "countdown" and kept[0].level == 2 and kept[0].meta == {"numbers": [1, 2, 3]}
    pairs = load_preferences(path)  # never two questions in one pair; q2 has no correct sample
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [("q1", "r", "w"), ("q3", "r", "w")]
    assert "'best'" in refusal(load_examples, path, filter="best")
    assert "line 1: " in refusal(load_examples, lines(tmp_path / "x.jsonl", [QA]), filter="correct")
    message = refusal(load_examples, lines(tmp_path / "y.jsonl", [QA | {"correct": 0}]), filter="correct")
    assert "correct = 1 among 1" in message


def test_several_sources_are_joined_by_commas(tmp_path):
    """Each answer counts once, repeated ones are counted; the union is what both files hold."""
    path, dropped = write_samples(tmp_path / "a.csv"), Counter()
    rows = path.read_text().splitlines()
    more = [rows[0], *(row.replace("q1", "q4") for row in rows[1:4]), rows[1]]
    (tmp_path / "b.csv").write_text("\n".join(more) + "\n")
    both = f"{path},{tmp_path / 'b.csv'}"
    kept = load_examples(both, filter="correct", dropped=dropped)
    assert [(e.prompt, e.completion) for e in kept] == [
        ("q1", "r"), ("q1", "s\n,"), ("q3", "r"), ("q4", "r")]  # fmt: skip
    assert dropped == {"wrong": 5, "repeated": 3} and len({e.id for e in kept}) == 4
    dropped = Counter()
    pairs = load_preferences(both, dropped=dropped)
    assert [p.prompt for p in pairs] == ["q1", "q3", "q4"] and dropped == {"repeated": 3}
    assert "no file" in refusal(load_preferences, f"{path},{tmp_path / 'c.csv'}")


def test_pairs_per_question_and_unfinished_samples(tmp_path):
    rows = [{"prompt": "q", "completion": c, "answer": "1", "correct": right, "finished": done}
            for c, right, done in (("a", 1, 1), ("b", 1, 1), ("c", 0, 1), ("d", 0, 0), (" ", 0, 1), ("e", 0, 1))]
    path, dropped = lines(tmp_path / "x.jsonl", rows), Counter()
    pairs = load_preferences(path, dropped=dropped)
    assert [(p.chosen, p.rejected) for p in pairs] == [("a", "c"), ("b", "e")]
    assert dropped == {"unfinished": 1, "empty reply": 1}
    assert len(load_preferences(path, pairs_per_question=1)) == 1


def test_a_url_is_fetched_once_and_its_hash_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    body, asked = Path(lines(tmp_path / "x.jsonl", rows)).read_bytes(), []
    cache = tmp_path / "cache"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404 if self.path == "/y.jsonl" else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8" if "login" in self.path else "text/plain")
            if "short" in self.path:
                self.send_header("Content-Length", str(len(body) + 7))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for _ in range(2):
            [pair] = load_preferences(f"{url}/x.jsonl")
            assert pair.chosen == "a" and hashlib.sha256(body).hexdigest() in capsys.readouterr().out
        assert asked == ["/x.jsonl"]
        for name, why in (("y.jsonl", "404"), ("short.jsonl", f"{len(body)} of {len(body) + 7} bytes came"),
                          ("login.jsonl", "a web page")):
            before = sorted(cache.rglob("*"))
            message = refusal(load_preferences, f"{url}/{name}")
            assert "cannot download" in message and why in message and "local file" in message
            assert [path for path in sorted(cache.rglob("*")) if path.is_file()] == [
                path for path in before if path.is_file()]  # nothing is kept of it
        server.shutdown()


def test_a_password_in_a_url_is_not_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path))
    message = refusal(load_preferences, "http://me:secret@127.0.0.1:9/x.jsonl")
    assert "cannot download http://127.0.0.1:9/x.jsonl" in message and "secret" not in message


@needs_data
def test_token_ids_of_lm_human_preferences():
    """Decoded by GPT-2's tokenizer; encoding gives the ids back, without the padding 50259."""
    path, gpt2 = DATA / "lm_human_preferences" / "layout_fixture.json", DATA / "tokenizers" / "gpt2"
    raw, tokenizer = json.loads(path.read_text()), AutoTokenizer.from_pretrained(gpt2)
    pairs = load_preferences(path, label_tokenizer=str(gpt2))
    assert len(pairs) == 64
    for row, pair in zip(raw, pairs, strict=True):
        assert 0 <= row["best"] <= 3
        assert tokenizer(pair.prompt)["input_ids"] == [i for i in row["query"] if i != 50259]
        best = [i for i in row[f"sample{row['best']}"] if i != 50259]
        assert tokenizer(pair.chosen)["input_ids"] == best
        texts = {tokenizer.decode([i for i in row[f"sample{n}"] if i != 50259]) for n in range(4)}
        assert {pair.chosen, pair.rejected, *pair.others} == texts and "<|endoftext|>" not in pair.prompt
    assert pairs[0].prompt == "Mass-society theory suggests that:"
    assert pairs[0].chosen == " the media manipulate 'the masses' as vulnerable, passive consumers"


@needs_data
@pytest.mark.parametrize("row, part", [
    ({"best": 4}, "best is 4, not 0 to 3"), ({"sample1": [50258]}, "token id 50258"),
    ({f"sample{n}": [5, 6] for n in range(4)}, "'same reply': 1"),
    ({"sample2": [50259]}, "'empty reply': 1")])  # fmt: skip
def test_bad_rows_of_token_ids(tmp_path, row, part):
    good = {"query": [5, 50259], "best": 2} | {f"sample{n}": [10 + n, 50259] for n in range(4)}
    path = lines(tmp_path / "x.jsonl", [good | row])
    assert part in refusal(load_preferences, path, label_tokenizer=str(DATA / "tokenizers" / "gpt2"))


def test_generated_preferences_are_right_against_wrong():
    """Every chosen reply is right, every rejected one wrong, each fault about as often as it should be."""
    pairs = load_preferences("arithmetic", level="1-4", limit=600, seed=3)
    gold = {e.prompt: e.answer for e in load_examples("arithmetic", level="1-4", seed=3)}
    for replies, right in ((("chosen",), 1.0), (("rejected",), 0.0)):
        texts = [getattr(p, *replies) for p in pairs]
        assert correctness(None, texts, [gold[p.prompt] for p in pairs]) == [right] * len(pairs)
    guesses = sum("<think>" not in p.rejected for p in pairs)
    assert 100 < guesses < 260 and load_preferences("arithmetic", level="1-4", limit=600, seed=3) == pairs
    assert "countdown has no pairs" in refusal(load_preferences, "countdown")


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt,completion\nq,{'a' * 200_000}\n")
    assert len(load_examples(tmp_path / "x.csv")[0].completion) == 200_000


GSM = {"question": "q", "answer": "so\n#### 1,234"}


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("a.jsonl", "", ["a.jsonl", "no rows"]),
        ("a.csv", "prompt,answer\n", ["a.csv", "no rows"]),
        (
            "a.jsonl",
            '{"prompt": "q", "answer": "1"}\n\n{"prompt": \n',
            ["a.jsonl: line 3", "not a JSON line"],
        ),
        ("a.jsonl", "3\n", ["a.jsonl: line 1", "not a int"]),
        ("a.json", '[{"prompt": "q"', ["a.json: "]),
        (
            "a.jsonl",
            '{"question": "q", "foo": "1"}\n',
            ["line 1", "question,foo", "prompt,completion", "messages"],
        ),
        ("a.csv", "prompt,answer\nq,1\nq,1,2\n", ["a.csv: line 3", "3 cells under 2 columns"]),
        ("a.csv", 'prompt,answer\nq,"1\n', ["a.csv: line 2"]),
        ("a.csv", "prompt,answer\n,1\n", ["a.csv: line 2", "prompt is empty"]),
        ("a.jsonl", json.dumps(GSM) + '\n{"question": "q", "answer": "5"}\n', ["line 2", "####", "'5'"]),
        ("a.jsonl", '{"question": "q", "answer": "#### five"}\n', ["line 1", "'#### five'"]),
        ("a.jsonl", '{"problem": "p", "solution": "s"}\n', ["line 1", "boxed"]),
        (
            "a.jsonl",
            '{"question": "q", "choices": ["x", "y"], "answer": 2}\n',
            ["line 1", "2, not one of A, B"],
        ),
        ("a.csv", "question,A,B,C,D,answer\nq,1,2,3,4,E\n", ["line 2", "'E', not one of A, B, C, D"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "q"}]}\n', ["line 1", "assistant turn"]),
        ("a.jsonl", '{"messages": "hello"}\n', ["line 1", "list of {role, content}"]),
        ("a.jsonl.gz", b"no gzip", ["a.jsonl.gz: "]),
        ("a.jsonl", b"\xff\xfe", ["a.jsonl: line 1", "not utf-8"]),
        ("a.csv", b"prompt,answer\nx,y\nJos\xe9,z\n", ["a.csv: line 3", "not utf-8"]),
        ("a.parquet", b"no parquet", ["a.parquet: "]),
        ("a.txt", "hello", ["a.txt", ".jsonl .json .csv .parquet"]),
    ],
)
def test_mistakes_in_a_file_are_named_in_one_line(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(load_examples, tmp_path / name)
    assert [part for part in parts if part not in message] == [], message


def test_gold_commas_go(tmp_path):
    assert load_examples(lines(tmp_path / "x.jsonl", [GSM]))[0].answer == "1234"


def test_missing_data_says_what_there_is(tmp_path):
    lines(tmp_path / "train.jsonl", [QA])
    message = refusal(load_examples, tmp_path / "trian.jsonl")
    assert "trian.jsonl" in message and "holds train.jsonl" in message
    message = refusal(load_examples, "gsm8kk")
    assert "'gsm8kk'" in message and all(
        name in message for name in ("arithmetic", "countdown", "gsm8k,", ".csv")
    )
    message = refusal(load_preferences, tmp_path / "train.jsonl")
    assert "line 1" in message and "prompt,answer" in message and "chosen,rejected" in message
    message = refusal(load_preferences, lines(tmp_path / "x.jsonl", [{"chosen": "a", "rejected": "b"}]))
    assert "line 1" in message and "Human" in message
    message = refusal(load_examples, tmp_path / "train.jsonl", level=3)
    assert "no row of level 3" in message


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets` with no network, and a folder in the hub's format in the place of gsm8k, math and mmmlu."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "repository"
    folder.mkdir()
    configs = []
    for config in ("algebra", "geometry"):
        (folder / config).mkdir()
        problems = [
            {"problem": f"{config} {i}", "level": "Level 2", "solution": rf"\boxed{{{i}}}"} for i in range(3)
        ]
        datasets.Dataset.from_list(problems).to_parquet(folder / config / "train-00000-of-00001.parquet")
        datasets.Dataset.from_list(problems[:1]).to_json(folder / config / "test.jsonl")
        configs.append(
            f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*.parquet\n"
        )
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    return str(folder)


def test_the_hubs_configs_are_read_one_after_the_other(hub, monkeypatch):
    monkeypatch.setitem(common.data.HUB, "math", [f"{hub}:algebra", f"{hub}:geometry"])
    examples = load_examples("math")
    assert [example.prompt for example in examples] == [
        f"{c} {i}" for c in ("algebra", "geometry") for i in range(3)
    ]
    assert [example.id for example in examples] == list(range(6)) and examples[4].answer == "1"
    train, validation = train_validation("math", n_train=4, n_validation=2)
    assert len(train) == 4 and len(validation) == 2


def test_the_hubs_mistakes(hub, monkeypatch):
    monkeypatch.setitem(common.data.HUB, "math", [f"{hub}:algebra"])
    message = refusal(load_examples, "math", "validation")
    assert "validation" in message and "train" in message
    monkeypatch.setitem(common.data.HUB, "math", [f"{hub}:topology"])
    assert "topology" in refusal(load_examples, "math")
    for data, hub_id in (
        ("gsm8k", "openai/gsm8k"),
        ("some/thing:x", "some/thing"),
        ("mmmlu/YO_NG", "openai/MMMLU"),
    ):
        message = refusal(load_examples, data)
        assert message.startswith(f"cannot reach the hub for {hub_id}")
        assert message.endswith("pass --data a local .jsonl/.csv/.parquet file instead")


def test_which_hub_data_a_name_means(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: asked.append((*args, split)) or [])
    for data, split in (
        ("math", "train"),
        ("math", "test"),
        ("aqua", "test"),
        ("mmmlu/YO_NG", "test"),
        ("a/b", "x"),
        ("mmlu", "train"),  # its auxiliary_train is other people's data
        ("mmlu", "test"),
        ("mmmlu/SW_KE", "train"),  # which has nothing but a test split
    ):
        refusal(load_examples, data, split)
    assert [row[0] for row in asked[:7]] == ["EleutherAI/hendrycks_math"] * 7 and len(set(asked[:7])) == 7
    assert asked[7:] == [
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("deepmind/aqua_rat", "raw", "test"),
        ("openai/MMMLU", "YO_NG", "test"),
        ("a/b", None, "x"),
        ("cais/mmlu", "all", "dev+validation"),
        ("cais/mmlu", "all", "test"),
        ("openai/MMMLU", "SW_KE", "test"),
    ]


@needs_data
def test_without_a_train_split_dev_and_validation_are_it():
    train = load_examples(DATA / "mmlu_african" / "ig", "train")
    parts = [load_examples(DATA / "mmlu_african" / "ig", split) for split in ("dev", "val", "test")]
    assert [e.prompt for e in train] == [e.prompt for part in parts[:2] for e in part]
    assert [len(part) for part in parts] == [15, 69, 604]
    assert len(load_examples(DATA / "mmlu", "train")) == 285 + 1531
    shown = worked_examples(DATA / "mmlu_african" / "ig", 3, parts[0][:5])  # of dev, made to be shown
    assert {e.prompt for e in shown} <= {e.prompt for e in parts[0][5:]} and len(shown) == 3
    assert all(e.completion == f"Answer: {e.answer}" for e in shown)
    assert worked_examples("no such data", 0, []) == []
    assert "no split 'valid'" in refusal(load_examples, DATA / "mmlu_african" / "ig", "valid")


# Training and validation


@pytest.mark.parametrize("data", ["arithmetic", "countdown", "gsm8k"])
def test_training_and_validation_are_exact_disjoint_and_fixed_by_the_seed(data):
    if data == "gsm8k":
        if not DATA.is_dir():
            pytest.skip("the sample data is not beside the repository")
        data = DATA / "gsm8k"
    train, validation = train_validation(data, n_train=30, n_validation=20, seed=1)
    assert len(train) == 30 and len(validation) == 20
    assert not {e.prompt for e in train} & {e.prompt for e in validation}
    assert len({e.id for e in train + validation}) == 50
    assert (train, validation) == train_validation(data, n_train=30, n_validation=20, seed=1)
    assert train_validation(data, n_train=60, n_validation=20, seed=1) == (
        train_validation(data, n_train=60, n_validation=20, seed=1)[0],
        validation,
    )
    assert train_validation(data, n_train=30, n_validation=20, seed=2)[1] != validation
    assert train_validation(data, n_train=30, n_validation=0, seed=1)[1] == []


@needs_data
def test_validation_is_never_the_official_test():
    train, validation = train_validation(DATA / "gsm8k", n_validation=500)
    assert len(train) == 7473 - 500
    test = {example.prompt for example in load_examples(DATA / "gsm8k", "test")}
    assert not test & {example.prompt for example in train + validation}


def test_carving_keeps_repeated_prompts_on_one_side_and_refuses_too_few_rows():
    rows = [Example(id=i, prompt=f"q{i // 4}", completion=str(i)) for i in range(40)]
    for seed in range(5):
        train, validation = carve(rows, n_train=0, n_validation=3, seed=seed)
        assert len(validation) == len({e.prompt for e in validation}) == 3 and len(train) == 40 - 3 * 4
        assert not {e.prompt for e in train} & {e.prompt for e in validation}
    messages = [{"role": "user", "content": "q"}, *CHAT]
    message = refusal(carve, rows, n_train=30, n_validation=3, seed=0, name="x.csv")
    assert "30" in message and "x.csv" in message and "40 rows with 10 different prompts" in message
    refusal(carve, rows, n_train=1, n_validation=11, seed=0)
    refusal(carve, rows, n_train=0, n_validation=10, seed=0)
    refusal(carve, rows, n_train=-1, n_validation=1, seed=0)
    chats = [Example(id=i, prompt=messages) for i in range(3)]
    refusal(carve, chats, n_train=1, n_validation=1, seed=0)  # one prompt, three times


def test_batches_are_shuffled_epochs_that_any_position_can_continue():
    order = batch_indices(7, 0, 21, seed=3)
    epochs = order[:7], order[7:14], order[14:]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert [i for start in range(0, 21, 3) for i in batch_indices(7, start, 3, seed=3)] == order
    assert batch_indices(7, 0, 21, seed=4) != order
    assert sorted(batch_indices(2, 0, 6, seed=0)) == [0, 0, 0, 1, 1, 1]  # a batch larger than the data


# Token ids


def test_prompts_go_through_the_chat_template(qwen):
    ids = encode_prompt(qwen, "Hi")
    assert type(ids) is list and all(type(i) is int for i in ids)
    assert qwen.decode(ids) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "user", "content": "Hi"}]
    assert ids == qwen.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(qwen, messages) and messages == [{"role": "user", "content": "Hi"}]
    chat = [*CHAT, {"role": "user", "content": "{x}"}]
    text = qwen.decode(encode_prompt(qwen, chat, system="S", template="T {prompt} {y}"))
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nT {x} {y}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat[-1] == {"role": "user", "content": "{x}"}  # the caller's messages are left alone
    assert encode_prompt(qwen, chat, system="none") == encode_prompt(qwen, chat)
    own = [{"role": "system", "content": "own"}, *messages]
    assert encode_prompt(qwen, own, system="S") == encode_prompt(qwen, "Hi", system="own")
    assert "'no place'" in refusal(encode_prompt, qwen, "Hi", template="no place")
    assert prompt_text(own) == "own\n\nHi" and prompt_text("Hi") == "Hi"
    refusal(encode_prompt, qwen, CHAT)
    refusal(encode_prompt, qwen, [])


@needs_data
def test_prompts_are_plain_text_without_a_template():
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.AutoTokenizer.from_pretrained(DATA / "tokenizers" / "gpt2")
    assert gpt2.decode(encode_prompt(gpt2, "Hi", system="S", template="Q: {prompt}\nA:")) == "S\n\nQ: Hi\nA:"
    chat = [*CHAT, {"role": "user", "content": "Bye"}]
    assert gpt2.decode(encode_prompt(gpt2, chat)) == "Question: Hi\nAnswer: Hello\n\nQuestion: Bye\nAnswer:"


def test_a_template_without_system_turns_gets_it_in_the_users():
    """As Gemma's; what a template refuses for another reason is one line."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(common.data.__file__).parent / "tiny")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% if messages | length > 3 %}{{ raise_exception('too many turns') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", system="Be brief")) == tokenizer.decode(
        tokenizer("user Be brief\n\nHi ", add_special_tokens=False)["input_ids"]
    )
    assert encode_prompt(tokenizer, "Hi", system="none") == encode_prompt(tokenizer, "Hi")
    turns = [*CHAT, *CHAT, {"role": "user", "content": "Hi"}]
    assert "too many turns" in refusal(encode_prompt, tokenizer, turns)


class AddsMarks:
    """A tokenizer that puts <s> in front of every text and </s> behind it, as Llama's and some others do."""

    bos_token_id, eos_token_id = 1, 2
    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        marks = {"<s>": [1], "</s>": [2]}
        words = [i for word in text.replace("<s>", "<s> ").split() for i in marks.get(word, [len(word) + 10])]
        return {"input_ids": [1, *words, 2] if add_special_tokens else words}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "<s>" + messages[-1]["content"]


def test_one_bos_at_most_and_no_eos_after_a_prompt():
    tokenizer = AddsMarks()
    assert encode_prompt(tokenizer, "ab c") == [1, 12, 11]
    tokenizer.chat_template = "yes"
    assert encode_prompt(tokenizer, "ab c") == [1, 12, 11]


def test_completions_end_in_one_eos():
    tokenizer = AddsMarks()
    assert encode_completion(tokenizer, "ab c", 2) == [12, 11, 2]
    assert encode_completion(tokenizer, "ab c </s> </s>", 2) == [12, 11, 2]
    assert encode_completion(tokenizer, "", 2) == [2]


def test_prompt_ids_do_not_depend_on_the_completion(qwen):
    examples = load_examples(DATA / "gsm8k", "test", limit=200)
    for example in examples:
        prompt_ids = encode_prompt(qwen, example.prompt)
        completion_ids = encode_completion(qwen, example.completion, qwen.eos_token_id)
        assert completion_ids.count(qwen.eos_token_id) == 1 and completion_ids[-1] == qwen.eos_token_id
        text = qwen.decode(prompt_ids + completion_ids)
        assert text.endswith(
            f"{example.prompt}<|im_end|>\n<|im_start|>assistant\n{example.completion}<|im_end|>"
        )


# ---- chat templates that write, leave out or date things (FAULTS W3-W5, L9) ----

BODY = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n")
GOOD = "<think>3+4=7</think><answer>7</answer>"


def with_template(template):
    tokenizer = load_tokenizer("")
    tokenizer.chat_template = template
    return tokenizer


def said(tokenizer, text):
    """The text that rewards see of a completion with these words."""
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Completion(ids, [0.0] * len(ids), True).text(tokenizer)


def test_tags_that_are_special_tokens_stay_in_the_text():
    tokenizer = load_tokenizer("")
    tokenizer.add_special_tokens({"additional_special_tokens": list(rewards.TAGS)})
    assert said(tokenizer, GOOD) == GOOD
    padded = Completion([tokenizer.pad_token_id, *tokenizer(GOOD)["input_ids"]], [], False)
    assert padded.text(tokenizer) == GOOD


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n\n</think>\n\n"])
def test_what_the_template_writes_of_the_answer_belongs_to_it(opening):
    tokenizer = with_template(BODY + opening + "{% endif %}")
    prompt = encode_prompt(tokenizer, "What is 3+4?")
    assert answer_opening(tokenizer) == opening and tokenizer.decode(prompt).endswith(opening)
    if "</think>" in opening:
        assert said(tokenizer, "<answer>7</answer>") == opening + "<answer>7</answer>"
        assert encode_completion(tokenizer, "7", 2) == [*tokenizer("7")["input_ids"], 2]
        return
    text = said(tokenizer, "3+4=7</think><answer>7</answer>")
    assert text == opening + "3+4=7</think><answer>7</answer>"
    assert rewards.format([""], [text], [""]) == [1.0] == rewards.correctness([""], [text], ["7"])
    assert rewards.format([""], [said(tokenizer, GOOD)], [""]) == [0.0]  # a second <think>
    assert rewards.correctness([""], [said(tokenizer, "I guess the answer is 7. No, wait")], ["7"]) == [0.0]
    rest = tokenizer("3+4=7</think><answer>7</answer>", add_special_tokens=False)["input_ids"]
    for written in (text, GOOD, "\n" + GOOD):  # one tag is trained
        assert encode_completion(tokenizer, written, 2) == [*rest, 2]
    before, answer = rewards.answered(tokenizer, text, "8", 100)
    assert tokenizer.decode(before + answer) == "3+4=7</think><answer>8</answer>"
    before, answer = rewards.answered(tokenizer, "", "8", 100)
    assert tokenizer.decode(before + answer) == "</think><answer>8</answer>"


THINKS = ("{% for m in messages %}{{ m['role'] + ': ' }}{% if loop.last and m['role'] == 'assistant' and "
          "'</think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


def test_the_templates_empty_thinking_block_is_trained(tmp_path):
    """As Qwen3's template writes it, where a row has no thinking of its own; reasoning_content is thinking."""
    tokenizer, block = with_template(THINKS), "<think>\n\n</think>\n\n"
    for written, trained in (("7", block + "7"), ("<think>3+4</think>7", "<think>3+4</think>7"),
                             ("<think>3+", "<think>3+"), ("3+4</think>7", "3+4</think>7")):
        ids = encode_completion(tokenizer, written, 2)
        assert ids == [*tokenizer(trained, add_special_tokens=False)["input_ids"], 2]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}], tokenize=False)
    prompt = tokenizer.decode(encode_prompt(tokenizer, "3+4?"))
    assert prompt + tokenizer.decode(encode_completion(tokenizer, "7", 2)[:-1]) == whole.rstrip("\n")
    row = {"messages": [{"role": "user", "content": "3+4?"},
                        {"role": "assistant", "content": "7", "reasoning_content": "3+4 is 7"}]}
    (example,) = load_examples(lines(tmp_path / "a.jsonl", [row]))
    assert example.completion == "<think>\n3+4 is 7\n</think>\n\n7"
    assert encode_completion(with_template(BODY + "{% endif %}"), "7", 2) == [*tokenizer("7")["input_ids"], 2]


DROPS = ("{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}{{ m['role'] + ': ' + "
         "m['content'].rpartition('</think>')[2].strip() + '\n' }}{% endif %}{% endfor %}assistant:")


def test_no_message_is_left_out_by_a_template():
    tokenizer = with_template(DROPS)

    def text(messages, system=""):
        return tokenizer.decode(encode_prompt(tokenizer, messages, system))

    assert text("Hi ", "Be brief.") == "user: Be brief.\n\nHi\nassistant:"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>so</think> Ho"},
             {"role": "user", "content": "And?"}]  # templates drop the thinking of earlier answers
    assert text(turns) == "user: Hi\nassistant: Ho\nuser: And?\nassistant:"
    with pytest.raises(ValueError, match="leaves out the developer message 'In French.'"):
        text([{"role": "developer", "content": "In French."}, *turns])
    with pytest.raises(ValueError, match="leaves out the system message 'Late.'"):
        text([turns[0], {"role": "system", "content": "Late."}, turns[2]])
    strict = with_template("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                           + DROPS)
    assert strict.decode(encode_prompt(strict, "Hi", "Be brief.")) == "user: Be brief.\n\nHi\nassistant:"


def test_a_date_in_the_prompt_is_that_of_the_run(monkeypatch, tmp_path):
    """Of its beginning, also when it goes on on another day."""
    import grpo
    from common import data, run

    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}" + BODY + "{% endif %}")
    monkeypatch.setattr(data, "now", datetime(2001, 2, 3))
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi")).startswith("03 Feb 2001")
    (tmp_path / "config.json").write_text(json.dumps({"begun": "1999-12-31T23:59:00", "args": {"seed": 3}}))
    assert run.parse(grpo.Args, ["--out", str(tmp_path), "--resume"]).seed == 3
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi")).startswith("31 Dec 1999")


# ---- rows that say something else than they seem to (FAULTS W7, W8, C1) ----


@pytest.mark.parametrize("missing", [None, "", float("nan")], ids=str)
def test_a_question_without_a_gold_answer_is_left_out_and_counted(tmp_path, capsys, missing):
    """It could never be right: neither trained on nor held out."""
    from types import SimpleNamespace

    path = lines(tmp_path / "a.jsonl", [{"prompt": f"{i}?", "answer": missing if i % 2 else str(i)}
                                        for i in range(40)])
    args = SimpleNamespace(data=path, train_questions=0, eval_questions=5, level="", seed=0, system="",
                           prompt_template="{prompt}", max_prompt_tokens=0, max_new_tokens=4, dry_run=False)
    train, held_out, _, _ = common.data.load_questions(args, load_tokenizer(""), 4)
    assert (len(train), len(held_out)) == (15, 5) and all(e.answer for e in train + held_out)
    assert "left out of" in (out := capsys.readouterr().out) and "{'without a gold answer': 20}" in out
    path = lines(tmp_path / "b.jsonl", [{"prompt": "1?", "answer": missing}])
    assert "0 rows" in refusal(common.data.load_questions, SimpleNamespace(**vars(args) | {"data": path}),
                               load_tokenizer(""), 4)


def test_rows_with_a_bad_label_or_score_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "x", "label": label}
            for i, label in enumerate((True, False, 1, 0, "false", "true"))]
    dropped = Counter()
    kept = load_examples(lines(tmp_path / "a.jsonl", rows), dropped=dropped)
    assert [e.prompt for e in kept] == ["0?", "2?", "5?"] and dropped == {"label is false": 3}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [pair | {"score_chosen": 2, "score_rejected": 9}, pair | {"score_chosen": 3, "score_rejected": 1}]
    (kept,) = load_preferences(lines(tmp_path / "b.jsonl", rows), dropped=(dropped := Counter()))
    assert kept.margin == 2 and dropped == {"rejected has the higher score": 1}
    for scores in ((float("nan"), 9), (9, None), ("", 9)):
        row = pair | dict(zip(("score_chosen", "score_rejected"), scores))
        assert "line 1: only one of score" in refusal(load_preferences, lines(tmp_path / "c.jsonl", [row]))


def test_a_column_system_is_the_system_message(tmp_path):
    rows = [{"system": "Be brief.", "prompt": "p", "completion": "a"},
            {"system": "Be brief.", "prompt": [{"role": "user", "content": "q"}, {"role": "assistant",
             "content": "r"}, {"role": "user", "content": "s"}], "completion": "a"}]
    for e, row in zip(load_examples(lines(tmp_path / "a.jsonl", rows)), rows):
        assert e.prompt[0] == {"role": "system", "content": "Be brief."} and e.prompt[-1]["content"] in "ps"
    row = {"system": "Be brief.", "prompt": "p", "chosen": "a", "rejected": "b"}
    (pair,) = load_preferences(lines(tmp_path / "b.jsonl", [row]))
    assert [m["content"] for m in pair.prompt] == ["Be brief.", "p"]
    twice = {"system": "A", "prompt": [{"role": "system", "content": "B"}, {"role": "user", "content": "p"}],
             "completion": "a"}
    assert "a column system, and a system message" in refusal(load_examples, lines(tmp_path / "c.jsonl", [twice]))


@pytest.mark.parametrize("key", ["thinking", "tool_calls", "name"])
def test_what_a_message_holds_beside_its_words_is_refused(tmp_path, key):
    row = {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3", key: "x"}]}
    assert f"line 1: a chat message has {key}" in refusal(load_examples, lines(tmp_path / "a.jsonl", [row]))
    row["messages"][1][key] = None
    assert load_examples(lines(tmp_path / "a.jsonl", [row]))[0].completion == "3"


@pytest.mark.parametrize("text, parts", [
    ('{"prompt": "smile \\ud83d", "answer": "3"}', ["line 1", "surrogates"]),
    ('{"prompt": "p", "completion": "\\ud83d"}', ["line 1", "surrogates"]),
    ('{"prompt": "p", "answer": ' + "[" * 5000 + "]" * 5000 + "}", ["line 1"]),
    ('{"prompt": "p", "answer": "3", "meta": [1]}', ["line 1", "meta is a list"]),
    ('{"prompt": "p", "answer": "3", "task": "countdown"}', ["line 1", "meta.numbers"]),
    ('{"prompt": "p", "answer": "x", "task": "countdown", "meta": {"numbers": [1]}}', ["line 1", "countdown"]),
    ('{"prompt": "p", "answer": {"a": 1}}', ["line 1", "answer holds a dict"])], ids=lambda value: str(value)[:40])
def test_odd_rows_are_one_line_with_their_place(tmp_path, text, parts):
    (tmp_path / "a.jsonl").write_text(text + "\n")
    message = refusal(load_examples, tmp_path / "a.jsonl")
    assert all(part in message for part in ["a.jsonl", *parts])


def test_columns_of_one_name_dates_and_bytes_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer,answer\n1+2?,3,4\n")
    assert "two columns are named 'answer'" in refusal(load_examples, tmp_path / "a.csv")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for value in (datetime(2001, 2, 3), b"3"):
        parquet.write_table(pyarrow.table({"prompt": ["p"], "answer": [value]}), tmp_path / "a.parquet")
        message = refusal(load_examples, tmp_path / "a.parquet")
        assert "line 1: column answer holds a " + type(value).__name__ in message


# Rows of other tools


def test_rows_of_other_tools(tmp_path):
    """Alpaca's, ShareGPT's, verl's, and two columns by other names."""
    chat = [{"from": "system", "value": "S"}, {"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "3"}]
    rows = {
        "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, ("Add.\n\n1 2", "", "3")),
        "alpaca without input": ({"instruction": "Add.", "input": "", "output": "3"}, ("Add.", "", "3")),
        "sharegpt": ({"conversations": chat}, ([{"role": "system", "content": "S"},
                                                {"role": "user", "content": "1+2?"}], "", "3")),
        "verl": ({"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "1+2?"}], "ability": "x",
                  "reward_model": {"style": "rule", "ground_truth": "3"}}, ("1+2?", "3", "")),
        "response": ({"prompt": "1+2?", "response": "3", "answer": "3"}, ("1+2?", "3", "3"))}
    for name, (row, expected) in rows.items():
        (e,) = load_examples(lines(tmp_path / "a.jsonl", [row]))
        assert (e.prompt, e.answer, e.completion) == expected, name
    for row, part in (({"instruction": "a", "output": "b", "history": [["x", "y"]]}, "history is not read"),
                      ({"prompt": "q", "reward_model": {"style": "model"}}, "only style rule"),
                      ({"conversations": [{"from": "human", "value": "x"}]}, "must end in an assistant turn"),
                      ({"conversations": chat + [{"from": "tool", "value": "x", "name": "f"}]}, "has name")):
        assert part in refusal(load_examples, lines(tmp_path / "a.jsonl", [row]))


def test_verls_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"data_source": "gsm8k", "prompt": [{"role": "user", "content": f"{i}?"}], "extra_info": {"index": i},
             "reward_model": {"style": "rule", "ground_truth": str(i)}} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert [(e.prompt, e.answer) for e in load_examples(tmp_path / "train.parquet")] == [
        ("0?", "0"), ("1?", "1"), ("2?", "2")]


def test_preferences_and_bare_prompts_are_questions(tmp_path):
    """Of pairs the prompt, once the reply is gone; a column of another name is refused, not left out."""
    hh = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    post = {"subreddit": "s", "title": "t", "post": "p"}
    rows = [{"chosen": hh + "x", "rejected": hh + "y"}, {"prompt": "q", "chosen": "x", "rejected": "y"},
            {"info": post, "summaries": [{"text": "x"}, {"text": "y"}], "choice": 1}, {"prompt": "q", "system": "S"}]
    examples = load_examples(lines(tmp_path / "a.jsonl", rows))
    assert [(e.answer, e.completion, e.task) for e in examples] == [("", "", "text")] * 4
    assert [e.prompt for e in examples[:2]] == [turns, "q"] and examples[2].prompt.endswith("TL;DR:")
    assert examples[3].text == "S\n\nq"
    twice = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: "
    lines(tmp_path / "a.jsonl", [{"chosen": twice + "c", "rejected": twice + "d"}, rows[0]])
    assert len(load_examples(tmp_path / "a.jsonl", dropped=(dropped := Counter()))) == 1
    assert dropped == {"prompt ends in a reply": 1}
    assert "known schemas" in refusal(load_examples, lines(tmp_path / "a.jsonl", [{"prompt": "q", "anwser": "7"}]))


def test_published_preferences_are_questions():
    gpt2 = str(DATA / "tokenizers" / "gpt2")
    if not Path(gpt2).exists():
        pytest.skip(f"no sample data in {DATA}")
    for name in ("ultrafeedback_binarized/test.jsonl", "hh_rlhf/harmless-base-test.jsonl.gz"):
        found = [path for path in (DATA / name.split("/")[0]).rglob("*") if path.suffix in (".jsonl", ".gz")]
        for path in found:
            assert all(e.text and not e.answer for e in load_examples(path))
    (path,) = (DATA / "lm_human_preferences").glob("*.json")
    pairs = load_preferences(path, label_tokenizer=gpt2)
    prompts = {e.id: e.prompt for e in load_examples(path, label_tokenizer=gpt2)}
    assert pairs and all(prompts[pair.id] == pair.prompt for pair in pairs)


def test_questions_without_gold_answers_where_no_reward_needs_one(tmp_path):
    lines(tmp_path / "a.jsonl", [{"prompt": f"q{i}"} for i in range(8)])
    args = SimpleNamespace(data=str(tmp_path / "a.jsonl"), level="", train_questions=0, eval_questions=2, seed=0,
                           max_prompt_tokens=0, max_new_tokens=4, system="none", prompt_template="{prompt}",
                           dry_run=False, label_tokenizer="")
    train, held_out, _, _ = common.data.load_questions(args, load_tokenizer(""), 4, gold=False)
    assert (len(train), len(held_out)) == (6, 2)
    assert "without a gold answer': 8" in refusal(common.data.load_questions, args, load_tokenizer(""), 4)
    for specs, need in ((["correctness=1", "format"], True), (["answer-prob:exp=1"], True), (["math"], True),
                        (["model:runs/rm", "format=0.1"], False), (["my.py:correctness=1"], False)):
        assert rewards.need_gold(specs) == need
    lines(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "answer": "7" * (i > 3), "completion": ""} for i in range(8)])
    assert "some have none" in refusal(common.data.load_questions, args, load_tokenizer(""), 4, gold=False)


def test_several_right_answers(tmp_path):
    """Any of them is right; they go with the question, into samples.csv and back."""
    path = lines(tmp_path / "a.jsonl", [{"prompt": "Capital?", "answer": ["Paris", "paris, France"]}])
    (e,) = load_examples(path)
    assert e.answer == "Paris" and e.meta == {"answers": ["Paris", "paris, France"]}
    given = [f"<answer>{text}</answer>" for text in ("Paris", "paris, France", "Lyon", "")]
    assert rewards.judge([e] * 4, given) == [1, 1, 0, 0]
    row = {"prompt": e.text, "answer": e.answer, "completion": "x", "meta": json.dumps(e.meta), "task": e.task}
    assert load_examples(lines(tmp_path / "b.jsonl", [row]))[0].meta == e.meta
    assert "empty" in refusal(load_examples, lines(tmp_path / "c.jsonl", [{"prompt": "q", "answer": ["a", ""]}]))


def test_each_answer_of_a_conversation():
    """--train-on all: with all that was said before it, and nothing behind it."""
    turns = [{"role": role, "content": text} for role, text in (
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))]
    first, last = answered_turns(Example(7, turns, completion="d"))
    assert (first.prompt, first.completion) == (turns[:2], "b") and last == Example(7, turns, completion="d")
    assert first.id < 0 and answered_turns(Example(7, "a", completion="b")) == [Example(7, "a", completion="b")]
    ids = [e.id for i in range(20) for e in answered_turns(Example(i, turns[1:], completion="d"))]
    assert len(set(ids)) == 40


def test_a_long_folder_is_not_listed_whole(tmp_path):
    for i in range(50):
        (tmp_path / f"file-{i:02d}.txt").touch()
    assert "file-11.txt and 38 more" in refusal(load_examples, tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("row, parts", [
    ('{"prompt": "q", "answer": ' + "9" * 5000 + "}", ["4300 digits"]),
    ('{"prompt": "q", "answer": "1", "answer": "2"}', ["stands twice", "prompt, answer, answer"]),
    ('{"prompt": "q", "answer": "1", "meta": "' + "[" * 5000 + '"}', ["recursion"]),
    ('{"a\\nb": "q", "answer": "1"}', ["the columns a b,answer"]),
    ('{"question": "q", "answer": 5}', ["ends in '5'", "columns prompt and answer"]),
    ('{"question": "q", "choices": "abcd", "answer": 0}', ["list of at most 10 texts"]),
    ('{"question": "q", "choices": ["a", null], "answer": 0}', ["list of at most 10 texts"]),
    ('{"question": "q", "choices": ["a", "b"], "answer": true}', ["the answer is True, not one of A, B"]),
    ('{"question": "", "choices": ["a", "b"], "answer": 0}', ["the question is empty"]),
    ('{"prompt": "q", "answer": "1", "task": "countdown", "meta": {"numbers": ["1"]}}', ["meta.numbers"]),
    ('{"prompt": [{"role": null, "content": "q"}], "answer": "1"}', ["list of {role, content}"]),
    ('{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "answer": "1"}',
     ["ends in an assistant turn"])], ids=lambda value: str(value)[:60])
def test_rows_that_hold_something_else_are_one_line_with_their_place(tmp_path, row, parts):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(QA)}\n{row}\n")
    message = refusal(load_examples, tmp_path / "a.jsonl")
    assert [part for part in ["a.jsonl: line 2: ", *parts] if part not in message] == [], message


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("row, part", [
    (PAIR | {"prompt": ""}, "the prompt is empty"),
    ({"info": {"article": "p"}, "summaries": [{"text": "a"}], "choice": 1}, "choice is 1 of 1 summaries"),
    ({"info": "p", "summaries": [{"text": "a"}] * 2, "choice": 1}, "not what its column should hold"),
    (PAIR | {"score_chosen": "nan", "score_rejected": 1}, "nan and 1"),
    (PAIR | {"score_chosen": "inf", "score_rejected": 1}, "inf and 1"),
    ({"prompt": "q", "completion": "c", "answer": "1", "correct": None}, "correct is None, neither 1 nor 0")])
def test_pairs_that_hold_something_else_are_one_line_with_their_place(tmp_path, row, part):
    message = refusal(load_preferences, lines(tmp_path / "a.jsonl", [row]))
    assert "a.jsonl: line 1: " in message and part in message


def test_flags_are_read_as_csv_json_and_pandas_write_them(tmp_path):
    for right, wrong in ((True, False), ("true", "false"), (1.0, 0.0), ("1.0", "0.0")):
        rows = [{"prompt": "p", "completion": completion, "answer": "1", "correct": correct, "finished": good,
                 "label": good} for completion, correct, good in (("a", right, right), ("b", wrong, right),
                                                                  ("c", wrong, wrong))]
        path = lines(tmp_path / "a.jsonl", rows)
        assert [(e.completion, yes) for e, yes in load_generations([path])] == [("a", True), ("b", False)]
        assert [e.completion for e in load_examples(path)] == ["a", "b"]


def test_a_pair_whose_prompt_ends_in_a_reply_is_left_out_and_counted(tmp_path):
    """As a few of HH: there is nothing to reply to."""
    twice = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: "
    rows = [{"chosen": twice + "c", "rejected": twice + "d"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    (pair,) = load_preferences(lines(tmp_path / "a.jsonl", rows), dropped=(dropped := Counter()))
    assert pair.prompt == "q" and dropped == {"prompt ends in a reply": 1}


def test_mmlus_columns_in_another_order_are_no_row(tmp_path):
    (tmp_path / "a.csv").write_text("answer,question,A,B,C,D\nB,q,1,2,3,4\n")
    (e,) = load_examples(tmp_path / "a.csv")
    assert (e.prompt, e.answer) == ("q\nA) 1\nB) 2\nC) 3\nD) 4", "B")


def test_the_line_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,answer\nq,1\nq\xff,1\n")
    assert "a.csv: line 3: not utf-8" in refusal(load_examples, tmp_path / "a.csv")


def test_parquet_cells_that_python_or_a_samples_csv_cannot_hold(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    far, path = pyarrow.array([2**31 - 1], pyarrow.int32()).view(pyarrow.date32()), tmp_path / "a.parquet"
    for name, cells, part in (("day", far, "days="), ("meta", [{"day": datetime(2001, 2, 3)}], "line 1: ")):
        parquet.write_table(pyarrow.table({"prompt": ["p"], "answer": ["1"], name: cells}), path)
        message = refusal(load_examples, path)
        assert "a.parquet: " in message and part in message


def test_odd_paths_splits_and_limits(tmp_path):
    path = lines(tmp_path / "train.jsonl", [QA])
    for split in ("", "/", "**", ".."):
        assert f"no split {split!r}" in refusal(load_examples, tmp_path, split)
    assert "holds train.jsonl" in refusal(load_generations, [tmp_path])
    many = ",".join([path] * 200)  # longer than a path may be
    assert len(load_examples(many)) == 200
    assert "no file" in refusal(load_examples, "~nobody-of-that-name/a.jsonl")
    assert "limit -1" in refusal(load_preferences, path, limit=-1)
