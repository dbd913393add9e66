"""The shipped workflows: in step with their source, valid on a real server, complete with thumbnails and links."""

import copy
import importlib.util
import json
import re
import urllib.error
from pathlib import Path

import pytest
from PIL import Image
from skein.demo import LOADER, MODEL_FOLDER, MODEL_NAME
from workflow_rules import problems

import workflows

MODEL, VAE, ONE_ENCODER = ("UNETLoader", "unet_name"), ("VAELoader", "vae_name"), ("CLIPLoader", "clip_name")
TWO_ENCODERS = [("DualCLIPLoader", f"clip_name{number}") for number in (1, 2)]
THREE_ENCODERS = [("TripleCLIPLoader", f"clip_name{number}") for number in (1, 2, 3)]
TEXT_TO_VIDEO = [MODEL, *TWO_ENCODERS, VAE]
IMAGE_TO_VIDEO = [*TEXT_TO_VIDEO, ("CLIPVisionLoader", "clip_name"), ("LoadImage", "image")]
FILES = {  # the inputs that name files which are not on this machine; all nodes are in every ComfyUI since 0.16.3
    "flux_dev_fast": [MODEL, *TWO_ENCODERS, VAE],
    "hunyuan_video_15_t2v_fast": TEXT_TO_VIDEO,
    "hunyuan_video_i2v_context_parallel": IMAGE_TO_VIDEO,
    "hunyuan_video_i2v_fast": IMAGE_TO_VIDEO,
    "hunyuan_video_t2v_low_vram": TEXT_TO_VIDEO,
    "hunyuan_video_t2v_cache": TEXT_TO_VIDEO,
    "hunyuan_video_t2v_context_parallel": TEXT_TO_VIDEO,
    "hunyuan_video_t2v_diffusers": [("SkeinLoadDiffusersTransformer", "model_name"), *TWO_ENCODERS, VAE],
    "hunyuan_video_t2v_fast": TEXT_TO_VIDEO,
    "hunyuan_video_t2v_lora_fast": [*TEXT_TO_VIDEO, ("LoraLoaderModelOnly", "lora_name")],
    "hunyuan_video_t2v_sparse": TEXT_TO_VIDEO,
    "hunyuan_video_t2v_speed_up": TEXT_TO_VIDEO,
    "mochi_t2v_fast": [MODEL, ONE_ENCODER, VAE],
    "qwen_image_fast": [MODEL, ONE_ENCODER, VAE],
    "sd35_large_fast": [("CheckpointLoaderSimple", "ckpt_name"), *THREE_ENCODERS],
    "wan22_t2v_fast": [MODEL, ONE_ENCODER, VAE],
}
REFUSALS = {"LoadImage": "custom_validation_failed"}  # what the server says of a missing file, if not: not in the list
SHIPPED = sorted([*FILES, "skein_demo"])
LOADERS = ("UNETLoader", "SkeinLoadDiffusersTransformer", "CheckpointLoaderSimple", LOADER)
SAVES_CALLS = {"SkeinFirstBlockCache", "SkeinSpeedUp"}
SEARCHED = 33  # characters of a title in which the template browser finds a word: its threshold times its distance
SHOWN = 43  # characters that a card has room for
FAST = [name for name in FILES if name.endswith("_fast")]


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def shipped(name: str) -> dict:
    return json.loads(workflows.TEMPLATES[name].path.read_text())


def api_prompt(name: str) -> dict:
    return json.loads((workflows.API / f"{name}.json").read_text())


def node_of(workflow: dict, class_type: str) -> dict:
    return next(node for node in workflow["nodes"] if node["type"] == class_type)


def test_every_workflow_is_there_in_both_forms():
    assert workflows.names() == SHIPPED == sorted(workflows.TEMPLATES)
    titles = sorted(template.title for template in workflows.TEMPLATES.values())
    assert sorted(path.stem for path in workflows.UI.glob("*.json")) == titles
    assert sorted(path.stem for path in workflows.UI.glob("*.jpg")) == titles
    assert sorted(path.stem for path in workflows.API.glob("*.md")) == SHIPPED


def test_every_node_of_the_pack_is_in_a_workflow(object_info):
    used = {node["class_type"] for name in SHIPPED for node in api_prompt(name).values()}
    assert [node for node in object_info if node.startswith("Skein") and node not in used] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_title_can_be_a_file_and_an_address_and_says_what_it_is(name):
    """On Windows, too; of the address the page encodes only what a browser does by itself."""
    template = workflows.TEMPLATES[name]
    assert re.fullmatch(r"Skein - [\w .,-]*\w", template.title, re.ASCII) and len(template.title) <= SHOWN
    assert template.model in template.title
    if name.endswith("_fast"):
        assert "fast" in template.title[:SEARCHED]


