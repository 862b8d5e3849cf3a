import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from prometheus_client import CollectorRegistry

from model import numerics
from model.evaluation.evaluate import ARTEFACT
from model.evaluation.occlusion import ConditionBaselines, attribute_channels, occlude_channels
from model.windows import Readings
from service.errors import ClientDisconnected, Fault, InvalidInput, Overloaded
from service.inference import predictor
from service.inference.model_loader import open_model
from service.inference.onnx_model import Model
from service.inference.predictions import PredictionResult, predict_windows
from service.inference.predictor import FLOAT32_MAX, MAX_LOOP_NUMBERS, Predictor
from service.metrics import Metrics
from service.settings import read_settings
from tests.support.models import classifier, identity_classifier, window_classifier

SETTINGS = {"max_batch_rows": 4, "max_queue_seconds": 60.0}  # requests of more than 4 rows need several batches
UNKNOWN = [np.nan] * 4


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return a model whose logits are its four inputs, with a temperature and prediction sets."""
    manifest: dict[str, object] = {
        "name": "table",
        "version": "1",
        "classes": ["n", "e", "s", "w"],
        "channels": [{"name": name} for name in "abcd"],
        "temperature": 2.0,
        "conformal": {"method": "lac", "level": 0.9, "threshold": 0.75},
    }
    return open_model(identity_classifier(tmp_path_factory.mktemp("model") / "table.onnx", manifest))


def model_of_sums(folder: Path, usual: list[list[float]]) -> Model:
    """Return a model of windows (3, 2) whose logits are ten times the sums, with baselines of some conditions."""
    conditions = {"setting_scales": [1.0], "usual": usual}
    return open_model(window_classifier(folder / "sums.onnx", "ReduceSum", 3, temperature=2.0, conditions=conditions))


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return a model of sums whose logits are not finite if `y` is occluded near x = 1000."""
    return model_of_sums(tmp_path_factory.mktemp("model"), [[0.0, 0.25], [1000.0, 3e38]])


class Service:
    """A predictor and its metrics."""

    def __init__(self, model: Model, tempered: tuple[float, str] | None, settings: dict[str, Any]) -> None:
        self.registry = CollectorRegistry()
        chosen = read_settings(**SETTINGS | settings)
        self.predictor = Predictor(model, Metrics(self.registry), chosen, tempered)
        self.predictor.serve()

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"engine_health_{name}", labels)


def play(
    scene: Callable[[Service], Awaitable[Any]], model: Model, tempered: tuple[float, str] | None = None, **settings: Any
) -> Any:
    """Run a scene with a new predictor, and return its result."""

    async def run() -> Any:
        service = Service(model, tempered, settings)
        try:
            return await scene(service)
        finally:
            await service.predictor.close()

    return asyncio.run(run())


def predict(model: Model, rows: Any, tempered: tuple[float, str] | None = None, **options: Any) -> PredictionResult:
    """Return the result of one call."""

    async def scene(service: Service) -> PredictionResult:
        return await service.predictor.predict(np.asarray(rows, dtype=np.float32), **options)

    result: PredictionResult = play(scene, model, tempered)
    return result


def rows_of(n: int, seed: int = 0) -> Readings:
    return np.random.default_rng(seed).normal(0, 3, (n, 4)).astype(np.float32)


def assert_equal(result: PredictionResult, expected: Any) -> None:
    """Compare all columns of predictions."""
    for actual, column in zip(result.answers, expected, strict=True):
        if column is None:
            assert actual is None
        else:
            np.testing.assert_array_equal(column, actual)


@pytest.mark.parametrize("n", [1, 4, 11])
def test_predict_uses_temperature_of_artefact(table: Model, n: int) -> None:
    """Any number of rows, also above one batch, gets exactly the calibrated output of the network."""
    result = predict(table, rows_of(n))
    assert_equal(result, predict_windows(table, rows_of(n), 2.0))
    assert all(piece.output.finite for piece in result.pieces)
    assert (2.0, None, None, None, None) == (
        result.temperature,
        result.loss,
        result.evaluation,
        result.explanation,
        result.labelled,
    )


def test_predict_other_temperature_keeps_prediction_sets(table: Model) -> None:
    """The temperature of one call, or of the predictor, calibrates its probabilities; the sets stay as they are."""
    expected = predict_windows(table, rows_of(5), 0.5)
    for result in (predict(table, rows_of(5), temperature=0.5), predict(table, rows_of(5), (0.5, "admin"))):
        assert 0.5 == result.temperature
        assert_equal(result, expected)
    np.testing.assert_array_equal(expected.sets, predict_windows(table, rows_of(5), 2.0).sets)


