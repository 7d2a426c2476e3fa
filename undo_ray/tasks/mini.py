"""The miniature world as a benchmark: generated word problems of a few skills, for `make demo` and the tests.

Source: `undo_ray.mini.world`. Licence: that of undo_ray. The benchmark seed is fixed: every run has the same questions.
A row (invented): {"id": "mini/train/0", "question": "zoe has 40 cups and loses 19. how many cups are left?",
"answer": "21", "subject": "sub"}
Metric: exact match of the final number (`grading.number`); rationales end in `ans 21`.
"""

from typing import Any

from undo_ray.tasks import Task

SEED = 2026
SIZES = {"train": 2000, "test": 400}


def _generate(split: str) -> list[dict[str, Any]]:
    from undo_ray.mini import world

    return [dict(row) for row in world.problems(split, SIZES[split], SEED)]


MINI = Task(
    name="mini",
    source="undo_ray.mini.world (Apache-2.0)",
    kind="number",
    instruction="",
    splits=tuple(SIZES),
    templated=True,
    generate=_generate,
)
