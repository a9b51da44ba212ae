"""Owns how the tables are made and brought to this version: by alembic, when the operator says so and never at a start.

Alembic and what it stands on take half a second to load: nobody imports this but the command.
"""

from __future__ import annotations

import asyncpg
import sqlalchemy
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from powermail.base import limits
from powermail.base.errors import IndexTrouble, OperatorError
from powermail.index.postgres.addresses import connect
from powermail.index.postgres.statements import Connection


async def migrate(url: str) -> None:
    """Makes the tables, or brings them to this version, in one transaction. Raises OperatorError."""

    async def connection_to_any() -> Connection:
        connection, _ = await connect(url, limits.INDEX_LONG_S)
        return connection

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connection_to_any, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_upgrade)
            await connection.commit()
    except (OSError, asyncpg.PostgresError, IndexTrouble, SQLAlchemyError) as error:
        why = error.orig if isinstance(error, DBAPIError) else error  # without the statement, which says nothing to an operator
        raise OperatorError(f"the database of the index cannot be used: {why}") from error
    finally:
        await engine.dispose()


def _upgrade(connection: sqlalchemy.Connection) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "powermail.index.postgres:migrations")
    config.set_main_option("path_separator", "os")
    command.upgrade(config, "head")
