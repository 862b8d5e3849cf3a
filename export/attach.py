"""A foreign ONNX classifier and its class names to an artefact that the same service serves. Needs no torch.

    python -m export.attach in.onnx out.onnx --logits OUTPUT --classes a,b,c      # or --classes @names.txt, one a line

The graph is cut to what its logits need, its tensors get the contract's names, its batch becomes free. What comes out
has to answer as what went in, batch by batch, on synthetic probes; a few of them become its golden windows.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from export import surgery
from export.surgery import AttachError, Classifier, first_line
from model import contract
from model.batch_invariance import max_difference
from model.contract import INPUT, LOGITS, ContractError, Golden, Manifest

Values = npt.NDArray[np.float32]
BATCHES = (1, 2, 7)
PROBES = 8  # four of them between 0 and 1, as features are scaled, and four between 0 and 255, as pixels come
UNIT = PROBES // 2
GOLDEN_VALUES = 2**16  # of all golden windows together, of which there are at least two
LIMIT = 1e-4  # of the largest logit; more than rounding can explain
# Other processors round otherwise. Ten times what was measured here, and never under 1e-5, is still nothing to a user.
MARGIN, LEAST = 10.0, 1e-5
SUM_TOLERANCE = 1e-3  # how near to 1 the values of a row must sum to be probabilities
FATAL_ONLY = 4  # ONNX Runtime's log severity: what goes wrong is raised, and said once


def attach(source: Path, target: Path, logits: str, described: Manifest) -> tuple[Manifest, str]:
    """Write the artefact; returns its manifest, golden windows and tolerance included, and its digest.

    Args:
        source: a foreign ONNX file.
        target: where the artefact goes.
        logits: the output, or any tensor inside of the graph, that holds a value for each class before softmax.
        described: name, version, classes and temperature.

    Raises:
        AttachError: the file cannot be served as it is.
        OSError: the target cannot be written.
    """
    found = surgery.cut(surgery.read(source), logits)
    alone, probes = _alone(found, logits)
    _check_classes(alone, described.classes, logits, found.before_softmax)
    proto = surgery.freed(found.proto, found.shape, len(described.classes)).SerializeToString()
    measured = _measure(proto, probes, alone, found.batch)
    golden = max(2, min(UNIT, GOLDEN_VALUES // max(1, int(np.prod(found.shape)))))
    proven = described.model_copy(
        update={
            "golden": tuple(
                Golden(telemetry=probe.tolist(), logits=row.tolist())
                for probe, row in zip(probes[:golden], alone[:golden], strict=True)
            ),
            "tolerance": max(MARGIN * measured, LEAST) * float(_size(alone[:UNIT]).max()),
            "training": {"source": source.name, "source_digest": contract.digest(source.read_bytes())}
            | {"source_input": found.input, "source_logits": logits},
        }
    )
    return proven, contract.write(proto, proven, target)


def class_names(text: str) -> tuple[str, ...]:
    """Names separated by commas, or `@` and a file with a name on each line.

    Raises:
        AttachError: no such file, a name that is empty, cannot be printed, or stands twice.
    """
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8-sig").rstrip().splitlines()
        except OSError as error:
            raise AttachError(f"{text[1:]}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise AttachError(f"{text[1:]}: not UTF-8 at byte {error.start}") from None
    else:
        lines = text.split(",")
    names = [line.strip() for line in lines]
    seen: dict[str, int] = {}
    for k, name in enumerate(names):
        if not name or not name.isprintable():
            raise AttachError(f"class {k} {name!r} is {'no name' if not name else 'not printable'}")
        if seen.setdefault(name, k) != k:
            raise AttachError(f"class {name!r} stands twice, as {seen[name]} and {k}; each name is of one class")
    return tuple(names)


def _probes(shape: tuple[int, ...]) -> Values:
    """Synthetic instances (PROBES, *shape): unlike each other, and short to write as they are exact in binary."""
    random = np.random.default_rng(0)
    unit, pixels = random.integers(0, 17, (UNIT, *shape)) / 16, random.integers(0, 256, (PROBES - UNIT, *shape))
    return np.concatenate([unit, pixels]).astype(np.float32)


def _alone(found: Classifier, logits: str) -> tuple[Values, Values]:
    """What the network answers to each probe by itself, in batches as the file declares them, and those probes.

    A pixel probe that has no finite answer is left out: not every network is made for such numbers.
    """
    session = _session(found.proto.SerializeToString())
    output, rows, probes = session.get_outputs()[0], found.batch or 1, _probes(found.shape)
    if output.type != "tensor(float)":
        raise AttachError(f"{logits!r} is {output.type}, logits are tensor(float){_instead(found.before_softmax)}")
    answers = [_run(session, np.repeat(probe[None], rows, axis=0), "the network fails on a probe") for probe in probes]
    shape = answers[0].shape
    if len(shape) != 2 or shape[0] != rows:
        raise AttachError(f"{logits!r} has shape {list(shape)} for a batch of {rows}; logits are [batch, classes]")
    alone = np.stack([answer[0] for answer in answers])
    finite = np.isfinite(alone).all(axis=1)
    if not finite[:UNIT].all():
        raise AttachError(f"{logits!r} is not finite for inputs between 0 and 1")
    return alone[finite], probes[finite]


def _check_classes(alone: Values, classes: tuple[str, ...], logits: str, before_softmax: str | None) -> None:
    width = alone.shape[1]
    if width != len(classes):
        raise AttachError(f"{logits!r} has {width} values an instance, --classes names {len(classes)}")
    if (alone >= 0).all() and (np.abs(alone.sum(axis=1) - 1) <= SUM_TOLERANCE).all():
        raise AttachError(
            f"{logits!r} already is a softmax: its rows sum to 1"
            + (_instead(before_softmax) or "; export the network without its last step, or append a logarithm")
        )


def _instead(before_softmax: str | None) -> str:
    return f"; take what it was made of: --logits {before_softmax!r}" if before_softmax else ""


def _measure(proto: bytes, probes: Values, alone: Values, batch: int | None) -> float:
    """The most that batches differ from instances alone, as a share of the largest logit.

    Also measured, but not limited: against the graph as it stands, which ONNX Runtime otherwise computes with other
    kernels, as it does on another processor.

    Raises:
        AttachError: a batch of N is not N batches of 1, or not possible at all.
    """
    failed = f"the batch is frozen{f' at {batch}' if batch else ''} inside of the graph, export it with a free one"
    session, worst, units = _session(proto, failed=failed), 0.0, [_size(alone)]
    every = np.arange(len(probes))
    for size in (*BATCHES, len(probes)):
        batches = [every[:size], every[-size:]]  # the last ones too: they are larger, and unlike the first
        difference = max_difference(lambda batch: [_run(session, batch, failed)], probes, [alone], batches, units)
        if difference == np.inf:
            raise AttachError(f"{failed}: a batch of {size} gives outputs of another shape")
        if not difference <= LIMIT:  # also when it is NaN
            raise AttachError(
                f"a batch of {size} is not {size} batches of 1: answers differ by {difference:.2g} of the largest "
                "logit, so that they depend on the other rows of the batch"
            )
        worst = max(worst, difference)
    plain = _session(proto, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    plainly = max_difference(lambda batch: [_run(plain, batch, failed)], probes, [alone], [every], units)
    return max(worst, plainly)


def _size(logits: Values) -> npt.NDArray[np.float64]:
    """The largest logit of each row (N, 1), and at least 1: rounding grows with it."""
    return np.asarray(np.maximum(np.abs(logits).max(axis=1, keepdims=True), 1.0), dtype=np.float64)


def _session(proto: bytes, level: Any = None, failed: str = "ONNX Runtime cannot use it") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if level is not None:
        options.graph_optimization_level = level
    try:
        return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own for each way a file can be broken
        raise AttachError(f"{failed}: {first_line(error)}") from None


def _run(session: ort.InferenceSession, batch: Values, failed: str) -> Values:
    try:
        found: Values = session.run([LOGITS], {INPUT: batch})[0]
    except Exception as error:  # as in _session
        raise AttachError(f"{failed}: {first_line(error)}") from None
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("export.attach", description="Serve a foreign ONNX classifier.")
    parser.add_argument("source", type=Path, metavar="in.onnx")
    parser.add_argument("target", type=Path, metavar="out.onnx")
    parser.add_argument("--logits", required=True, help="the output, or a tensor inside, that holds the logits")
    parser.add_argument("--classes", required=True, help="names in order: a,b,c, or @FILE with a name on each line")
    parser.add_argument("--name", help="of the model; out.onnx gives `out` if it is not set")
    parser.add_argument("--version", default="1")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 1.0 if not set")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """in.onnx to out.onnx; exit code 1 and one line if that cannot be, 2 for wrong usage."""
    flags = _parser().parse_args(arguments)
    try:
        described = {"name": flags.target.stem if flags.name is None else flags.name, "version": flags.version}
        described |= {"classes": class_names(flags.classes), "temperature": flags.temperature}
        proven, digest = attach(
            flags.source, flags.target, flags.logits, contract.parse_manifest(json.dumps(described))
        )
    except (AttachError, ContractError) as error:
        raise SystemExit(f"attach: {error}") from None
    except OSError as error:
        raise SystemExit(f"attach: {flags.target}: {error.strerror}") from None
    print(f"wrote {flags.target}: {proven.name} {proven.version}, {len(proven.classes)} classes, sha256 {digest}")


if __name__ == "__main__":
    main()
