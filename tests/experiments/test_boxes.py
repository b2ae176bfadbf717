from __future__ import annotations

import pytest
import torch
from torch import Tensor

from experiments.tasks.boxes import Found, average_precision, decode, hits, mean_average_precision, overlap


def found(*rows: tuple[float, int, list[float]]) -> Found:
    """Boxes with their scores and classes, surest first."""
    scores, classes, boxes = zip(*rows, strict=True) if rows else ((), (), ())
    return Found(torch.tensor(boxes).reshape(-1, 4), torch.tensor(classes), torch.tensor(scores))


def true(*rows: tuple[int, list[float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([box for _, box in rows]).reshape(-1, 4), torch.tensor([label for label, _ in rows]).long()


def test_overlap_is_intersection_over_union() -> None:
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    second = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], [2.0, 0.0, 4.0, 2.0], [5.0, 5.0, 4.0, 4.0]])
    assert torch.allclose(overlap(first, second), torch.tensor([[1.0, 1 / 7, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert overlap(first[1:], first[1:]).tolist() == [[0.0]]  # no area at all is no match
    assert overlap(first, first[:0]).shape == (2, 0)


def test_a_peak_becomes_a_box_around_its_place() -> None:
    heat, distances = torch.full((2, 3, 4, 5), -8.0), torch.zeros(2, 4, 4, 5)
    heat[1, 2, 3, 1] = 2.0  # class 2, row 3, column 1
    heat[1, 2, 3, 2] = 1.0  # beside it, and lower
    heat[1, 0, 3, 1] = 0.0  # at the same place, of another class
    distances[1, :, 3, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    image = decode(heat, distances, stride=4, most=2)[1]
    assert image.classes.tolist() == [2, 0]
    assert image.boxes.tolist() == [[3.0, 10.0, 7.0, 16.0]] * 2
    assert image.scores.tolist() == pytest.approx([1 / (1 + 2.718281828**-2), 0.5])


def test_neighbours_of_peaks_never_get_a_score() -> None:
    heat = torch.arange(25.0).reshape(1, 1, 5, 5)
    image = decode(heat, torch.zeros(1, 4, 5, 5), stride=1)[0]
    assert len(image.scores) == 25
    assert image.scores[0] > 0.99
    assert not image.scores[1:].any()


def test_a_true_box_is_found_once_by_the_first_that_fits() -> None:
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 4.0], [0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 10.0], [20.0, 1.0, 30.0, 11.0]]
    )
    assert hits(boxes, truth).tolist() == [False, True, False, True]
    assert hits(boxes, truth[:0]).tolist() == [False] * 4
    assert hits(boxes, truth, least=0.3).tolist() == [True, False, False, True]


def test_average_precision_in_closed_form() -> None:
    right = torch.tensor([True, False, True, False])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    # Recall 1/3 at precision 1, 2/3 at precision 2/3; the third box is never found.
    assert average_precision(scores, right, 3) == pytest.approx(1 / 3 + 2 / 9)
    # A later, better precision holds for smaller recalls, too: 0 1 1 gives 2/3 and 2/3.
    assert average_precision(scores[:3], torch.tensor([False, True, True]), 2) == pytest.approx(2 / 3)
    assert average_precision(scores.flip(0), right, 2) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert average_precision(scores[:0], right[:0], 2) == 0.0


BOX, FAR = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def test_the_mean_is_over_the_classes_that_occur() -> None:
    truth = [true((3, BOX), (5, FAR)), true((3, FAR)), true()]
    perfect = [found((0.9, 3, BOX), (0.8, 5, FAR)), found((0.7, 3, FAR)), found()]
    assert mean_average_precision(perfect, truth) == 1.0
    # Class 3 is found in one of two images, class 5 not at all; class 7 occurs nowhere.
    poor = [found((0.9, 3, BOX), (0.8, 5, BOX)), found((0.7, 5, FAR)), found((0.6, 7, BOX))]
    assert mean_average_precision(poor, truth) == pytest.approx((1 / 2 + 0) / 2)


def test_boxes_are_ranked_over_all_images() -> None:
    truth = [true((1, BOX)), true((1, BOX))]
    late = [found((0.9, 1, BOX)), found((0.8, 1, FAR), (0.7, 1, BOX))]
    assert mean_average_precision(late, truth) == pytest.approx((1 + 2 / 3) / 2)
    early = [found((0.5, 1, BOX)), found((0.8, 1, FAR), (0.7, 1, BOX))]
    assert mean_average_precision(early, truth) == pytest.approx((2 / 3 + 2 / 3) / 2)
