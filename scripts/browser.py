#!/usr/bin/env python3
"""Find a Chromium for the browser tests; installs Debian's where there is none and this user may.

    python3 scripts/browser.py

Prints its path. CHROMIUM names one that is elsewhere. Only the standard library is used here.
"""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "The browser tests need Chromium; install it (apt-get install chromium), or name yours in CHROMIUM."


def find() -> str | None:
    """The path of a Chromium on this machine."""
    own = os.environ.get("CHROMIUM")
    if own:
        return shutil.which(own)
    return next((path for path in map(shutil.which, NAMES) if path), None)


def install() -> None:
    """Install Debian's Chromium, as root and where there is apt-get; otherwise nothing happens."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    print("[setup] installing chromium", file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        subprocess.run(["apt-get", "-qq", *command], stdout=sys.stderr, env=environment)


def main() -> None:
    if not find():
        install()
    print(find() or MISSING, file=None if find() else sys.stderr)


if __name__ == "__main__":
    main()
