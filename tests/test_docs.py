"""The pages for people: what they link to is there, and the README stays short and keeps its two commands."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh.md")
PAGES = [
    p
    for p in (*(ROOT / name for name in READMES), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")
    if p.exists()
]
PAGES += sorted((ROOT / "docs").glob("*.md"))
HELP = sorted((ROOT / "nodes" / "web" / "docs").rglob("*.md"))
RAW = "https://raw.githubusercontent.com/comfyui-nibble/ComfyUI-Nibble/main/"
COMMANDS = (
    "python -m pip install -e '.[demo]' && nibble demo",
    "python -m pip install -e '.[test]' && pytest",
)


def links(text: str) -> list[str]:
    """The targets of a page's links that lie in this repository, "file" or "file#heading"."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))
    # The registry shows the README, too, and knows no path of the repository: pictures have a whole address.
    found = [target.removeprefix(RAW) for target in found]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def headings(text: str) -> set[str]:
    """The names under which a page's headings are linked to."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def missing(page: Path, text: str) -> list[str]:
    """The links of a page's text that lead nowhere."""
    out = []
    for target in links(text):
        name, _, heading = target.partition("#")
        file = (page.parent / name) if name else page
        found = file.exists() and (not heading or heading in headings(file.read_text(encoding="utf-8")))
        out += [] if found else [target]
    return out


def paths(text: str) -> set[str]:
    """Names in backticks that look like paths of this repository: a folder of it, a slash and more."""
    tops = "docs|kernels|nodes|quant_core|subgraphs|tests|workflows"
    return set(re.findall(rf"`((?:{tops})/[\w./\-]*)`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_points_to_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert missing(page, text) == []
    assert [path for path in sorted(paths(text)) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_every_page_is_found_from_the_readme(name):
    linked = {
        (ROOT / target.partition("#")[0]).resolve() for target in links((ROOT / name).read_text("utf-8"))
    }
    assert {page for page in PAGES if page.name != name} <= linked


@pytest.mark.parametrize("name", READMES)
def test_the_readme_is_short_and_has_its_two_commands(name):
    """`.ci/run` runs the second one word for word."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line.strip() for line in lines if line.strip().startswith("python -m pip")] == list(COMMANDS)
    assert all(f"    {command}" in lines for command in COMMANDS)
    ci = ROOT / ".ci" / "run"
    assert COMMANDS[1] in ci.read_text(encoding="utf-8")


def outline(text: str) -> dict:
    """What a page has in any language: commands, figures of tables, links, levels of headings."""
    rows = re.findall(r"^\|(.*)\|$", text, re.M)
    return {
        "commands": re.findall(r"^    (.+)$", text, re.M),
        "headings": [len(signs) for signs in re.findall(r"^(#+) ", text, re.M)],
        "rows": [(row.count("|"), re.findall(r"\d+\.\d+", row)) for row in rows],
        "links": sorted(set(links(text)) - {"README.md", "README.zh.md"} - {"#documentation", "#文档"}),
    }


def test_the_chinese_readme_says_the_same():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    assert outline(chinese) == outline(english)


@pytest.mark.parametrize("page", [*PAGES, *HELP], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_picture_has_words(page):
    """For those who cannot see it, and where it does not load."""
    for words in re.findall(r"!\[([^\]]*)\]\(", page.read_text(encoding="utf-8")):
        assert len(words) >= (8 if re.search(r"[\u4e00-\u9fff]", words) else 20)


def test_the_search_finds_what_it_is_for(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading, two\n")
    text = "[a](page.md) [b](page.md#one-heading-two) [c\nd](gone.md) [e](#none) [f](https://a.b/c) `[g](h)`"
    assert missing(page, text) == ["gone.md", "#none"]
    assert paths("`kernels/plan.py` `quant_core/` `a/b` kernels/c") == {"kernels/plan.py", "quant_core/"}
