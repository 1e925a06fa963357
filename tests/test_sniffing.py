"""The content type from the name, held against the first bytes."""

from __future__ import annotations

import gzip
import io
import random
import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aproxy_storage.sniffing import _places_of_signatures, guess_content_type

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"
ELF = b"\x7fELF\2\1\1\0"
MP4 = b"\0\0\0\x18ftypmp42\0\0\0\0"
HTML = b"<!DOCTYPE html><script>alert(1)</script>"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'
GZIP = gzip.compress(b"x", mtime=0)


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    return file.getvalue()


ZIP = _zip()
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        # they agree
        ("a.png", PNG, "image/png"),
        ("dir.d/A.PNG", PNG, "image/png"),
        ("a.jpg", JPEG, "image/jpeg"),
        ("a.pdf", PDF, "application/pdf"),
        ("a.html", HTML, "text/html"),
        ("a.svg", SVG, "image/svg+xml"),
        ("a.txt", b"hello", "text/plain"),
        ("a.css", b"a {}", "text/css"),
        ("a.json", b"{}", "application/json"),
        # containers, and formats built on others
        ("a.zip", ZIP, "application/zip"),
        ("a.docx", ZIP, DOCX),
        ("a.jar", ZIP, "application/java-archive"),
        ("a.tar.gz", GZIP, "application/gzip"),
        ("a.tar", b"some" + bytes(300), "application/x-tar"),
        ("a.tif", b"II*\0", "image/tiff"),
        ("a.mp4", MP4, "video/mp4"),
        ("a.mov", MP4, "video/quicktime"),
        ("a.mp3", b"ID3\x04\0", "audio/mpeg"),
        ("a.wav", b"RIFF\0\0\0\0WAVEfmt ", "audio/x-wav"),
        # the bytes are definitely something else
        ("a.html", PNG, "image/png"),
        ("a.html", ZIP, "application/zip"),
        ("a.html", GZIP, "application/gzip"),
        ("a.svg", PDF, "application/pdf"),
        ("a.js", ZIP, "application/zip"),
        ("a.xml", ELF, "application/x-executable"),
        ("a.png", JPEG, "image/jpeg"),
        ("a.jpg", ELF, "application/x-executable"),
        ("a.txt", MP4, "video/mp4"),
        ("a.png", b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        # what a browser would run is never taken from the bytes
        ("a.png", HTML, "image/png"),
        ("a.jpg", SVG, "image/jpeg"),
        ("a.pdf", HTML, "application/pdf"),
        (None, HTML, "text/plain"),
        ("README", SVG, "text/plain"),
        # no extension that says anything
        ("README", b"# hello\n", "text/plain"),
        ("a.unheard-of", "Grüße\r\n".encode(), "text/plain"),
        (".bashrc", b"alias x=y\n", "text/plain"),
        (".png", PNG, "image/png"),
        ("upload", PNG, "image/png"),
        (None, PDF, "application/pdf"),
        ("notes", "text".encode("utf-16"), "text/plain"),
        # no bytes
        ("a.png", b"", "image/png"),
        ("a.txt", b"", "text/plain"),
        ("README", b"", None),
        ("", b"", None),
        (None, b"", None),
        # a name is not a URL
        ("data:text/html,x", b"", None),
        ("http://x/a.png", b"", "image/png"),
        ("a.b/c", b"", None),
        ("a.", b"", None),
    ],
)
def test_name_and_bytes(name: str | None, head: bytes, expected: str | None) -> None:
    assert guess_content_type(name, head) == expected


HARMFUL = """
    text/html TEXT/HTML text/html;charset=utf-8 application/xhtml+xml application/vnd.wap.xhtml+xml image/svg+xml
    image/svg text/xml application/xml application/atom+xml application/xml-dtd text/xsl application/xslt+xml
    text/javascript application/x-javascript text/javascript1.5 application/ecmascript text/vbscript application/hta
    application/x-shockwave-flash text/cache-manifest text/x-component multipart/x-mixed-replace multipart/related
    message/rfc822 text/html,text/plain */* text text/ /plain 写/真
"""


@pytest.mark.parametrize(
    ("declared", "believed"),
    [
        ("application/x-own", "application/x-own"),
        (DOCX, DOCX),
        ("Image/X-Own; q=1", "image/x-own"),
        ("application/vnd.x+json", "application/vnd.x+json"),
        *((kind, None) for kind in HARMFUL.split()),
        *((kind, None) for kind in ("text/x\r\nSet-Cookie: a=b", "text/\x01html", "text/pl ain", "x/" + "x" * 300, "")),
    ],
)
def test_of_what_is_declared_only_what_does_no_harm_is_believed(declared: str, believed: str | None) -> None:
    head = b"\0<script>alert(1)</script>"
    assert guess_content_type("x.zzz", head, declared) == believed
    assert guess_content_type(None, b"", declared) == believed
    assert guess_content_type("x.png", head, declared) == "image/png"
    assert guess_content_type("x.zzz", PNG, declared) == "image/png"
    assert guess_content_type("x.zzz", HTML, declared) == "text/plain"


def test_nameless_binary_content_is_left_to_puremagic(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("puremagic")
    flash = b"FLV\x01\0\0"  # which the short table does not know
    assert guess_content_type(None, flash) == "video/x-flv"
    assert guess_content_type("a.bin", flash) == "application/octet-stream"
    monkeypatch.setitem(sys.modules, "puremagic", None)
    assert guess_content_type(None, flash) is None
    assert guess_content_type(None, b"\0\1\2\3") is None


def test_whatever_puremagic_knows_it_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    puremagic = pytest.importorskip("puremagic.main")
    dice = random.Random(7)
    heads = [dice.randbytes(4096) for _ in range(100)]
    heads += [dice.randbytes(header.offset) + header.byte_match for header in puremagic.magic_header_array]
    heads += [
        dice.randbytes(600 + footer.offset) + footer.byte_match + bytes(-footer.offset - len(footer.byte_match))
        for footer in puremagic.magic_footer_array
    ]
    got = [guess_content_type(None, head) for head in heads]
    monkeypatch.setattr("aproxy_storage.sniffing._fits", lambda head, places: True)
    assert got == [guess_content_type(None, head) for head in heads]
    assert len(set(got)) > 100


def test_puremagic_with_other_tables_is_asked_about_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = pytest.importorskip("puremagic.main")
    monkeypatch.setattr(tables, "magic_footer_array", [object()])
    assert _places_of_signatures.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setattr("aproxy_storage.sniffing._places_of_signatures", lambda: None)
    assert guess_content_type(None, b"FLV\x01\0\0") == "video/x-flv"


def test_puremagic_is_left_alone_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    puremagic = pytest.importorskip("puremagic")
    asked: list[bytes] = []
    monkeypatch.setattr(puremagic, "magic_string", lambda head: asked.append(head) or [])
    assert guess_content_type(None, b"\0\1\2\3") is None
    assert not asked


@given(st.none() | st.text(max_size=40), st.binary(max_size=100))
def test_any_input_has_an_answer(name: str | None, head: bytes) -> None:
    answer = guess_content_type(name, head)
    assert answer is None or "/" in answer
    assert guess_content_type(name, head) == answer


@given(st.sampled_from([PNG, JPEG, PDF, ELF, MP4, HTML, SVG, GZIP, ZIP]), st.binary(max_size=50))
def test_bytes_alone_never_make_a_page(start: bytes, rest: bytes) -> None:
    answer = guess_content_type(None, start + rest)
    if answer is not None:
        assert answer == "text/plain" or not answer.startswith("text/")
        assert "xml" not in answer
        assert "html" not in answer
