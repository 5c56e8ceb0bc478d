"""A real ComfyUI on this machine's CPU, driven over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]


def find_comfyui() -> Path | None:
    """$COMFYUI_PATH, else comfy-cli's default workspace; None where neither is a ComfyUI."""
    for candidate in (os.environ.get("COMFYUI_PATH"), Path.home() / "comfy" / "ComfyUI"):
        if candidate and (Path(candidate) / "comfy_api" / "latest").is_dir():
            return Path(candidate)
    return None


class GraphError(RuntimeError):
    """ComfyUI refused or failed a graph; the text is what a user sees."""


class Server:
    """Starts ComfyUI with its base directory at `base`. Use as a context manager."""

    def __init__(self, comfyui: Path, base: Path, pack: bool = True, options: tuple[str, ...] = ()):
        self.comfyui, self.base, self.options = comfyui, base, options
        for folder in (
            "models/diffusion_models",
            "models/loras",
            "models/vae",
            "custom_nodes",
            "input",
            "output",
        ):
            (base / folder).mkdir(parents=True, exist_ok=True)
        if pack:
            (base / "custom_nodes" / "ComfyUI-Nibble").symlink_to(PACK)
        (base / "custom_nodes" / "test_nodes").symlink_to(PACK / "tests" / "host" / "test_nodes")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        command = [
            sys.executable,
            "main.py",
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--disable-api-nodes",
        ]
        command += [
            "--base-directory",
            str(self.base),
            "--database-url",
            "sqlite:///:memory:",
            "--cache-none",
            *self.options,
        ]
        self.log = open(self.base / "server.log", "w")
        environment = {
            k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"
        }  # as users run it, without the tests' interpreter
        self.process = subprocess.Popen(
            command, cwd=self.comfyui, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError("ComfyUI did not start:\n" + (self.base / "server.log").read_text()[-3000:])

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as r:
            return json.loads(r.read())

    def post(self, path, data=None):
        request = urllib.request.Request(
            self.url + path, json.dumps(data or {}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as r:
                return json.loads(r.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise GraphError(error.read().decode()) from error

    def submit(self, graph: dict, client: str = "", **extra) -> str:
        """Queues an API graph; returns its prompt id. client: who is told of it; extra: data that goes with
        it, such as the preview_method."""
        told = {"prompt": graph, "client_id": client or uuid.uuid4().hex, "extra_data": extra}
        return self.post("/prompt", told)["prompt_id"]

    def wait(self, prompt: str, timeout: float = 900) -> dict:
        """The history entry of a finished prompt. Raises GraphError with ComfyUI's message where it
        failed."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt}")
            if prompt in history and history[prompt]["status"]["completed"] is not None:
                entry = history[prompt]
                for kind, data in entry["status"]["messages"]:
                    if kind == "execution_error":
                        raise GraphError(f"{data['node_type']}: {data['exception_message']}")
                    if kind == "execution_interrupted":
                        raise GraphError(f"interrupted at {data['node_type']}")
                return entry
            if self.process.poll() is not None:
                raise RuntimeError("ComfyUI died:\n" + (self.base / "server.log").read_text()[-3000:])
            time.sleep(0.1)
        raise TimeoutError(f"no result after {timeout} s")

    def run(self, graph: dict) -> dict:
        """Runs an API graph to its end; outputs by node id."""
        return self.wait(self.submit(graph))["outputs"]

    def latents(self, outputs: dict, node: str):
        """The tensor that a SaveLatent node wrote."""
        from safetensors.torch import load_file

        item = outputs[node]["latents"][0]
        return load_file(self.base / "output" / item["subfolder"] / item["filename"])["latent_tensor"]
