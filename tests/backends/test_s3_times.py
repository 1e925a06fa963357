"""The times in S3's answers: as botocore reads them, by the formats that S3 has."""

from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.utils import parse_timestamp as botocores

from aproxy_storage import Source
from aproxy_storage.backends import _s3_times
from aproxy_storage.backends._s3_times import parse_timestamp
from aproxy_storage.backends.s3 import S3Backend
from tests.services.s3 import S3Service


@pytest.mark.parametrize(
    "value",
    [
        "2026-11-21T17:49:28.316Z",
        "2026-11-21T17:49:28Z",
        "2026-11-21T17:49:28.316123+02:00",
        "Sat, 21 Nov 2026 17:49:28 GMT",
        "Sat, 21 Nov 2026 17:49:28 -0000",
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        "20261121T174928Z",
        "2026-11-21",
        "1700000000",
        "1700000000.5",
        1700000000,
        0,
    ],
)
def test_a_time_is_what_botocore_makes_of_it(value: Any) -> None:
    moment, expected = parse_timestamp(value), botocores(value)
    assert moment.replace(tzinfo=moment.tzinfo or UTC) == expected.replace(tzinfo=expected.tzinfo or UTC)
    assert (moment.tzinfo is None) == (expected.tzinfo is None)


@pytest.mark.parametrize("value", ["", "yesterday", "2026-13-45T00:00:00Z", None])
def test_what_is_no_time_is_refused_as_before(value: Any) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as theirs:
        botocores(value)
    with pytest.raises(theirs.type):
        parse_timestamp(value)


@pytest.mark.asyncio
async def test_answers_and_listings_are_read_so(s3_service: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ask(value: Any) -> datetime:
        asked.append(value)
        moment: datetime = botocores(value)
        return moment

    monkeypatch.setattr(_s3_times, "any_timestamp", ask)
    service = s3_service.fresh()
    async with S3Backend(
        **service.options, prefix=service.prefix.rstrip("/"), flat_listings=False, max_segment_bytes=255
    ) as backend:
        before = datetime.now(UTC)
        await backend.write("a.txt", Source.of(b"a"))
        stat = await backend.stat("a.txt")
        listed = [info async for info in backend.list()]
    assert [info.key for info in listed] == ["a.txt"]
    for info in (stat, *listed):
        assert info.modified_at is not None
        assert abs((info.modified_at - before).total_seconds()) < 60
    assert not asked  # nothing was left to botocore
