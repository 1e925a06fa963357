"""The example that takes the first store away, over two directories and over S3."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.services.s3 import S3Server

PROGRAM = Path(__file__).parents[2] / "examples" / "fallback_to_s3.py"


def run(directory: Path, *args: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM), "--count", "30", *args],
        cwd=directory, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout.splitlines()


@pytest.mark.parametrize("second", ["directory", "s3"])
def test_no_upload_fails_while_the_first_store_is_away(
    tmp_path: Path, second: str, request: pytest.FixtureRequest
) -> None:
    args = ["--data", "a b/c#"]
    if second == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        options = server.service.options
        key, secret = quote(options["access_key"], safe=""), quote(options["secret_key"], safe="")
        rest = f"endpoint_url={options['endpoint_url']}&region={options.get('region', 'us-east-1')}"
        args += ["--second", f"s3://{key}:{secret}@{options['bucket']}/example-{tmp_path.name}?{rest}"]
    well, gone, back, end = run(tmp_path, *args)
    assert "first: ok 10" in well
    assert "second: ok 10" in gone
    assert "first: failed" in gone
    assert "first: ok 10" in back
    assert end == "30 of 30 files are whole: 20 in first, 10 in second"
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("the only copy")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--data", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, [path.name for path in tmp_path.iterdir()]) == (2, ["thesis.tex"])
    assert "is there already" in done.stderr