def test_predictor_has_a_temperature_and_its_source(table: Model) -> None:
    """A predictor uses the temperature of the artefact unless another one is given, and exports it as a metric."""

    async def scene(service: Service) -> tuple[Any, ...]:
        return service.predictor.temperature, service.predictor.temperature_source, service.metric("temperature")

    assert (2.0, "artefact", 2.0) == play(scene, table)
    assert (0.7, "admin", 0.7) == play(scene, table, (0.7, "admin"))


@pytest.mark.parametrize("temperature", [None, 2.0, 0.5])
def test_labels_are_scored_at_the_temperature_of_the_call(table: Model, temperature: float | None) -> None:
    """Loss and evaluation use the temperature of the call, and `labelled` uses the active one."""
    rows, labelled = rows_of(3), [0, 2]
    targets = np.array([[1, 0, 0, 0], UNKNOWN, [0, 0.5, 0.25, 0.25]])
    result = predict(table, rows, targets=targets, temperature=temperature)
    z, q, t = rows[labelled], targets[labelled], temperature or 2.0
    losses = numerics.cross_entropy(z, q, t, reduction="none")
    assert result.loss is not None
    assert result.evaluation is not None
    assert result.labelled is not None
    np.testing.assert_allclose([losses[0], np.nan, losses[1]], result.loss)
    expected = (losses.mean(), numerics.entropy(z, t).mean(), numerics.correct(z, q).mean())
    evaluation = result.evaluation
    assert 2 == evaluation.count
    assert expected == pytest.approx((evaluation.cross_entropy, evaluation.expected_cross_entropy, evaluation.accuracy))
    assert numerics.brier(z, q, t).mean() == pytest.approx(evaluation.brier)
    np.testing.assert_allclose(numerics.cross_entropy(z, q, 2.0, reduction="none"), result.labelled.loss)
    assert (t, None) == (result.temperature, result.explanation)
    assert_equal(result, predict_windows(table, rows, t))


def test_loss_beyond_float32_is_its_maximum(table: Model) -> None:
    """A loss beyond the range of float32 is the largest float32, in each row and in the mean."""
    rows = np.array([[3e38, -3e38, 0, 0], [0, 0, 0, 0]], np.float32)
    result = predict(table, rows, targets=np.eye(4)[[1, 0]], temperature=0.01)
    assert result.loss is not None
    assert result.evaluation is not None
    assert [FLOAT32_MAX, pytest.approx(np.log(4))] == result.loss.tolist()
    assert FLOAT32_MAX == result.evaluation.cross_entropy


def test_predict_many_labels_has_the_same_scores(table: Model) -> None:
    """A call with more probabilities than the event loop processes itself has the same result."""
    n = MAX_LOOP_NUMBERS // 4 + 1
    rows, targets = rows_of(n), np.eye(4)[np.arange(n) % 4]

    async def scene(service: Service) -> PredictionResult:
        return await service.predictor.predict(rows, targets)

    result: PredictionResult = play(scene, table, max_batch_rows=4096)
    assert numerics.cross_entropy(rows, targets, 2.0, reduction="none") == pytest.approx(result.loss)
    assert 2.0 == result.temperature


def test_imputed_values_are_counted_by_channel(table: Model) -> None:
    """Imputed values are counted by channel."""

    async def scene(service: Service) -> list[float | None]:
        await service.predictor.predict(rows_of(2))
        await service.predictor.predict(rows_of(2), imputed=np.array([0, 3, 0, 1]))
        return [service.metric("imputed_values_total", channel=name) for name in "abcd"]

    assert [0, 3, 0, 1] == [count or 0 for count in play(scene, table)]


def test_predict_not_counted_is_counted_on_request(table: Model) -> None:
    """Predictions are counted in the metrics immediately, or when the caller counts them."""

    async def scene(service: Service) -> list[float | None]:
        await service.predictor.predict(rows_of(2))
        counts = [service.metric("confidence_count")]
        result = await service.predictor.predict(rows_of(5), counted=False)
        counts.append(service.metric("confidence_count"))
        service.predictor.count(rows_of(5), result.pieces)
        return [*counts, service.metric("confidence_count")]

    assert [2, 2, 7] == play(scene, table)


def test_rows_of_a_disconnected_client_are_not_inferred(table: Model) -> None:
    """A client that has disconnected gets an error, and its rows reach neither the model nor the metrics."""

    async def scene(service: Service) -> float | None:
        with pytest.raises(ClientDisconnected):
            await service.predictor.predict(rows_of(2), gone=lambda: True)
        await service.predictor.predict(rows_of(3), gone=lambda: False)
        return service.metric("batch_rows_sum")

    assert 3 == play(scene, table)


def fail(*_: object) -> Any:
    """Stand in for a function that must not be called."""
    raise AssertionError


