"""Sphinx: ``make docs``. The source directory is the project's root, so that links between pages hold as on a forge."""

import re
from importlib.metadata import version as version_of

import django
from django.conf import settings
from sphinx.util import logging

import aproxy_storage

# For the docstrings of sync_bridge, whose modules want to know where Django is.
settings.configure(INSTALLED_APPS=["django.contrib.contenttypes", "sync_bridge"])
django.setup()

project = "aproxy_storage"
author = "the contributors to aproxy_storage"
version = release = version_of("aproxy-storage")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "docs/**.md"]
root_doc = "docs/index"

# Headings get the anchors that a forge gives them; tests/test_docs.py checks the links themselves.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_title = f"aproxy_storage {version}"
html_extra_path = ["_root"]  # index.html, which leads to docs/index.html

# In docstrings `name` is code, linked where there is something to link to.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
napoleon_use_rtype = False
napoleon_use_ivar = True


def _split_raises(app, what, name, obj, options, lines):
    """Take ``Raises, from every call:`` and ``Raises (on entering):`` apart, which Napoleon takes for no section."""
    for number, line in reversed(list(enumerate(lines))):
        found = re.fullmatch(r"( *)Raises[, ]+\(?(.+?)\)?:", line)
        if found:
            indent, when = found.groups()
            lines[number : number + 1] = [f"{indent}{when[0].upper()}{when[1:]}:", "", f"{indent}Raises:"]


def _check_public_names(app, env):
    known = env.get_domain("py").objects
    for name in aproxy_storage.__all__:
        if f"aproxy_storage.{name}" not in known:
            logging.getLogger(__name__).warning("the reference leaves out the public name %s", name)


def setup(app):
    app.connect("env-check-consistency", _check_public_names)
    app.connect("autodoc-process-docstring", _split_raises, priority=400)  # before Napoleon
