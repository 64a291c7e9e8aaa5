"""Which questions a run draws: shuffled epochs of all, or the levels of a curriculum as they open."""

import itertools
import random
from dataclasses import dataclass, field

from common import data, dist
from common.run import RunState


@dataclass
class QuestionState(RunState):
    """Where a run stands among its questions; a part of its checkpoints.

    With --curriculum the lowest level is open first, and the next one opens as soon as the newest answers to
    the newest level, --curriculum-window of them or more, are right in the share --curriculum.
    """

    position: int = 0  # in the endless sequence of shuffled questions
    open_levels: int = 1  # of a curriculum
    recent: list = field(default_factory=list)  # (right, answers) of each step, to the newest level

    def draw(self, train, n, args) -> list[data.Example]:
        """The next n questions: the same on every number of ranks, a function of the state and the seed.

        With --curriculum each is of the newest open level or, by the share --curriculum-share, of one of
        those before it, which are equally likely. A dry run draws from all levels: it needs the longest.
        """
        first, self.position = self.position, self.position + n
        if not args.curriculum or args.dry_run:
            return [train[row] for row in data.batch_indices(len(train), first, n, args.seed)]
        *earlier, newest = levels_of(train)[:self.open_levels]
        rows = {level: [e for e in train if e.level == level] for level in [*earlier, newest]}
        drawn = []
        for i in range(first, first + n):
            rng = random.Random(f"curriculum {args.seed} {i}")
            level = rng.choice(earlier) if earlier and rng.random() < args.curriculum_share else newest
            (row,) = data.batch_indices(len(rows[level]), i, 1, args.seed)
            drawn.append(rows[level][row])
        return drawn

    def open_next(self, train, answers, args, run) -> dict:
        """Open the next level if it is time. Returns metrics: the newest level, and accuracy on it of late.

        answers: (level, right) of each answer that this rank has sampled.
        """
        if not args.curriculum:
            return {}
        levels = levels_of(train)
        newest = levels[self.open_levels - 1]
        right = [value == 1 for level, value in itertools.chain(*dist.gather(answers)) if level == newest]
        recent = [*self.recent, (sum(right), len(right))]
        while sum(n for _, n in recent[1:]) >= args.curriculum_window:
            recent = recent[1:]
        n = sum(n for _, n in recent)
        accuracy = sum(right for right, _ in recent) / max(1, n)
        if n >= args.curriculum_window and accuracy >= args.curriculum and self.open_levels < len(levels):
            run.print(f"level {levels[self.open_levels]} opens: {accuracy:.0%} of the last {n} answers of "
                      f"level {newest} were right")
            self.open_levels, recent = self.open_levels + 1, []
        self.recent = recent
        return {"level": newest, "level/accuracy": accuracy}


def levels_of(train) -> list[int]:
    return sorted({e.level for e in train})
