"""The guide: it runs, its notebook is the same, and what it points at is there and says so."""

import importlib
import inspect
import json
import re

import pytest
import torch

from tests.conftest import ROOT
from utils.notebook import GUIDE, NOTEBOOK, cells, execute, notebook

TEXT = GUIDE.read_text("utf-8")
# "- Ho et al. 2020, eq. 4: [`NoiseSchedule`](../utils/noise_scheduler.py)"
LINKS = re.findall(
    r"^- (.+? \d{4}b?)(?:, (.+))?: \[`(.+?)`\]\(\.\./(.+?)\.py\)$", TEXT, re.MULTILINE
)


def test_the_notebook_is_the_guide():
    assert NOTEBOOK.read_text("utf-8") == notebook(TEXT), "run python -m utils.notebook"
    made = json.loads(notebook("# A\n\n```python\nx = 1\n```\n\n$$y$$\n\n```python\nx += 1\n```\n"))
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", "code", "markdown", "code"]
    assert "".join(made["cells"][1]["source"]) == "x = 1"


def test_it_runs_from_top_to_bottom(own_folder, monkeypatch):
    monkeypatch.setenv("GUIDE_SIZE", "0.001")
    torch.manual_seed(0)
    names = execute(TEXT)
    assert len(names["by_weights"]["their average"]) == 8
    made = {f"guide/{path.name}" for path in (own_folder / "guide").iterdir()}
    shown = re.findall(r"^!\[.+?\]\((.+?)\)$", TEXT, re.MULTILINE)
    assert made == set(shown) and len(shown) == len(made)
    for name in shown:
        assert (GUIDE.parent / name).stat().st_size < 60_000


def test_every_section_has_an_equation_lines_a_picture_and_a_question():
    _, *sections = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)
    assert len(sections) == 10
    for section in sections:
        for part in ("\n$$", "\n- ", "![", "**Question.**", "**Answer.**", "```python"):
            assert part in section, (part, section[:40])
    assert sum(kind == "code" for kind, _ in cells(TEXT)) > 10


def test_every_line_that_starts_like_a_link_is_one():
    assert len(LINKS) == TEXT.count("\n- ") > 15
    assert not [paper for paper, *_ in LINKS if f"| {paper} | [" not in TEXT]  # has its title


@pytest.mark.parametrize("paper, place, name, file", LINKS)
def test_the_lines_are_there_and_name_their_equation(paper, place, name, file):
    """In the docstring of the function or class, or of its module; of a table, in the file."""
    assert (ROOT / f"{file}.py").exists()
    module = importlib.import_module(file.replace("/", "."))
    thing = module
    for part in name.split("."):
        thing = getattr(thing, part)
    documented = inspect.isfunction(thing) or inspect.isclass(thing)
    said = f"{inspect.getdoc(thing)} {module.__doc__}" if documented else inspect.getsource(module)
    said = re.sub(r"\s*\n\s*#?\s*", " ", said)
    assert re.search(re.escape(paper) + ".*?" + re.escape(place) + r"\b", said), said
