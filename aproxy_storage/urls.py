"""URLs that name a backend: taking them apart, typed query parameters, and texts without secrets (pure).

Every ``from_url`` goes the same way::

    parsed = URL.parse(url)
    return cls(parsed.local_path(), **parsed.options(timeouts=True, max_workers=int, file_mode=optional(mode)))

What a driver understands itself is left to it::

    own = parsed.options(timeouts=True, others=True, table=str)
    return cls(parsed.rest("table", "timeouts"), **own)
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from .errors import ConfigurationError
from .timeouts import Timeouts

__all__ = ["URL", "boolean", "choice", "mode", "optional", "redacted", "relative_to", "scheme_of"]

_LIMITS = {f"timeouts.{name}": name for name in Timeouts.__dataclass_fields__}

#: Schemes of paths on this machine, in which nobody writes a password.
_PATHS = ("file", "sqlite")

#: Hosts with or without ports; what follows a colon and is no number is most likely a password.
_HOSTS = re.compile(r"(?:(?:\[[^\]]*\]|[^:,\[\]]*)(?::\d*)?(?:,|$))*")

_base: ContextVar[str | None] = ContextVar("aproxy_storage.urls.base", default=None)


@dataclass(frozen=True, slots=True, repr=False)
class URL:
    """A URL in its parts. `str` and `repr` hold neither the password nor any value of the query.

    Attributes:
        scheme: in small letters.
        username, password: unquoted; None where there is none.
        host: in small letters; several, separated by commas, stay one text with their ports.
        port: None where there is none, or where there are several hosts.
        path: unquoted.
        query: pairs in the order of the URL, unquoted.
    """

    text: str
    scheme: str
    username: str | None = None
    password: str | None = None
    host: str | None = None
    port: int | None = None
    path: str = ""
    query: Sequence[tuple[str, str]] = ()

    @classmethod
    def parse(cls, text: str) -> URL:
        """Take `text` apart.

        Raises:
            ConfigurationError: it is no URL. The message holds no part that may be secret.
        """
        scheme = scheme_of(text)
        try:
            parts = urlsplit(text)
            several = "," in parts.netloc
            hosts = parts.netloc.rpartition("@")[2].lower()
            if several and not _HOSTS.fullmatch(hosts):
                raise ValueError("a port that is no number")
            port = None if several else parts.port
            query = tuple(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:
            raise ConfigurationError(
                f"cannot read the {scheme} URL: a port that is no number, or a query that is not name=value&…; in user"
                " names and passwords, characters like / ? # @ : [ ] are written %2F %3F %23 %40 %3A %5B %5D"
            ) from None
        return cls(
            text,
            scheme,
            None if parts.username is None else unquote(parts.username),
            None if parts.password is None else unquote(parts.password),
            hosts if several else parts.hostname,
            port,
            unquote(parts.path),
            query,
        )

    def __str__(self) -> str:
        return redacted(self.text)

    def __repr__(self) -> str:
        return f"URL({redacted(self.text)!r})"

    def options(self, *, timeouts: bool = False, others: bool = False, **types: Callable[[str], Any]) -> dict[str, Any]:
        """Return the query as keyword arguments, each converted by the function that `types` gives for its name.

        Args:
            timeouts: take the parameters ``timeouts.operation``, ``timeouts.idle`` and so on too, in seconds or
                ``none``; the result holds them as one `Timeouts`.
            others: leave unknown parameters alone; they are the driver's.
            types: converters by name: `int`, `float`, `str`, or one of this module.

        Returns:
            What the URL gives; a name that it does not give is not there.

        Raises:
            ConfigurationError: a name is unknown (the message lists the known ones), given twice, or has a value
                that cannot be converted.
        """
        found: dict[str, Any] = {}
        limits: dict[str, Any] = {}
        for name, value in self.query:
            target: dict[str, Any] = found
            convert = types.get(name)
            if timeouts and name in _LIMITS:
                target, convert = limits, optional(float)
            elif convert is None and others:
                continue
            elif convert is None:
                known = ", ".join(sorted([*types, *(_LIMITS if timeouts else ())])) or "none"
                raise ConfigurationError(f"{self} has an unknown parameter {name!r} (known: {known})")
            if name in target:
                raise ConfigurationError(f"{self} gives the parameter {name!r} twice")
            try:
                converted = convert(value)
                if isinstance(converted, float) and not math.isfinite(converted):
                    raise _WrongValue("a finite number expected")
                target[name] = converted
            except ValueError as error:
                expected = str(error) if isinstance(error, _WrongValue) else f"{convert.__name__} expected"
                raise ConfigurationError(f"{self}: {name}: {expected}") from None
        for name, seconds in limits.items():
            try:
                found["timeouts"] = found.get("timeouts", Timeouts()).but(**{_LIMITS[name]: seconds})
            except ValueError:
                or_none = "" if name == "timeouts.cleanup" else ", or none"
                raise ConfigurationError(f"{self}: {name}: a positive number of seconds expected{or_none}") from None
        return found

    def rest(self, *names: str) -> str:
        """Return the URL without the query parameters `names` (``timeouts`` stands for all of its own)."""
        head, _, query = self.text.partition("?")
        query, hash_, fragment = query.partition("#")
        kept = [
            pair
            for pair in query.split("&")
            if pair and not {unquote(pair.partition("=")[0]), unquote(pair.partition(".")[0])} & set(names)
        ]
        # Not urlunsplit, which makes postgresql:/app of postgresql:///app.
        return head + ("?" + "&".join(kept) if kept else "") + hash_ + fragment

    def local_path(self) -> str:
        """Return the path of a ``file:`` URL: ``file:///srv/media`` is absolute, ``file:media`` relative.

        Relative paths count from the configuration file that holds the URL, else from the working directory.

        Raises:
            ConfigurationError: there is no path, or the URL names a host, a user or a fragment.
        """
        self._check_local(f"{self.scheme}:///", f"{self.scheme}:")
        return self._absolute(self.path)

    def database_path(self) -> str:
        """Return the path of an ``sqlite:`` URL, by the custom of that scheme: three slashes begin a relative path,
        four an absolute one; ``sqlite:files.sqlite3`` and ``sqlite:/srv/files.sqlite3`` are read as they look.

        Raises:
            ConfigurationError: as `local_path`.
        """
        self._check_local(f"{self.scheme}:////", f"{self.scheme}:///")
        custom = self.text[len(self.scheme) + 1 :].startswith("//")
        return self._absolute(self.path[1:] if custom else self.path)

    def _check_local(self, absolute: str, relative: str) -> None:
        if self.host not in (None, "", "localhost") or self.username is not None or self.port is not None:
            raise ConfigurationError(
                f"{self} names a host; an absolute path begins with {absolute}, a relative one with {relative}"
            )
        if "#" in self.text:
            raise ConfigurationError(f"{self}: a # in a path is written %23")

    def _absolute(self, path: str) -> str:
        if not path or "\0" in path:
            raise ConfigurationError(f"{self} names no path")
        return os.path.abspath(os.path.join(_base.get() or "", path))


@contextlib.contextmanager
def relative_to(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Let relative paths in URLs count from `directory` inside the block, in this context only."""
    token = _base.set(os.path.abspath(directory))
    try:
        yield
    finally:
        _base.reset(token)


