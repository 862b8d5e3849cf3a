import numpy as np
import pytest

from service.store.labelling import LabelSource, derive_label

THRESHOLDS = (125.0, 50.0)  # as in a model of three classes
SOFT = np.array([0.2, 0.3, 0.5])


def derived(
    cycle: int | None,
    failed_at: int | None = None,
    newest_cycle: int | None = None,
    inspected: np.ndarray | None = None,
    thresholds: tuple[float, ...] | None = THRESHOLDS,
) -> tuple[list[float], LabelSource] | None:
    """Return the label for a model of three classes as a list."""
    label = derive_label(inspected, cycle, failed_at, newest_cycle, thresholds, 3)
    return label and (label[0].tolist(), label[1])


@pytest.mark.parametrize(
    ("rul", "expected"),
    [(0, [0, 0, 1]), (50, [0, 0, 1]), (51, [0, 1, 0]), (125, [0, 1, 0]), (126, [1, 0, 0]), (1000, [1, 0, 0])],
)
def test_label_of_a_failed_engine_is_the_class_of_its_rul(rul: int, expected: list[float]) -> None:
    """The RUL is the failure minus the cycle of the prediction; a threshold belongs to the class below it."""
    assert (expected, LabelSource.OUTCOME) == derived(7, failed_at=7 + rul)
    assert (expected, LabelSource.OUTCOME) == derived(0, failed_at=rul, newest_cycle=5000)


def test_label_after_the_failure_is_unknown() -> None:
    """A prediction for a cycle after the failure of its engine has no label."""
    assert derived(101, failed_at=100) is None
    assert derived(101, failed_at=100, newest_cycle=5000) is None


@pytest.mark.parametrize(("newest_cycle", "labelled"), [(7, False), (132, False), (133, True), (1000, True)])
def test_label_of_running_engine_is_first_class(newest_cycle: int, labelled: bool) -> None:
    """An engine that ran longer than the highest threshold was in the first class; else the label is unknown."""
    assert (([1, 0, 0], LabelSource.SURVIVAL) if labelled else None) == derived(7, newest_cycle=newest_cycle)


def test_label_of_an_inspection_precedes_all_others() -> None:
    """An inspection is the label as it is, even without cycle or thresholds, and after a failure."""
    expected = (SOFT.tolist(), LabelSource.INSPECTION)
    assert expected == derived(7, failed_at=7, newest_cycle=5000, inspected=SOFT)
    assert expected == derived(None, inspected=SOFT, thresholds=None)
    assert expected == derived(101, failed_at=100, inspected=SOFT)


def test_label_of_other_classes_is_ignored() -> None:
    """An inspection with another number of classes is ignored in favour of the engine's outcome."""
    assert derived(7, inspected=SOFT[:2]) is None
    assert ([0, 0, 1], LabelSource.OUTCOME) == derived(7, failed_at=7, inspected=SOFT[:2])


def test_label_without_cycle_or_thresholds_is_unknown() -> None:
    """Without cycle or thresholds the outcome of an engine gives no label."""
    assert derived(None, failed_at=100, newest_cycle=5000) is None
    for thresholds in (None, ()):
        assert derived(7, failed_at=100, newest_cycle=5000, thresholds=thresholds) is None
    assert derived(7) is None
