"""Published figures are data, in docs/results/*.json; this module shows them in the pages.

A results file has nested `values` and their provenance (`utils.provenance`). A page shows them in
two ways. A table stands between two marker lines,

    <!-- results: floors -->
    <!-- end -->

and is docs/tables/floors.md with its holes filled. A figure in a sentence is written as

    of 5,000 <!--=floors.mnist.5000.fid:.3f-->0.032 ± 0.009<!---->

A hole `{...}` or such a figure names a results file and keys in it, joined by dots. After a colon
there can be a Python format, which applies to the figure and its spread. `floors@commit` is part of
the file's provenance, not a value. In a table,

    | {floors.mnist.*.n:,} | {floors.mnist.*.fid:.3f} | {floors.mnist.*.recall.value:.3f} |

becomes one line for each key at the star, except keys that another hole of the table names, and
`{...:least .3f}` is bold if it is the least in its column.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import FOLDER, figure_text, with_spread
from config import UserError, setting
from utils.files import write_atomically
from utils.provenance import SOURCE, commit, source_hash

RESULTS, TABLES = Path("docs/results"), Path("docs/tables")
BLOCK = re.compile(r"^(<!-- results: (\S+) -->\n)((?!<!--).*\n)*(<!-- end -->)$", re.M)
INLINE = re.compile(r"(<!--=([^<>]+)-->)((?!<!--).)*(<!---->)", re.S)
FIRST = re.compile(r"^[\s>*+-]*(\d+[.)]\s+)?<!--=", re.M)  # a figure here makes the line HTML
HOLE = re.compile(r"\{([^{}]+)\}")
ELSEWHERE = re.compile(r"(?<=[\s\"',=])(\.\.)?/[^\s\"',]*/")  # folders of the machine that measured


@dataclass(frozen=True)
class ReportConfig:
    """What to publish; without flags, the pages are updated from docs/results."""

    take: str | None = setting(
        None,
        "results in outputs/benchmark/ to publish (copy to docs/results/), as in floors,guidance;"
        " `all`: those that docs/results/ has already",
    )
    check: bool = setting(False, "change nothing; exit with 1 if a page differs from the results")


def report(cfg: ReportConfig) -> None:
    """Show the figures of docs/results in the pages, each between its markers."""
    if not RESULTS.is_dir():
        raise UserError(f"there is no {RESULTS} here: run this in the project's folder")
    names = cfg.take.split(",") if cfg.take else []
    if names == ["all"]:
        names = [path.stem for path in RESULTS.glob("*.json") if (FOLDER / path.name).exists()]
    for name in names:
        take(name)
    results = {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}
    differing = []
    for page in sorted([*Path().glob("*.md"), *Path("docs").glob("*.md")]):
        text = page.read_text("utf-8")
        try:
            rendered = render_page(text, results)
        except UserError as error:
            raise UserError(f"{page}: {error}") from None
        if rendered != text:
            differing.append(str(page))
            if not cfg.check:
                write_atomically(page, rendered.encode())
    if cfg.check and differing:
        pages = ", ".join(differing)
        print(
            f"{pages}: not up to date with {RESULTS}; run python -m benchmarks report",
            file=sys.stderr,
        )
        sys.exit(1)
    print(
        "\n".join(f"written: {page}" for page in differing)
        or f"all pages match the {RESULTS} files"
    )


def render_page(text: str, results: dict[str, dict]) -> str:
    """`text` with every table and figure filled in from `results`, {file name: content}.

    Raises UserError if markers do not pair up or do not name a figure.
    """
    if first := FIRST.search(text):
        line = text.count("\n", 0, first.end()) + 1
        raise UserError(f"line {line} begins with a figure: put a word before it")
    for start, pattern in (("<!-- results:", BLOCK), ("<!--=", INLINE)):
        if text.count(start) != len(pattern.findall(text)):
            raise UserError(f"one `{start}` has no end")

    def table(match: re.Match) -> str:
        template = TABLES / f"{match[2]}.md"
        if not template.exists():
            raise UserError(f"there is no {template}")
        return match[1] + render_table(template.read_text("utf-8"), results) + match[4]

    text = BLOCK.sub(table, text)
    return INLINE.sub(lambda match: match[1] + figure(match[2], results) + match[4], text)


def render_table(template: str, results: dict[str, dict]) -> str:
    """A table of docs/tables with its starred lines repeated and its holes filled."""
    lines = template.splitlines(keepends=True)
    lines = [row for line in lines for row in repeated(line, template, results)]
    return HOLE.sub(lambda hole: figure(hole[1], results), "".join(lines))


def repeated(line: str, template: str, results: dict[str, dict]) -> list[str]:
    """The line once for every key at its first star, and likewise for further stars."""
    starred = next((hole for hole in HOLE.findall(line) if "*" in hole), None)
    if starred is None:
        return [line]
    prefix = starred.partition(".*")[0]
    keys = [key for key in lookup(prefix, results) if f"{{{prefix}.{key}." not in template]

    def at(key: str, hole: re.Match) -> str:
        path, _, form = hole[1].partition(":")
        own = path.replace("*", key, 1)
        if not form.startswith("least") or "*" in own:
            return f"{{{own}:{form}}}"
        column = [lookup(path.replace("*", each, 1), results) for each in keys]
        least = min((value for value in column if value is not None), default=None)
        bold = "**" * (least is not None and lookup(own, results) == least)
        return f"{bold}{{{own}:{form[5:].strip()}}}{bold}"

    rows = [HOLE.sub(lambda hole, key=key: at(key, hole), line) for key in keys]
    return [row for each in rows for row in repeated(each, template, results)]


def figure(hole: str, results: dict[str, dict]) -> str:
    """The text of the figure "path" or "path:format". Raises UserError if there is none."""
    path, _, form = hole.partition(":")
    value = lookup(path, results)
    try:
        return figure_text(value, form)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{hole}: is not a figure, or its format does not fit") from None


def lookup(path: str, results: dict[str, dict]) -> Any:
    """The value at file.key.key, or the field file@key of the file. Raises UserError if missing."""
    name, sign, keys = re.fullmatch(r"([^.@]*)([.@]?)(.*)", path, re.S).groups()
    content = results.get(name, {})
    for found in at_path(content if sign == "@" else content.get("values"), keys):
        return found
    raise UserError(f"{path}: is not in {RESULTS}")


def at_path(tree: Any, path: str) -> Iterator[Any]:
    """The values at key.key in nested dicts; a key may itself contain dots, like 1.5."""
    if not path:
        yield tree
    elif isinstance(tree, dict):
        for key in tree:
            if f"{path}.".startswith(f"{key}."):
                yield from at_path(tree[key], path[len(key) + 1 :])


def take(name: str) -> None:
    """Publish outputs/benchmark/NAME.json, made by a benchmark or by `validation.py --json`.

    Raises UserError if it is missing, if it covers several checkpoints, or if the code that made it
    is in no commit.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise UserError(f"--take {name}: there is no {path}")
    result = json.loads(path.read_text("utf-8"))
    if "provenance" in result:
        result = {**result.pop("provenance"), "values": figures_of(result)}
    if "values" not in result:
        raise UserError(f"--take {name}: {path} is not a result of one table or one model")
    clean = commit()
    if result["source"] == source_hash(SOURCE) and clean and "+" not in clean:
        result["commit"] = clean  # measured before the commit, or without git
    if not result["commit"] or "+" in result["commit"]:
        raise UserError(f"--take {name}: the code that measured it is in no commit")
    text = ELSEWHERE.sub("", json.dumps(result, indent=1, ensure_ascii=False))
    write_atomically(RESULTS / f"{name}.json", f"{text}\n".encode())


def figures_of(scores: dict) -> dict:
    """Numbers and texts of a score file; scores have their standard error, or else their spread."""
    figures = {}
    for key, value in scores.items():
        spread = scores.get(f"{key}_error", scores.get(f"{key}_spread"))
        if None not in (value, spread):
            figures[key] = with_spread(value, spread)
        elif not isinstance(value, (list, dict)):
            figures[key] = value
    return figures