def redacted(text: str) -> str:
    """Return a URL fit to be shown: without password, values of the query, and fragment.

    Of one that may be mistyped, only what stands before a password is shown, at least the scheme.
    """
    try:
        scheme = scheme_of(text)
    except ConfigurationError:
        return "(not a URL)"
    address, _, fragment = text.partition("#")
    head, question, query = address.partition("?")
    names = "&".join(_without_value(pair) for pair in query.split("&")) if query else ""
    before, slashes, rest = head.partition("//")
    if before.lower() != f"{scheme}:":  # these slashes begin no authority
        before, slashes, rest = head, "", ""
    authority, slash, path = rest.partition("/")
    user, at, hosts = authority.rpartition("@")
    if not slashes or not authority:
        # No place for a password. If there seems to be one, it came there by a slash too few or too many.
        if scheme not in _PATHS and re.search("[:@]", head[len(scheme) + 1 :] + query + fragment):
            return f"{scheme}:***"
    elif "@" in user + path + query + fragment or not _HOSTS.fullmatch(hosts):
        # Most likely a password with a / ? # or @ in it: from here on nothing is sure to be no part of it.
        return f"{before}//***"
    name, colon, _ = user.partition(":")
    return before + slashes + name + (colon and ":***") + at + hosts + slash + path + question + names


def _without_value(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    return f"{name}=***" if equals else "***"


# -- converters: functions of one text that raise ValueError


class _WrongValue(ValueError):
    """A ValueError whose text says what was expected."""


def boolean(text: str) -> bool:
    """Return the truth value of ``true``/``false``, ``yes``/``no``, ``on``/``off`` or ``1``/``0``."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise _WrongValue("true or false expected")
    return words[text.lower()]


def mode(text: str) -> int:
    """Return the permission bits of an octal number with its leading zero: ``0644`` or ``0o644``.

    Without the zero it is refused: nobody could tell whether it was meant in octal.
    """
    if not re.fullmatch(r"0o?[0-7]{3,4}", text):
        raise _WrongValue("an octal number like 0640 expected, in a TOML file as a text: '0640'")
    return int(text.removeprefix("0o"), 8)


def optional(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that takes ``none`` for None, and anything else as `convert` does."""

    def converted(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    converted.__name__ = f"{getattr(convert, '__name__', 'a value')} or none"
    return converted


def choice(*values: str) -> Callable[[str], str]:
    """Return a converter that takes one of `values`."""

    def chosen(text: str) -> str:
        if text not in values:
            raise _WrongValue(f"one of {', '.join(values)} expected")
        return text

    return chosen


def scheme_of(text: str) -> str:
    """Return the scheme of a URL, in small letters.

    Raises:
        ConfigurationError: it has none.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if found is None:
        raise ConfigurationError("this is no URL: it begins with no scheme like file: or sqlite:")
    return found[1].lower()
