"""The conformance suite of meta-backends: subclass `MetaBackendTests`, and it is yours.

::

    class TestMine(MetaBackendTests):
        @pytest_asyncio.fixture
        async def meta(self):
            async with MyMetaBackend(...) as meta:      # empty
                yield meta

        async def row_behind(self, meta, path): ...     # with the database's own means, not through `meta`

Needs pytest and pytest-asyncio. The hooks look and act behind the meta-backend's back, so that an error which it
makes both ways cannot hide.
"""

from __future__ import annotations

from ._meta_hooks import make_record
from ._meta_hooks import make_reservation as make_reservation
from ._meta_life import LifeTests
from ._meta_listings import LeaseTests, ListTests, OwnerTests
from ._meta_many import ManyTests
from ._meta_records import ChangeTests, CreateTests

__all__ = ["MetaBackendTests", "make_record"]


class MetaBackendTests(CreateTests, ChangeTests, LeaseTests, ManyTests, ListTests, OwnerTests, LifeTests):
    """Every promise of `MetaBackend`, one test each. The fixture ``meta`` gives an empty, ready meta-backend.

    Class attributes say what a database keeps, see `MetaBackendHooks`.
    """
