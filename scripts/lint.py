#!/usr/bin/env python3
"""ruff and mypy over the checkout, all of them whatever the first says:  python3 scripts/dev.py scripts/lint.py

mypy takes a package's name from its folder's, and refuses one with a hyphen; so it looks through a link called skein.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def checked_files() -> list[str]:
    """What pyproject.toml has mypy check. Python 3.10 reads no TOML by itself."""
    (listed,) = re.findall(r"^\[tool\.mypy\]\nfiles = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return re.findall(r'"(.+?)"', listed)


def main() -> int:
    failed = 0
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        failed |= subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "skein").symlink_to(ROOT, target_is_directory=True)
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
        files = [f"skein/{name}" for name in checked_files()]
        failed |= subprocess.run([sys.executable, "-m", "mypy", *options, *files], cwd=folder).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