@pytest.mark.parametrize(
    "words", ["skein", "multi gpu", "fast", "low vram", "lora", "hunyuanvideo", "wan", "flux", "demo"]
)
def test_a_title_is_found_by_a_search(words):
    """tests/ui/test_newcomer.py types these into the template browser."""
    titles = [template.title.lower() for template in workflows.TEMPLATES.values()]
    assert any(0 <= title.find(words) < SEARCHED for title in titles)


@pytest.mark.parametrize("name", SHIPPED)
def test_workflow_is_valid(name, object_info):
    assert problems(shipped(name), object_info, bundled=(MODEL_NAME,)) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_workflow_is_what_the_generator_makes(name, object_info):
    made = workflows.build(name, object_info)
    assert made == shipped(name), "run: python3 scripts/dev.py scripts/workflows.py"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_note_has_no_code_spans(name):
    """The Vue nodes show them in blue on a blue ground, which cannot be read (tests/ui/test_newcomer.py)."""
    assert "`" not in (workflows.API / f"{name}.md").read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_workflow_has_a_thumbnail(name):
    with Image.open(workflows.TEMPLATES[name].picture) as image:
        assert image.format == "JPEG"
        assert image.width == image.height == 512  # the card's picture is square


def test_the_bundled_model_is_there():
    assert (MODEL_FOLDER / MODEL_NAME).exists()


@pytest.mark.parametrize("name", FILES)
def test_server_misses_nothing_but_the_files(name, server):
    """The real server takes everything in the prompt except the files that this machine does not have."""
    prompt = api_prompt(name)
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/prompt", {"prompt": prompt, "client_id": server.client_id})
    answer = json.loads(refused.value.read())
    said = {}
    for key, node in answer["node_errors"].items():
        for error in node["errors"]:
            said[prompt[key]["class_type"], error["extra_info"]["input_name"]] = error["type"]
    assert said == {place: REFUSALS.get(place[0], "value_not_in_list") for place in FILES[name]}


def chains(prompt: dict) -> list[list[str]]:
    """The nodes behind each loaded model, one after another, as long as one node alone takes the last one's output."""
    found = []
    for key, node in prompt.items():
        if node["class_type"] not in LOADERS:
            continue
        found.append([])
        while len(takers := takers_of_model(prompt, key)) == 1:
            (key,) = takers
            if prompt[key]["class_type"] != "LoraLoaderModelOnly":  # which belongs to the model
                found[-1].append(prompt[key]["class_type"])
    return found