def test_predict_other_delay_reduces_longest_wait(table: Model, sums: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction with a large delay outside of the queue is rejected, an explanation before its copies are made."""

    async def scene(service: Service) -> None:
        shape = service.predictor.model.input_shape
        rows = np.zeros((1, *shape), np.float32)
        shedder = service.predictor.admit.__self__.shedder  # type: ignore[attr-defined]  # a method of Admission
        shedder.other_delay = 6.0
        with monkeypatch.context() as patch:
            patch.setattr(predictor, "occlude_channels", fail)
            with pytest.raises(Overloaded, match=r"6\.0 s of at most 5 s"):
                await service.predictor.predict(rows, explain=len(shape) == 2)
        shedder.other_delay = 4.0
        await service.predictor.predict(rows, explain=len(shape) == 2)

    play(scene, table, max_queue_seconds=5.0)
    play(scene, sums, max_queue_seconds=5.0)


def test_settings_bound_the_queue_and_its_batches(table: Model) -> None:
    """`max_batch_rows` limits batches, `max_queue_rows` limits waiting rows, and admission checks the queue."""

    async def scene(service: Service) -> None:
        waiting = asyncio.create_task(service.predictor.predict(rows_of(9)))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="9 of 10 rows"):
            await service.predictor.predict(rows_of(2))
        service.predictor.admit(100).rows(2)
        with pytest.raises(Overloaded, match="9 of 10 rows"):
            service.predictor.admit(100)
        await waiting
        assert (3, 9) == (service.metric("batch_rows_count"), service.metric("batch_rows_sum"))

    play(scene, table, max_queue_rows=10)


def test_admission_sheds_load_by_the_longest_wait(table: Model) -> None:
    """A turn with bytes for more than an eighth of the longest wait admits no further request."""

    async def scene(service: Service) -> None:
        service.predictor.admit(10**9)
        with pytest.raises(Overloaded, match="event-loop lag"):
            service.predictor.admit(1)

    play(scene, table, max_queue_seconds=7.0)


def test_close_completes_admitted_requests(table: Model) -> None:
    """`close` waits for queued requests, and a later request is still answered."""

    async def scene(service: Service) -> None:
        waiting = asyncio.create_task(service.predictor.predict(rows_of(9)))
        await asyncio.sleep(0)
        await service.predictor.close()
        assert waiting.done()
        assert_equal(await service.predictor.predict(rows_of(2)), predict_windows(table, rows_of(2), 2.0))

    play(scene, table)


def test_unaligned_rows_get_same_predictions(table: Model) -> None:
    """Unaligned rows are aligned for the network, and get the same predictions."""
    rows = rows_of(3)
    unaligned = np.frombuffer(b"x" + rows.tobytes(), np.float32, offset=1).reshape(3, 4)
    assert not unaligned.flags.aligned

    def run(batch: Readings) -> Any:
        assert batch.flags.aligned
        return table.run(batch)

    assert_equal(predict(replace(table, run=run), unaligned), predict_windows(table, rows, 2.0))


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_explanation_is_effect_of_occluded_channels(sums: Model, temperature: float | None) -> None:
    """An explanation compares the prediction with its occluded copies at the temperature of the call."""
    windows = np.random.default_rng(1).normal(0, 0.1, (3, 3, 2)).astype(np.float32)

    async def scene(service: Service) -> PredictionResult:
        result = await service.predictor.predict(windows, temperature=temperature, explain=True)
        assert 9 == service.metric("batch_rows_sum")
        assert 3 == service.metric("confidence_count")
        return result

    result, t = play(scene, sums), temperature or 2.0
    assert_equal(result, predict_windows(sums, windows, t))
    usual = ConditionBaselines.from_lists([1.0], [[0.0, 0.25], [1000.0, 3e38]])
    for i, window in enumerate(windows):
        without = numerics.softmax(sums.run(occlude_channels(window, usual)).logits, t)
        expected = attribute_channels(result.answers.probabilities[i], None, without, None)
        assert 0.01 < expected[0].shift
        assert expected == result.explanation[i]


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_explanation_includes_rul_of_each_channel(temperature: float | None) -> None:
    """An explanation has the RUL minus that of each occluded copy, and labelled rows are scored too."""
    model = open_model(ARTEFACT)
    windows = np.array([golden.telemetry for golden in model.manifest.golden[:2]], np.float32)
    targets = np.array([[np.nan] * 3, [0, 0, 1]])

    async def scene(service: Service) -> PredictionResult:
        return await service.predictor.predict(windows, targets, temperature, explain=True)

    result, t = play(scene, model, max_batch_rows=1000), temperature or model.manifest.temperature
    conditions = model.manifest.conditions
    assert conditions is not None
    usual = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual)
    assert np.isnan(result.loss[0])
    assert 1 == result.evaluation.count
    for i, window in enumerate(windows):
        occluded = predict_windows(model, occlude_channels(window, usual), t)
        rul = float(result.answers.rul[i])
        assert occluded.rul is not None
        expected = attribute_channels(result.answers.probabilities[i], rul, occluded.probabilities, occluded.rul)
        for wanted, actual in zip(expected, result.explanation[i], strict=True):
            assert wanted.channel == actual.channel
            assert (wanted.shift, wanted.rul) == pytest.approx((actual.shift, actual.rul), abs=1e-3)


def test_explanation_that_exceeds_the_queue_is_rejected(sums: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Occluded copies count as rows, and are not made if they exceed the queue."""
    windows = np.zeros((2, 3, 2), np.float32)

    async def scene(service: Service) -> None:
        waiting = asyncio.create_task(service.predictor.predict(windows))
        await asyncio.sleep(0)
        with monkeypatch.context() as patch:
            patch.setattr(predictor, "occlude_channels", fail)
            with pytest.raises(Overloaded, match="2 of 5 rows"):
                await service.predictor.predict(windows, explain=True)
        assert not waiting.done()
        await service.predictor.predict(windows[:1], explain=True)  # three rows: one window and two copies
        await waiting

    play(scene, sums, max_queue_rows=5)


@pytest.mark.parametrize("n", [3, 9])
def test_instance_without_finite_output_is_named(sums: Model, n: int) -> None:
    """The first instance without a finite output is rejected by its index, in any batch."""
    windows = np.zeros((n, 3, 2), np.float32)
    for bad in range(n - 1):
        overflowing = windows.copy()
        overflowing[[bad, n - 1], 0, 0] = 3e38
        with pytest.raises(InvalidInput, match=rf"^instances\[{bad}\]\.telemetry: the model has no finite") as refusal:
            predict(sums, overflowing)
        message = "the model has no finite output for these readings"
        assert (Fault(("instances", bad, "telemetry"), message),) == refusal.value.faults


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_predict_not_finite_occluded_copy_names_instance(sums: Model, bad: int) -> None:
    """If the network overflows on an occluded copy, its instance is rejected."""
    windows = np.zeros((3, 3, 2), np.float32)
    windows[bad, :, 0] = 1000  # near the condition whose baseline overflows
    predict(sums, windows)
    with pytest.raises(InvalidInput, match=rf"^instances\[{bad}\]"):
        predict(sums, windows, explain=True)
    windows[2, :, 0] = 1000
    with pytest.raises(InvalidInput, match=rf"^instances\[{bad}\]"):
        predict(sums, windows, explain=True)


def test_predict_not_finite_first_copy_names_instance(tmp_path: Path) -> None:
    """If the network overflows on the first copy of the first instance, that instance is rejected."""
    model = model_of_sums(tmp_path, [[3e38, 0.0]])
    with pytest.raises(InvalidInput, match=r"^instances\[0\]"):
        predict(model, np.zeros((3, 3, 2)), explain=True)


def test_predict_in_batch_with_overflow_returns_result(sums: Model) -> None:
    """A request is rejected only for its own rows, not for other rows of the batch."""
    windows = np.zeros((2, 3, 2), np.float32)
    overflowing = windows.copy()
    overflowing[1, 0, 0] = 3e38

    async def scene(service: Service) -> None:
        calls = [service.predictor.predict(rows) for rows in (overflowing, windows)]
        refused, result = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(refused, InvalidInput)
        assert isinstance(result, PredictionResult)
        assert_equal(result, predict_windows(sums, windows, 2.0))
        assert 1 == service.metric("batch_rows_count")

    play(scene, sums)


def test_model_without_prediction_sets_has_none(tmp_path: Path) -> None:
    """Without a conformal rule, predictions and their scores have no sets."""
    manifest: dict[str, object] = {"name": "bare", "version": "1", "classes": ["n", "e", "s", "w"]}
    model = open_model(identity_classifier(tmp_path / "bare.onnx", manifest))
    result = predict(model, rows_of(2), targets=np.eye(4)[:2], temperature=3.0)
    assert result.answers.sets is None
    assert result.labelled is not None
    assert result.labelled.covered is None


def test_model_of_one_class_has_no_loss(tmp_path: Path) -> None:
    """Labels of a model with one class have a loss of 0."""
    manifest: dict[str, object] = {"name": "one", "version": "1", "classes": ["a"]}
    nodes = [helper.make_node("Identity", ["telemetry"], ["logits"])]
    model = open_model(classifier(tmp_path / "one.onnx", nodes, (1,), manifest))
    result = predict(model, [[0.5], [3.0]], targets=np.array([[1.0], [np.nan]]))
    assert result.loss is not None
    np.testing.assert_array_equal([0, np.nan], result.loss)
