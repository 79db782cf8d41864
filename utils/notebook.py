"""`python -m utils.notebook`: make docs/guide.ipynb from docs/GUIDE.md, and their pictures.

The Markdown page is the only source. Its Python blocks are the notebook's code cells.
"""

import json
import os
import re
from pathlib import Path

from utils.files import write_atomically

GUIDE = Path(__file__).parents[1] / "docs" / "GUIDE.md"
NOTEBOOK = GUIDE.with_name("guide.ipynb")


def cells(markdown: str) -> list[tuple[str, str]]:
    """(kind, text) of each cell, kind `code` or `markdown`."""
    parts = re.split(r"^```python\n(.*?)^```\n", markdown, flags=re.DOTALL | re.MULTILINE)
    kinds = ("markdown", "code")
    named = [(kinds[number % 2], part.strip("\n")) for number, part in enumerate(parts)]
    return [(kind, text) for kind, text in named if text]


def notebook(markdown: str) -> str:
    """The page as a Jupyter notebook (nbformat 4.5), without outputs."""
    made = []
    for number, (kind, text) in enumerate(cells(markdown)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def execute(markdown: str) -> dict:
    """Run the code from top to bottom, as a notebook does; return the names that it defines."""
    names: dict = {}
    for number, (kind, text) in enumerate(cells(markdown)):
        if kind == "code":
            exec(compile(text, f"{GUIDE.name}, cell {number}", "exec"), names)
    return names


def main() -> None:
    text = GUIDE.read_text("utf-8")
    write_atomically(NOTEBOOK, notebook(text).encode())
    os.chdir(GUIDE.parent)  # the folder where a notebook runs
    execute(text)


if __name__ == "__main__":
    main()
