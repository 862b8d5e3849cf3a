"""Labels to distributions over the classes, and back to JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from model import numerics
from model.numerics import Floats
from service.codecs.faults import MAX_FAULTS
from service.codecs.requests import Label
from service.errors import Fault
from service.store.store import LabelResultColumn


def decode_labels(
    labels: list[Label | None], classes: tuple[str, ...], faults: list[Fault], place: Any
) -> Floats | None:
    """Labels as distributions (N, C), a row of NaN where there is none; None if there is none at all."""
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
    """One label as probabilities (C,).

    Raises:
        ValueError: an unknown name, an index out of range, or a list that is no distribution over the classes.
    """
    if isinstance(label, str):
        if label not in classes:
            raise ValueError(f"unknown class {label[:50]!r}; classes are {', '.join(classes[:20])}")
        label = classes.index(label)
    if isinstance(label, int):
        if not 0 <= label < len(classes):
            raise ValueError(f"class index {str(label)[:20]} is not from 0 to {len(classes) - 1}")
        label = [float(k == label) for k in range(len(classes))]
    return numerics.as_distributions([label], len(classes))[0]  # type: ignore[no-any-return]  # numpy's indexing is Any


def results_json(targets: Floats | None, results: LabelResultColumn, classes: tuple[str, ...]) -> dict[str, Any]:
    """What `/v1/predict` adds to its answer where it did not apply a label: what became of each, null without one."""
    if targets is None or all(one is None or one[0] != "conflict" for one in results):
        return {}
    rows = zip(targets, results, strict=True)
    return {"results": [None if one is None else label_result_json(label, *one, classes) for label, one in rows]}


def label_result_json(label: Floats, result: str, known: Floats | None, classes: tuple[str, ...]) -> dict[str, Any]:
    """What became of one label; both values where it was refused."""
    if known is None:
        return {"result": result}
    return {"result": result, "given": label_json(label, classes), "known": label_json(known, classes)}


def label_json(label: Floats, classes: Sequence[str]) -> str | dict[str, float]:
    """A label as people say it: the class if it is one, else the probability of each."""
    if len(label) != len(classes):
        return {str(k): p for k, p in enumerate(label.tolist())}
    top = int(label.argmax())
    return classes[top] if label[top] == 1.0 else dict(zip(classes, label.tolist(), strict=True))
