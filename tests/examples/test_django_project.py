"""The Django example: it starts, and its migrations are those of its models. `tests/e2e` has it in a browser."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def environment(directory: Path) -> dict[str, str]:
    """Return that of the example: its data in `directory`, and its own settings, not those of other tests."""
    inherited = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    return {**inherited, "PYTHONPATH": str(ROOT), "EXAMPLE_VAR": str(directory / "var")}


@pytest.mark.parametrize("command", [["check", "--fail-level", "WARNING"], ["makemigrations", "--check", "--dry-run"]])
def test_it_is_in_order(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "django_project" / "manage.py"), *command],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_prepares_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "django_project" / "run.py"), "nothing"]
    env = environment(tmp_path)
    for expected in ("user ann, password demo", ""):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
        assert expected in done.stdout
    assert done.stdout == ""
    assert (tmp_path / "var" / "db.sqlite3").is_file()
    look = """
import asyncio
import os
import django
django.setup()
from django.conf import settings
from django.contrib.auth.models import User
from django.core.files.base import ContentFile
from django.test import AsyncClient, Client
from letters.models import Letter
from sync_bridge.models import StoredFile

ann, eve, admin = (User.objects.get(username=name) for name in ("ann", "eve", "admin"))
letter = Letter.objects.create(author=ann, receiver=eve, text="Hello", attachment=ContentFile(b"x", name="a b.txt"))
client = Client(headers={"host": "localhost"})
client.force_login(admin)
page = client.get(f"/admin/letters/letter/{letter.pk}/change/")
print(page.status_code, f'href="{letter.attachment.url}"' in page.text)
client.force_login(ann)
print(b"".join(client.get(letter.attachment.url)))

async def again(what):
    browser = AsyncClient()
    await browser.aforce_login(ann)
    answer = await browser.get(f"/async/attachment/{letter.attachment.name}")
    length = answer.headers["Content-Length"] if answer.streaming else ""
    print(what, answer.status_code, length, b"".join([c async for c in answer]) if answer.streaming else "")

settings.ALLOWED_HOSTS.append("testserver")
storage = letter.attachment.storage
asyncio.run(again("stored"))
StoredFile.objects.update(size=None)  # as of a file that was taken in from a store that does not know sizes
print(client.get(letter.attachment.url).headers["Content-Length"])
asyncio.run(again("size unknown"))
os.remove(storage.path(letter.attachment.name))
print("gone", client.get(letter.attachment.url).status_code)
asyncio.run(again("gone"))
"""
    done = subprocess.run(
        [sys.executable, "-c", look],
        cwd=ROOT / "examples" / "django_project",
        env={**env, "DJANGO_SETTINGS_MODULE": "project.settings"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "200 True",
        "b'x'",
        "stored 200 1 b'x'",
        "1",
        "size unknown 200 1 b'x'",
        "gone 404",
        "gone 404  ",
    ], done.stderr
