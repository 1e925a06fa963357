"""A page whose uploads go from the browser straight to S3, past this process.

    S3_URL='s3://my-bucket/uploads?endpoint_url=https://s3.example.org&region=eu-central-1' \\
        python -m uvicorn --app-dir examples browser_upload:app

Needs starlette and uvicorn, credentials in the environment, and a CORS rule of the bucket that lets the page's origin
POST (SeaweedFS has one for all).
"""

import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from aproxy_storage import InvalidPath, NotFound
from aproxy_storage.config import storage_from_urls

MAX_BYTES = 100_000_000

storage = storage_from_urls(os.environ["S3_URL"], os.environ.get("META_URL", "sqlite:uploads.sqlite3"))
FORM_SECONDS = 600  # in which an upload must begin
KEPT_SECONDS = 86_400  # in which it must be finished

# A secret of the browser that has begun an upload -> when, and its path; yours: the user's session.
begun: dict[str, tuple[float, str]] = {}

PAGE = """<!doctype html>
<meta charset="utf-8"><title>Upload</title>
<input type="file" id="file"> <progress id="progress" value="0" hidden></progress> <span id="said"></span>
<script>
const said = document.getElementById("said"), progress = document.getElementById("progress");
const ask = async (url, data) => {
  const answer = await fetch(url, {method: "POST", body: JSON.stringify(data)});
  if (!answer.ok) throw Error(await answer.text());
  return answer.json();
};
const send = (form, file) => new Promise((resolve, reject) => {
  const data = new FormData(), request = new XMLHttpRequest();
  for (const [name, value] of Object.entries(form.fields)) data.append(name, value);
  data.append("file", file);  // the last field
  request.upload.onprogress = event => progress.value = event.loaded / event.total;
  request.onload = () => request.status < 300 ? resolve() : reject(Error("refused: " + request.status));
  request.onerror = () => reject(Error("no connection"));
  request.open("POST", form.url);
  request.send(data);
});
document.getElementById("file").onchange = async event => {
  const file = event.target.files[0];
  progress.hidden = false;
  try {
    const form = await ask("/begin", {name: file.name});
    await send(form, file);
    const done = await ask("/finish", {secret: form.secret});
    said.innerHTML = `<a href="/files/${done.path.split("/").map(encodeURIComponent).join("/")}"></a>`;
    said.firstChild.textContent = `${done.path}, ${done.size} bytes`;
  } catch (error) { said.textContent = error.message; }
};
</script>"""


async def page(request: Request) -> Response:
    return HTMLResponse(PAGE)


async def begin(request: Request) -> Response:
    asked = await request.json()
    # The content type is that of the name. What the browser says of it is not to be believed.
    upload = await storage.begin_upload(asked["name"], max_bytes=MAX_BYTES, expires_in=FORM_SECONDS)
    secret, now = secrets.token_urlsafe(), time.monotonic()
    while begun and now - begun[oldest := next(iter(begun))][0] > KEPT_SECONDS:
        del begun[oldest]
    begun[secret] = now, upload.path
    return JSONResponse({"secret": secret, "url": upload.form.url, "fields": dict(upload.form.fields)})


async def finish(request: Request) -> Response:
    _, path = begun.get((await request.json())["secret"], (0.0, None))
    if path is None:
        return Response("there is no such upload", 404)
    record = await storage.finish_upload(path)
    return JSONResponse({"path": record.path, "size": record.size})


async def download(request: Request) -> Response:
    path = request.path_params["path"]
    # To be saved, not shown: what strangers upload may be a page with scripts.
    url = await storage.url(path, expires_in=60, download_name=path.rpartition("/")[2])
    return RedirectResponse(url)


async def not_found(request: Request, error: Exception) -> Response:
    return Response("there is no such file", 404)


async def bad_name(request: Request, error: Exception) -> Response:
    return Response("no file can have this name", 400)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with storage:
        yield


app = Starlette(
    routes=[
        Route("/", page),
        Route("/begin", begin, methods=["POST"]),
        Route("/finish", finish, methods=["POST"]),
        Route("/files/{path:path}", download),
    ],
    exception_handlers={NotFound: not_found, InvalidPath: bad_name},
    lifespan=lifespan,
)
