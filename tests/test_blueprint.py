"""The shipped subgraph blueprint: in step with its source, and offered by ComfyUI."""

import json

import blueprint
import pytest


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def shipped() -> dict:
    return json.loads(blueprint.PATH.read_text())


def test_the_blueprint_is_what_the_generator_makes(object_info):
    assert blueprint.build(object_info) == shipped(), "run: python3 scripts/dev.py scripts/blueprint.py"


def test_comfyui_offers_it(server):
    found = {key: each for key, each in server.get("/global_subgraphs").items() if each["name"] == blueprint.TITLE}
    ((key, entry),) = found.items()
    assert entry["info"] == {"node_pack": "custom_nodes.skein"}
    assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == shipped()
