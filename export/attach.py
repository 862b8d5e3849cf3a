"""Convert a foreign ONNX classifier and its class names to an artefact for the service. Does not need torch.

    python -m export.attach in.onnx out.onnx --logits OUTPUT --classes a,b,c   # or --classes @names.txt, one per line

The graph is reduced to the nodes that compute the logits, tensors get the names of the contract, and the batch size
becomes dynamic. Outputs must equal those of the original for all batch sizes on synthetic probes. Some probes become
golden windows.
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
PROBES = 8  # four in 0..1, as scaled features, and four in 0..255, as pixels
UNIT_PROBES = PROBES // 2
GOLDEN_VALUES = 2**16  # total of all golden windows, at least two windows
MAX_DIFFERENCE = 1e-4  # relative to the largest logit; more than rounding errors
# Processors round differently: the tolerance is 10 times the measured difference and at least 1e-5.
TOLERANCE_FACTOR, MIN_TOLERANCE = 10.0, 1e-5
SUM_TOLERANCE = 1e-3  # of the sum of a row of probabilities from 1
LOG_FATAL_ONLY = 4  # log severity of ONNX Runtime; errors are raised instead


def attach_classifier(source: Path, target: Path, logits: str, manifest: Manifest) -> tuple[Manifest, str]:
    """Write the artefact, and return its complete manifest and its digest.

    Args:
        source: a foreign ONNX file.
        target: path of the artefact.
        logits: name of the output or inner tensor with one value per class before softmax.
        manifest: name, version, classes and temperature.

    Raises:
        AttachError: the file cannot be served.
        OSError: the target cannot be written.
    """
    classifier = surgery.cut_classifier(surgery.read_model(source), logits)
    outputs, probes = _run_alone(classifier, logits)
    _check_classes(outputs, manifest.classes, logits, classifier.before_softmax)
    proto = surgery.free_batch(classifier.proto, classifier.shape, len(manifest.classes)).SerializeToString()
    measured = _measure_difference(proto, probes, outputs, classifier.batch)
    golden = max(2, min(UNIT_PROBES, GOLDEN_VALUES // max(1, int(np.prod(classifier.shape)))))
    complete = manifest.model_copy(
        update={
            "golden": tuple(
                Golden(telemetry=probe.tolist(), logits=row.tolist())
                for probe, row in zip(probes[:golden], outputs[:golden], strict=True)
            ),
            "tolerance": max(TOLERANCE_FACTOR * measured, MIN_TOLERANCE)
            * float(_logit_sizes(outputs[:UNIT_PROBES]).max()),
            "training": {"source": source.name, "source_digest": contract.digest(source.read_bytes())}
            | {"source_input": classifier.input, "source_logits": logits},
        }
    )
    return complete, contract.write(proto, complete, target)


def parse_class_names(text: str) -> tuple[str, ...]:
    """Parse names separated by commas, or `@` and the path of a file with one name per line.

    Raises:
        AttachError: the file is missing, or a name is empty, not printable or duplicate.
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
    indices: dict[str, int] = {}
    for k, name in enumerate(names):
        if not name or not name.isprintable():
            raise AttachError(f"class {k} {name!r} is {'empty' if not name else 'not printable'}")
        if indices.setdefault(name, k) != k:
            raise AttachError(f"duplicate class {name!r}, at {indices[name]} and {k}; names must be unique")
    return tuple(names)


def _make_probes(shape: tuple[int, ...]) -> Values:
    """Return synthetic instances (PROBES, *shape), distinct and with short decimals."""
    random = np.random.default_rng(0)
    unit = random.integers(0, 17, (UNIT_PROBES, *shape)) / 16
    pixels = random.integers(0, 256, (PROBES - UNIT_PROBES, *shape))
    return np.concatenate([unit, pixels]).astype(np.float32)


def _run_alone(classifier: Classifier, logits: str) -> tuple[Values, Values]:
    """Run each probe individually, in the declared batch size, and return outputs and probes.

    Pixel probes with outputs that are not finite are excluded, because not every network supports such inputs.
    """
    session = _open_session(classifier.proto.SerializeToString())
    output, rows, probes = session.get_outputs()[0], classifier.batch or 1, _make_probes(classifier.shape)
    if output.type != "tensor(float)":
        raise AttachError(
            f"{logits!r} is {output.type}, logits are tensor(float){_suggest_logits(classifier.before_softmax)}"
        )
    results = [
        _run_session(session, np.repeat(probe[None], rows, axis=0), "the network fails on a probe") for probe in probes
    ]
    shape = results[0].shape
    if len(shape) != 2 or shape[0] != rows:
        raise AttachError(f"{logits!r} has shape {list(shape)} for a batch of {rows}; logits are [batch, classes]")
    outputs = np.stack([result[0] for result in results])
    finite = np.isfinite(outputs).all(axis=1)
    if not finite[:UNIT_PROBES].all():
        raise AttachError(f"{logits!r} is not finite for inputs between 0 and 1")
    return outputs[finite], probes[finite]


