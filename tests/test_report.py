"""Published figures are data: pages show what docs/results holds, and nothing else."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import report as module
from benchmarks.common import figure_text, with_spread, write_table
from benchmarks.report import BLOCK, HOLE, INLINE, figure, render_page, render_table
from config import UserError
from tests.conftest import ROOT
from utils.provenance import SOURCE, source_hash

MADE = {"command": "python -m benchmarks few", "commit": "0123456789ab", "source": "s"}
FEW = {
    **MADE,
    "values": {
        "near": {
            "1": {"n": 1, "fid": with_spread(0.5, 0.012)},
            "1.5": {"n": 1500, "fid": with_spread(2, 0.3)},
        },
        "far": {"1": {"fid": 3.25}, "1.5": {"fid": None}, "2": {"fid": 1234.6}},
        "share, images/s": 0.123,
        "call": 1,
        "calls": 2,
    },
}
RESULTS = {"few": FEW}


@pytest.fixture
def pages(own_folder):
    """A copy of the project's pages and results, in this folder."""
    for page in ROOT.glob("*.md"):
        shutil.copy(page, own_folder)
    shutil.copytree(ROOT / "docs", own_folder / "docs", ignore=shutil.ignore_patterns("*.gif"))
    return own_folder


def content():
    paths = [*Path().glob("*.md"), *Path("docs").rglob("*"), *Path("outputs").glob("benchmark/*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def check(cli):
    """The exit status of `report --check`, which never writes; and what it says."""
    before = content()
    status, _, stderr = cli("benchmarks", "report", "--check")
    assert content() == before and stderr.count("\n") == (status != 0)
    return status, stderr


def test_the_pages_show_what_the_results_are(cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check(cli)[0] == 0


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def results_shown(page: str) -> set[str]:
    """Names of the results files whose figures are in the text of a page or in its tables."""
    holes = [match[2] for match in INLINE.finditer(page)]
    for match in BLOCK.finditer(page):
        holes += HOLE.findall((ROOT / f"docs/tables/{match[2]}.md").read_text("utf-8"))
    return {re.split("[.@]", hole)[0] for hole in holes}


def test_every_result_and_every_table_is_shown():
    texts = [page.read_text("utf-8") for page in PAGES]
    tables = {match[2] for text in texts for match in BLOCK.finditer(text)}
    assert tables == {path.stem for path in (ROOT / "docs/tables").glob("*.md")}
    files = set().union(*map(results_shown, texts))
    assert files == {path.stem for path in (ROOT / "docs/results").glob("*.json")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_the_commits_of_its_figures(page):
    text = page.read_text("utf-8")
    names = results_shown(text) - {"shipped"}  # what the training runs printed
    found = [json.loads((ROOT / f"docs/results/{name}.json").read_text()) for name in names]
    visible = re.sub("<!--.*?-->", "", text)
    missing = {result["commit"] for result in found if result["commit"] not in visible}
    assert not missing
    assert page.name != "README.md" or len({result["commit"] for result in found}) == 1


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("patch", sorted((ROOT / "docs/variants").iterdir()), ids=lambda p: p.stem)
def test_each_variant_fits_the_code(patch):
    done = subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_every_result_says_what_made_it():
    for path in (ROOT / "docs/results").glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        assert {"command", "commit", "date", "hardware", "values"} <= set(result), path
        assert result["commit"] and "+" not in result["commit"], path


@pytest.mark.parametrize("place", ["a table", "a sentence"])
def test_a_changed_digit_in_a_page_is_seen_and_mended(cli, pages, place):
    page, pattern = Path("README.md"), BLOCK if place == "a table" else INLINE
    text = page.read_text("utf-8")
    start, end = list(pattern.finditer(text))[-1].span()
    digit = max(m.start() for m in re.finditer(r"\d(?![^<]*-->)", text[start:end])) + start
    page.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :], "utf-8")
    status, stderr = check(cli)
    assert status == 1 and "README.md" in stderr and "RECIPES.md" not in stderr
    assert cli("benchmarks", "report")[0] == 0
    assert page.read_text("utf-8") == text and check(cli)[0] == 0


def test_a_changed_figure_in_the_results_is_seen_and_shown(cli, pages):
    path = Path("docs/results/floors.json")
    result = json.loads(path.read_text("utf-8"))
    result["values"]["mnist"]["2000"]["fid"]["value"] = 0.987
    path.write_text(json.dumps(result))
    status, stderr = check(cli)
    assert status == 1 and "EVALUATION.md" in stderr and "RECIPES.md" in stderr
    status, stdout, _ = cli("benchmarks", "report")
    pages = [str(Path("docs") / name) for name in ("EVALUATION.md", "RECIPES.md")]
    assert status == 0 and stdout.split() == ["written:", pages[0], "written:", pages[1]]
    spread = result["values"]["mnist"]["2000"]["fid"]["spread"]
    assert f"| 2,000 | 0.987 ± {spread:.3f} |" in Path(pages[0]).read_text("utf-8")
    assert f"-->0.987 ± {spread:.3f}<!---->" in Path(pages[1]).read_text("utf-8")
    assert check(cli)[0] == 0


@pytest.mark.parametrize(
    "hole, text",
    [
        ("few.near.1.fid", "0.500 ± 0.012"),
        ("few.near.1.fid:.1f", "0.5 ± 0.0"),
        ("few.near.1.fid.value:.2f", "0.50"),
        ("few.near.1.5.n", "1,500"),  # the key 1.5, not 1
        ("few.far.1.fid", "3.25"),
        ("few.far.1.5.fid", ""),
        ("few.far.2.fid", "1,235"),
        ("few.calls", "2"),
        ("few.share, images/s:.1%", "12.3 %"),
        ("few@commit", "0123456789ab"),
    ],
)
def test_what_a_hole_becomes(hole, text):
    assert figure(hole, RESULTS) == text


@pytest.mark.parametrize(
    "hole", ["few", "few.near", "few.near.1", "few.near.3.fid", "other.near", "few.far.1.fid:k"]
)
def test_what_names_no_figure_is_refused(hole):
    with pytest.raises(UserError, match=re.escape(hole)):
        figure(hole, RESULTS)


def test_a_line_with_a_star_is_there_for_every_key():
    template = "| n | near | far |\n| {few.near.*.n:,} | {few.near.*.fid:.1f} | {few.far.*.fid} |\n"
    lines = ["| n | near | far |", "| 1 | 0.5 ± 0.0 | 3.25 |", "| 1,500 | 2.0 ± 0.3 |  |", ""]
    assert render_table(template, RESULTS) == "\n".join(lines)


def test_stars_leave_out_what_is_named_and_nest():
    results = {"t": {"values": {"a": {"x": {"v": 1}}, "b": {"y": {"v": 2}, "z": {"v": 3}}}}}
    assert render_table("{t.*.*.v}\n", results) == "1\n2\n3\n"
    assert render_table("only {t.b.y.v}\n{t.b.*.v}\n", results) == "only 2\n3\n"


def test_the_least_of_a_column_is_bold():
    rows = {"a": 0.25, "b": None, "c": 0.125, "d": 0.125}
    results = {"t": {"values": {key: {"v": value} for key, value in rows.items()}}}
    assert render_table("{t.*.v:least .2f}\n", results) == "0.25\n\n**0.12**\n**0.12**\n"
    nested = {"t": {"values": {"of": results["t"]["values"], "on": {"e": {"v": 3}}}}}
    shown = "0.25\n\n**0.12**\n**0.12**\n**3.00**\n"
    assert render_table("{t.*.*.v:least .2f}\n", nested) == shown


@pytest.mark.parametrize(
    "text, words",
    [
        ("<!--=few.far.1.fid-->3<!----> begins\n", "line 1 begins with a figure"),
        ("one\n- <!--=few.far.1.fid-->3<!---->\n", "line 2 begins with a figure"),
        ("a <!--=few.far.1.fid-->3\n", "`<!--=` has no end"),
        ("a <!--=few.far.1.fid-->3 <!--=few.far.1.fid-->3<!---->\n", "`<!--=` has no end"),
        ("<!-- results: few -->\n| 1 |\n", "`<!-- results:` has no end"),
        ("<!-- results: none -->\n<!-- end -->\n", "there is no docs/tables/none.md"),
        ("of <!--=few.fur-->3<!---->\n", "few.fur"),
    ],
)
def test_a_page_with_wrong_markers_is_refused(refuses, text, words):
    Path("docs/results").mkdir(parents=True)
    Path("docs/results/few.json").write_text(json.dumps(FEW))
    Path("docs/page.md").write_text(text)
    refuses("benchmarks", "report", words=("docs/page.md: ", words))
    assert Path("docs/page.md").read_text() == text


def test_one_word_in_many_places_and_over_two_lines():
    text = "a <!--=few.near.1.fid-->0.5\n± 0.012<!---->, **<!--=few.far.1.fid-->3<!---->**\n"
    shown = "a <!--=few.near.1.fid-->0.500 ± 0.012<!---->, **<!--=few.far.1.fid-->3.25<!---->**\n"
    assert render_page(text, RESULTS) == shown


def kept(name, **changes):
    """Write a result as `write_table` would, but for `changes`."""
    Path("outputs/benchmark").mkdir(parents=True, exist_ok=True)
    Path("docs/results").mkdir(parents=True, exist_ok=True)
    Path(f"outputs/benchmark/{name}.json").write_text(json.dumps(FEW | changes))


def taken(name):
    return json.loads(Path(f"docs/results/{name}.json").read_text("utf-8"))


def test_what_is_measured_can_be_taken_and_shown(cli, monkeypatch):
    monkeypatch.setattr("utils.provenance.commit", lambda: "0123456789ab")
    rows = [["a", 512, with_spread(0.5, 0.01)], ["a", 1000, None], ["b", 512, with_spread(2, 1)]]
    write_table("few", ["space", "n", "fid"], rows, torch.device("cpu"), keys=2)
    Path("docs/results").mkdir(parents=True)
    Path("docs/page.md").write_text("of 512 <!--=few.a.512.fid-->?<!---->\n")
    assert cli("benchmarks", "report", "--take", "few")[0] == 0
    assert "-->0.500 ± 0.010<!---->" in Path("docs/page.md").read_text("utf-8")
    assert taken("few")["values"]["a"]["1000"] == {"space": "a", "n": 1000, "fid": None}


def test_a_score_file_can_be_taken(cli):
    scores = {"n": 40, "features": "mnist", "fid": 0.5, "fid_spread": 0.02, "fid_floor": None}
    spread = {"recall": 0.9, "recall_spread": 0.01, "recall_error": 0.004}
    kept("one")
    written = {**scores, **spread, "classes": [1, 2], "provenance": MADE}
    Path("outputs/benchmark/one.json").write_text(json.dumps(written))
    assert cli("benchmarks", "report", "--take", "one")[0] == 0
    figures = {"fid": with_spread(0.5, 0.02), "recall": with_spread(0.9, 0.004)}
    assert taken("one") == {**MADE, "values": {**scores, **spread, **figures}}


def test_what_no_commit_holds_is_not_published(cli, refuses, monkeypatch):
    now = "ba9876543210"
    monkeypatch.setattr(module, "commit", lambda: now)
    for commit in (None, f"{now}+changes"):
        kept("few", commit=commit)  # by other source than this
        refuses("benchmarks", "report", "--take", "few", words=("--take few", "in no commit"))
        assert not Path("docs/results/few.json").exists()
        kept("few", commit=commit, source=source_hash(SOURCE))  # committed since
        assert cli("benchmarks", "report", "--take", "few")[0] == 0
        assert taken("few")["commit"] == now
        Path("docs/results/few.json").unlink()
    monkeypatch.setattr(module, "commit", lambda: f"{now}+changes")
    refuses("benchmarks", "report", "--take", "few", words=("--take few", "in no commit"))


def test_folders_of_ones_own_machine_are_not_published(cli):
    command = "python -m benchmarks compare --data_dir /home/me/data --images /a/b.npz,../c/d.npz"
    kept("few", command=command)
    assert cli("benchmarks", "report", "--take", "few")[0] == 0
    shared = "python -m benchmarks compare --data_dir data --images b.npz,d.npz"
    assert taken("few")["command"] == shared
    assert taken("few")["values"] == FEW["values"]  # whose key "images/s" is no folder


def test_what_cannot_be_taken_is_said(refuses):
    refuses("benchmarks", "report", words=("docs/results",))
    kept("few")
    refuses("benchmarks", "report", "--take", "none", words=("--take none", "none.json"))
    Path("outputs/benchmark/several.json").write_text("[]")
    refuses("benchmarks", "report", "--take", "several", words=("--take several",))


@pytest.mark.parametrize(
    "value, text",
    [(None, ""), ("20 min", "20 min"), (12345, "12,345"), (0.25, "0.25"), (37831.2, "37,831")],
)
def test_figures_without_a_format(value, text):
    assert figure_text(value) == text
