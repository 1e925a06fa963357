"""How an object is made: one PUT, or a multipart upload with a few parts in memory; whole, or not at all.

The request that makes it visible runs in a task of the backend's. A caller who is cancelled meanwhile waits a little
for what has become of it, and takes it back.

Three clocks run, one inside the other:

* of the attempt, and of the backend's ``idle``: nothing at all has moved. They are around all of this. `Chunks` stops
  them while the content is waited for, and starts them when it has come; `unhurried` stops them while the service works
  by itself. We reach them through the watch of `Upload`, which has no limit of its own.
* of one request, in `Connection.call`: nothing of this request has moved. Each try starts it anew, and so does each
  piece of a body that is sent, whatever the other clocks do.
* of the driver: connecting, and silence on the socket.

A piece that is sent starts the outer ones too, but for one time: while the content is waited for. They stand still then
because the caller may take as long as ``source`` allows, and a part that is sent meanwhile must not start them; it has
the clock of its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from ..cleanup import Cleanup
from ..content import Source
from ..errors import (
    AccessDenied,
    AlreadyExists,
    Conflict,
    ContentError,
    NotFound,
    NotSupported,
    StorageError,
    outcome_unknown,
)
from ..futures import outcome_of, over, seen
from ..timeouts import IdleWatch, unhurried
from ._s3_client import Body, Connection
from ._s3_errors import code_of
from ._s3_objects import TOKEN

__all__ = ["MAX_PARTS", "Target", "Upload", "copy_parts"]

MAX_PARTS = 10_000  # of one upload: a rule of S3
_SETTLED_BY_A_LOOK = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchUpload"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one write is to make, and with what."""

    connection: Connection
    cleanup: Cleanup
    uploads: MutableMapping[str, str]  # unfinished ones of this process -> token
    bucket: str
    key: str
    what: str
    token: str
    params: Mapping[str, Any]  # of the new object: ContentType, Metadata …
    conditional: bool
    undo_within: float

    @property
    def at(self) -> dict[str, Any]:
        """The parameters that name the object."""
        return {"Bucket": self.bucket, "Key": self.key}

    @property
    def checksum(self) -> dict[str, Any]:
        """The parameter of a part that names the algorithm, where the caller has chosen one for the object."""
        return {name: self.params[name] for name in ("ChecksumAlgorithm",) if name in self.params}

    def part(self, number: int, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the completion has to say of a part: its checksum too, if the upload was begun with one."""
        names = [f"Checksum{algorithm.upper()}" for algorithm in self.checksum.values()]
        sums = {name: answer[name] for name in names if name in answer}
        return {"PartNumber": number, "ETag": answer["ETag"], **sums}


class Upload:
    """One write of one object."""

    def __init__(self, target: Target, source: Source, *, part_bytes: int, parts: int, multipart_bytes: int) -> None:
        self._target = target
        self._source = source
        self._part_bytes = part_bytes
        self._parts = parts
        self._multipart_bytes = multipart_bytes
        self._pieces: _Pieces | None = None
        self._watch: IdleWatch | None = None

    async def run(self) -> tuple[int, str | None]:
        """Write the content; return its size and the object's ETag."""
        try:
            return await self._run(self._source)
        except asyncio.CancelledError as error:
            _nothing_was_decided(error)
            raise

    async def _run(self, source: Source) -> tuple[int, str | None]:
        async with source.watched(None) as self._watch:
            if source.data is not None and len(source.data) < self._multipart_bytes:
                await source.measure()
                return await self._put(Body(source.data))
            async with contextlib.aclosing(source.chunks()) as chunks:
                self._pieces = pieces = _Pieces(chunks)
                if source.size is None or source.size < self._multipart_bytes:
                    head = await pieces.take(self._multipart_bytes)
                    if head.size < self._multipart_bytes:
                        return await self._put(head)
                else:
                    head = Body()
                return await self._multipart(head, pieces)

    def _on_progress(self) -> None:
        # See above: while the content is waited for, a part that moves is no reason to start the outer clocks.
        if self._watch is not None and not (self._pieces is not None and self._pieces.waiting):
            self._watch.go_on()

    # -- in one piece

    async def _put(self, body: Body) -> tuple[int, str | None]:
        size = body.size
        answer = await decide(self._target, "put_object", body=body, on_progress=self._on_progress)
        return size, answer.get("ETag")

    # -- in parts

    async def _multipart(self, head: Body, pieces: _Pieces) -> tuple[int, str | None]:
        target = self._target
        part_bytes = self._part_bytes
        if (whole := await self._source.likely_size()) is not None:
            part_bytes = max(part_bytes, -(-whole // MAX_PARTS))
        size = 0

        async def send_parts(upload_id: str) -> list[dict[str, Any]]:
            nonlocal size
            sent: list[dict[str, Any]] = []
            slots = asyncio.Semaphore(self._parts)

            async def send(number: int, body: Body) -> None:
                try:
                    answer = await target.connection.call(
                        "upload_part", target.what, body=body, on_progress=self._on_progress,
                        UploadId=upload_id, PartNumber=number, **target.checksum, **target.at,
                    )  # fmt: skip
                    sent.append(target.part(number, answer))
                except Exception as error:
                    pieces.fail(error)
                finally:
                    body.close()
                    slots.release()

            async with one_error(), asyncio.TaskGroup() as group:
                for number in range(1, MAX_PARTS + 2):
                    await slots.acquire()  # first, so that the part that is being put together counts too
                    body = await pieces.take(part_bytes, head if number == 1 else None)
                    if not body.size:
                        break
                    if number > MAX_PARTS:
                        raise ContentError(
                            f"the content has more than {size} bytes, which {MAX_PARTS} parts of {part_bytes} bytes "
                            "hold: declare its size, or enlarge part_bytes"
                        )
                    size += body.size
                    group.create_task(send(number, body))
                    del body
                pieces.end()
            return sent

        answer = await in_parts(target, send_parts)
        return size, answer.get("ETag")


class _Pieces:
    """Cuts what comes into parts, each of them the body of a request."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""
        self._failure: Exception | None = None
        self._over = False
        self.waiting = False

    def fail(self, error: Exception) -> None:
        """Let `error`, of a part, end the upload: once the chunk that may be waited for has come. A generator that is
        interrupted, as a TaskGroup would do, is over, and could not be read for another original any more."""
        if self._over:
            raise error
        self._failure = self._failure or error

    def end(self) -> None:
        """Nothing more will be taken. From now on a part that fails ends the upload at once."""
        self._over = True
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def take(self, size: int, body: Body | None = None) -> Body:
        """Return the next `size` bytes, fewer at the end; what `body` holds comes first.

        Raises:
            ContentError; the error of a part that has failed.
        """
        self._check()
        body = body or Body()
        body.seek(0, 2)
        while (room := size - body.tell()) > 0:
            chunk = self._rest
            if not chunk:
                self.waiting = True
                try:
                    chunk = await anext(self._chunks, b"")
                finally:
                    self.waiting = False
                self._check()
            if not chunk:
                break
            body.write(chunk if len(chunk) <= room else memoryview(chunk)[:room])
            self._rest = chunk[room:]
        body.seek(0)
        return body


async def copy_parts(
    target: Target, size: int, source: Mapping[str, Any], etag: str, *, part_bytes: int, parts: int
) -> Any:
    """Make the object of the bytes of another one, on the server, and only if that is still at `etag`."""
    # CopyObject would do for small ones, but a service that does not know its If-None-Match yet would overwrite.
    part_bytes = max(part_bytes, -(-size // MAX_PARTS))

    async def send_parts(upload_id: str) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        slots = asyncio.Semaphore(parts)

        async def send(number: int, start: int) -> None:
            part: dict[str, Any] = {"CopySourceRange": f"bytes={start}-{min(start + part_bytes, size) - 1}"}
            if size <= part_bytes:
                part = {}  # of objects up to 5 MiB Amazon takes no range
            try:
                answer = await target.connection.call(
                    "upload_part_copy", target.what, UploadId=upload_id, PartNumber=number,
                    CopySource=source, CopySourceIfMatch=etag, **part, **target.at,
                )  # fmt: skip
                sent.append(target.part(number, answer["CopyPartResult"]))
            finally:
                slots.release()

        with unhurried():
            async with one_error(), asyncio.TaskGroup() as group:
                for number, start in enumerate(range(0, size, part_bytes), 1):
                    await slots.acquire()
                    group.create_task(send(number, start))
        return sent

    return await in_parts(target, send_parts)


async def in_parts(target: Target, send_parts: Callable[[str], Awaitable[list[dict[str, Any]]]]) -> Any:
    """Do a multipart upload, whose parts `send_parts` sends; after an error or a cancellation none is left."""
    with contextlib.suppress(AccessDenied):  # who may only write finds out in the end
        if await _token_at(target) is not None:  # better now than when everything has been sent
            raise AlreadyExists(f"could not {target.what}: there is an object already")
    upload_id = await _begin(target)
    target.uploads[upload_id] = target.token
    try:
        parts = sorted(await send_parts(upload_id), key=lambda part: part["PartNumber"])
        answer = await decide(target, "complete_multipart_upload", UploadId=upload_id, MultipartUpload={"Parts": parts})
    except BaseException as error:
        _nothing_was_decided(error)
        with _as_unknown_as(error):
            await target.cleanup.finish(abort(target, upload_id), within=target.undo_within, name="abort of an upload")
        raise
    target.uploads.pop(upload_id, None)
    return answer


async def _begin(target: Target) -> str:
    work = target.connection.call("create_multipart_upload", target.what, again=False, **target.params, **target.at)

    async def undo(task: asyncio.Task[Any]) -> bool:
        with contextlib.suppress(StorageError):
            answer = await _result(task)
            await abort(target, answer["UploadId"])
        return True  # without a completion nothing becomes visible

    answer = await _owned(target, work, undo, "beginning of an upload")
    return str(answer["UploadId"])


async def abort(target: Target, upload_id: str) -> None:
    """End an unfinished upload; one that is gone is fine. Until that has succeeded it stays known, for a discard."""
    with contextlib.suppress(Conflict, NotFound):
        await target.connection.call("abort_multipart_upload", target.what, UploadId=upload_id, **target.at)
    target.uploads.pop(upload_id, None)


# -- the request that decides


async def refuse_taken(target: Target) -> None:
    """Where the service has no conditional writes, look first. Of two simultaneous writers both may win then.

    Raises:
        AlreadyExists: the key is taken.
    """
    if not target.conditional and await _token_at(target) is not None:
        raise AlreadyExists(f"could not {target.what}: there is an object already")


async def decide(
    target: Target,
    operation: str,
    *,
    body: Body | None = None,
    on_progress: Callable[[], None] | None = None,
    **params: Any,
) -> Any:
    """Send the request that makes the object visible, and return its answer.

    Raises:
        AlreadyExists: the key is taken, and not by this write, whose answer may have been lost at the first try.
        Conflict: the upload is gone. StorageError.
    """
    await refuse_taken(target)
    if operation != "complete_multipart_upload":  # else they were given when it began
        params = {**target.params, **params}
    if target.conditional:
        params["IfNoneMatch"] = "*"

    async def work() -> Any:
        try:
            with contextlib.nullcontext() if body is not None else unhurried():
                return await target.connection.call(
                    operation, target.what, body=body, on_progress=on_progress, **params, **target.at
                )
        except StorageError as error:
            if code_of(error) not in _SETTLED_BY_A_LOOK:
                raise
            return await _settle(target, error)

    async def undo(task: asyncio.Task[Any]) -> bool:
        if body is not None and body.withdraw():
            task.cancel()  # not all of it is on its way, and what is not will not be
            await over(task)
            return True
        try:
            answer = await _result(task)
        except StorageError as error:
            if not error.outcome_unknown:
                return True
            answer = None
        with contextlib.suppress(StorageError):
            await remove(target, target.token)
            return answer is not None  # else it may still come
        return False

    return await _owned(target, work(), undo, "write")


async def _settle(target: Target, error: StorageError) -> Any:
    """Look whose object it is that stands in our way."""
    try:
        found = await _token_at(target)
    except StorageError as unseen:
        unseen.outcome_unknown = True
        raise
    if found == target.token:
        return {}
    if found is None and not isinstance(error, AlreadyExists):
        raise error
    taken = AlreadyExists(f"could not {target.what}: there is an object already")
    taken.outcome_unknown = found is None and error.outcome_unknown
    raise taken from error.__cause__


async def is_taken(target: Target) -> bool:
    """Return whether there is an object."""
    return await _token_at(target) is not None


async def _token_at(target: Target) -> str | None:
    """Return the token of the object there: empty for one without, None where none is."""
    try:
        answer = await target.connection.head(target.what, **target.at)
    except NotFound:
        return None
    return str((answer.get("Metadata") or {}).get(TOKEN, ""))


async def remove(target: Target, token: str) -> None:
    """Remove the object if it carries `token`."""
    try:
        answer = await target.connection.head(target.what, **target.at)
    except NotFound:
        return
    if (answer.get("Metadata") or {}).get(TOKEN) != token:
        return
    # If-Match, because it may have been replaced since we looked.
    pinned: dict[str, Any] = {"IfMatch": answer["ETag"]} if target.conditional and answer.get("ETag") else {}
    with contextlib.suppress(AlreadyExists, NotFound):  # replaced or gone; a Conflict says neither
        try:
            await target.connection.call("delete_object", target.what, **target.at, **pinned)
        except NotSupported:
            if not pinned:
                raise
            await target.connection.call("delete_object", target.what, **target.at)


# -- helpers


async def _owned(
    target: Target,
    work: Coroutine[Any, Any, Any],
    undo: Callable[[asyncio.Task[Any]], Coroutine[Any, Any, bool]],
    name: str,
) -> Any:
    """Run `work` in a task of the backend's. If the caller is cancelled, `undo` is given that task, and returns whether
    it is certain now that nothing becomes visible; the CancelledError says so.

    Raises:
        BackendUnavailable: the backend was closed, which has cut `work` short; the outcome is unknown.
    """
    task = target.cleanup.start(work, name=name, context=contextvars.copy_context(), log=False)
    task.add_done_callback(seen)
    try:
        await over(task)
    except asyncio.CancelledError as error:
        certain = False

        async def undoing() -> None:
            nonlocal certain
            certain = await undo(task)

        error.outcome_unknown = True  # type: ignore[attr-defined]
        with _as_unknown_as(error):
            await target.cleanup.finish(undoing(), within=target.undo_within, name=f"undo of a {name}")
        error.outcome_unknown = not certain  # type: ignore[attr-defined]
        raise
    return outcome_of(task)


def _nothing_was_decided(error: BaseException) -> None:
    """Note on a cancellation that nothing becomes visible, unless the request that decides has said otherwise."""
    if isinstance(error, asyncio.CancelledError) and not hasattr(error, "outcome_unknown"):
        error.outcome_unknown = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def _as_unknown_as(first: BaseException) -> Iterator[None]:
    """Let a second cancellation, amid the cleanup, say as much as the error that it follows."""
    try:
        yield
    except asyncio.CancelledError as second:
        second.outcome_unknown = outcome_unknown(first)  # type: ignore[attr-defined]
        raise


async def _result(task: asyncio.Task[Any]) -> Any:
    """Wait for `task`; return its result, or raise its error."""
    await over(task)
    return task.result()


@contextlib.asynccontextmanager
async def one_error() -> AsyncIterator[None]:
    """Raise the first error of a TaskGroup in place of the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group.exceptions[0].__cause__
