"""Worker processes in the panel: their cards, one killed in the middle of a run, release."""

import os
import signal

from comfy_page import SLOW, ComfyPage
from playwright.sync_api import expect
from skein.demo.run import in_workers


def sampling(prompt, seed, steps):
    sampler = next(node for node in prompt.values() if node["class_type"] == "KSampler")
    sampler["inputs"].update(seed=seed, steps=steps)
    return in_workers(prompt, "cpu,cpu")  # a copy


def test_a_worker_killed_in_the_middle_and_workers_released(browser, ui_server, prompt):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_panel()
        cards = comfy.page.locator(".skein-card")
        release = comfy.panel.get_by_role("button", name="Release workers")
        expect(release).to_be_disabled()
        ui_server.submit(sampling(prompt, seed=91, steps=300))
        expect(cards).to_have_count(3, timeout=SLOW)  # ComfyUI and two workers
        expect(cards.nth(2)).to_contain_text("Worker 1")
        comfy.wait_for_state("running")
        comfy.wait_for_points(4)
        expect(cards.nth(1)).to_have_attribute("data-state", "running")
        expect(cards.nth(2).get_by_role("meter")).to_be_visible()
        expect(cards.nth(2)).to_contain_text("Time per call")
        expect(release).to_be_disabled()
        comfy.screenshot("workers")

        worker = next(each for each in comfy.status()["processes"] if each["rank"] == 1)
        os.kill(worker["pid"], signal.SIGKILL)
        expect(comfy.page.locator(".skein-banner")).to_contain_text("ended without a message", timeout=SLOW)
        expect(cards.nth(2)).to_have_attribute("data-state", "failed")
        expect(cards.nth(2)).to_contain_text("killed, or out of host memory?")
        expect(cards.nth(1)).to_have_attribute("data-state", "ended")
        comfy.wait_for_state("stopped")
        run = comfy.status()["runs"][-1]
        assert run["ended"] and not run["finished"] and "Worker 1" in run["error"]
        assert 4 <= len(run["calls"]) < 300  # what was seen before is kept
        comfy.screenshot("worker-killed")

        ui_server.run(sampling(prompt, seed=92, steps=6))
        expect(cards.nth(2)).to_have_attribute("data-state", "ready", timeout=SLOW)
        expect(comfy.page.locator(".skein-banner")).to_be_hidden()
        run = comfy.status()["runs"][-1]
        assert run["finished"] and len(run["calls"]) == 6 and all(call["ms"] for call in run["calls"])

        ui_server.submit(sampling(prompt, seed=93, steps=300))
        comfy.wait_for_state("running")
        comfy.wait_for_points(2)
        ui_server.interrupt()
        comfy.wait_for_state("stopped")
        interrupted = comfy.status()["runs"][-1]["id"]
        ui_server.run(sampling(prompt, seed=94, steps=6))  # only now the workers end the interrupted one
        run = ui_server.get(f"/skein/runs/{interrupted}")
        assert run["ended"] and not run["finished"] and run["error"] == "interrupted"
        release.click()
        expect(comfy.panel.get_by_text("The workers have ended")).to_be_visible(timeout=SLOW)
        expect(cards.nth(1)).to_have_attribute("data-state", "ended")
        expect(release).to_be_disabled()
        assert comfy.complaints() == []
