"""What the panel costs a run: the same prompts with the panel open and closed in a real browser, in turn.

    python3 scripts/dev.py -m bench.panel [--pairs 8] [--apart]

With --apart the server has one CPU core and the browser another, as if it ran on another machine: what is left is what
the panel costs the sampling itself.
Wall time of the sampling, and CPU time of the server's process, which a busy machine and the browser's own work disturb
less. Ends with one JSON line: medians, and the median of the pairs' ratios.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "ui")]

from pack import load_pack  # noqa: E402

load_pack()

from browser import MISSING, find  # noqa: E402
from comfy_page import FLAGS, OPEN_PANEL, ComfyPage  # noqa: E402
from graphs import SAMPLER, seeded  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from skein.demo.run import WORKFLOW, node_id  # noqa: E402
from skein.demo.server import ComfyServer, comfyui_path  # noqa: E402


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(server: ComfyServer, prompt: dict) -> tuple[float, float]:
    """Wall seconds of a prompt and CPU seconds of the server's process for it."""
    assert server.process is not None
    started, cpu = time.perf_counter(), cpu_seconds(server.process.pid)
    server.run(prompt)
    return time.perf_counter() - started, cpu_seconds(server.process.pid) - cpu


def compare(server: ComfyServer, prompt: dict, path: str, pairs: int, found: dict) -> None:
    """Measure with the panel open (True) and closed, in turn; path: of the browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        with ComfyPage(browser, server) as comfy:
            server.run(prompt)
            open_now = False
            for pair in range(pairs):
                for wanted in (pair % 2 == 0, pair % 2 == 1):
                    if wanted != open_now:
                        comfy.page.evaluate(OPEN_PANEL)
                        open_now = wanted
                    comfy.panel.wait_for(state="visible" if wanted else "detached")
                    found[wanted].append(measure(server, seeded(prompt, 500 + 2 * pair + wanted)))
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--apart", action="store_true", help="server and browser on cores of their own")
    options = parser.parse_args()
    prompt = json.loads(WORKFLOW.read_text())
    prompt[node_id(prompt, SAMPLER)]["inputs"]["steps"] = 16
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    path = find() or sys.exit(MISSING)
    cores = sorted(os.sched_getaffinity(0))
    if options.apart:
        os.sched_setaffinity(0, cores[:1])  # inherited by what starts from here on
    with ComfyServer(comfyui_path()) as server:
        os.sched_setaffinity(0, cores[1:] if options.apart else cores)
        compare(server, prompt, path, options.pairs, found)
    ratios = [[a[i] / b[i] for a, b in zip(found[True], found[False])] for i in (0, 1)]
    print(
        json.dumps(
            {
                "pairs": options.pairs,
                "apart": options.apart,
                "open_s": round(statistics.median(wall for wall, _ in found[True]), 3),
                "closed_s": round(statistics.median(wall for wall, _ in found[False]), 3),
                "wall_ratio": round(statistics.median(ratios[0]), 4),
                "server_cpu_ratio": round(statistics.median(ratios[1]), 4),
                "spread_of_cpu_ratio": [round(min(ratios[1]), 4), round(max(ratios[1]), 4)],
            }
        )
    )


if __name__ == "__main__":
    main()
