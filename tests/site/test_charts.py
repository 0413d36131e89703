"""Charts on the pages of a built book: picture, data and words on the page that has one, and nothing on the others."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from medarch.book.interactive import STILL, VEGA
from medarch.site import charts
from medarch.site.build import run_sphinx
from medarch.site.chapters import Project
from medarch.site.evidence import collect, read_claims
from medarch.site.execute import execute
from medarch.site.recorded import comparable

HERE = Path(__file__).parent
WORDS = "A curve falls from one towards zero, and the faster the larger the step size is chosen."


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture book with a third page that has a chart, built as strictly as the book is."""
    root = Path(shutil.copytree(HERE / "fixture", tmp_path_factory.mktemp("charts") / "fixture"))
    shutil.copy(HERE / "decay.md", root / "book/demo/decay.md")
    toc = root / "_toc.yml"
    toc.write_text(toc.read_text("utf8") + "      - file: book/demo/decay\n", "utf8")
    project = Project(root)
    collect(project, execute(project, project.chapters.values(), read_claims(project), report=lambda _: None))
    run_sphinx(project, project.build / "work")
    return project.build / "work/html"


def read(site: Path, name: str) -> str:
    return (site / "book" / f"{name}.html").read_text("utf8")


def chart_data(site: Path) -> Any:
    (data,) = re.findall(r'<script type="application/json" class="chart-data">(.*?)</script>', read(site, "demo/decay"))
    return json.loads(data)


def test_the_page_has_picture_data_and_words(site: Path) -> None:
    (figure,) = re.findall(r"<figure.*?</figure>", read(site, "demo/decay"), re.DOTALL)
    assert 'id="fig-decay"' in figure
    assert '<span class="caption-number">Fig. 2 </span>' in figure  # the die of the first page is Fig. 1
    (picture,) = re.findall(r"<img [^>]*>", figure)
    assert f'alt="{WORDS}"' in html.unescape(picture)
    source = re.search(r'src="([^"]+)"', picture)
    assert source
    assert (site / "book/demo" / source[1]).read_text("utf8").startswith("<svg")
    assert figure.index(picture) < figure.index(charts.SIGN) < figure.index("<figcaption>")
    assert chart_data(site)["description"] == WORDS
    assert "<noscript><p>" in figure
    assert "step size Δ 0.5" in figure


def test_only_the_pages_with_a_chart_have_its_script(site: Path) -> None:
    pages = {name: read(site, name) for name in ("index", "demo/first", "demo/first-slides", "demo/second")}
    assert [name for name, page in pages.items() if "chart" in page or "vega" in page] == []
    assert re.search(r'<script defer="defer" src="\.\./\.\./_static/chart\.js\?v=\w+">', read(site, "demo/decay"))
    assert '<script defer src="../../_static/chart.js">' in read(site, "demo/decay-slides")


def test_scripts_are_the_sites_own_and_evaluate_no_text(site: Path) -> None:
    loader, vega = ((site / "_static" / name).read_text("utf8") for name in ("chart.js", "vega.js"))
    assert re.search(r"vega\.js\?[0-9a-f]{16}", loader)
    assert not re.search(r"https?://", loader)
    assert not re.search(r"cdn\.|\bimport[ ({]", vega)  # all that it needs is inside
    assert "ast:true" in vega  # expressions are walked by the interpreter instead of being compiled
    assert not re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="(?:https?:)?//', read(site, "demo/decay"))


def test_the_deck_shows_the_chart(site: Path) -> None:
    deck = read(site, "demo/decay-slides")
    slide = deck[deck.index("<h2>What a state forgets") :]
    assert re.search(r'<img alt="A curve falls[^>]*>\s*<script type="application/json" class="chart-data">', slide)
    assert "_static/chart.css" in deck


def test_the_readers_notebook_runs_and_shows_it(site: Path) -> None:
    notebook = nbformat.read(site / "notebooks/demo/decay.ipynb", as_version=4)
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "**Fig. 2.** What is kept of a state after some steps" in text
    assert "chart-data" not in text
    NotebookClient(notebook, kernel_name="python3").execute()
    (output,) = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert set(output.data) == {VEGA, STILL, "text/plain"}
    assert output.data["text/plain"] == WORDS
    assert [each.data for each in comparable([output])] == [{"text/plain": f"({STILL})"}]
    # Another process with other hashes: the chart and its picture are the same, byte for byte.
    assert output.data[STILL] in {path.read_text("utf8") for path in (site / "_images").glob("*.svg")}
    assert output.data[VEGA] == chart_data(site)


def test_a_book_without_charts_gets_no_script(tmp_path: Path) -> None:
    app = SimpleNamespace(builder=SimpleNamespace(name="html"), outdir=tmp_path, srcdir=tmp_path)
    charts.write_scripts(app, SimpleNamespace(metadata={"book/index": {"slides": "yes"}}))
    assert list(tmp_path.iterdir()) == []


def test_data_cannot_end_their_element() -> None:
    env = SimpleNamespace(metadata={"d": {}}, docname="d")
    chart = {"signals": [], "description": "Words.", "data": [{"values": ["</script><b>"]}]}
    data = SimpleNamespace(mime_type=VEGA, content=chart)
    renderer = SimpleNamespace(renderer=SimpleNamespace(sphinx_env=env))
    (node,) = charts.Renderer.handle_mime(renderer, data, False) or []
    assert "</script><b>" not in node.astext()
    found = re.search(r">(\{.*\})</script>", node.astext())
    assert found
    assert json.loads(found[1]) == chart
