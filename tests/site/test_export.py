"""A reader's notebook shows nothing of Sphinx, loses nothing of the page, and opens."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from medarch.site.chapters import BookError, Project
from medarch.site.export import export_all, export_notebook

PROSE = "One throw of a die says little"


def exported(root: Path, name: str = "demo/first", **options: object) -> NotebookNode:
    return export_notebook(Project(root).chapters[name], **options)  # type: ignore[arg-type]


def shown(root: Path, markdown: str) -> str:
    """What the reader sees in the place of a piece of MyST."""
    page = root / "book" / "demo" / "first.md"
    text = page.read_text("utf8")
    assert PROSE in text
    before, _, after = text.partition(PROSE)
    page.write_text(f"{before}BEGIN\n\n{markdown}\n\nEND\n\n{after}", "utf8")
    prose = "\n\n".join(cell.source for cell in exported(root).cells if cell.cell_type == "markdown")
    return re.search(r"BEGIN\n\n(.*?)\n*END", prose, re.DOTALL)[1]  # type: ignore[index]


def test_whole_notebook(fixture_book: Path) -> None:
    notebook = exported(fixture_book, evidence={"dice-mean-is-four": 3.5})
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    chapter = Project(fixture_book).chapters["demo/first"]
    assert [cell.source for cell in code] == [cell.source for _, cell in chapter.code_cells]
    assert "make lab" in notebook.cells[0].source
    assert notebook.cells[1].source.startswith("# What does a die show?")
    assert (
        "The mean by (1) is 3.5, and the picture" in prose
    )  # equation, value, and no trace of the claim's mark
    assert r"\frac{n + 1}{2} \tag{1}" in prose
    assert "(Pearson, 1900). Figure 1 is a" in prose
    assert "**Figure 1.** A die. It shows **three**." in prose
    assert "No throw shows it." in prose
    assert "Throw one now." not in prose
    assert "> **Note**\n> \n> The sums" in prose
    assert "[the second chapter](second.ipynb)" in prose
    assert "### Exercise: The mean of two dice" in prose
    assert re.search(
        r"<details>\n<summary>Solution</summary>\n\nEach .*```python\nanswer = 2 .*```\n\n</details>",
        prose,
        re.DOTALL,
    )
    assert "| A fair die shows four on average. | corrected | The mean of" in prose
    assert "## References\n\n- Karl Pearson" in notebook.cells[-1].source
    assert not re.search(r"\{[a-z:-]+\}`|```\{|:::|\(first\)=|:label:", prose)
    assert code[2].metadata.jupyter.source_hidden is True
    assert "jupyter" not in code[0].metadata


def test_image_travels_inside(fixture_book: Path) -> None:
    prose = "".join(cell.source for cell in exported(fixture_book).cells)
    data = re.search(r"!\[A die that shows three\.\]\(data:image/svg\+xml;base64,([^)]+)\)", prose)[1]  # type: ignore[index]
    assert base64.b64decode(data) == (fixture_book / "book/_static/die.svg").read_bytes()


def test_same_bytes_every_time_and_unchanged_files_are_left(fixture_book: Path, tmp_path: Path) -> None:
    paths = export_all(Project(fixture_book), tmp_path / "out")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "out/demo/first.ipynb",
        "out/demo/second.ipynb",
    ]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert export_all(Project(fixture_book), tmp_path / "out") == paths
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_value_of_the_last_build_or_an_honest_gap(fixture_book: Path) -> None:
    assert "is (run the cell), and" in "".join(cell.source for cell in exported(fixture_book).cells)
    evidence = fixture_book / "_build" / "evidence" / "demo"
    evidence.mkdir(parents=True)
    (evidence / "first.json").write_text(
        '{"chapter": "demo/first", "claims": {"dice-mean-is-four": 3.456}, "run": {}}', "utf8"
    )
    assert "is 3.5, and" in "".join(cell.source for cell in exported(fixture_book).cells)


def test_outputs_are_carried_without_glue(fixture_book: Path) -> None:
    run = nbformat.from_dict(Project(fixture_book).chapters["demo/second"].notebook)
    cell = next(cell for cell in run.cells if cell.cell_type == "code")
    glue = nbformat.v4.new_output(
        "display_data", {"text/plain": "1.0"}, metadata={"scrapbook": {"name": "coin-is-fair"}}
    )
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="one bit\n"), glue]
    cell.execution_count = 1
    notebook = exported(fixture_book, "demo/second", outputs=run)
    nbformat.validate(notebook)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert [out.get("text") for out in code.outputs] == ["one bit\n"]


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("{ref}`a die <first>`", "a die"),
        ("{ref}`dice-two`", "The mean of two dice"),
        ("{doc}`second`", "[What does a coin say?](second.ipynb)"),
        ("{doc}`coins </book/demo/second>`", "[coins](second.ipynb)"),
        ("{doc}`../index`", "A fixture book"),
        ("[home](../index.md) and [out](https://example.org/a_(b))", "home and [out](https://example.org/a_(b))"),
        ("[](#die) {numref}`picture %s <die>` {numref}`die`", "A die. It shows **three**. picture 1 Figure 1"),  # noqa: E501
        ("{cite:t}`pearson1900criterion`", "Pearson (1900)"),
        ("{term}`load <loads>` H{sub}`2`O {math}`x_1` {py:class}`~medarch.moe.MoELayer`", "load H<sub>2</sub>O $x_1$ `MoELayer`"),  # noqa: E501
        ("`{ref}` stays, ``{ref}`first` `` too", "`{ref}` stays, ``{ref}`first` `` too"),
        ("{ref}`over a\nline <first>`", "over a line"),
        ("% a comment\ntext", "text"),
        ("```{admonition} Not for clinical use\n:class: warning\nStudy *only*.\n```", "> **Not for clinical use**\n> \n> Study *only*."),  # noqa: E501
        (":::{margin}\nAside {ref}`first`.\n:::", "> Aside What does a die show?."),
        ("- item\n\n  ```{tip}\n  In a list.\n  ```", "- item\n\n  > **Tip**\n  > \n  > In a list."),
        ("````{note}\n```{math}\n:label: inner\na = b\n```\n````", "> **Note**\n> \n> $$\n> a = b \\tag{1}\n> $$"),  # noqa: E501
        ("```python\n{ref}`first`\n```", "```python\n{ref}`first`\n```"),
        ("Text[^note].\n\n[^note]: The note.", "Text<sup>note</sup>.\n\n<sup>note</sup> The note."),
        ("load\n: what an expert carries", "**load**: what an expert carries"),
        ("```{code-block} bash\nmake lab\n```", "```bash\nmake lab\n```"),
        ("```{bibliography}\n:filter: docname in docnames\n```", ""),
    ],
)  # fmt: skip
def test_myst_becomes_plain_markdown(fixture_book: Path, markdown: str, plain: str) -> None:
    assert shown(fixture_book, markdown) == plain


def test_included_source_is_the_real_one(fixture_book: Path) -> None:
    (fixture_book / "code.py").write_text(
        "import os\n\n\nclass A:\n    @property\n    def b(self):\n        return os  # why\n\n    c = 1\n",
        "utf8",
    )
    text = shown(
        fixture_book,
        "```{literalinclude} ../../code.py\n:pyobject: A.b\n```\n\n```{literalinclude} /code.py\n```",
    )
    method = "```python\n@property\ndef b(self):\n    return os  # why\n```"
    assert text == f"{method}\n\n```python\n{(fixture_book / 'code.py').read_text('utf8')}```"


def test_caption_of_a_drawn_figure_is_kept_and_numbered(fixture_book: Path) -> None:
    page = fixture_book / "book" / "demo" / "first.md"
    options = "mystnb:\n  figure:\n    name: sums\n    caption: Sums by {eq}`mean`.\n  image:"
    page.write_text(
        page.read_text("utf8")
        .replace("mystnb:\n  image:", options)
        .replace("the picture shows", "{numref}`sums` shows"),
        "utf8",
    )
    prose = [cell.source for cell in exported(fixture_book).cells]
    assert "**Figure 2.** Sums by (1)." in prose
    assert any("Figure 2 shows how often" in source for source in prose)


@pytest.mark.parametrize(
    ("markdown", "told"),
    [
        (
            "{reff}`first`",
            r"book/demo/first.md:21: there is no role 'reff'\n    -> use one of .*nearest: ref",
        ),
        (
            "```{notes}\nx\n```",
            r"book/demo/first.md:21: there is no directive 'notes'\n    -> use one of .*nearest: note",
        ),
        ("```{note}\n\nx\n\n{eq}`nowhere`\n```", r"book/demo/first.md:25: there is no label 'nowhere'"),
        ("{doc}`third`", "there is no page 'demo/third'"),
        ("{cite:p}`nobody2020`", "there is no entry in references.bib 'nobody2020'"),
        ("![x](missing.png)", "the file 'missing.png' does not exist"),
        ("```{literalinclude} missing.py\n```", "the file 'missing.py' does not exist"),
        ("```{literalinclude} second.md\n:start-after: x\n```", "literalinclude: start-after"),
        ("{proved}`dice`", "no claim 'dice'"),
        ("[](#nowhere)", "there is no label 'nowhere'"),
    ],
)
def test_what_cannot_be_resolved_is_a_fault(fixture_book: Path, markdown: str, told: str) -> None:
    with pytest.raises(BookError, match=told):
        shown(fixture_book, markdown)


def test_all_faults_of_all_chapters_are_told_together(fixture_book: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        page = fixture_book / "book" / "demo" / f"{name}.md"
        page.write_text(page.read_text("utf8") + "\n{nope}`x`\n", "utf8")
    with pytest.raises(BookError) as caught:
        export_all(Project(fixture_book), tmp_path / "out")
    assert [fault.file for fault in caught.value.faults] == ["book/demo/first.md", "book/demo/second.md"]
