"""Fit temperature, prediction-set threshold and drift references on held-out engines.

    python -m model.training.calibrate        # checkpoint -> build/calibration.json, the first step of `make export`

Rows are weighted with their frequency in a live fleet. Engines are resampled instead of rows, because windows of one
engine overlap.
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
from model.training.cross_fit import CHECKPOINT, data_digest, load_checkpoint
from model.training.network import DistributionHead, NetworkConfig
from model.training.train import TrainingConfig

CALIBRATION = Path("build/calibration.json")
CONFORMAL_LEVEL = 0.9
CHANNEL_BINS = 10
OTHER_THRESHOLDS = (80.0, 30.0)  # other class boundaries that are used for this data set
RESAMPLES = 200
Integers = npt.NDArray[np.int64]


def temperature_interval(
    logits: npt.ArrayLike, targets: Integers, weights: Floats, engine: Integers, draws: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the 5th and 95th percentile of the fitted temperature over resampled engines."""
    random, count = np.random.default_rng(seed), int(engine.max()) + 1
    fits = []
    for _ in range(draws):
        multiplicity = np.bincount(random.integers(0, count, count), minlength=count)
        fits.append(numerics.fit_temperature(logits, targets, weights * multiplicity[engine], tolerance=1e-4))
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
    """Return the 95th percentile of the prediction-set threshold over resampled engines.

    A new fleet then reaches the level with 95 % confidence, not only on average over fleets (training-conditional
    validity, Vovk 2012). The bootstrap is used because rows of one engine are not exchangeable.
    """
    random, count = np.random.default_rng(0), int(engine.max()) + 1
    thresholds = []
    for _ in range(draws):
        multiplicity = np.bincount(random.integers(0, count, count), minlength=count)
        thresholds.append(
            conformal.fit_threshold(
                logits, targets, weights * multiplicity[engine], temperature, CONFORMAL_LEVEL, method
            )
        )
    return float(np.quantile(thresholds, 0.95))


def choose_temperature(fitted: float, interval: tuple[float, float]) -> float:
    """Return the fitted temperature, or 1 if its interval covers 1 and the deviation may be noise."""
    return 1.0 if interval[0] <= 1.0 <= interval[1] else fitted


def fit_vector_scaling(logits: Floats, targets: Integers, weights: Floats) -> tuple[Floats, Floats]:
    """Fit scales (C,) and biases (C,) of the logits to the lowest mean cross-entropy (Guo et al. 2017) with L-BFGS."""
    z, y, w = torch.from_numpy(logits), torch.from_numpy(targets), torch.from_numpy(weights)
    scale, bias = torch.ones(z.shape[1], dtype=z.dtype), torch.zeros(z.shape[1], dtype=z.dtype)
    optimiser = torch.optim.LBFGS([scale.requires_grad_(), bias.requires_grad_()], max_iter=100)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = (torch.nn.functional.cross_entropy(z * scale + bias, y, reduction="none") * w).sum() / w.sum()
        value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return scale.detach().numpy(), bias.detach().numpy()


def compare_scalings(logits: Floats, targets: Integers, weights: Floats, engine: Integers) -> dict[str, float]:
    """Return the mean cross-entropy of each scaling, fitted on half of the engines and evaluated on the others."""
    cross_entropies = {"none": 0.0, "temperature": 0.0, "vector": 0.0}
    for parity in (0, 1):
        fit, score = engine % 2 == parity, engine % 2 != parity
        t = numerics.fit_temperature(logits[fit], targets[fit], weights[fit])
        scale, bias = fit_vector_scaling(logits[fit], targets[fit], weights[fit])
        for name, z in (
            ("none", logits[score]),
            ("temperature", logits[score] / t),
            ("vector", logits[score] * scale + bias),
        ):
            losses = numerics.cross_entropy(z, targets[score], reduction="none")
            cross_entropies[name] += float(np.average(losses, weights=weights[score])) / 2
    return cross_entropies


def weighted_histogram(values: Floats, weights: Floats, edges: Floats) -> Histogram:
    """Return the weighted shares of values between edges. Outer bins are open; equal edges are merged."""
    edges = np.unique(edges)
    counts = np.bincount(np.searchsorted(edges, values), weights, minlength=len(edges) + 1)
    return Histogram(edges=edges.tolist(), shares=np.round(counts / counts.sum(), 6).tolist())


def quantile_edges(values: Floats, bins: int) -> Floats:
    """Return inner edges that divide values into bins of about equal size."""
    return np.asarray(np.quantile(values, np.arange(1, bins) / bins))


def build_reference(logits: Floats, telemetry: Floats, weights: Floats, temperature: float) -> Reference:
    """Return the drift references: histograms of confidence, entropy and the newest reading of each channel."""
    confidence = numerics.softmax(logits, temperature).max(axis=1)
    channels = {
        name: weighted_histogram(telemetry[:, k], weights, quantile_edges(telemetry[:, k], CHANNEL_BINS))
        for k, (name, _, _) in enumerate(CHANNEL_TABLE)
    }
    return Reference(
        confidence=weighted_histogram(confidence, weights, np.arange(1, 20) / 20),
        entropy_nats=weighted_histogram(numerics.entropy(logits, temperature), weights, np.arange(1, 11) / 10),
        channels=channels,
    )


