"""Where an answer ends: --stop texts, and the next question of a base model, which writes on into its own."""

import copy
import json

import pytest
import torch

from common import data, models
from common.draws import NEXT_EXAMPLE, Completion, StopTexts, decode, noise_key
from grpo import Sampler
from tests.commands import read, run
from tests.tiny_models import adapted_model, some_prompts, tiny_tokenizer

torch.set_num_threads(1)
TOKENIZER = tiny_tokenizer()
PROMPTS = some_prompts((4, 1, 9, 17, 30, 5, 2))
KEYS = [[noise_key(0, 0, p, g) for g in range(6)] for p in range(len(PROMPTS))]


def base_tokenizer():
    """Without a chat template, as of a base model."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    return tokenizer


def ids_of(*pieces):
    """Token by token as given: where one token ends and the next begins is the test's choice."""
    ids = [TOKENIZER.convert_tokens_to_ids(piece) for piece in pieces]
    assert None not in ids and TOKENIZER.unk_token_id not in ids[1:]
    return ids


def longest_prefix(ids, stops):
    """By definition, token by token: the fewest ids that hold all of the answer, and how much of a text."""
    texts = [decode(TOKENIZER, ids[:n]) for n in range(1, len(ids) + 1)]
    text = next(text for text in texts if any(stop in text for stop in stops))  # as soon as one is whole
    answer = text[:min(text.find(stop) for stop in stops if stop in text)]
    kept = next(n for n in range(1, len(ids) + 1) if decode(TOKENIZER, ids[:n]).startswith(answer))
    return kept, len(decode(TOKENIZER, ids[:kept])) - len(answer), answer


def test_the_sampler_ends_a_row_at_a_text_token_for_token():
    """Whatever the slots and however late the host looks; log-probs stay; the text crosses token borders."""
    torch.manual_seed(0)
    model, _ = adapted_model("qwen2")
    free = [c for row in Sampler(model, ()).sample(PROMPTS, KEYS, 40) for c in row]
    texts = [decode(TOKENIZER, c.ids) for c in free]
    stops = tuple(text[9:13] for text in texts[::5] if "\ufffd" not in text[9:13])
    assert len(stops) >= 3
    crossing = 0
    for slots, sync_every in ((64, 1), (5, 1), (3, 4), (64, 7)):
        sampler = Sampler(model, (), slots, None, StopTexts(TOKENIZER, stops), sync_every)
        samples = [c for row in sampler.sample(PROMPTS, KEYS, 40) for c in row]
        ended = 0
        for c, text, was in zip(samples, texts, free):
            if not any(stop in text for stop in stops):
                assert (c.ids, c.finished, c.cut) == (was.ids, False, None)
                continue
            ended += 1
            kept, cut, answer = longest_prefix(was.ids, stops)
            assert c.finished and c.ids == was.ids[:kept] and c.cut == cut
            assert c.logprobs == pytest.approx(was.logprobs[:kept], abs=1e-4)
            assert c.text(TOKENIZER) == answer and not any(stop in answer for stop in stops)
            crossing += cut > 0
        assert ended >= len(stops)
    assert crossing  # of some rows the last token holds the answer's end and the stop's beginning


def test_a_row_goes_no_further_than_to_the_text():
    """As soon as the host looks: at once on a CPU, where it looks after every token."""
    torch.manual_seed(0)
    model, _ = adapted_model("qwen2")
    passes = []
    model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    for (free,), prompt, keys in zip(Sampler(model, ()).sample(PROMPTS, [[0]] * 7, 40), PROMPTS, KEYS):
        text = decode(TOKENIZER, free.ids)[9:12]
        whole = next(n for n in range(len(free.ids) + 1) if text in decode(TOKENIZER, free.ids[:n]))
        for sync_every in (1, 7):
            passes.clear()
            Sampler(model, (), 4, None, StopTexts(TOKENIZER, (text,)), sync_every).sample([prompt], [[0]], 40)
            assert whole <= len(passes) < whole + sync_every


def test_a_token_that_ends_the_answer_and_begins_the_stop_text_stays():
    """"}\\n\\n" is one token of many models: without it the box would not be closed."""
    texts = StopTexts(TOKENIZER, ("72",))
    ids = ids_of("1", "7", "2", "3")
    assert texts.end(ids) == (1, 0) and Completion(ids[:1], [0.0], True, 0).text(TOKENIZER) == "1"
    both = next(i for i in range(len(TOKENIZER)) if len(TOKENIZER.decode([i])) >= 2
                and TOKENIZER.decode([i]).isprintable() and not TOKENIZER.decode([i]).startswith("<|"))
    first, *rest = TOKENIZER.decode([both])
    stop = "".join(rest) + "7"
    ids = [*ids_of("1"), both, *ids_of("7", "5")]
    kept, cut = StopTexts(TOKENIZER, (stop,)).end(ids)
    assert (kept, cut) == (2, len(rest))
    assert Completion(ids[:kept], [0.0] * kept, True, cut).text(TOKENIZER) == f"1{first}"


def test_an_answer_that_begins_with_the_stop_text_is_one_token_and_empty():
    """A row without tokens could not be trained."""
    ids = ids_of("7", "2", "5")
    assert StopTexts(TOKENIZER, ("72",)).end(ids) == (1, 1)
    assert Completion(ids[:1], [0.0], True, 1).text(TOKENIZER) == ""


