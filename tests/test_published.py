"""What the registry would publish: valid by ComfyUI's own tool, without what is for development, and it runs.

comfy-cli runs without network and without asking anything.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import blueprint
import comfy_cli
import pytest
import yaml
from graphs import SAMPLER, frames
from pack import ROOT
from PIL import Image
from skein.demo.run import node_id
from skein.demo.server import ComfyServer, comfyui_path

FOLDER = "skein-hunyuanvideo"  # what the registry calls the pack, so its folder
BLUEPRINT = str(blueprint.PATH.relative_to(ROOT))
NOT_PUBLISHED = ("tests", "bench", "scripts", ".ci", ".dev", ".github", "CONTRIBUTING.md", "Makefile")
PUBLISHED = (
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "docs/API.md",
    BLUEPRINT,
)
LARGEST = 30e6  # bytes of the zip
RAW = "https://raw.githubusercontent.com"
NOWHERE = "http://127.0.0.1:9"  # a proxy that is not there
METADATA = (
    "import dataclasses, json, comfy_cli.registry as registry; "
    "print(json.dumps(dataclasses.asdict(registry.extract_node_configuration())))"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git has of this checkout, or would have, as a repository: comfy-cli asks git for the files."""
    folder = tmp_path_factory.mktemp("published") / "checkout"
    folder.mkdir()
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def comfy(folder: Path, *command: str) -> str:
    """What comfy-cli, or the Python it runs in, says in a folder, to a terminal or to another program."""
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE)
    environment = {**os.environ, **proxies, "NO_PROXY": "", "no_proxy": "", "PYTHONPATH": ""}
    environment |= {"HOME": str(folder.parent), "DO_NOT_TRACK": "1", "COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def tool():
    return str(comfy_cli.install())


@pytest.fixture(scope="module")
def metadata(checkout, tool):
    """pyproject.toml as comfy-cli reads it, which is what it sends."""
    return json.loads(comfy(checkout, str(Path(tool).with_name("python")), "-c", METADATA).splitlines()[-1])


@pytest.fixture(scope="module")
def unpacked(checkout, tool):
    comfy(checkout, tool, "--skip-prompt", "node", "pack")
    folder = checkout.parent / "unpacked"
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        archive.extractall(folder)
    return folder


def test_the_pack_is_valid_to_the_registry(checkout, tool):
    said = comfy(checkout, tool, "--skip-prompt", "node", "validate")
    assert "All validation checks passed" in said and "arning" not in said


def test_the_registry_is_told_the_requirements(metadata):
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert metadata["project"]["dependencies"] == [line for line in lines if line]
    assert metadata["project"]["name"] == FOLDER
    assert metadata["project"]["supported_comfyui_version"] == ">=0.16.3"


def test_icon_and_banner_lie_in_the_repository_as_the_registry_shows_them(metadata):
    """The icon square, at most 400 pixels; the banner 21:9."""
    repository = metadata["project"]["urls"]["repository"].removeprefix("https://github.com/")
    comfy = metadata["tool_comfy"]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", repository) and comfy["publisher_id"]
    sizes = {}
    for url in (comfy["icon"], comfy["banner_url"]):
        path = ROOT / url.removeprefix(f"{RAW}/{repository}/main/")
        sizes[path.stem] = Image.open(path).size
        assert path.stat().st_size < 40e3
    assert sizes["icon"] == (400, 400) and sizes["banner"][0] * 9 == sizes["banner"][1] * 21


def test_the_registrys_search_finds_it(metadata):
    """It looks through name and description; comfy-cli sends no tags."""
    text = f"{metadata['tool_comfy']['display_name']} {metadata['project']['description']}".lower()
    assert all(word in text for word in ("hunyuan", "multi gpu", "fast", "wan", "flux", "sageattention"))


def test_the_newest_entry_of_the_changelog_is_the_version(metadata):
    versions = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == metadata["project"]["version"]
    assert versions == sorted(versions, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def test_a_new_version_on_main_is_published():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    started = workflow[True]  # YAML takes the key `on` for true
    assert started["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]} and "workflow_dispatch" in started
    (action,) = (step for step in workflow["jobs"]["publish-node"]["steps"] if "publish-node-action" in step["uses"])
    assert action["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}


def test_what_is_for_development_is_not_published(checkout, unpacked):
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert not [name for name in names if name.partition("/")[0] in NOT_PUBLISHED or name.endswith("sitecustomize.py")]
    assert not {*PUBLISHED} - names
    assert (checkout / "node.zip").stat().st_size < LARGEST
    others = sum((unpacked / name).stat().st_size for name in names if not name.endswith(".safetensors"))
    assert len(names) < 300 and others < 3e6


def test_what_is_published_runs(unpacked, server, prompt):
    """Every node, template and file of the panel; and the demo in two worker processes, which import the pack too."""
    graph = copy.deepcopy(prompt)
    sampler = graph[node_id(graph, SAMPLER)]["inputs"]
    widgets = {"devices": "cpu,cpu", "ulysses_degree": 0, "ring_degree": 0, "keep_warm": False}
    graph["workers"] = {"class_type": "SkeinContextParallel", "inputs": {"model": sampler["model"], **widgets}}
    sampler |= {"model": ["workers", 0], "steps": 2}
    with ComfyServer(comfyui_path(), pack=unpacked, name=FOLDER) as published:
        assert nodes(published) == nodes(server) and len(nodes(server)) > 10
        assert published.get("/workflow_templates")[FOLDER] == server.get("/workflow_templates")["skein"]
        assert {"name": blueprint.TITLE, "source": "custom_node", "info": {"node_pack": f"custom_nodes.{FOLDER}"}} in [
            *published.get("/global_subgraphs").values()
        ]
        assert panel(published, FOLDER) == panel(server, "skein") != set()
        assert frames(published, graph).shape[0] == 3


def nodes(running):
    return {name for name in running.get("/object_info") if name.startswith("Skein")}


def panel(running, folder):
    """What the browser loads of the pack."""
    start = f"/extensions/{folder}/"
    return {url.removeprefix(start) for url in running.get("/extensions") if url.startswith(start)}
