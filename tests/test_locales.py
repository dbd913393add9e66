"""Texts in other languages: complete, in step with the nodes and the panel, served by ComfyUI."""

import ast
import json
import re
from pathlib import Path

import pytest
from pack import ROOT

import locales
import workflows

HELP = ROOT / "web" / "docs"
LANGUAGES = sorted(folder.name for folder in locales.LOCALES.iterdir())
NOT_OF_NODES = (".dev", "bench", "scripts", "tests")
VALUE = "\0"
PANEL_TEXT = re.compile(r'\bt\(\s*"([^"]*)"')


@pytest.fixture(scope="module")
def texts(server):
    return locales.node_texts(server.get("/object_info"))


def panel_texts():
    """Every text that web/*.js asks a translation for."""
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "web").glob("*.js")))
    return set(PANEL_TEXT.findall(sources))


def shape(value):
    return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_english_and_chinese_are_there():
    assert LANGUAGES == ["en", "zh"]


def test_english_is_what_the_nodes_say(texts):
    english = json.loads((locales.LOCALES / "en" / "nodeDefs.json").read_text())
    assert english == texts, "run: python3 scripts/dev.py scripts/locales.py"


def test_every_input_and_node_says_what_it_is(texts):
    for name, node in texts.items():
        assert node["description"] and node["display_name"].endswith("(Skein)"), name
        for key, each in node["inputs"].items():
            assert each["tooltip"].endswith("."), f"{name}.{key} has no tooltip"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_is_translated(texts, language, server):
    ours = json.loads((locales.LOCALES / language / "nodeDefs.json").read_text())
    assert shape(ours) == shape(texts)
    served = server.get("/i18n")[language]["nodeDefs"]
    assert {name: served[name] for name in ours} == ours


def test_help_names_every_widget_of_a_node(texts, server):
    """By the name that the node shows in the page's language; the Chinese page has the English name beside it."""
    chinese = json.loads((locales.LOCALES / "zh" / "nodeDefs.json").read_text())
    definitions = server.get("/object_info")
    for node in texts:
        here, there = ((HELP / file).read_text() for file in (f"{node}.md", f"{node}/zh.md"))
        assert here.startswith(f"# {texts[node]['display_name']}\n"), node
        assert there.startswith(f"# {chinese[node]['display_name']}\n"), node
        for name, (kind, options, _) in workflows.inputs_of(definitions[node]).items():
            if workflows.is_widget(kind, options):
                assert f"**{name}**" in here, f"{node}.{name}"
                assert name in there and f"**{chinese[node]['inputs'][name]['name']}**" in there, f"{node}.{name}"


def test_every_text_of_the_panel_is_translated(server):
    chinese = json.loads((locales.LOCALES / "zh" / "main.json").read_text())["skein"]
    wanted = panel_texts()
    assert len(wanted) > 50 and set(chinese) == wanted
    for english, text in chinese.items():
        assert text and sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", english)), english
    assert server.get("/i18n")["zh"]["skein"] == chinese


def status_texts(path: Path) -> set[str]:
    """The texts in a module, with VALUE in the place of each value."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub(r"{\w*}", VALUE, node.value))
    return found


def test_every_translated_status_is_one_that_python_says(server):
    """Word for word: one that is worded anew is translated anew."""
    chinese = json.loads((locales.LOCALES / "zh" / "main.json").read_text())["skein_status"]
    modules = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in NOT_OF_NODES]
    said = {text for path in modules for text in status_texts(path)}
    for english, text in chinese.items():
        literal = re.sub(r"{\w+}", VALUE, english).strip(VALUE)
        assert literal and any(literal in each for each in said), english
        assert text and sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", english)), english
        assert not re.search(r"; |: |\n", english), "web/status.js translates what stands between these"
    assert server.get("/i18n")["zh"]["skein_status"] == chinese


def test_search_finds_the_nodes_by_other_names(server):
    nodes = {name: node for name, node in server.get("/object_info").items() if name.startswith("Skein")}
    assert all(node.get("search_aliases") for node in nodes.values())
    assert all(node["category"].split("/")[0] == "Skein" for node in nodes.values())
