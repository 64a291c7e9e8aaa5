"""--curriculum: which questions are drawn, when a level opens, and that a run goes on where it was killed."""

import signal
from collections import Counter
from types import SimpleNamespace

import pytest

from common import curriculum, data
from common.curriculum import QuestionState
from tests.processes import assert_equal_bits, patched, rows, timeless, train_lines, weights

TRAIN = [data.Example(id=i, prompt=str(i), level=level) for i, level in enumerate([2] * 40 + [3] * 60 + [5] * 50)]
ARGS = SimpleNamespace(curriculum=0.5, curriculum_window=10, curriculum_share=0.25, seed=3, dry_run=False)
RUN = SimpleNamespace(print=lambda text: None)


def test_without_a_curriculum_the_questions_are_shuffled_epochs():
    state, args = QuestionState(), SimpleNamespace(curriculum=0, seed=3, dry_run=False)
    drawn = state.draw(TRAIN, 100, args) + state.draw(TRAIN, 200, args)
    assert drawn == [TRAIN[i] for i in data.batch_indices(150, 0, 300, 3)] and state.position == 300
    assert state.open_next(TRAIN, [(2, 1)] * 100, args, RUN) == {} and state.open_levels == 1


def test_levels_are_drawn_by_the_share():
    assert {e.level for e in QuestionState().draw(TRAIN, 500, ARGS)} == {2}
    drawn = Counter(e.level for e in QuestionState(open_levels=3).draw(TRAIN, 4000, ARGS))
    assert abs(drawn[5] - 3000) < 110 and abs(drawn[2] - 500) < 85 and abs(drawn[3] - 500) < 85  # 4 sigma
    alone = SimpleNamespace(**vars(ARGS) | {"curriculum_share": 0.0})
    assert {e.level for e in QuestionState(open_levels=2).draw(TRAIN, 500, alone)} == {3}
    dry = SimpleNamespace(**vars(ARGS) | {"dry_run": True})
    assert {e.level for e in QuestionState().draw(TRAIN, 150, dry)} == {2, 3, 5}  # the longest may be anywhere


def test_no_question_comes_twice_within_an_epoch_of_its_level_and_no_call_changes_the_order():
    drawn = QuestionState(open_levels=2).draw(TRAIN, 60, ARGS)
    newest = [e.id for e in drawn if e.level == 3]
    assert len(newest) == len(set(newest)) > 30
    state = QuestionState(open_levels=2)
    assert [e for n in (7, 13, 40) for e in state.draw(TRAIN, n, ARGS)] == drawn
    other = SimpleNamespace(**vars(ARGS) | {"seed": 4})
    assert QuestionState(open_levels=2).draw(TRAIN, 60, other) != drawn


def test_a_level_opens_at_the_accuracy_of_the_newest_level_over_the_window(monkeypatch):
    state, said = QuestionState(), []
    run = SimpleNamespace(print=said.append)

    def step(*answers):
        before = list(state.recent)
        kept = state.recent
        metrics = state.open_next(TRAIN, answers, ARGS, run)
        assert kept == before  # a checkpoint may hold this very list
        return metrics

    assert step(*[(2, 1)] * 9) == {"level": 2, "level/accuracy": 1.0} and state.open_levels == 1  # too few
    step(*[(2, 0)] * 12)  # the window is this step: the one before counts no more
    assert state.recent == [(0, 12)] and state.open_levels == 1
    step((2, 1), (2, float("nan")), (2, 1), (2, 0))  # what hung is not right
    assert state.recent == [(0, 12), (2, 4)]
    step(*[(2, 1)] * 3, (3, 1), (5, 1))
    assert state.recent == [(0, 12), (2, 4), (3, 3)]
    assert step(*[(2, 1)] * 3) == {"level": 2, "level/accuracy": 8 / 10} and not state.recent
    assert state.open_levels == 2 and said == [
        "level 3 opens: 80% of the last 10 answers of level 2 were right"]
    step(*[(2, 1)] * 50)  # of an earlier level
    assert state.open_levels == 2
    monkeypatch.setattr(curriculum.dist, "gather", lambda mine: [mine, [(3, 0)] * 5])  # the other rank's
    step(*[(3, 1)] * 5)
    assert state.open_levels == 3 and len(said) == 2  # exactly one half is enough
    step(*[(5, 1)] * 50)
    assert state.open_levels == 3 and len(said) == 2 and state.recent == [(50, 50)]


