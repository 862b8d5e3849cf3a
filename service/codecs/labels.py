"""Decode labels into distributions over the classes, and encode them as JSON."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from model import numerics
from model.numerics import Floats
from service.codecs.faults import MAX_FAULTS, Loc, unknown_class
from service.codecs.requests import Label
from service.errors import Fault
from service.store.store import LabelResultColumn


def decode_labels(
    labels: list[Label | None], classes: tuple[str, ...], faults: list[Fault], place: Callable[[int], Loc]
) -> Floats | None:
    """Return labels as distributions (N, C), NaN in rows without a label; None if no row has a label.

    A fault is appended to `faults`; `place` returns the place of the label of a row.
    """
    if all(label is None for label in labels):
        return None
    targets = np.full((len(labels), len(classes)), np.nan)
    for i, label in enumerate(labels):
        if label is None:
            continue
        try:
            targets[i] = label_distribution(label, classes)
        except ValueError as error:
            faults.append(Fault(place(i), str(error)))
            if len(faults) >= MAX_FAULTS:
                break
    return targets


def label_distribution(label: Label, classes: tuple[str, ...]) -> Floats:
    """Return a label as probabilities (C,).

    Raises:
        ValueError: an unknown name, an index out of range, or a list that is no distribution over the classes.
    """
    if isinstance(label, str):
        if label not in classes:
            raise ValueError(unknown_class(label, classes))
        label = classes.index(label)
    if isinstance(label, int):
        if not 0 <= label < len(classes):
            raise ValueError(f"class index {str(label)[:20]} is not from 0 to {len(classes) - 1}")
        label = [float(k == label) for k in range(len(classes))]
    return numerics.as_distributions([label], len(classes))[0]  # type: ignore[no-any-return]  # numpy's indexing is Any


def results_json(targets: Floats | None, results: LabelResultColumn, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the field that `/v1/predict` adds if it rejected a label: the result of each label, null without one."""
    if targets is None or all(result is None or result[0] != "conflict" for result in results):
        return {}
    rows = zip(targets, results, strict=True)
    documents = [None if result is None else label_result_json(label, *result, classes) for label, result in rows]
    return {"results": documents}


def label_result_json(label: Floats, result: str, stored: Floats | None, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the result of one label; also the label and the stored one if they contradict each other."""
    if stored is None:
        return {"result": result}
    return {"result": result, "given": label_json(label, classes), "known": label_json(stored, classes)}


def label_json(label: Floats, classes: Sequence[str]) -> str | dict[str, float]:
    """Return a label as its class if it is certain, otherwise as the probability of each class."""
    if len(label) != len(classes):
        return {str(k): p for k, p in enumerate(label.tolist())}
    top = int(label.argmax())
    return classes[top] if label[top] == 1.0 else dict(zip(classes, label.tolist(), strict=True))
