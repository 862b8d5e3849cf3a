"""Serialisation of a prediction response without HTTP."""

import tracemalloc

import orjson
from prometheus_client import CollectorRegistry

from model.evaluation.evaluate import ARTEFACT
from service.codecs.predictions_json import envelope
from service.inference.model_loader import open_model
from service.inference.predictions import Evaluation, PredictionResult
from service.inference.predictor import Predictor
from service.metrics import Metrics
from service.settings import read_settings


def test_rows_of_a_response_are_joined_once() -> None:
    """A response is joined from its rows without a second copy, since it may have hundreds of MB."""
    predictor = Predictor(open_model(ARTEFACT), Metrics(CollectorRegistry()), read_settings())
    result = PredictionResult(2.0, [], evaluation=Evaluation(1, 0.1, 0.2, 1.0, 0.3))
    for n in (1, 2, 20):
        rows = [b'"%s"' % (b"abcdefghij" * 100_000) for _ in range(n)]
        tracemalloc.start()
        body = envelope(predictor, rows, result, True, {"results": [None]})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        response = orjson.loads(body)
        assert list(response) == ["model", "temperature", "temperature_source", "predictions", "evaluation", "results"]
        assert response["predictions"] == [row[1:-1].decode() for row in rows]
        assert (response["temperature"], response["temperature_source"]) == (2.0, "request")
        assert response["results"] == [None]
        assert response["evaluation"]["brier"] == 0.3
        assert peak < len(body) + 4_000_000
