#!/usr/bin/env python3
"""Make locales/en/nodeDefs.json from the nodes themselves, as a running ComfyUI describes them.

    python3 scripts/dev.py scripts/locales.py

Texts live in the nodes' schemas; the file is what translators start from. Translations beside it are written by hand.
"""

import json
from pathlib import Path

from workflows import inputs_of  # type: ignore[attr-defined]  # scripts/workflows.py, not the folder

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"


def node_texts(object_info: dict) -> dict:
    """All texts of this pack's nodes in the form of nodeDefs.json."""
    own = {name: node for name, node in object_info.items() if name.startswith("Skein")}
    return {name: texts_of(node) for name, node in sorted(own.items())}


def texts_of(definition: dict) -> dict:
    inputs = {
        name: {"name": name, "tooltip": options.get("tooltip", "")}
        for name, (_, options, _) in inputs_of(definition).items()
    }
    tooltips = definition.get("output_tooltips") or [None] * len(definition["output"])
    outputs = {
        str(slot): {"name": name, **({"tooltip": tooltip} if tooltip else {})}
        for slot, (name, tooltip) in enumerate(zip(definition["output_name"], tooltips))
    }
    return {
        "display_name": definition["display_name"],
        "description": definition["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def main() -> None:
    from pack import load_pack

    load_pack()
    from skein.demo.server import ComfyServer, comfyui_path

    with ComfyServer(comfyui_path()) as server:
        texts = node_texts(server.get("/object_info"))
    path = LOCALES / "en" / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
