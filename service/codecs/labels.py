"""What became of labels, as answers say it. Knows no HTTP."""

from collections.abc import Sequence
from typing import Any

from model.numerics import Floats
from service.store.store import Results


def results_json(targets: Floats | None, results: Results, classes: tuple[str, ...]) -> dict[str, Any]:
    """What `/v1/predict` adds to its answer where it did not apply a label: what became of each, null without one."""
    if targets is None or all(one is None or one[0] != "conflict" for one in results):
        return {}
    rows = zip(targets, results, strict=True)
    return {"results": [None if one is None else told_json(label, *one, classes) for label, one in rows]}


def told_json(label: Floats, result: str, known: Floats | None, classes: tuple[str, ...]) -> dict[str, Any]:
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
