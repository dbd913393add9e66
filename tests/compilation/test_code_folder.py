"""Where compiled code lies: what is there is unpickled and run, so neither a workflow nor another user chooses it."""

import json
import os
import pickle
import stat
import urllib.request
import uuid
from pathlib import Path

import pytest
from graphs import frames, seeded
from skein.compilation.folder import require_own_folder
from skein.demo.server import ComfyServer, comfyui_path


class Payload:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def compiled(prompt, seed: int, folder: Path):
    """The demo workflow with Compile, as version 0.1 saved it: with the folder."""
    graph = seeded(prompt, seed)
    cache = next(node for node in graph.values() if node["class_type"] == "SkeinFirstBlockCache")["inputs"]
    inputs = {"mode": "default", "dynamic": "auto", "warm_up": True, "cache_folder": str(folder)}
    graph["compile"] = {"class_type": "SkeinCompile", "inputs": {**inputs, "model": cache["model"]}}
    cache["model"] = ["compile", 0]
    return graph


def upload(server, subfolder: str, name: str, content: bytes) -> None:
    """By the route of the front end's "choose file to upload"."""
    border = uuid.uuid4().hex
    fields = f'--{border}\r\nContent-Disposition: form-data; name="subfolder"\r\n\r\n{subfolder}\r\n'
    file = f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
    body = fields.encode() + file.encode() + content + f"\r\n--{border}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={border}"}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/upload/image", body, headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        assert json.load(response)["name"] == name


def test_a_workflow_cannot_have_uploaded_files_run(prompt, tmp_path, monkeypatch):
    """Which names PyTorch looks for, anybody finds out on a computer of their own: here, in a first server."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))  # PyTorch's own folder, and empty
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "temporary").mkdir()
    with ComfyServer(comfyui_path()) as own:
        frames(own, compiled(prompt, 1, tmp_path / "chosen"))
    places = [tmp_path / "chosen", *(tmp_path / "temporary").glob("torchinductor_*")]
    graphs = [file.relative_to(place) for place in places for file in place.glob("*graph*/**/*") if file.is_file()]
    assert graphs

    mark, said = tmp_path / "the payload ran", {}
    with ComfyServer(comfyui_path()) as server:
        for file in graphs:
            upload(server, f"attack/{file.parent}", file.name, pickle.dumps(Payload(mark)))
        assert (server.base / "input" / "attack" / graphs[0]).exists()

        def listen(event):
            if event["type"] == "progress_text":
                said[event["data"]["node"]] = event["data"]["text"]

        frames(server, compiled(prompt, 1, server.base / "input" / "attack"), listen)
    assert not mark.exists()
    assert "compiled" in said["compile"]  # old workflows go on as they are


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows gives each user temporary folders of their own")
class TestPyTorchsFolder:
    """A predictable name in a folder where everybody may write."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setenv("LOGNAME", "somebody")
        return tmp_path / "torchinductor_somebody"

    def test_is_made_for_its_owner_only(self, folder):
        require_own_folder()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_is_closed_to_others_where_it_was_open(self, folder):
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)
        require_own_folder()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    @pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root makes others' folders")
    @pytest.mark.parametrize("link", [False, True])
    def test_of_another_user_is_refused(self, folder, link, tmp_path):
        (tmp_path / "own").mkdir()
        folder.symlink_to(tmp_path / "own") if link else folder.mkdir()
        os.chown(folder, 12345, 12345, follow_symlinks=False)
        with pytest.raises(ValueError, match="belongs to another user"):
            require_own_folder()
