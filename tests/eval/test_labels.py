from __future__ import annotations

import random

from ktmerge.eval.labels import Box, Label, along, place, square

FRAME = Box(0, 0, 400, 300)


def test_boxes() -> None:
    assert square(10, 10, 4) == Box(8, 8, 12, 12)
    assert square(10, 10, 4).overlap(Box(10, 10, 20, 20)) == 4
    assert square(10, 10, 4).overlap(Box(12, 12, 20, 20)) == 0
    assert Box(-1, 0, 1, 2).outside(FRAME) == 2
    assert len(along([(0, 0), (30, 0), (30, 30)], 3)) == 22


def test_eight_crowded_labels_do_not_overlap() -> None:
    source = random.Random(0)
    for _ in range(20):
        labels = [Label(200 + source.gauss(0, 25), 150 + source.gauss(0, 25), 50, 11) for _ in range(8)]
        obstacles = [square(label.x, label.y, 8) for label in labels]
        placed = place(labels, obstacles, FRAME)
        for i, box in enumerate(placed):
            assert box.outside(FRAME) == 0
            assert all(box.overlap(other) == 0 for other in placed[:i])


def test_labels_stay_inside_and_near() -> None:
    labels = [Label(399, 299, 60, 12), Label(1, 1, 60, 12)]
    for label, box in zip(labels, place(labels, [], FRAME), strict=True):
        assert box.outside(FRAME) < 60 * 12 * 0.2
        assert box.left - 15 <= label.x <= box.right + 15
    assert place(labels, [], FRAME) == place(labels, [], FRAME)
