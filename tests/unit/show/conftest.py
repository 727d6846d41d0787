"""What the tests of MLflow share."""

import pytest


@pytest.fixture(scope="session")
def tables_made_once():
    """A new sqlite store goes through all migrations of MLflow's history, which takes a second. The first one does;
    the others get the tables, and the rows in them, that it then had.
    """
    from mlflow.store.db import utils
    from mlflow.store.tracking import sqlalchemy_store

    made, script = utils._initialize_tables, []

    def initialize(engine):
        if engine.dialect.name != "sqlite":
            return made(engine)
        connection = engine.raw_connection()
        try:
            if not script:
                made(engine)
                script.append("\n".join(connection.driver_connection.iterdump()))
            else:
                connection.driver_connection.executescript(script[0])
        finally:
            connection.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", initialize)
        assert sqlalchemy_store.mlflow.store.db.utils is utils
        yield