def takers_of_model(prompt: dict, key: str) -> list[str]:
    """The nodes that take a node's first output, but for those that only ask what model it is."""
    asking = ("SkeinLatentVideoPreview", "SkeinCacheReport")
    return [
        taker
        for taker, node in prompt.items()
        if [key, 0] in node["inputs"].values() and node["class_type"] not in asking
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_skein_stands_between_each_loader_and_its_sampler(name):
    """No branch goes around it."""
    found = chains(api_prompt(name))
    assert found
    for chain in found:
        assert chain and chain[0].startswith("Skein") and SAVES_CALLS & {*chain}


@pytest.mark.parametrize("name", FAST)
def test_a_fast_workflow_has_all_of_skein(name):
    """On each of its models; the settings of one are those of the others."""
    prompt = api_prompt(name)
    for chain in chains(prompt):
        assert chain[:4] == ["SkeinAttention", "SkeinFP8Quantize", "SkeinCompile", "SkeinFirstBlockCache"]
    for kind in ("SkeinAttention", "SkeinFP8Quantize", "SkeinCompile", "SkeinFirstBlockCache"):
        settings = [node["inputs"] | {"model": None} for node in prompt.values() if node["class_type"] == kind]
        assert settings == [settings[0]] * len(chains(prompt))


def test_the_sparse_workflow_is_the_fast_one_with_sparse_attention():
    """And writes to a file of its own."""
    fast, sparse = api_prompt("hunyuan_video_t2v_fast"), api_prompt("hunyuan_video_t2v_sparse")
    (key,) = (key for key, node in sparse.items() if node["class_type"] == "SkeinSparseAttention")
    added = sparse.pop(key)["inputs"]
    assert set(added) == {"model", "max_error", "start_percent", "end_percent"}
    for node in sparse.values():
        if node["inputs"].get("model") == [key, 0]:
            node["inputs"]["model"] = added["model"]
        if node["class_type"] == "SaveVideo":
            node["inputs"]["filename_prefix"] = node["inputs"]["filename_prefix"].replace("sparse", "fast")
    assert {key: node["inputs"] for key, node in sparse.items()} == {key: node["inputs"] for key, node in fast.items()}


def test_wan_goes_on_with_its_other_expert():
    """The second sampler takes the first one's latent with its noise, at the step where that has ended."""
    prompt = api_prompt("wan22_t2v_fast")
    (high, first), (low, second) = ((key, n) for key, n in prompt.items() if n["class_type"] == "KSamplerAdvanced")
    first, second = first["inputs"], second["inputs"]
    assert second["latent_image"] == [high, 0]
    assert first["return_with_leftover_noise"] == "enable" and second["add_noise"] == "disable"
    assert first["start_at_step"] == 0 and first["end_at_step"] == second["start_at_step"] < first["steps"]
    assert second["end_at_step"] >= second["steps"] and second["return_with_leftover_noise"] == "disable"
    shared = ("steps", "cfg", "sampler_name", "scheduler", "positive", "negative")
    assert [first[name] for name in shared] == [second[name] for name in shared]
    assert {"high": file_of(prompt, high), "low": file_of(prompt, low)} == {
        noise: f"wan2.2_t2v_{noise}_noise_14B_fp16.safetensors" for noise in ("high", "low")
    }


def file_of(prompt: dict, key: str) -> str:
    """The file of the model that a node takes, through all nodes between."""
    while "model" in prompt[key]["inputs"]:
        key = prompt[key]["inputs"]["model"][0]
    return prompt[key]["inputs"]["unet_name"]


def test_validator_agrees_with_comfyui(object_info):
    """ComfyUI's own template, saved by its canvas, is valid by the same rules."""
    spec = importlib.util.find_spec("comfyui_workflow_templates_json")
    if spec is None or spec.origin is None:
        pytest.skip("ComfyUI 0.16 and 0.18 have no comfyui_workflow_templates_json package, whose template this reads")
    template = Path(spec.origin).parent / "templates" / "hunyuan_video_text_to_video.json"
    assert problems(json.loads(template.read_text()), object_info) == []


def break_node_type(workflow):
    node_of(workflow, "KSamplerSelect")["type"] = "NoSuchNode"


def break_link_type(workflow):
    workflow["links"][0][5] = "LATENT"


def break_output_slot(workflow):
    workflow["links"][0][2] = 1


def break_input_slot(workflow):
    workflow["links"][0][4] = 1


def break_socket(workflow):
    node_of(workflow, "BasicGuider")["inputs"][0]["link"] = None


def break_required_input(workflow):
    node = node_of(workflow, "VAEDecodeTiled")
    dropped = node["inputs"].pop()["link"]
    workflow["links"] = [link for link in workflow["links"] if link[0] != dropped]
    for output in node_of(workflow, "VAELoader")["outputs"]:
        output["links"].remove(dropped)


def break_order(workflow):
    nodes = workflow["nodes"]
    nodes[0]["order"], nodes[-2]["order"] = nodes[-2]["order"], nodes[0]["order"]


def break_number(workflow):
    node_of(workflow, "SkeinFirstBlockCache")["widgets_values"][0] = 1.5


def break_step(workflow):
    node_of(workflow, "EmptyHunyuanLatentVideo")["widgets_values"][2] = 130


def break_choice(workflow):
    node_of(workflow, "BasicScheduler")["widgets_values"][0] = "simpel"


def break_count_by_one_less(workflow):
    node_of(workflow, "EmptyHunyuanLatentVideo")["widgets_values"].pop()


def break_count_by_one_more(workflow):
    node_of(workflow, "SkeinFirstBlockCache")["widgets_values"] += [0, 0]  # a saved one lacks the newest widget


def break_seed_control(workflow):
    node_of(workflow, "RandomNoise")["widgets_values"].pop()


def break_model_entry(workflow):
    del node_of(workflow, "UNETLoader")["properties"]["models"]


def break_model_url(workflow):
    node_of(workflow, "VAELoader")["properties"]["models"][0]["url"] += ".txt"


def break_model_directory(workflow):
    node_of(workflow, "VAELoader")["properties"]["models"][0]["directory"] = "vaes"


@pytest.mark.parametrize(
    "damage, expected",
    [
        (break_node_type, "ComfyUI has no such node"),
        (break_link_type, "of type LATENT"),
        (break_output_slot, "has no output 1 of type MODEL"),
        (break_input_slot, "has no input 1 of type MODEL"),
        (break_socket, "the list of links and node"),
        (break_required_input, "the input vae is not connected"),
        (break_order, "which it needs"),
        (break_number, "1.5 is not allowed for residual_diff_threshold"),
        (break_step, "130 is not allowed for length"),
        (break_choice, "'simpel' is not allowed for scheduler"),
        (break_count_by_one_less, "there is no value for batch_size"),
        (break_count_by_one_more, "there is no widget for [0]"),
        (break_seed_control, "the value after noise_seed"),
        (break_model_entry, "hunyuan_video_t2v_720p_bf16.safetensors is in only one of"),
        (break_model_url, "is no address of hunyuan_video_vae_bf16.safetensors"),
        (break_model_directory, "belongs into vae, not vaes"),
    ],
)
def test_validator_finds_damage(damage, expected, object_info):
    workflow = copy.deepcopy(shipped("hunyuan_video_t2v_cache"))
    damage(workflow)
    assert any(expected in problem for problem in problems(workflow, object_info)), problems(workflow, object_info)
