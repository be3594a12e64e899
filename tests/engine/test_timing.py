"""How long an image still takes, on a clock that the test turns."""

from core.events import Stage, Step
from engine.timing import Pace


def test_the_rest_is_told_from_the_steps_after_the_first() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.left(Stage("denoising")) is None
    now[0] = 60.0  # the first step also warms up
    assert pace.left(Step(1, 5)) is None
    now[0] = 62.0
    assert pace.left(Step(2, 5)) == 6.0
    now[0] = 66.0
    assert pace.left(Step(3, 5)) == 6.0
    assert pace.left(Stage("decoding")) is None


def test_the_next_image_begins_again() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    for index in (1, 2):
        now[0] += 1
        pace.left(Step(index, 2))
    pace.left(Stage("encoding"))
    now[0] = 100.0
    assert pace.left(Step(1, 2)) is None