@pytest.mark.parametrize("script, flags, complaint", [
    ("grpo", {"data": "arithmetic", "level": 2}, "--curriculum 0.5: the questions of arithmetic have one level "
                                                 "only, --level 2"),
    ("grpo", {"data": "questions.jsonl"}, "--curriculum 0.5: the questions of questions.jsonl have one level only"),
    ("dpo", {"pairs": "pairs.jsonl"}, "--curriculum 0.5 chooses questions; --pairs pairs.jsonl are fixed"),
    ("ppo", {"curriculum": 1.5}, "--curriculum 1.5: must be from 0 to 1"),
])
def test_what_has_no_levels_is_refused(go, tmp_path, script, flags, complaint):
    (tmp_path / "questions.jsonl").write_text(
        "".join(f'{{"prompt": "{i}+1?", "answer": "2"}}\n' for i in range(9)))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 20)
    done = go("run", script=f"{script}.py", bare=True, fails=True,
              **{"curriculum": 0.5, "eval_questions": 2} | flags)
    assert complaint in done.err and "Traceback" not in done.err and not done.folder.exists()


CURRICULUM = {"data": "arithmetic", "level": "1-3", "train_questions": 90, "eval_questions": 12, "seed": 1,
              "curriculum": 0.05, "curriculum_window": 20, "max_new_tokens": 40, "max_steps": 4, "save_every": 1}
KILLED_IN_STEP_3 = """
def collect(sampler, train, prompt_ids, reward_functions, args, state, *more):
    done = original(sampler, train, prompt_ids, reward_functions, args, state, *more)
    if state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return done

original, script.collect = script.collect, collect
"""


def test_killed_after_a_level_has_opened_and_resumed(go, tmp_path):
    flags = CURRICULUM | {"prompts_per_step": 4, "num_generations": 6}
    whole = go("whole", bare=True, **flags)
    killed = go("killed", script=patched(tmp_path, "grpo", KILLED_IN_STEP_3), fails=True, bare=True, **flags)
    assert killed.code == -signal.SIGKILL
    folder = go("killed", script="grpo.py", resume=True, bare=True).folder
    assert timeless(folder) == timeless(whole.folder)
    for file in ("samples.csv", "eval.csv"):
        assert (folder / file).read_bytes() == (whole.folder / file).read_bytes()
    assert_equal_bits(weights(folder), weights(whole.folder))
    levels = [line["level"] for line in train_lines(folder)]
    assert levels[0] == 1 < levels[2] and "level 2 opens: " in whole.out  # before the kill
    for line in train_lines(folder):
        sampled = Counter(int(row["level"]) for row in rows(folder, step=line["step"]))
        assert max(sampled) == line["level"] and sampled[line["level"]] >= 12
    evaluated = [Counter(int(row["level"]) for row in rows(folder, "eval.csv", step)) for step in (0, 4)]
    assert evaluated[0] == evaluated[1] and evaluated[0].keys() == {1, 2, 3}  # always at all levels


def test_the_levels_are_all_of_the_tasks_where_none_is_given(go):
    folder = go("run", bare=True, data="countdown", curriculum=0.5, max_steps=1, train_questions=40,
                eval_questions=12, prompts_per_step=2, num_generations=2, max_new_tokens=8).folder
    assert f'"level": "1-{data.GENERATED["countdown"][1]}"' in (folder / "config.json").read_text()
    assert {row["level"] for row in rows(folder, step=1)} == {"1"}
