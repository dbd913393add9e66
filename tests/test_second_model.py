"""FP8 and compiled blocks under dynamic VRAM: the second model that they need has no second copy of the weights.

In processes of their own (under_dynamic_vram.py), on files of 150 to 250 MB.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "under_dynamic_vram.py"
NOISE = 12 << 20  # what a process allocates beside

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc where the weights are")


def told(folder, case):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, case], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "memory leak" not in done.stderr  # what ComfyUI says of a model in its books whose patcher is gone
    return json.loads(done.stdout.splitlines()[-1])


def test_the_second_model_stays_in_the_file_and_goes_with_the_nodes_that_need_it(tmp_path):
    found = told(tmp_path, "plans")
    assert found["compile"] < NOISE < found["file"] / 10 and found["compile_outside"] == 0
    # The twin's own weights are on the CPU here, which is the device; a second model would be four times as large.
    assert found["twin_outside"] < found["twin"] / 2
    assert found["fp8"] < found["twin_outside"] + 2 * NOISE < found["file"] / 2
    assert found["kept"] == [False] * 4 and found["after"] < 2 * NOISE, found
    assert found["compile_error"] < 1e-5 and 0 < found["fp8_error"] < 0.1 and found["stock_is_back"]


def test_the_second_models_weights_are_of_the_models_type(tmp_path):
    """As ComfyUI loads it without dynamic VRAM; and the load leaves ComfyUI's settings as they were."""
    assert told(tmp_path, "types") == {
        "torch.bfloat16": True,
        "torch.float8_e4m3fn": True,
        "dynamic_again": True,
        "vram_state": "DISABLED",  # as on all CPUs
    }


def test_a_text_encoder_in_fp8_leaves_the_rest_in_the_file(tmp_path):
    found = told(tmp_path, "text_encoder")
    assert found["outside"] < 0.6 * found["twin"]  # its embeddings stay in the file
    assert found["own"] < found["outside"] + 2 * NOISE < found["file"] / 2
    assert all(found["in_the_books"]) and 0 < found["error"] < 0.15 and found["stock_is_back"]
