"""Fits of the temperature, and every change of it: who, when, and what it was before."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from service.errors import Conflict, NotFound
from service.store.records import ActiveTemperature, StoredFit, TemperatureChange
from service.store.sql.session import WriteSession
from service.store.sql.tables import fits, models, temperatures


def store_fits(session: WriteSession, connection: Connection, items: Sequence[StoredFit]) -> list[None]:
    """Keep fits."""
    for item in items:
        model = session.stored_model(connection, item.digest, item.manifest).id
        row = {"id": item.id, "model": model, "created_at": item.created_at, "temperature": item.temperature}
        connection.execute(insert(fits), row | {"result": json.dumps(item.result)})
    return [None for _ in items]


def change_temperatures(
    session: WriteSession, connection: Connection, items: Sequence[TemperatureChange]
) -> list[ActiveTemperature]:
    """Put temperatures in force.

    Raises:
        NotFound: no such fit.
        Conflict: a fit of another model, or nothing to take back.
    """
    return [_change(session, connection, item) for item in items]


def _change(session: WriteSession, connection: Connection, item: TemperatureChange) -> ActiveTemperature:
    model = session.stored_model(connection, item.digest, item.manifest).id
    connection.execute(select(models.c.id).where(models.c.id == model).with_for_update())  # one change after the other
    row: dict[str, Any] = {
        "model": model,
        "actor": item.actor,
        "changed": item.changed,
        "fit": item.fit,
        "reverts": None,
    }
    if item.fit is not None:
        row |= {"temperature": _fitted(connection, item.fit, model), "source": "fit"}
    elif item.temperature is not None:
        row |= {"temperature": item.temperature, "source": "fit"}
    else:
        standing = _standing(changes(connection, item.digest))
        if not standing:
            raise Conflict("there is nothing to take back: the temperature is the artefact's")
        before = {"temperature": item.manifest.temperature, "source": "artefact", "fit": None}
        if len(standing) > 1:
            before = {name: getattr(standing[-2], name) for name in before}
        row |= before | {"reverts": standing[-1].id}
    number = connection.execute(insert(temperatures).returning(temperatures.c.id), row).scalar_one()
    return ActiveTemperature(number, row["temperature"], row["source"])


def _fitted(connection: Connection, name: str, model: int) -> float:
    found = connection.execute(select(fits).where(fits.c.id == name)).first()
    if found is None:
        raise NotFound(f"no fit {name[:40]!r}")
    if found.model != model:
        raise Conflict("that fit is of another model than the one that answers")
    return float(found.temperature)


def _standing(every: Sequence[Row[Any]]) -> list[Row[Any]]:
    """The changes that were not taken back, oldest first."""
    stack: list[Row[Any]] = []
    for row in every:
        if row.reverts is None:
            stack.append(row)
        else:
            stack.pop()
    return stack


def changes(connection: Connection, digest: str) -> list[Row[Any]]:
    """Every change of a model's temperature, oldest first."""
    asked = select(temperatures).join(models, models.c.id == temperatures.c.model).where(models.c.digest == digest)
    return list(connection.execute(asked.order_by(temperatures.c.id)))


def active_temperature(connection: Connection, digest: str) -> ActiveTemperature | None:
    """A model's temperature after its last change; None while it has its artefact's."""
    c = temperatures.c
    asked = select(c.id, c.temperature, c.source).join(models, models.c.id == c.model).where(models.c.digest == digest)
    row = connection.execute(asked.order_by(c.id.desc()).limit(1)).first()
    return None if row is None else ActiveTemperature(*row)
