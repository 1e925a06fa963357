"""Placements in a configuration file, and what the command line says of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aproxy_storage import AccessDenied, Breaker, ConfigurationError, Fallback, ProxyStorage, Replicate, Request, Source
from aproxy_storage.config import load

HEAD = """
[storages.media]
meta = "memory:"
"""


def loaded(tmp_path: Path, text: str) -> ProxyStorage:
    (tmp_path / "aproxy.toml").write_text(HEAD + text)
    return load(tmp_path / "aproxy.toml")["media"]


def test_a_fallback_with_all_its_rules(tmp_path: Path) -> None:
    storage = loaded(
        tmp_path,
        """
placement = { policy = "fallback", order = ["b", "a"], attempt_timeout = 2.5, source_timeout = 20, deadline = "none", \
hedge_after = 0.5, hedge_max_bytes = 1000, spool_bytes = 0, breaker = { failures = 2, reset_after = 3 } }

[storages.media.originals]
a = { url = "memory:", max_concurrency = 4, fallback_on = ["OSError", "AccessDenied", "json.JSONDecodeError"] }
b = { url = "memory:", attempt_timeout = 1 }
c = "memory:"
""",
    )
    assert isinstance(storage.placement, Fallback)
    limits = storage.placement.limits
    assert (limits.attempt_timeout, limits.source_timeout, limits.deadline) == (2.5, 20, None)
    assert (limits.hedge_after, limits.hedge_max_bytes, limits.spool_bytes) == (0.5, 1000, 0)
    assert limits.breaker == Breaker(2, 3)
    assert storage.placement.order == ("b", "a")
    import json

    assert storage.gates["a"].fallback_on == (OSError, AccessDenied, json.JSONDecodeError)
    assert storage.gates["a"].has_slots
    assert [storage.gates[name].attempt_timeout for name in "abc"] == [2.5, 1, 2.5]
    assert not storage.gates["c"].has_slots


def test_copies(tmp_path: Path) -> None:
    storage = loaded(
        tmp_path,
        """
placement = { policy = "replicate", copies = 3, quorum = 2, breaker = "none" }
originals = { a = "memory:", b = "memory:", c = "memory:" }
""",
    )
    assert isinstance(storage.placement, Replicate)
    limits = storage.placement.limits
    assert (limits.copies, limits.quorum, limits.breaker) == (3, 2, None)


@pytest.mark.parametrize(("name", "wanted"), [("a.jpg", "b"), ("a.txt", "c"), ("a.bin", "a")])
def test_a_route(tmp_path: Path, name: str, wanted: str) -> None:
    storage = loaded(
        tmp_path,
        """
placement = { policy = "route", suffixes = { ".jpg" = "b" }, content_types = { "text/*" = "c" }, default = "a" }
originals = { a = "memory:", b = "memory:", c = "memory:" }
""",
    )
    request = Request(name, Source.of(b"\\0\\1"))
    assert asyncio.run(storage.placement.candidates(request, list("abc")))[0] == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('placement = { policy = "fallback", patience = 1 }\noriginals = "memory:"', "patience"),
        ('placement = { policy = "fallback", deadline = -1 }\noriginals = "memory:"', "deadline"),
        ('placement = { policy = "fallback", breaker = { failures = 0 } }\noriginals = "memory:"', "failures"),
        ('placement = { policy = "fallback", breaker = { fails = 1 } }\noriginals = "memory:"', "fails"),
        ('placement = { policy = "replicate", copies = 2, quorum = 3 }\noriginals = "memory:"', "quorum"),
        ('originals = { a = { url = "memory:", fallback_on = ["NoSuchError"] } }', "NoSuchError"),
        ('originals = { a = { url = "memory:", max_concurrency = 0 } }', "max_concurrency"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        loaded(tmp_path, text)


def test_aproxy_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from aproxy_storage.cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "aproxy.toml").write_text(
        '[storages.media]\nmeta = "sqlite:meta.sqlite3"\noriginals = { near = "file:near", far = "file:far" }\n'
        'placement = { policy = "fallback" }\n'
    )
    done = CliRunner().invoke(app, ["health"])
    assert done.exit_code == 0, (done.stdout, done.stderr)
    assert [line.split() for line in done.stdout.splitlines()] == [["ok", "near"], ["ok", "far"], ["ok", "meta"]]
    (tmp_path / "far").rmdir()
    (tmp_path / "far").write_text("a file")
    done = CliRunner().invoke(app, ["health"])
    assert done.exit_code == 1
    assert "far" in done.stderr


def test_aproxy_reconcile_and_stat_of_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from aproxy_storage.cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "aproxy.toml").write_text(
        '[storages.media]\nmeta = "sqlite:meta.sqlite3"\noriginals = { near = "file:near", far = "file:far" }\n'
        'placement = { policy = "replicate", copies = 2 }\n'
    )
    (tmp_path / "x.txt").write_text("content")
    runner = CliRunner()
    assert runner.invoke(app, ["put", "x.txt"]).exit_code == 0
    stat = runner.invoke(app, ["stat", "x.txt"])
    assert "near" in stat.stdout
    assert "far" in stat.stdout, stat.stdout
    (tmp_path / "near" / "x.txt").unlink()
    done = runner.invoke(app, ["reconcile", "--apply"])
    assert "copies made that were missing" in done.stdout + done.stderr
    assert len(list((tmp_path / "near").iterdir())) == 1
