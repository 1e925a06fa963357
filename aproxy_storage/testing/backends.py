"""The conformance suite of original backends: subclass `BackendTests`, and it is yours.

::

    class TestMine(BackendTests):
        @pytest_asyncio.fixture
        async def backend(self):
            async with MyBackend(...) as backend:       # empty
                yield backend

        async def put_behind(self, backend, key, data): ...     # with the service's own means, not through `backend`
        async def get_behind(self, backend, key): ...
        async def list_behind(self, backend): ...

Needs pytest and pytest-asyncio. What a test needs is asked of ``backend.capabilities``; what is not claimed is skipped
with that reason. The hooks look and act behind the backend's back, so that an error which it makes both ways cannot
hide. Every test takes the backend alone, so that it can be called without pytest too.
"""

from __future__ import annotations

from ._backend_life import LifeTests
from ._backend_reads import ListTests, ReadTests
from ._backend_writes import CancellationTests, WriteTests

__all__ = ["BackendTests"]


class BackendTests(WriteTests, CancellationTests, ReadTests, ListTests, LifeTests):
    """Every promise of `Backend`, one test each. The fixture ``backend`` gives an empty, ready backend.

    Class attributes say what a service is not expected to do, see `BackendHooks`.
    """
