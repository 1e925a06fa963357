"""What django-proxy-storage 0.1.2 needs to be imported on Django 5.2: `six` and `force_text`, both gone from Django."""

import sys
import types

import django.utils.encoding


def install() -> None:
    # Its `compat` module imports half of Django 1.x and uses none of it here; only `six` is asked of it.
    compat = types.ModuleType("proxy_storage.compat")
    compat.six = types.SimpleNamespace(string_types=(str,), text_type=str)  # type: ignore[attr-defined]
    sys.modules["proxy_storage.compat"] = compat
    django.utils.encoding.force_text = django.utils.encoding.force_str  # type: ignore[attr-defined]
