"""The content type of a file, from its name and its first bytes.

Four rules, in this order:

* The bytes are *definitely* something that the name does not say (a PNG named ``.html``): the bytes win. Only the
  signatures of binary formats are definite, and a container (zip, gzip, OLE) agrees with everything that may be
  built on it. So a type that a browser would execute never comes from the bytes: HTML named ``.png`` stays
  ``image/png``, which is harmless, whereas believing the bytes would serve an attacker's page.
* Otherwise the name's type, where its extension has one.
* Otherwise ``text/plain`` for what reads as text, and for the rest what puremagic makes of it, where it is installed
  (``pip install 'aproxy-storage[sniff]'``).
* Otherwise what the content itself declares, as an upload does. That is the word of whoever has sent it: it counts
  where it is a short ``type/subtype`` that no browser would execute. Its parameters do not.

puremagic compares the bytes with all of its 1400 signatures, one by one, which takes longer than a small save.
Therefore the short table below comes first, and puremagic is asked only about nameless binary content that one of its
signatures fits; whether one does is looked up by their places.
"""

from __future__ import annotations

import importlib
import mimetypes
import re
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["guess_content_type"]

_HEAD = 4096  # bytes that are looked at

# As Django's FileResponse: the type is that of the bytes, and those are compressed.
_ENCODINGS = {
    "br": "application/x-brotli",
    "bzip2": "application/x-bzip",
    "compress": "application/x-compress",
    "gzip": "application/gzip",
    "xz": "application/x-xz",
}

_TEXTUAL = ("+xml", "+json", "/xml", "/json", "/javascript", "/ecmascript", "/x-javascript", "/x-sh", "/sql", "/toml")


class _Signature(NamedTuple):
    start: bytes
    type: str
    agrees: tuple[str, ...] = ()  # beginnings of other types that such bytes may have


_ANY_APPLICATION = ("application/", "model/", "chemical/")
_MEDIA = ("audio/", "video/", "application/ogg", "application/mp4")
_FONT = ("font/", "application/font", "application/x-font", "application/vnd.ms-")

_SIGNATURES = (
    _Signature(b"\x89PNG\r\n\x1a\n", "image/png", ("image/apng", "image/vnd.mozilla.apng", "image/x-png")),
    _Signature(b"\xff\xd8\xff", "image/jpeg", ("image/jp", "image/pjpeg", "image/mpo")),
    _Signature(b"GIF87a", "image/gif"),
    _Signature(b"GIF89a", "image/gif"),
    _Signature(b"II*\0", "image/tiff", ("image/",)),  # the raw formats of most cameras too
    _Signature(b"MM\0*", "image/tiff", ("image/",)),
    _Signature(b"8BPS", "image/vnd.adobe.photoshop", ("image/", "application/")),
    _Signature(b"%PDF-", "application/pdf", _ANY_APPLICATION),
    _Signature(b"PK\x03\x04", "application/zip", _ANY_APPLICATION),
    _Signature(b"PK\x05\x06", "application/zip", _ANY_APPLICATION),
    _Signature(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "application/x-ole-storage", (*_ANY_APPLICATION, "image/")),
    _Signature(b"\x1f\x8b\x08", "application/gzip", (*_ANY_APPLICATION, "image/svg", "image/x-")),
    _Signature(b"\xfd7zXZ\0", "application/x-xz", _ANY_APPLICATION),
    _Signature(b"\x28\xb5\x2f\xfd", "application/zstd", _ANY_APPLICATION),
    _Signature(b"7z\xbc\xaf\x27\x1c", "application/x-7z-compressed", _ANY_APPLICATION),
    _Signature(b"Rar!\x1a\x07", "application/vnd.rar", _ANY_APPLICATION),
    _Signature(b"\x7fELF", "application/x-executable", _ANY_APPLICATION),
    _Signature(b"\0asm", "application/wasm", _ANY_APPLICATION),
    _Signature(b"SQLite format 3\0", "application/vnd.sqlite3", _ANY_APPLICATION),
    _Signature(b"\x1a\x45\xdf\xa3", "video/x-matroska", _MEDIA),
    _Signature(b"OggS\0", "application/ogg", _MEDIA),
    _Signature(b"fLaC", "audio/flac", _MEDIA),
    _Signature(b"MThd\0\0\0\x06", "audio/midi", _MEDIA),
    _Signature(b"wOFF", "font/woff", _FONT),
    _Signature(b"wOF2", "font/woff2", _FONT),
    _Signature(b"OTTO\0", "font/otf", _FONT),
)

_BY_START: dict[bytes, list[_Signature]] = {}
for _signature in _SIGNATURES:
    _BY_START.setdefault(_signature.start[:2], []).append(_signature)

_RIFF = {
    b"WEBP": _Signature(b"RIFF", "image/webp"),
    b"WAVE": _Signature(b"RIFF", "audio/wav", _MEDIA),
    b"AVI ": _Signature(b"RIFF", "video/x-msvideo", _MEDIA),
}
_FTYP = {
    b"heic": _Signature(b"ftyp", "image/heic", ("image/hei",)),
    b"heix": _Signature(b"ftyp", "image/heic", ("image/hei",)),
    b"mif1": _Signature(b"ftyp", "image/heif", ("image/hei", "image/avif")),
    b"avif": _Signature(b"ftyp", "image/avif"),
    b"M4A ": _Signature(b"ftyp", "audio/mp4", _MEDIA),
    b"qt  ": _Signature(b"ftyp", "video/quicktime", _MEDIA),
    b"crx ": _Signature(b"ftyp", "image/x-canon-cr3", ("image/",)),
}
_ID3 = _Signature(b"ID3", "audio/mpeg", _MEDIA)
_MP4 = _Signature(b"ftyp", "video/mp4", (*_MEDIA, "image/"))

