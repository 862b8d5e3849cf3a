"""The tables. Logits and readings are float32 blobs, little-endian; labels are float64 blobs, a probability a class.

Times are seconds since 1970. A column whose name in the database is unclear has a `key` for Python. Alembic's steps in
`migrations` make the same tables; a test holds them together.
"""

from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()
Real = Double
ENGINE_ID = String(200)
PREDICTION_ID = String(32)  # hexadecimal, the first twelve digits the time, so that new rows lie together


def _table(name: str, *columns: Any, clustered: bool = False) -> Table:
    return Table(name, metadata, *columns, sqlite_with_rowid=not clustered)


engines = _table(
    "engines",
    Column("id", Integer, primary_key=True),
    Column("engine_id", ENGINE_ID, nullable=False, unique=True),
    Column("revision", BigInteger, nullable=False),  # of its readings: who remembers them sees whether they changed
    Column("newest_cycle", BigInteger),  # at which it was seen running
    Column("failed_at", BigInteger),  # the cycle of its end
    Column("failed_told", Real, key="failure_reported_at"),  # when that was said
    Column("truths", Integer, nullable=False),  # how many labels are kept for it
    Column("latest", PREDICTION_ID),  # of its newest cycle
    Column("latest_cycle", BigInteger),
    Column("health", Integer),  # class index of the latest
    Column("risk", Real),  # probability of the last class in the latest
)
Index("engines_worst_first", engines.c.risk.desc(), engines.c.engine_id)

models = _table(
    "models",
    Column("id", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("manifest", Text, nullable=False),  # JSON: what is needed to read its logits again
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
    Column(
        "inputs", LargeBinary, key="feature_bins"
    ),  # the reference bin of each channel's newest reading, a byte each
    Column("counts", Boolean, key="is_latest", nullable=False),  # the latest of its engine and cycle
    Column("label", LargeBinary),  # the truth that joined it
    Column("source", Integer),  # of that truth, see `labelling.LabelSource`
    Column("labelled", Real),  # when the truth joined
    Column("flight", Boolean, key="from_flight"),  # made for a flight that was told; unknown of what older code kept
    clustered=True,
)
Index("predictions_engine_cycle", predictions.c.engine, predictions.c.cycle)
Index("predictions_made", predictions.c.created_at)

truths = _table(
    "truths",
    Column("id", Integer, primary_key=True),
    Column("engine", Integer, nullable=False),
    Column("cycle", BigInteger),
    Column("prediction", PREDICTION_ID),  # only where that has no cycle
    Column("label", LargeBinary, nullable=False),
    Column("told", Real, key="received_at", nullable=False),
)
Index("truths_engine_cycle", truths.c.engine, truths.c.cycle, unique=True)
Index("truths_prediction", truths.c.prediction, unique=True)

revisions = _table(  # what was said before it was revised
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
    Column("result", Text, nullable=False),  # JSON, as it was answered
)

temperatures = _table(  # every change; the last of a model is the active one
    "temperatures",
    Column("id", Integer, primary_key=True),
    Column("model", Integer, nullable=False),
    Column("temperature", Real, nullable=False),
    Column("source", String(10), nullable=False),
    Column("fit", PREDICTION_ID),
    Column("undoes", Integer, key="reverts"),  # the change that this one takes back
    Column("who", String(80), key="actor", nullable=False),
    Column("changed", Real, nullable=False),
)
Index("temperatures_model", temperatures.c.model)