def held_out_metrics(
    logits: Floats, targets: Integers, rul: Floats, true_rul: Floats, w: Floats, t: float
) -> dict[str, float]:
    """Return metrics of the fold networks on held-out engines, weighted with row frequencies of a live fleet."""
    losses = {
        name: numerics.cross_entropy(logits, targets, temperature, reduction="none")
        for name, temperature in (("before", 1.0), ("after", t))
    }
    error = (rul - np.minimum(true_rul, RUL_CAP)) ** 2
    return {
        "cross_entropy_before_temperature": float(np.average(losses["before"], weights=w)),
        "cross_entropy": float(np.average(losses["after"], weights=w)),
        "accuracy": float(np.average(numerics.correct(logits, targets), weights=w)),
        "brier": float(np.average(numerics.brier(logits, targets, t), weights=w)),
        "rul_rmse": float(np.sqrt(np.average(error, weights=w))),
    }


def calibrate_checkpoint(checkpoint: dict[str, Any], telemetry: Floats) -> dict[str, Any]:
    """Compute the calibration part of the manifest from the held-out outputs in a checkpoint.

    Args:
        checkpoint: written by `model.training.cross_fit`.
        telemetry: (N, 17) readings of the engines of the checkpoint, in the same order.

    Raises:
        DataError: the checkpoint has no held-out outputs.
    """
    held_out = {key: value.numpy() for key, value in checkpoint["held_out"].items()}
    if not held_out:
        raise DataError("the checkpoint has no held-out outputs: train with folds")
    logits, weights, engine = (
        held_out["logits"].astype(np.float64),
        held_out["weight"].astype(np.float64),
        held_out["engine"],
    )
    targets = cmapss.health_classes(held_out["true_rul"], TrainingConfig(**checkpoint["knobs"]).thresholds)
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
        "conformal": Conformal(
            level=CONFORMAL_LEVEL, threshold=safe_threshold(logits, targets, weights, engine, t)
        ).model_dump(),
        "alternatives": _calibrate_other_thresholds(checkpoint, weights)
        | {
            "aps_threshold": safe_threshold(logits, targets, weights, engine, t, "aps"),
            "cross_entropy_of_scalings": compare_scalings(logits, targets, weights, engine),
        },
        "reference": build_reference(logits, telemetry, weights, t).model_dump(),
        "channels": [
            Channel(
                name=name, unit=unit, description=text, training_range=(float(column.min()), float(column.max()))
            ).model_dump()
            for (name, unit, text), column in zip(CHANNEL_TABLE, telemetry.T, strict=True)
        ],
        "metrics": {
            "held_out_engines": held_out_metrics(logits, targets, held_out["rul"], held_out["true_rul"], weights, t)
        },
    }


def _calibrate_other_thresholds(checkpoint: dict[str, Any], weights: Floats) -> dict[str, Any]:
    """Fit the temperature for other class boundaries on the same held-out RUL distributions."""
    bins = checkpoint["held_out"].get("bins")
    if bins is None:
        return {}
    config = NetworkConfig(**checkpoint["network"] | {"thresholds": OTHER_THRESHOLDS})
    logits = DistributionHead(config, 1).class_log_mass(bins).numpy()
    targets = cmapss.health_classes(checkpoint["held_out"]["true_rul"].numpy(), OTHER_THRESHOLDS)
    return {"temperature_80_30": numerics.fit_temperature(logits, targets, weights)}


def main() -> None:
    """Calibrate a checkpoint with its training data and write build/calibration.json."""
    parser = argparse.ArgumentParser(description="Calibrate a checkpoint on its held-out outputs.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--output", type=Path, default=CALIBRATION)
    flags = parser.parse_args()
    try:
        _, checkpoint = load_checkpoint(flags.checkpoint)
        engines = [h for subset in checkpoint["subsets"] for h in cmapss.read_train(cmapss.data_folder(), subset)]
    except DataError as error:
        raise SystemExit(f"calibrate: {error}") from None
    if data_digest(engines) != checkpoint["data"]["sha256"]:
        raise SystemExit("calibrate: the data differ from the training data of the checkpoint")
    try:
        calibration = calibrate_checkpoint(
            checkpoint, np.concatenate([history.telemetry for history in engines]).astype(np.float64)
        )
    except DataError as error:
        raise SystemExit(f"calibrate: {error}") from None
    flags.output.write_text(json.dumps(calibration))
    low, high = calibration["temperature_fit"]["interval_90"]
    print(
        f"temperature {calibration['temperature']:.4f} "
        f"(fitted {calibration['temperature_fit']['fitted']:.4f}, 90 % {low:.3f}..{high:.3f})"
    )
    print(
        "held-out engines: " + "  ".join(f"{k} {v:.4f}" for k, v in calibration["metrics"]["held_out_engines"].items())
    )
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    main()
