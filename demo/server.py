"""A real ComfyUI server as a subprocess, with this pack installed, and a small client for it.

    with ComfyServer(comfyui) as server:
        outputs = server.run(prompt, on_progress=print)

The server gets a base directory of its own (models, output, user files and all), so that neither an existing
ComfyUI nor another server on the machine is touched.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import websocket

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 300
TEXT = 3  # ComfyUI's number of a binary message with a status text
Progress = Callable[[dict], None]


class PromptError(RuntimeError):
    """The server refused or failed a prompt; the message is what ComfyUI would show."""


def comfyui_path() -> Path:
    """The ComfyUI that scripts/dev.py has prepared, or that COMFYUI_PATH names."""
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "main.py").exists():
        sys.exit("Run this through `make` or `python3 scripts/dev.py`, or set COMFYUI_PATH to a ComfyUI folder.")
    return Path(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """Context manager: starts the server on a free loopback port, waits until it answers, and ends it."""

    def __init__(self, comfyui: Path, arguments: tuple[str, ...] = (), pack: Path = ROOT, name: str = "skein"):
        """pack: this pack's folder, or another copy of it. name: what it is called among the custom nodes."""
        self.comfyui = comfyui
        self.arguments = arguments
        self.pack, self.name = pack, name
        self.client_id = uuid.uuid4().hex
        self.base = Path(tempfile.mkdtemp(prefix="skein-comfyui-"))
        self.log = self.base / "server.log"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "ComfyServer":
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / folder).mkdir()
        (self.base / "custom_nodes" / self.name).symlink_to(self.pack, target_is_directory=True)
        self.port = free_port()
        command = [
            sys.executable, str(self.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.base), "--database-url", f"sqlite:///{self.base / 'comfyui.db'}",
            "--disable-auto-launch", "--disable-api-nodes", "--preview-method", "latent2rgb",
            *([] if has_gpu() else ["--cpu"]), *self.arguments,
        ]  # fmt: skip
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.comfyui)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting:\n{self.tail()}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.tail()}")

    def __exit__(self, *_) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def tail(self, lines: int = 40) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: dict) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read() or "null")

    def run(self, prompt: dict, on_progress: Progress | None = None) -> dict[str, dict]:
        """Run an API-format prompt to its end; returns the outputs by node id. Raises PromptError if it fails.

        on_progress is called with each message of the server ("progress", "executing", ...); a status text of a node
        comes as "progress_text" with its node and text.
        """
        socket_url = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        channel = websocket.create_connection(socket_url, timeout=600)
        try:
            prompt_id = self.submit(prompt)
            while True:
                message = channel.recv()
                event = _status_text(message) if isinstance(message, bytes) else json.loads(message)
                data = event.get("data", {})
                if on_progress is not None:
                    on_progress(event)
                if data.get("prompt_id") != prompt_id:
                    continue
                if event["type"] == "execution_error":
                    raise PromptError(data["exception_message"].strip())
                if event["type"] == "execution_interrupted":
                    raise PromptError("interrupted")
                if event["type"] == "execution_success":
                    return self._outputs(prompt_id)
        finally:
            channel.close()

    def _outputs(self, prompt_id: str) -> dict[str, dict]:
        """A finished prompt's outputs. ComfyUI tells of success shortly before it writes the history."""
        deadline = time.monotonic() + 30
        while prompt_id not in (history := self.get(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                raise PromptError("The server reported success, but its history has no such prompt.")
            time.sleep(0.05)
        return history[prompt_id]["outputs"]

    def submit(self, prompt: dict) -> str:
        """Queue a prompt; returns its id. Raises PromptError if the server finds it invalid."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from None

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def file(self, item: dict) -> Path:
        """The file on disk behind an entry of a node's output, e.g. outputs["9"]["images"][0]."""
        return self.base / item["type"] / item["subfolder"] / item["filename"]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _status_text(message: bytes) -> dict:
    """A binary message as an event; a preview has nothing in it that is of use here."""
    kind, length = struct.unpack(">II", message[:8])
    if kind != TEXT:
        return {"type": "preview"}
    return {
        "type": "progress_text",
        "data": {"node": message[8 : 8 + length].decode(), "text": message[8 + length :].decode()},
    }
