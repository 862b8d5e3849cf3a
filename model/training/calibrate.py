"""Temperature, prediction-set threshold and drift references from engines that the answering network never saw.

    python -m model.training.calibrate        # checkpoint -> build/calibration.json, the first step of `make export`

Rows are weighed as a live fleet shows them. Engines, not rows, are resampled: windows of one engine overlap.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model import numerics
from model.contract import CHANNEL_TABLE, RUL_CAP, Channel, Conformal, Histogram, Reference
from model.data import cmapss
from model.data.cmapss import DataError
from model.evaluation import conformal
from model.numerics import Floats
from model.training.cross_fit import CHECKPOINT, data_digest, load
from model.training.network import DistributionHead, NetworkConfig
from model.training.train import Knobs

OUTPUT = Path("build/calibration.json")
LEVEL = 0.9
CHANNEL_BINS = 10
OTHER_THRESHOLDS = (80.0, 30.0)  # the other class boundaries in use for this data
RESAMPLES = 200
Integers = npt.NDArray[np.int64]


def temperature_interval(
    logits: npt.ArrayLike, targets: Integers, weights: Floats, engine: Integers, draws: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """5th and 95th percentile of the temperature over resampled engines."""
    random, count = np.random.default_rng(seed), int(engine.max()) + 1
    fits = []
    for _ in range(draws):
        times = np.bincount(random.integers(0, count, count), minlength=count)
        fits.append(numerics.fit_temperature(logits, targets, weights * times[engine], tolerance=1e-4))
    low, high = np.quantile(fits, [0.05, 0.95])
    return float(low), float(high)


def safe_threshold(
    logits: npt.ArrayLike,
    targets: Integers,
    weights: Floats,
    engine: Integers,
    temperature: float,
    method: conformal.Method = "lac",
    draws: int = RESAMPLES,
) -> float:
    """95th percentile over resampled engines of the threshold of prediction sets.

    The level is then promised for a new fleet with 95 % confidence, not on average over fleets (Vovk 2012 calls it
    training-conditional validity; here by the bootstrap, because rows of one engine are not exchangeable).
    """
    random, count = np.random.default_rng(0), int(engine.max()) + 1
    found = []
    for _ in range(draws):
        times = np.bincount(random.integers(0, count, count), minlength=count)
        found.append(conformal.threshold(logits, targets, weights * times[engine], temperature, LEVEL, method))
    return float(np.quantile(found, 0.95))


def choose_temperature(fitted: float, interval: tuple[float, float]) -> float:
    """The fitted temperature, or 1 where its interval covers 1: what may be noise is not corrected."""
    return 1.0 if interval[0] <= 1.0 <= interval[1] else fitted


def fit_vector_scaling(logits: Floats, targets: Integers, weights: Floats) -> tuple[Floats, Floats]:
    """Scales and biases (C,), (C,) of the logits with the lowest mean cross-entropy (Guo et al. 2017), by L-BFGS."""
    z, y, w = torch.from_numpy(logits), torch.from_numpy(targets), torch.from_numpy(weights)
    scale, bias = torch.ones(z.shape[1], dtype=z.dtype), torch.zeros(z.shape[1], dtype=z.dtype)
    optimiser = torch.optim.LBFGS([scale.requires_grad_(), bias.requires_grad_()], max_iter=100)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = (torch.nn.functional.cross_entropy(z * scale + bias, y, reduction="none") * w).sum() / w.sum()
        value.backward()  # type: ignore[no-untyped-call]  # torch ships it so
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]  # torch ships it so
    return scale.detach().numpy(), bias.detach().numpy()


def compare_scalings(logits: Floats, targets: Integers, weights: Floats, engine: Integers) -> dict[str, float]:
    """Mean cross-entropy of no scaling, a temperature, a vector: fitted on half the engines, scored on the others."""
    found = {"none": 0.0, "temperature": 0.0, "vector": 0.0}
    for half in (0, 1):
        fit, score = engine % 2 == half, engine % 2 != half
        t = numerics.fit_temperature(logits[fit], targets[fit], weights[fit])
        scale, bias = fit_vector_scaling(logits[fit], targets[fit], weights[fit])
        for name, z in (
            ("none", logits[score]),
            ("temperature", logits[score] / t),
            ("vector", logits[score] * scale + bias),
        ):
            losses = numerics.cross_entropy(z, targets[score], reduction="none")
            found[name] += float(np.average(losses, weights=weights[score])) / 2
    return found


def histogram(values: Floats, weights: Floats, edges: Floats) -> Histogram:
    """Weighted shares of values between edges, outer bins open; equal edges are merged."""
    edges = np.unique(edges)
    counts = np.bincount(np.searchsorted(edges, values), weights, minlength=len(edges) + 1)
    return Histogram(edges=edges.tolist(), shares=np.round(counts / counts.sum(), 6).tolist())


def quantile_edges(values: Floats, bins: int) -> Floats:
    """Inner edges that part values into bins of about equal size."""
    return np.asarray(np.quantile(values, np.arange(1, bins) / bins))


def reference(logits: Floats, telemetry: Floats, weights: Floats, temperature: float) -> Reference:
    """Label-free baselines of a healthy life of the fleet: confidence, entropy and each channel's newest reading."""
    confidence = numerics.softmax(logits, temperature).max(axis=1)
    channels = {
        name: histogram(telemetry[:, k], weights, quantile_edges(telemetry[:, k], CHANNEL_BINS))
        for k, (name, _, _) in enumerate(CHANNEL_TABLE)
    }
    return Reference(
        confidence=histogram(confidence, weights, np.arange(1, 20) / 20),
        entropy_nats=histogram(numerics.entropy(logits, temperature), weights, np.arange(1, 11) / 10),
        channels=channels,
    )


