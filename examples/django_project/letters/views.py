"""Each view twice: as it is written for WSGI, and with ``async def``. The model and its files are the same."""

from collections.abc import AsyncIterator

from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.decorators import login_required
from django.core.files.storage import default_storage
from django.db.models import Q, QuerySet
from django.http import FileResponse, Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect, render

from aproxy_storage import AsyncFile, Conflict, IntegrityError, NotFound
from sync_bridge import aget_content_object, get_content_object

from .forms import LetterForm
from .models import Letter


def letters_of(user) -> QuerySet[Letter]:
    return Letter.objects.filter(Q(author=user) | Q(receiver=user)).select_related("author", "receiver")


#: What `open` of a record says where its file cannot be had any more: deleted, without its bytes, or replaced.
GONE = (NotFound, IntegrityError, Conflict)


def headers_for(file) -> dict[str, str]:
    """Have the browser save an open file, whatever it is: users may have uploaded anything."""
    return {
        "Content-Type": file.record.content_type or "application/octet-stream",
        "Content-Length": str(file.size),  # of the file: not every record knows it
        "Content-Disposition": "attachment",
        "X-Content-Type-Options": "nosniff",
    }


# -- for WSGI


@login_required
def letters(request: HttpRequest) -> HttpResponse:
    """List the user's letters, and send one."""
    form = LetterForm(request.POST or None, request.FILES or None)
    if request.method == "POST" and form.is_valid():
        form.instance.author = request.user
        form.save()  # stores the file through BridgeStorage
        return redirect("letters")
    return render(
        request, "letters/letters.html", {"form": form, "letters": letters_of(request.user), "to": "attachment"}
    )


@login_required
def attachment(request: HttpRequest, path: str) -> HttpResponse:
    """Send a file to those who may have it: the record knows to which letter it belongs."""
    try:
        record = default_storage.get(path)
    except NotFound as error:
        raise Http404 from error
    letter = get_content_object(record)
    if not isinstance(letter, Letter) or not letter.may_be_read_by(request.user):
        return HttpResponse("This is somebody else's letter.", status=403)
    try:
        file = default_storage.open(record)  # not of the path, which may be another file's by now
    except GONE as error:
        raise Http404 from error
    return FileResponse(file, as_attachment=True, headers=headers_for(file))


# -- for ASGI


async def aletters(request: HttpRequest) -> HttpResponse:
    """`letters`, without a thread for each upload: the file goes straight to the async storage."""
    user = await request.auser()
    if not user.is_authenticated:
        return redirect("login")
    form = LetterForm(request.POST or None, request.FILES or None)
    if request.method == "POST" and await sync_to_async(form.is_valid)():
        letter = form.save(commit=False)
        letter.author = user
        upload = form.cleaned_data["attachment"]
        if upload:
            await letter.attachment.asave(upload.name, upload, save=False)
        await letter.asave()
        return redirect("aletters")
    context = {"form": form, "letters": [letter async for letter in letters_of(user)], "to": "aattachment"}
    return await sync_to_async(render)(request, "letters/letters.html", context)


async def aattachment(request: HttpRequest, path: str) -> HttpResponse:
    """`attachment`, streamed: memory stays at a few chunks whatever the size of the file."""
    storage = default_storage.proxy
    try:
        record = await storage.get(path)
    except NotFound as error:
        raise Http404 from error
    letter = await aget_content_object(record)
    if not isinstance(letter, Letter) or not letter.may_be_read_by(await request.auser()):
        return HttpResponse("This is somebody else's letter.", status=403)
    try:
        # Of the record: deleted and saved anew meanwhile, the path may be somebody else's. And before the answer
        # begins: `storage.stream(record)` would find out in the midst of it.
        file = await storage.open(record)
    except GONE as error:
        raise Http404 from error
    return StreamingHttpResponse(Chunks(file), headers=headers_for(file))


class Chunks:
    """The chunks of an open file. Django closes them with the answer, also where nobody has asked for one."""

    def __init__(self, file: AsyncFile) -> None:
        self.file = file

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with self.file:
            async for chunk in self.file:
                yield chunk

    def close(self) -> None:
        if not self.file.closed:
            async_to_sync(self.file.aclose)()
