"""What the Comfy registry reads of the pack, and the zip that a person installs from there.

The rules are those of `comfy node validate` and `comfy node pack`, whose own package brings two services that
report what it is used for.
"""

import io
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from pathspec import GitIgnoreSpec
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMFY = PROJECT["tool"]["comfy"]
HOME = "https://github.com/comfyui-nibble/ComfyUI-Nibble"
RAW = "https://raw.githubusercontent.com/comfyui-nibble/ComfyUI-Nibble/main/"
LIMIT = 2 * 2**20
# As comfy-cli spells them: others are dropped with a warning.
ACCELERATORS = {f"Environment :: GPU :: {n}" for n in ("NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal")}
VERSIONS = r"(?:(==|>=|<=|!=|~=|>|<|<>|=)\s*)?\d+\.\d+\.\d+(?:-[a-zA-Z0-9]+)?"
NEEDED = {
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "requirements-windows.txt",
    "README.md",
    "LICENSE",
    "locales/en/nodeDefs.json",
    "locales/zh/nodeDefs.json",
    "locales/zh/main.json",
    "quant_core/calibration/prompts.txt",
}


@pytest.fixture(scope="module")
def packed():
    """{path: bytes} of what `comfy node pack` takes: git's files without those that .comfyignore names."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what the registry packs are git's files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line[:1] not in ("", "#")]
    ignored = GitIgnoreSpec.from_lines(lines)
    kept = [p for p in listed.stdout.split("\0") if p and not ignored.match_file(p)]
    return {p: (ROOT / p).read_bytes() for p in kept if (ROOT / p).is_file()}


def zipped(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return memory.getvalue()


@pytest.mark.quick
def test_the_registry_reads_every_field():
    project, urls = PROJECT["project"], PROJECT["project"]["urls"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", project["name"])
    assert re.fullmatch(VERSIONS, COMFY["requires-comfyui"])
    assert COMFY["PublisherId"]
    assert COMFY["DisplayName"]
    assert set(urls) == {"Homepage", "Repository", "Documentation", "Issues", "Changelog"}
    assert all(url.startswith(HOME) for url in urls.values())
    classifiers = project["classifiers"]
    assert [c for c in classifiers if c.startswith("Operating")] == ["Operating System :: OS Independent"]
    assert {c for c in classifiers if c.startswith("Environment")} <= ACCELERATORS


@pytest.mark.quick
@pytest.mark.parametrize(("field", "shape"), [("Icon", (1, 1)), ("Banner", (21, 9))])
def test_its_pictures_are_in_the_repository(field, shape):
    assert COMFY[field].startswith(RAW)
    with Image.open(ROOT / COMFY[field].removeprefix(RAW)) as picture:
        assert picture.width * shape[1] == picture.height * shape[0]
        assert min(picture.size) >= 400


def test_the_zip_is_small_and_has_what_comfyui_serves(packed):
    size = len(zipped(packed))
    assert size < LIMIT
    assert packed.keys() >= NEEDED
    pages = [p for p in packed if re.fullmatch(r"nodes/web/docs/(\w+/zh|\w+)\.md", p)]
    assert len(pages) >= 11
    for page in pages:
        shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", packed[page].decode())
        assert {f"nodes/web/docs/{name}" for name in shown} <= packed.keys(), page
    assert not [p for p in packed if p.startswith(("tests/", ".ci/", ".github/", "docs/pictures/"))]


def test_the_zip_imports_alone(packed, tmp_path):
    """Nothing in it needs what was left out."""
    with zipfile.ZipFile(io.BytesIO(zipped(packed))) as archive:
        archive.extractall(tmp_path / "packed_alone")
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    wanted = [
        f"packed_alone{name}" for name in ("", ".quant_core.cli.commands", ".quant_core.evaluation.demo.run")
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *wanted], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_registrys_security_check_finds_nothing():
    """It is ruff, over the whole checkout: exec, eval, and several statements on a line."""
    command = [sys.executable, "-m", "ruff", "check", "-q", "--isolated", "--select", "S102,S307,E702"]
    done = subprocess.run([*command, "."], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_readme_does_not_promise_the_demo_from_the_zip(packed):
    """Its model is in tests/, which stays out."""
    for name in ("README.md", "README.zh.md"):
        text = packed[name].decode()
        assert "git" in text[: text.index("    python -m pip")].rstrip().rpartition("\n\n")[2]


@pytest.mark.quick
@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.stem)
def test_githubs_files_are_sound(path):
    """Issue forms have what GitHub asks for; publishing takes its key from the repository's secrets."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        steps = content["jobs"]["publish"]["steps"]
        assert "secrets.REGISTRY_ACCESS_TOKEN" in steps[-1]["with"]["personal_access_token"]
    elif path.stem != "config":
        assert content["name"]
        assert content["description"]
        asked = [part for part in content["body"] if part["type"] != "markdown"]
        assert len({part["id"] for part in asked}) == len(asked) > 0
        assert all(part["attributes"]["label"] for part in asked)
