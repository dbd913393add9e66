"""A real Chromium and a ComfyUI server of its own for the browser tests."""

import os

import pytest
from browser import MISSING, find
from comfy_page import FLAGS
from playwright.sync_api import sync_playwright
from skein.demo.server import ComfyServer, comfyui_path


@pytest.fixture(scope="package")
def browser():
    path = find()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="package")
def ui_server():
    front_end = os.environ.get("SKEIN_FRONT_END")  # a folder, in the place of the one that ComfyUI asks for
    with ComfyServer(comfyui_path(), ("--front-end-root", front_end) if front_end else ()) as running:
        yield running
