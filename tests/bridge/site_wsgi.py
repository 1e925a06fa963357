"""The site as a module with an ``application``, for a server that looks into the module's dictionary."""

from tests.bridge import site

application = site.wsgi
