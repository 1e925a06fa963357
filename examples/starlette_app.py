"""Upload and streamed download over HTTP, with ranges and conditional requests, in one Starlette application.

    pip install "aproxy-storage" starlette uvicorn
    uvicorn examples.starlette_app:app

    curl -T film.mp4 http://127.0.0.1:8000/files/film.mp4     # 201, and the path in Location
    curl http://127.0.0.1:8000/files/film.mp4 -r 0-99         # 206, the first hundred bytes

No file is in memory as a whole, in either direction. A client that hangs up leaves nothing behind: its request is
cancelled, and with it the save. Who may do what is not asked here; put your own check before it.
"""

import re
from contextlib import asynccontextmanager
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from aproxy_storage import ByteRange, ContentError, InvalidPath, NotFound, OutOfSpace, StorageError
from aproxy_storage.config import load

storage = next(iter(load().values()))  # $APROXY_CONFIG, ./aproxy.toml, or ./aproxy-data; opens nothing


async def upload(request):
    """PUT a new file. The body is streamed; a taken path gives the next free one, which Location names."""
    length = request.headers.get("content-length")
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise HTTPException(400)
    try:
        path = await storage.save(
            request.path_params["path"],
            request.stream(),
            size=None if length is None else int(length),  # a body that ends too early is no file
            content_type=request.headers.get("content-type"),
        )
    except ContentError as error:
        if isinstance(error.__cause__, ClientDisconnect):
            raise error.__cause__ from None
        raise
    record = await storage.get(path)
    return JSONResponse(
        {"path": record.path, "size": record.size, "checksum": record.checksum},
        status_code=201,
        headers={"Location": f"/files/{quote(record.path)}"},
    )


async def download(request):
    """GET or HEAD a file, or a part of it."""
    record = await storage.get(request.path_params["path"])
    etag = f'"{record.token}-{record.version}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Type": record.content_type or "application/octet-stream",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",  # an uploaded page is no page of ours
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    size = await storage.size(record)
    part = None
    if request.headers.get("if-range", etag) == etag:
        part = parse_range(request.headers.get("range", ""), size)
    start, stop = part.resolve(size) if part else (0, size)
    if part and start == stop:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Length"] = str(stop - start)
    if part:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    status = 206 if part else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    # Opened before the answer begins, so that what is gone is an error and no answer cut short.
    return OpenFileResponse(await storage.open(record, byte_range=part), status_code=status, headers=headers)


class OpenFileResponse(StreamingResponse):
    """Sends an open file, and closes it also where the client is gone before the first chunk is asked for."""

    def __init__(self, file, **options):
        super().__init__(file, **options)
        self.file = file

    async def __call__(self, scope, receive, send):
        async with self.file:
            await super().__call__(scope, receive, send)


async def remove(request):
    await storage.delete(request.path_params["path"])
    return Response(status_code=204)


def parse_range(text, size):
    """Return the one range that is asked for; None for none, for several and for what cannot be understood."""
    found = re.fullmatch("bytes=([0-9]{0,18})-([0-9]{0,18})", text.replace(" ", ""))
    if not found or not (found[1] or found[2]):
        return None
    first, last = found.groups()
    if not first:
        return ByteRange.last(int(last))
    if last and int(last) < int(first):
        return None
    return ByteRange(min(int(first), size), int(last) + 1 if last else None) if int(first) < size else ByteRange(size)


STATUS = {NotFound: 404, InvalidPath: 400, ContentError: 400, OutOfSpace: 507}


async def storage_error(request, error):
    """Answer with what went wrong, not with where: messages name our servers."""
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 503 if error.retryable else 500)
    return await http_error(request, HTTPException(status))


async def http_error(request, error):
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


@asynccontextmanager
async def lifespan(app):
    async with storage:
        yield


app = Starlette(
    routes=[
        Route("/files/{path:path}", download, methods=["GET", "HEAD"]),
        Route("/files/{path:path}", upload, methods=["PUT"]),
        Route("/files/{path:path}", remove, methods=["DELETE"]),
    ],
    exception_handlers={StorageError: storage_error, HTTPException: http_error},
    lifespan=lifespan,
)