def held_out_metrics(
    logits: Floats, targets: Integers, rul: Floats, true_rul: Floats, w: Floats, t: float
) -> dict[str, float]:
    """What the fold networks reach on engines that they never saw, weighed as a live fleet shows its rows."""
    losses = {
        name: numerics.cross_entropy(logits, targets, at, reduction="none")
        for name, at in (("before", 1.0), ("after", t))
    }
    error = (rul - np.minimum(true_rul, RUL_CAP)) ** 2
    return {
        "cross_entropy_before_temperature": float(np.average(losses["before"], weights=w)),
        "cross_entropy": float(np.average(losses["after"], weights=w)),
        "accuracy": float(np.average(numerics.correct(logits, targets), weights=w)),
        "brier": float(np.average(numerics.brier(logits, targets, t), weights=w)),
        "rul_rmse": float(np.sqrt(np.average(error, weights=w))),
    }


def calibrate(checkpoint: dict[str, Any], telemetry: Floats) -> dict[str, Any]:
    """Everything that the manifest says beyond the network, from the held-out answers in a checkpoint.

    Args:
        checkpoint: as `model.training.cross_fit` writes it.
        telemetry: (N, 17) readings of the checkpoint's engines, row by row in its order.
    """
    held = {key: value.numpy() for key, value in checkpoint["held_out"].items()}
    if not held:
        raise DataError("the checkpoint holds no answers for engines that it never saw: train with folds")
    logits, weights, engine = held["logits"].astype(np.float64), held["weight"].astype(np.float64), held["engine"]
    targets = cmapss.health(held["true_rul"], Knobs(**checkpoint["knobs"]).thresholds)
    fitted = numerics.fit_temperature(logits, targets, weights)
    interval = temperature_interval(logits, targets, weights, engine)
    t = choose_temperature(fitted, interval)
    return {
        "temperature": t,
        "temperature_fit": {
            "fitted": fitted,
            "interval_90": interval,
            "engines": int(engine.max()) + 1,
            "rows": len(engine),
        },
        "conformal": Conformal(level=LEVEL, threshold=safe_threshold(logits, targets, weights, engine, t)).model_dump(),
        "alternatives": _other_thresholds(checkpoint, weights)
        | {
            "aps_threshold": safe_threshold(logits, targets, weights, engine, t, "aps"),
            "cross_entropy_of_scalings": compare_scalings(logits, targets, weights, engine),
        },
        "reference": reference(logits, telemetry, weights, t).model_dump(),
        "channels": [
            Channel(
                name=name, unit=unit, description=text, training_range=(float(column.min()), float(column.max()))
            ).model_dump()
            for (name, unit, text), column in zip(CHANNEL_TABLE, telemetry.T, strict=True)
        ],
        "metrics": {"held_out_engines": held_out_metrics(logits, targets, held["rul"], held["true_rul"], weights, t)},
    }


def _other_thresholds(checkpoint: dict[str, Any], weights: Floats) -> dict[str, Any]:
    """The temperature for the other class boundaries in use for this data, from the same held-out RUL distributions."""
    bins = checkpoint["held_out"].get("bins")
    if bins is None:
        return {}
    config = NetworkConfig(**checkpoint["network"] | {"thresholds": OTHER_THRESHOLDS})
    logits = DistributionHead(config, 1).classes_of(bins).numpy()
    targets = cmapss.health(checkpoint["held_out"]["true_rul"].numpy(), OTHER_THRESHOLDS)
    return {"temperature_80_30": numerics.fit_temperature(logits, targets, weights)}


def main() -> None:
    """Checkpoint and the data it came from, to build/calibration.json."""
    parser = argparse.ArgumentParser(description="Calibrate a checkpoint on its held-out answers.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    flags = parser.parse_args()
    try:
        _, checkpoint = load(flags.checkpoint)
        engines = [h for subset in checkpoint["subsets"] for h in cmapss.read_train(cmapss.data_folder(), subset)]
    except DataError as error:
        raise SystemExit(f"calibrate: {error}") from None
    if data_digest(engines) != checkpoint["data"]["sha256"]:
        raise SystemExit("calibrate: the data are not those that the checkpoint was trained on")
    try:
        found = calibrate(checkpoint, np.concatenate([history.telemetry for history in engines]).astype(np.float64))
    except DataError as error:
        raise SystemExit(f"calibrate: {error}") from None
    flags.output.write_text(json.dumps(found))
    low, high = found["temperature_fit"]["interval_90"]
    print(
        f"temperature {found['temperature']:.4f} "
        f"(fitted {found['temperature_fit']['fitted']:.4f}, 90 % {low:.3f}..{high:.3f})"
    )
    print("held-out engines: " + "  ".join(f"{k} {v:.4f}" for k, v in found["metrics"]["held_out_engines"].items()))
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    main()