def _check_classes(outputs: Values, classes: tuple[str, ...], logits: str, before_softmax: str | None) -> None:
    width = outputs.shape[1]
    if width != len(classes):
        raise AttachError(f"{logits!r} has {width} values per instance, --classes has {len(classes)} names")
    if (outputs >= 0).all() and (np.abs(outputs.sum(axis=1) - 1) <= SUM_TOLERANCE).all():
        raise AttachError(
            f"{logits!r} is the output of a softmax: its rows sum to 1"
            + (_suggest_logits(before_softmax) or "; export the network without softmax, or append a logarithm")
        )


def _suggest_logits(before_softmax: str | None) -> str:
    return f"; use the input of the softmax: --logits {before_softmax!r}" if before_softmax else ""


def _measure_difference(proto: bytes, probes: Values, outputs: Values, batch: int | None) -> float:
    """Return the largest difference between batches and individual runs, relative to the largest logit.

    The difference to the graph without optimisation is included, but not limited. Its kernels differ, as they do on
    other processors.

    Raises:
        AttachError: a batch of N differs from N batches of 1, or fails.
    """
    fixed = f" at {batch}" if batch else ""
    failed = f"the batch size is fixed{fixed} inside the graph; export it with a dynamic batch"
    session, worst, sizes = _open_session(proto, failed=failed), 0.0, [_logit_sizes(outputs)]
    indices = np.arange(len(probes))
    for size in (*BATCHES, len(probes)):
        batches = [indices[:size], indices[-size:]]  # includes the last ones, which are larger
        difference = max_difference(
            lambda batch: [_run_session(session, batch, failed)], probes, [outputs], batches, sizes
        )
        if difference == np.inf:
            raise AttachError(f"{failed}: a batch of {size} gives outputs of another shape")
        if not difference <= MAX_DIFFERENCE:  # also when it is NaN
            raise AttachError(
                f"a batch of {size} differs from {size} batches of 1 by {difference:.2g} of the largest "
                "logit: outputs depend on the other rows of the batch"
            )
        worst = max(worst, difference)
    unoptimised = _open_session(proto, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    return max(
        worst,
        max_difference(lambda batch: [_run_session(unoptimised, batch, failed)], probes, [outputs], [indices], sizes),
    )


def _logit_sizes(logits: Values) -> npt.NDArray[np.float64]:
    """Return the largest absolute logit of each row (N, 1), at least 1, the unit of rounding errors."""
    return np.asarray(np.maximum(np.abs(logits).max(axis=1, keepdims=True), 1.0), dtype=np.float64)


def _open_session(proto: bytes, level: Any = None, failed: str = "ONNX Runtime cannot use it") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    if level is not None:
        options.graph_optimization_level = level
    try:
        return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a separate exception class per kind of defect
        raise AttachError(f"{failed}: {first_line(error)}") from None


def _run_session(session: ort.InferenceSession, batch: Values, failed: str) -> Values:
    try:
        logits: Values = session.run([LOGITS], {INPUT: batch})[0]
    except Exception as error:  # ONNX Runtime has a separate exception class per kind of failure
        raise AttachError(f"{failed}: {first_line(error)}") from None
    return logits


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("export.attach", description="Serve a foreign ONNX classifier.")
    parser.add_argument("source", type=Path, metavar="in.onnx")
    parser.add_argument("target", type=Path, metavar="out.onnx")
    parser.add_argument("--logits", required=True, help="output or inner tensor with the logits")
    parser.add_argument("--classes", required=True, help="names in order: a,b,c, or @FILE with one name per line")
    parser.add_argument("--name", help="of the model; default: the stem of out.onnx")
    parser.add_argument("--version", default="1")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits; default: 1.0")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert in.onnx to out.onnx. The exit code is 1 on failure, with a one-line message, and 2 on wrong usage."""
    flags = _build_parser().parse_args(arguments)
    try:
        fields = {"name": flags.target.stem if flags.name is None else flags.name, "version": flags.version}
        fields |= {"classes": parse_class_names(flags.classes), "temperature": flags.temperature}
        complete, digest = attach_classifier(
            flags.source, flags.target, flags.logits, contract.parse_manifest(json.dumps(fields))
        )
    except (AttachError, ContractError) as error:
        raise SystemExit(f"attach: {error}") from None
    except OSError as error:
        raise SystemExit(f"attach: {flags.target}: {error.strerror}") from None
    print(f"wrote {flags.target}: {complete.name} {complete.version}, {len(complete.classes)} classes, sha256 {digest}")


if __name__ == "__main__":
    main()
