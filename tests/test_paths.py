"""Legal paths, the next free name, and the order of prefixes."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from aproxy_storage.errors import InvalidPath
from aproxy_storage.paths import MAX_PATH_BYTES, alternative, check_path, new_token, successor, token_key

TOKEN = "AbCdEf012345"

# Names as people have them, with the characters that need care, and any text at all.
_parts = st.one_of(
    st.text("abcXYZ0123._-~ äß世🎉", min_size=1, max_size=30),
    st.from_regex(r"\A[a-z]{1,8}(\.[a-z0-9]{1,5}){0,3}\Z"),
    st.text(min_size=1, max_size=30),
)


def _is_legal(path: str) -> bool:
    try:
        return check_path(path) == path
    except InvalidPath:
        return False


paths = st.lists(_parts, min_size=1, max_size=4).map("/".join).filter(_is_legal)


@given(st.text(max_size=200))
def test_check_path_accepts_exactly_what_is_legal(text: str) -> None:
    legal = (
        text != ""
        and not text.startswith("/")
        and all(part not in ("", ".", "..") for part in text.split("/"))
        and all(ord(c) >= 32 and not 127 <= ord(c) < 160 and c not in "\\\u2028\u2029" for c in text)
        and not any(0xD800 <= ord(c) < 0xE000 for c in text)
        and len(text.encode(errors="replace")) <= MAX_PATH_BYTES
    )
    assert _is_legal(text) is legal


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "empty"),
        ("/etc/passwd", "relative"),
        ("//x", "relative"),
        ("a//b", "empty, '.' and '..'"),
        ("a/", "empty, '.' and '..'"),
        (".", "empty, '.' and '..'"),
        ("a/../b", "empty, '.' and '..'"),
        ("..", "empty, '.' and '..'"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x9bb", "control"),
        ("a\u2028b", "control"),
        ("..\\b", "backslashes"),
        ("\ud800", "surrogates"),
        ("x" * 1025, "1024 bytes"),
        ("ä" * 513, "1024 bytes in UTF-8"),
    ],
)
def test_illegal_paths_say_why(path: str, reason: str) -> None:
    with pytest.raises(InvalidPath, match=reason) as caught:
        check_path(path)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 300


def test_limits() -> None:
    assert check_path("x" * 1024) == "x" * 1024
    assert check_path("a/" + "x" * 255, max_segment_bytes=255)
    with pytest.raises(InvalidPath, match="the part"):
        check_path("a/" + "ä" * 128, max_segment_bytes=255)
    with pytest.raises(InvalidPath, match="5 bytes"):
        check_path("abcdef", max_bytes=5)


def test_path_objects_and_other_types() -> None:
    assert check_path(pathlib.PurePosixPath("a/b.txt")) == "a/b.txt"
    with pytest.raises(InvalidPath, match="is text, not"):
        check_path(b"abc")  # type: ignore[arg-type]


@given(st.text(max_size=2000))
def test_a_huge_name_gives_a_short_message(text: str) -> None:
    with pytest.raises(InvalidPath) as caught:
        check_path("/" + text * 50)
    assert len(str(caught.value)) < 1000  # escapes are up to ten characters each


@given(paths)
def test_alternative_is_legal_and_keeps_directory_and_suffixes(path: str) -> None:
    assume(len(path.encode()) < 900)
    other = alternative(path)
    assert _is_legal(other)
    assert other != path
    assert other.rpartition("/")[0] == path.rpartition("/")[0]
    suffixes = pathlib.PurePosixPath(path).suffixes
    assert other.endswith("".join(suffixes))
    assert len(other) == len(path) + 8
    assert alternative(path) != other


@given(paths, st.integers(1, 120))
def test_alternative_obeys_max_length(path: str, max_length: int) -> None:
    try:
        other = alternative(path, max_length=max_length)
    except InvalidPath:
        assert len(path.rpartition("/")[0]) + len("".join(pathlib.PurePosixPath(path).suffixes)) + 10 > max_length
    else:
        assert len(other) <= max_length
        assert _is_legal(other)
        assert other.rpartition("/")[0] == path.rpartition("/")[0]


@given(paths, st.integers(20, 255))
def test_names_obey_segment_and_byte_limits(path: str, most: int) -> None:
    for make in (
        lambda: alternative(path, max_segment_bytes=most),
        lambda: token_key(path, TOKEN, max_segment_bytes=most),
    ):
        try:
            name = make()
        except InvalidPath:
            continue
        assert len(name.rpartition("/")[2].encode()) <= most
        assert _is_legal(name)


def test_names_of_greatest_length_have_alternatives() -> None:
    for path in ("x" * 1024, "ä" * 512, "x" * 1020 + ".txt", "d/" + "世" * 300 + ".tar.gz", "a." + "b" * 1000):
        for name in (alternative(path), token_key(path, TOKEN)):
            assert _is_legal(name), path
    assert alternative("x" * 1020 + ".txt").endswith(".txt")
    for segment in ("x" * 255, "ä" * 127 + ".jpg", "a." + "b" * 253, "." + "x" * 254):
        assert len(alternative(f"dir/{segment}", max_segment_bytes=255).encode()) <= 259
        assert len(token_key(f"dir/{segment}", TOKEN, max_segment_bytes=255).encode()) <= 259
    with pytest.raises(InvalidPath, match="no free name fits into 8 characters"):
        alternative("abc.txt", max_length=8)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/srv/media/a.txt", f"srv/media/a_{TOKEN}.txt"),
        ("../../etc/./passwd", f"etc/passwd_{TOKEN}"),
        ("a//b", f"a/b_{TOKEN}"),
        ("C:\\old\n.txt", f"C:_old__{TOKEN}.txt"),
        ("dir/", f"dir/_{TOKEN}"),
        ("..", f".._{TOKEN}"),
    ],
)
def test_paths_from_before_there_were_rules_have_token_keys(path: str, key: str) -> None:
    assert token_key(path, TOKEN) == key
    assert _is_legal(key)


@given(paths)
@example("..0")
def test_token_key_is_legal_and_says_whose_it_is(path: str) -> None:
    assume(len(path.encode()) < 900)
    key = token_key(path, TOKEN)
    assert _is_legal(key)
    assert f"_{TOKEN}" in key
    assert key.rpartition("/")[0] == path.rpartition("/")[0]
    # Leading dots begin no suffix, as pathlib has it from 3.14 on.
    before, after = (pathlib.PurePosixPath(each).name.lstrip(".") for each in (path, key))
    if not path.endswith("."):  # it sees no suffix in that, and one in what is put behind it
        assert pathlib.PurePosixPath(after).suffix == pathlib.PurePosixPath(before).suffix
    assert token_key(path, TOKEN) == key


def test_tokens_differ_and_are_plain() -> None:
    tokens = {new_token() for _ in range(10_000)}
    assert len(tokens) == 10_000
    assert all(len(token) == 12 and token.isascii() and token.isalnum() for token in tokens)


_any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(_any_text, _any_text)
def test_successor_bounds_what_begins_with_the_prefix(prefix: str, other: str) -> None:
    bound = successor(prefix)
    if bound is None:
        assert prefix.strip("\U0010ffff") == ""
        return
    assert bound.encode() > (prefix + other).encode()  # byte order is the order of code points
    assert bound > prefix + other
    if prefix <= other < bound:
        assert other.startswith(prefix)


def test_successor_at_the_edges() -> None:
    assert successor("") is None
    assert successor("a") == "b"
    assert successor("media/") == "media0"
    assert successor("a\U0010ffff") == "b"
    assert successor("\U0010ffff") is None
    assert successor("\ud7ff") == "\ue000"
