"""Store fits of the temperature, and every change of it with its actor and time."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from service.errors import Conflict, NotFound
from service.store.records import ActiveTemperature, StoredFit, TemperatureChange
from service.store.sql.session import WriteSession
from service.store.sql.tables import fits, models, temperatures


def store_fits(session: WriteSession, connection: Connection, items: Sequence[StoredFit]) -> list[None]:
    """Store fits."""
    for item in items:
        model = session.stored_model(connection, item.digest, item.manifest).id
        row = {"id": item.id, "model": model, "created_at": item.created_at, "temperature": item.temperature}
        connection.execute(insert(fits), row | {"result": json.dumps(item.result)})
    return [None for _ in items]


def change_temperatures(
    session: WriteSession, connection: Connection, items: Sequence[TemperatureChange]
) -> list[ActiveTemperature]:
    """Apply temperature changes.

    Raises:
        NotFound: no such fit.
        Conflict: a fit of another model, or nothing to restore.
    """
    return [_apply_change(session, connection, item) for item in items]


def _apply_change(session: WriteSession, connection: Connection, item: TemperatureChange) -> ActiveTemperature:
    model = session.stored_model(connection, item.digest, item.manifest).id
    connection.execute(select(models.c.id).where(models.c.id == model).with_for_update())  # serialises changes
    row: dict[str, Any] = {
        "model": model,
        "actor": item.actor,
        "changed": item.changed,
        "fit": item.fit,
        "reverts": None,
    }
    if item.fit is not None:
        row |= {"temperature": _fitted_temperature(connection, item.fit, model), "source": "fit"}
    elif item.temperature is not None:
        row |= {"temperature": item.temperature, "source": "fit"}
    else:
        unreverted = _unreverted(changes(connection, item.digest))
        if not unreverted:
            raise Conflict("there is no change to undo: the active temperature is that of the artefact")
        before = {"temperature": item.manifest.temperature, "source": "artefact", "fit": None}
        if len(unreverted) > 1:
            before = {name: getattr(unreverted[-2], name) for name in before}
        row |= before | {"reverts": unreverted[-1].id}
    number = connection.execute(insert(temperatures).returning(temperatures.c.id), row).scalar_one()
    return ActiveTemperature(number, row["temperature"], row["source"])


def _fitted_temperature(connection: Connection, fit_id: str, model: int) -> float:
    fit = connection.execute(select(fits).where(fits.c.id == fit_id)).first()
    if fit is None:
        raise NotFound(f"no fit {fit_id[:40]!r}")
    if fit.model != model:
        raise Conflict("the fit belongs to another model than the active one")
    return float(fit.temperature)


def _unreverted(rows: Sequence[Row[Any]]) -> list[Row[Any]]:
    """Return the changes that were not reverted, oldest first."""
    stack: list[Row[Any]] = []
    for row in rows:
        if row.reverts is None:
            stack.append(row)
        else:
            stack.pop()
    return stack


def changes(connection: Connection, digest: str) -> list[Row[Any]]:
    """Return every change of a model's temperature, oldest first."""
    statement = select(temperatures).join(models, models.c.id == temperatures.c.model).where(models.c.digest == digest)
    return list(connection.execute(statement.order_by(temperatures.c.id)))


def active_temperature(connection: Connection, digest: str) -> ActiveTemperature | None:
    """Return a model's temperature after its last change; None for the temperature of its artefact."""
    c = temperatures.c
    columns = select(c.id, c.temperature, c.source)
    statement = columns.join(models, models.c.id == c.model).where(models.c.digest == digest)
    row = connection.execute(statement.order_by(c.id.desc()).limit(1)).first()
    return None if row is None else ActiveTemperature(*row)
