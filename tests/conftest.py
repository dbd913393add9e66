"""Fixtures: the pack as a package, ComfyUI's library in this process, a real server, small models.

What needs ComfyUI is imported in the fixture that needs it, so that tests/quick.txt runs without (`make quick`).
"""

import json
import os
import sys

import pytest
from pack import load_pack

# On a GPU ComfyUI would compute in other types than float32, and results be equal to less than the tests ask for.
# SKEIN_DEVICES names GPUs for those that are meant to run there (small_models.on_a_gpu; tests/workers/test_faults.py).
if "SKEIN_DEVICES" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
load_pack()

import torch  # noqa: E402
from graphs import SAMPLER  # noqa: E402
from skein.demo.run import WORKFLOW, node_id  # noqa: E402
from skein.demo.server import ComfyServer, comfyui_path  # noqa: E402


def pytest_generate_tests(metafunc):
    """A test that takes a `_round` is done so often as SKEIN_ROUNDS says: once, and ten times by `make faults`."""
    if "_round" in metafunc.fixturenames:
        rounds = range(int(os.environ.get("SKEIN_ROUNDS", "1")))
        metafunc.parametrize("_round", [pytest.param(i, marks=pytest.mark.rounds) for i in rounds])


@pytest.fixture(autouse=True)
def _no_gradients():
    """As ComfyUI runs its nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def _without_comfyui():
    """A test of tests/quick.txt that has ComfyUI imported by a way around `load_pack` fails by its name."""
    yield
    if os.environ.get("SKEIN_WITHOUT_COMFYUI"):
        assert "comfy" not in sys.modules


@pytest.fixture(scope="session")
def server():
    """A real ComfyUI server with the pack installed; shared, so tests leave it as they found it."""
    with ComfyServer(comfyui_path()) as running:
        yield running


@pytest.fixture(scope="session")
def demo_model():
    """The embedded checkpoint, loaded as the node "Load Demo Model" loads it."""
    from skein.demo.sampling import load_demo_model

    with torch.inference_mode():
        return load_demo_model()


@pytest.fixture(scope="session")
def tiny_model():
    """A random HunyuanVideo of two heads, 2 + 2 blocks: for what does not depend on training."""
    from small_models import random_hunyuan_video

    with torch.inference_mode():
        return random_hunyuan_video()


@pytest.fixture
def recorder(monkeypatch):
    """Compiled blocks on the CPU are recorded, too; `calls` has what was done, in its order."""
    from recorder import Again
    from skein.compilation import graphs as block_graphs

    monkeypatch.setitem(block_graphs.RECORDERS, "cpu", Again)
    monkeypatch.setattr(Again, "calls", [])
    return Again


@pytest.fixture
def prompt():
    """The demo workflow at a small size."""
    graph = json.loads(WORKFLOW.read_text())
    graph[node_id(graph, SAMPLER)]["inputs"]["steps"] = 6
    graph[node_id(graph, "EmptyHunyuanLatentVideo")]["inputs"].update(width=128, height=128, length=9)
    return graph
