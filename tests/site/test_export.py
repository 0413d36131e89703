"""A reader's notebook shows nothing of Sphinx, loses nothing of the page, and opens."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from medarch.site.build import run_sphinx
from medarch.site.chapters import Project
from medarch.site.evidence import collect, read_claims
from medarch.site.execute import execute

FIXTURE = Path(__file__).parent / "fixture"
# What stands on a page, and what the reader sees in its place.
PIECES = {
    "{ref}`a die <first>` and {ref}`second`": "[a die](first.ipynb) and [What does a coin say?](second.ipynb)",
    "{ref}`dice-two`": "[Exercise 1](first.ipynb)",
    "{doc}`second` {doc}`coins </book/demo/second>`": "[What does a coin say?](second.ipynb) [coins](second.ipynb)",
    "[home](../index.md) and [out](https://example.org/a_b)": "home and [out](https://example.org/a_b)",
    "{numref}`picture %s <die>` {numref}`die`": "[picture 1](first.ipynb) [Fig. 1](first.ipynb)",
    "{cite:t}`pearson1900criterion`": "Pearson [1900]",
    "H{sub}`2`O and x{sup}`2`, {math}`x_1`, **bold** *slanted*": "H<sub>2</sub>O and x<sup>2</sup>, $x_1$, **bold** *slanted*",
    r"`{ref}` stays, ``a`b``, \*so\*, snake_case, 5 \$ < 6": r"`{ref}` stays, `` a`b ``, \*so\*, snake_case, 5 \$ \< 6",
    "% a comment\nA word": "A word",
    "```{admonition} Not for clinical use\n:class: warning\nStudy *only*.\n```": "> **Not for clinical use**\n> \n> Study *only*.",
    ":::{margin}\nAside {ref}`first`.\n:::": "> Aside [What does a die show?](first.ipynb).",
    "- item\n- one\n\n  ```{tip}\n  In a list.\n  ```": "- item\n- one\n\n  > **Tip**\n  > \n  > In a list.",
    "2. two\n3. three": "2. two\n3. three",
    "````{note}\n```{math}\n:label: inner\na = b\n```\n````": "> **Note**\n> \n> $$\n> a = b \\tag{1}\n> $$",
    "\\begin{align}\na &= b\n\\end{align}": "\\begin{align}\na &= b\n\\end{align}",
    "```python\n{ref}`first`\n```": "```python\n{ref}`first`\n```",
    "Text[^note].\n\n[^note]: The note.": "Text<sup>1</sup>.",
    "load\n: what an expert carries": "**load**: what an expert carries",
    "| a | b |\n| --- | --- |\n| `x` | 2 |": "| a | b |\n| --- | --- |\n| `x` | 2 |",
    "```{literalinclude} ../../code.py\n:pyobject: A.b\n:language: python\n```": "```python\n    def b(self):\n        return 1  # why\n```",
    "```{figure} ../_static/die.svg\n:alt: No number.\n```": "![No number.](data:image/svg+xml;base64,…)",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NotebookNode]:
    """The notebooks of a built book: of its two chapters, and of one that holds all the pieces above."""
    root = Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("export") / "fixture"))
    (root / "code.py").write_text("class A:\n    def b(self):\n        return 1  # why\n\n    c = 2\n")
    second = root / "book/demo/second.md"
    text = second.read_text("utf8").replace("# What does a coin", "(second)=\n# What does a coin", 1)
    hidden = "\n```{code-cell} ipython3\n:tags: [remove-cell]\nprint('seen by none')\n```\n"
    second.write_text(text + hidden, "utf8")
    head = second.read_text("utf8").split("(second)=")[0].replace("coin-slide", "")
    pieces = "\n\n".join(f"BEGIN{number}\n\n{piece}\n\nEND" for number, piece in enumerate(PIECES))
    (root / "book/demo/third.md").write_text(f"{head}# Pieces\n\n{pieces}\n", "utf8")
    toc = root / "_toc.yml"
    toc.write_text(toc.read_text("utf8") + "      - file: book/demo/third\n", "utf8")
    project = Project(root)
    collect(project, execute(project, project.chapters.values(), read_claims(project), report=lambda _: None))
    run_sphinx(project, project.build / "work", strict=False)
    folder = project.build / "work/html/notebooks"
    return {name: nbformat.read(folder / f"{name}.ipynb", as_version=4) for name in project.chapters}


def prose(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_whole_notebook(built: dict[str, NotebookNode]) -> None:
    notebook = built["demo/first"]
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    text = prose(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "make lab" in notebook.cells[0].source
    assert notebook.cells[1].source.startswith("# What does a die show?")
    assert "(1) is 3.5, and the picture" in text  # equation, value, and no trace of the claim's mark
    assert r"\frac{n + 1}{2} \tag{1}" in text
    assert "[Pearson, 1900]. Fig. 1 is a" in text
    assert "**Fig. 1.** A die. It shows **three**." in text
    assert "No throw shows it." in text
    assert "Throw one now." not in text
    assert "[the second chapter](second.ipynb)" in text
    assert "### Exercise 1: The mean of two dice" in text
    solution = r"<details>\n<summary>Solution</summary>\n\nEach .*```python\nanswer = 2 .*```\n\n</details>"
    assert re.search(solution, text, re.DOTALL)
    assert "| A fair die shows four on average. | corrected | The mean of" in text
    assert "## References\n\n- Karl Pearson" in notebook.cells[-1].source
    assert not re.search(r"\{[a-z:-]+\}`|```\{|:::|\(first\)=|:label:", text)
    assert code[2].metadata.jupyter.source_hidden is True
    assert "jupyter" not in code[0].metadata


@pytest.mark.parametrize("name", ["demo/first", "demo/second"])
def test_its_cells_are_the_chapters_and_run(built: dict[str, NotebookNode], name: str, tmp_path: Path) -> None:
    book = Path(shutil.copytree(FIXTURE, tmp_path / "fixture"))
    cells = [cell.source for cell in built[name].cells if cell.cell_type == "code"]
    expected = [cell.source for _, cell in Project(book).chapters[name].code_cells]
    assert cells == expected + ["print('seen by none')"] * (name == "demo/second")
    NotebookClient(built[name], kernel_name="python3", resources={"metadata": {"path": str(book)}}).execute()


def test_image_travels_inside(built: dict[str, NotebookNode]) -> None:
    data = re.search(r"!\[A die that shows three\.\]\(data:image/svg\+xml;base64,([^)]+)\)", prose(built["demo/first"]))
    assert data
    assert base64.b64decode(data[1]) == (FIXTURE / "book/_static/die.svg").read_bytes()


@pytest.mark.parametrize("number", range(len(PIECES)), ids=[re.sub(r"\W+", "-", piece)[:20] for piece in PIECES])
def test_myst_becomes_plain_markdown(built: dict[str, NotebookNode], number: int) -> None:
    found = re.search(rf"BEGIN{number}\n\n(.*?)\n\nEND", prose(built["demo/third"]), re.DOTALL)
    assert found
    assert re.sub(r"base64,[^)]+", "base64,…", found[1]) == list(PIECES.values())[number]