def test_letters_of_several_bytes_are_whole_before_they_are_kept():
    """A token may hold a part of a letter, which decodes as U+FFFD, no shorter than the letter itself."""
    ids = TOKENIZER("é中1", add_special_tokens=False)["input_ids"] + ids_of("7", "2")
    assert len(ids) > 5
    kept, cut = StopTexts(TOKENIZER, ("72",)).end(ids)
    assert (decode(TOKENIZER, ids[:kept]), cut) == ("é中1", 0)


def test_which_texts_stop_an_answer():
    base = base_tokenizer()
    assert not StopTexts(TOKENIZER) and StopTexts(TOKENIZER).window == 1
    assert StopTexts(base).texts == NEXT_EXAMPLE
    assert StopTexts(base, (), "Frage: {prompt}\nAntwort:").texts == (*NEXT_EXAMPLE, "\nFrage:")
    assert StopTexts(base, ("\n\n",), "Q {prompt}").texts == ("\n\n",)
    assert not StopTexts(base, ("none",)) and not StopTexts(base, dry_run=True)
    ids = base("72.\n\nQuestion: 3+4?\nAnswer: 7", add_special_tokens=False)["input_ids"]
    kept, cut = StopTexts(base).end(ids)
    assert decode(base, ids[:kept])[:-cut or None] == "72.\n"


def test_worked_examples_in_plain_text_have_marks_between_them():
    """W6: question and answer of a base model's examples ran together, with no mark to stop at."""
    base = base_tokenizer()
    shown = [data.Example(0, "1+1?", "2", "It is 2."), data.Example(1, "1+2?", "3", "It is 3.")]
    messages = data.few_shot_messages(shown, "1+3?")
    assert base.decode(data.encode_prompt(base, messages)) == (
        "Question: 1+1?\nAnswer: It is 2.\n\nQuestion: 1+2?\nAnswer: It is 3.\n\nQuestion: 1+3?\nAnswer:")
    ids = data.encode_prompt(base, messages[:2] + messages[-1:], "S", "Q {prompt} A ")
    assert base.decode(ids) == "S\n\nQ 1+1? A It is 2.\n\nQ 1+3? A "


@pytest.fixture(scope="module")
def writes_on(tmp_path_factory):
    """A base model that answers right and goes on with a question of its own: no end token, no template."""
    folder = tmp_path_factory.mktemp("writes_on")
    on = "\nQ: Compute 1+1.\nA: The answer is 2."
    rows = [{"prompt": f"Compute {n}+{n}.", "answer": str(2 * n), "completion": f" The answer is {2 * n}.{on}"}
            for n in range(2, 7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models.load_model("", torch.float32, torch.device("cpu")).save_pretrained(folder / "model")
    base_tokenizer().save_pretrained(folder / "model")
    run("--model", "model", "--data", "rows.jsonl", "--full", "--lr", "3e-3", "--max-steps", 60,
        "--batch-size", 4, "--eval-questions", 1, "--prompt-template", "Q: {prompt}\nA:", "--system", "none", "--out", "sft",
        "--max-new-tokens", 8, cwd=folder, script="sft.py")
    return folder


def test_a_base_model_is_judged_by_its_own_answer(writes_on):
    """W6: pass@1 was 0 where the first answers were right and the last ones, to other questions, were not."""
    words = ["--model", "sft", "--data", "rows.jsonl", "--split", "train", "--max-new-tokens", "48"]
    run(*words, "--out", "e", cwd=writes_on)
    rows = read(writes_on / "e/samples.csv")
    assert [row["correct"] for row in rows] == ["1"] * 4 and all(row["finished"] == "1" for row in rows)
    assert all(row["completion"].strip() == f"The answer is {row['answer']}." for row in rows)
    run(*words, "--stop", "none", "--out", "n", cwd=writes_on)
    rows = read(writes_on / "n/samples.csv")
    assert all("Q: Compute 1+1." in row["completion"] and row["correct"] == "0" for row in rows)


@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_every_script_that_samples_stops_there(tmp_path, script):
    """The tokens of the text are neither counted nor trained; the rows are finished."""
    run("--data", "arithmetic", "--level", 1, "--stop", "ink>", "</an", "--out", "a", "--prompts-per-step", 2,
        "--max-steps", 1, "--max-new-tokens", 40, "--eval-questions", 2, "--train-questions", 8,
        "--warmup-steps", 0, cwd=tmp_path, script=f"{script}.py")
    run("--model", "a", "--limit", 4, "--max-new-tokens", 40, "--out", "e", cwd=tmp_path)  # asked as trained
    rows = [row for name in ("a/samples", "a/eval", "e/samples") for row in read(tmp_path / f"{name}.csv")]
    assert any(row["finished"] == "1" and row["completion"] for row in rows)
    for row in rows:
        assert "ink>" not in row["completion"] and "</an" not in row["completion"]
        own = len(TOKENIZER(row["completion"], add_special_tokens=False)["input_ids"])
        assert row["finished"] == "0" or int(row["tokens"]) <= own + 1
