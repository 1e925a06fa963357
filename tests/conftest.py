"""Servers and fixtures that all suites share. A server starts when a test first asks for it, and dies with the run."""

import os
import signal

import pytest
from hypothesis import settings

from tests.django_support.setup import django_database, migrated_sqlite  # noqa: F401
from tests.services.mongo import forgotten_sockets, mongo_client, mongo_database, mongo_url, own_mongo  # noqa: F401
from tests.services.pages import page_live_bucket, page_mongo, page_postgres, page_s3  # noqa: F401
from tests.services.postgres import own_postgres, postgres_behind, postgres_table, postgres_url  # noqa: F401
from tests.services.s3 import own_s3, s3_client, s3_server, s3_service  # noqa: F401
from tests.telling import Told, tell  # noqa: F401

# The same examples in each run, so that a red one is about the change; a soak looks for new ones.
settings.register_profile("same", derandomize=True)
if not os.environ.get("APROXY_SOAK"):
    settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    # A shell ignores the signal for what it starts in the background, and so would we and what we start: some tests
    # send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(Told())
