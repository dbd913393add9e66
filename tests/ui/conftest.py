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
    with ComfyServer(comfyui_path()) as running:
        yield running