# Bytes that no text in UTF-8 or a Latin encoding holds; escape sequences and form feeds it may.
_BINARY = bytes(byte for byte in range(0x20) if byte not in b"\t\n\r\f\b\x1b")


_DECLARED = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]*/[a-z0-9][a-z0-9!#$&^_.+-]*")  # the names of RFC 6838
_DECLARED_CHARS = 127

# What a browser runs, or takes apart and then runs: as a page, a picture with scripts, a script, a bundle of these.
_EXECUTED = re.compile(
    r"^(?:multipart|message)/|(?:^|[/.+_-])(?:[xm]?html|svg|xml|xslt?|(?:java|ecma|j|live|vb|type)script|hta|sgml"
    r"|component|htc|cache-manifest|shockwave|mimearchive|xul|vrml)(?:$|[\d.+_-])"
)


def guess_content_type(name: str | None, head: bytes, declared: str | None = None) -> str | None:
    """Return the content type of a file called `name` that begins with `head`; None where nothing tells.

    `declared`: what the content says itself, believed last, and only of what does no harm.

    Never raises. Takes microseconds; a millisecond for binary content without a known extension that puremagic has a
    signature for.
    """
    by_name, kind = _of_extension(_extension(name)) if name else (None, "")
    signature = _signature_of(head)
    if signature is not None:
        if by_name is None or not (by_name == signature.type or kind.startswith(signature.agrees or ("//",))):
            return signature.type
        return by_name
    if by_name is not None:
        return by_name
    head = head[:_HEAD]
    found = None if not head else "text/plain" if _is_text(head) else _by_puremagic(head)
    return found or _harmless(declared)


def _harmless(declared: str | None) -> str | None:
    kind = (declared or "").partition(";")[0].strip().lower()
    if len(kind) > _DECLARED_CHARS or not _DECLARED.fullmatch(kind) or _EXECUTED.search(kind):
        return None
    return kind


def _extension(name: str) -> str:
    """Return what mimetypes needs to know of `name`: its last extensions, so that the answers can be cached."""
    base = name[max(name.rfind("/"), name.rfind("\\")) + 1 :]
    return base[base.find(".", 1) :][-64:] if "." in base[1:] else ""


@lru_cache(maxsize=1024)
def _of_extension(extension: str) -> tuple[str | None, str]:
    """Return the type, and what to compare with `_Signature.agrees`: the type again, ``text/…`` for any text."""
    if not extension:
        return None, ""
    # A path object's name, not a URL: guess_type() takes "data:,x" and "http://…" apart.
    guessed, encoding = mimetypes.guess_type(f"x{extension}")
    if encoding is not None:
        guessed = _ENCODINGS.get(encoding)
    if guessed is None:
        return None, ""
    return guessed, f"text/{guessed}" if guessed.endswith(_TEXTUAL) else guessed


def _signature_of(head: bytes) -> _Signature | None:
    for signature in _BY_START.get(head[:2], ()):
        if head.startswith(signature.start):
            return signature
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _FTYP.get(head[8:12], _MP4)
    if head.startswith(b"ID3") and head[3:4] in (b"\x02", b"\x03", b"\x04"):
        return _ID3
    return None


def _is_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # the byte order marks of UTF-16
        return True
    return len(head.translate(None, _BINARY)) == len(head)


def _by_puremagic(head: bytes) -> str | None:
    try:
        import puremagic
    except ImportError:
        return None
    places = _places_of_signatures()
    if places is not None and not _fits(head, places):
        return None
    found: list[Any]
    try:
        found = puremagic.magic_string(head)
    except Exception:  # "could not identify", and whatever odd input makes of its parsers
        return None
    for match in found:  # the most likely first
        guessed = match.mime_type
        if guessed and not guessed.startswith("text/") and not guessed.endswith(_TEXTUAL):
            return str(guessed)
    return None


#: For each place where signatures begin: their first two bytes (or the only one), and the slices to compare as a whole.
_Places = list[tuple[slice, dict[bytes, list[tuple[slice, bytes]]]]]


def _fits(head: bytes, places: _Places) -> bool:
    for start, signatures in places:
        for whole, signature in signatures.get(head[start], ()):
            if head[whole] == signature:
                return True
    return False


@lru_cache(maxsize=1)
def _places_of_signatures() -> _Places | None:
    """Return what puremagic looks for, and where; None if it does not keep its tables where 1.x and 2.x have them."""
    places: dict[tuple[int, int | None], dict[bytes, list[tuple[slice, bytes]]]] = {}
    try:
        tables = importlib.import_module("puremagic.main")
        for each in (*tables.magic_header_array, *tables.magic_footer_array):
            offset, signature = each.offset, each.byte_match
            whole = slice(offset, offset + len(signature) or None)
            beginning = (offset, offset + len(signature[:2]) or None)  # a few are of a single byte
            places.setdefault(beginning, {}).setdefault(signature[:2], []).append((whole, signature))
    except (ImportError, AttributeError):
        return None
    return [(slice(*beginning), signatures) for beginning, signatures in places.items()]
