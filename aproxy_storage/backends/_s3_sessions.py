"""Sessions, which find the credentials, and whose they are."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from typing import Any

from aiobotocore.session import AioSession
from botocore.credentials import RefreshableCredentials

from ..errors import ConfigurationError
from ._s3_times import read_times_quickly

__all__ = ["claim", "loader_of", "new_session"]

_loader: Any = None  # of botocore's descriptions of services


def new_session(profile: str | None) -> Any:
    """Return a session. Each loop has its own, because fetched credentials are guarded by locks of their loop; but
    what they read from the disk, which takes nearly all of the time, is shared."""
    global _loader
    session = AioSession(profile=profile)
    if _loader is None:
        _loader = session.get_component("data_loader")
    else:
        session.register_component("data_loader", _loader)
    read_times_quickly(session)
    return session


def loader_of(session: Any) -> Any:
    """Return what gives botocore's descriptions of services; `session` is aiobotocore's, or aioboto3's."""
    return getattr(session, "_session", session).get_component("data_loader")


#: Sessions of callers whose credentials are renewed -> the process and the loop that they are used in.
_claimed: weakref.WeakKeyDictionary[Any, tuple[int, weakref.ref[asyncio.AbstractEventLoop]]] = (
    weakref.WeakKeyDictionary()
)
_claiming = threading.Lock()


async def claim(session: Any) -> None:
    """Let the running loop be the one that uses `session`, a caller's, if its credentials are renewed: their lock
    belongs to one loop.

    Raises:
        ConfigurationError: another loop uses it already, and is not closed.
    """
    if not isinstance(await session.get_credentials(), RefreshableCredentials):
        return
    loop = asyncio.get_running_loop()
    with _claiming:
        pid, known = _claimed.get(session, (0, None))
        owner = known() if known is not None and pid == os.getpid() else None
        if owner is not None and owner is not loop and not owner.is_closed():
            raise ConfigurationError(
                "the credentials of session= are renewed, in the event loop that has used it first, and this is "
                "another one. Leave session= out (profile= says which credentials): each loop has a session of its own "
                "then"
            )
        _claimed[session] = (os.getpid(), weakref.ref(loop))
