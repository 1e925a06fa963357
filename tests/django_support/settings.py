"""Settings of the Django that the tests configure; see `setup.py` beside this."""

import os
import tempfile

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["testserver", "localhost"]
USE_TZ = True
TIME_ZONE = "UTC"
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "sync_bridge",
    "tests.django_support.shelf.apps.ShelfConfig",
    "tests.bridge.desk.apps.DeskConfig",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # fast, and for nobody's password
# Where no test has given it another file: a process of a test's own may name one. Nobody makes it before it is used.
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get(
            "APROXY_TEST_DJANGO_FILE", os.path.join(tempfile.gettempdir(), f"aproxy-django-{os.getpid()}.sqlite3")
        ),
    }
}
STORAGES = {
    "default": {"BACKEND": "sync_bridge.BridgeStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
# No test writes there: each that stores files overrides it.
MEDIA_ROOT = os.path.join(tempfile.gettempdir(), f"aproxy-media-{os.getpid()}")
MEDIA_URL = "/media/"
STATIC_URL = "/static/"
