"""Tables of the database. Logits and readings are float32 blobs, labels are float64 blobs with a probability per class.

Blobs are little-endian. Times are seconds since 1970. A column whose name in the database is unclear has a `key` for
Python. The revisions in `migrations` create the same tables, which a test verifies.
"""

from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()
Real = Double
ENGINE_ID = String(200)
PREDICTION_ID = String(32)  # hexadecimal; the first twelve digits are the time, so that new rows are adjacent


def _table(name: str, *columns: Any, clustered: bool = False) -> Table:
    return Table(name, metadata, *columns, sqlite_with_rowid=not clustered)


engines = _table(
    "engines",
    Column("id", Integer, primary_key=True),
    Column("engine_id", ENGINE_ID, nullable=False, unique=True),
    Column("revision", BigInteger, nullable=False),  # of its readings: caches compare it to detect a change
    Column("newest_cycle", BigInteger),  # of a prediction or flight: the engine ran until then
    Column("failed_at", BigInteger),  # the cycle of its failure
    Column("failed_told", Real, key="failure_reported_at"),  # when the failure was submitted
    Column("truths", Integer, nullable=False),  # number of its stored labels
    Column("latest", PREDICTION_ID),  # prediction of its newest cycle
    Column("latest_cycle", BigInteger),
    Column("health", Integer),  # class index of the latest
    Column("risk", Real),  # probability of the last class in the latest
)
Index("engines_worst_first", engines.c.risk.desc(), engines.c.engine_id)

models = _table(
    "models",
    Column("id", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("manifest", Text, nullable=False),  # JSON: the fields that are needed to read its logits
)

layouts = _table(
    "layouts",
    Column("id", Integer, primary_key=True),
    Column("channels", Text, nullable=False, unique=True),  # JSON: names in the order of a reading's values
)

readings = _table(
    "readings",
    Column("engine", Integer, primary_key=True, autoincrement=False),
    Column("cycle", BigInteger, primary_key=True, autoincrement=False),
    Column("layout", Integer, nullable=False),
    Column("telemetry", LargeBinary, nullable=False),
    Column("told", Real, key="received_at", nullable=False),
    clustered=True,
)
Index("readings_told", readings.c.received_at)

predictions = _table(
    "predictions",
    Column("id", PREDICTION_ID, primary_key=True),
    Column("engine", Integer, nullable=False),
    Column("cycle", BigInteger),
    Column("made", Real, key="created_at", nullable=False),
    Column("model", Integer, nullable=False),
    Column("temperature", Real, nullable=False),
    Column("temperature_source", String(10), nullable=False),
    Column("logits", LargeBinary, nullable=False),
    Column("rul", Real),
    Column("inputs", LargeBinary, key="feature_bins"),  # reference bin of each channel's newest reading, one byte each
    Column("counts", Boolean, key="is_latest", nullable=False),  # the latest of its engine and cycle
    Column("label", LargeBinary),  # its label
    Column("source", Integer),  # of the label, see `labelling.LabelSource`
    Column("labelled", Real),  # when the label was joined
    Column("flight", Boolean, key="from_flight"),  # made for a stored flight; null for predictions of older code
    clustered=True,
)
Index("predictions_engine_cycle", predictions.c.engine, predictions.c.cycle)
Index("predictions_made", predictions.c.created_at)

truths = _table(
    "truths",
    Column("id", Integer, primary_key=True),
    Column("engine", Integer, nullable=False),
    Column("cycle", BigInteger),
    Column("prediction", PREDICTION_ID),  # only for a prediction without a cycle
    Column("label", LargeBinary, nullable=False),
    Column("told", Real, key="received_at", nullable=False),
)
Index("truths_engine_cycle", truths.c.engine, truths.c.cycle, unique=True)
Index("truths_prediction", truths.c.prediction, unique=True)

revisions = _table(  # labels and failures before their revision
    "revisions",
    Column("id", Integer, primary_key=True),
    Column("engine", Integer, nullable=False),
    Column("cycle", BigInteger),
    Column("prediction", PREDICTION_ID),
    Column("label", LargeBinary),  # of a label
    Column("failed_at", BigInteger),  # of an outcome
    Column("told", Real, key="received_at", nullable=False),
    Column("revised", Real, nullable=False),
)

fits = _table(
    "fits",
    Column("id", PREDICTION_ID, primary_key=True),
    Column("model", Integer, nullable=False),
    Column("made", Real, key="created_at", nullable=False),
    Column("temperature", Real, nullable=False),
    Column("result", Text, nullable=False),  # JSON, the response of the call
)

temperatures = _table(  # every change; the last of a model is the active one
    "temperatures",
    Column("id", Integer, primary_key=True),
    Column("model", Integer, nullable=False),
    Column("temperature", Real, nullable=False),
    Column("source", String(10), nullable=False),
    Column("fit", PREDICTION_ID),
    Column("undoes", Integer, key="reverts"),  # the change that this one reverts
    Column("who", String(80), key="actor", nullable=False),
    Column("changed", Real, nullable=False),
)
Index("temperatures_model", temperatures.c.model)
