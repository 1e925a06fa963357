"""The endpoint of a request to S3, worked out once for each kind of request instead of once for each key.

Which host a request goes to is said by some hundred rules, which botocore goes through for every request: a fifth of
the CPU that a small one takes. It remembers the latest hundred answers, by all that the rules may ask for. That has the
key in it, so it never meets one again. But no rule of S3 does ask for the key; as long as that is so, it is left out.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["remember_endpoints"]

#: Parameters of the rules that differ from request to request.
_VARYING = ("Key", "Prefix", "CopySource")

_asked_for: frozenset[str] | None = None  # those of them that a rule asks for; None: not looked yet


class _Remembering:
    """What botocore calls an endpoint provider, asked without the parameters that make no difference."""

    def __init__(self, provider: Any, left_out: frozenset[str]) -> None:
        self._provider = provider
        self._left_out = left_out

    def resolve_endpoint(self, **parameters: Any) -> Any:
        for name in self._left_out:
            parameters.pop(name, None)
        return self._provider.resolve_endpoint(**parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)


def remember_endpoints(client: Any, loader: Any) -> None:
    """Let `client`, which is ours, remember its endpoints. Does nothing where botocore is not as it is known here.

    `loader` gives botocore's descriptions of services.
    """
    resolver = getattr(client, "_ruleset_resolver", None)
    provider = getattr(resolver, "_provider", None)
    if not hasattr(provider, "resolve_endpoint"):
        return
    left_out = frozenset(_VARYING) - _asked_by_rules(loader)
    if left_out:
        resolver._provider = _Remembering(provider, left_out)  # type: ignore[union-attr]


def _asked_by_rules(loader: Any) -> frozenset[str]:
    global _asked_for
    if _asked_for is None:
        try:
            rules = json.dumps(loader.load_service_model("s3", "endpoint-rule-set-1")["rules"])
        except Exception:  # another botocore: then all of them count
            _asked_for = frozenset(_VARYING)
        else:
            # As {"ref": "Key"}, or in a template: "https://{Key}…", "{Key#part}".
            _asked_for = frozenset(name for name in _VARYING if f'"{name}"' in rules or f"{{{name}" in rules)
    return _asked_for
