"""Prepare the site and serve it: ``python run.py uvicorn`` or ``python run.py gunicorn``, with ``--port N``."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
USERS = ("admin", "ann", "bob", "eve")
SERVERS = {
    "uvicorn": ["uvicorn", "project.asgi:application", "--port"],
    "gunicorn": ["gunicorn", "project.wsgi:application", "--threads", "4", "--bind"],
}


def prepare() -> None:
    """Make the tables, and users to play with."""
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)
    from django.contrib.auth.models import User

    for name in USERS:
        if not User.objects.filter(username=name).exists():
            make = User.objects.create_superuser if name == "admin" else User.objects.create_user
            make(name, password="demo")
            print(f"user {name}, password demo")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=[*SERVERS, "nothing"])
    parser.add_argument("--port", default="8000")
    options = parser.parse_args()
    os.chdir(HERE)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    # In a process of its own: the server forks or starts from a clean one.
    if options.server == "nothing":
        prepare()
    else:
        subprocess.run([sys.executable, __file__, "nothing"], check=True)
        port = options.port if options.server == "uvicorn" else f"127.0.0.1:{options.port}"
        os.execv(sys.executable, [sys.executable, "-m", *SERVERS[options.server], port])
