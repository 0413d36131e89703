"""Each rule of the linter: a planted fault gives exactly that fault, at its line, with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from medarch.site.chapters import Fault, Project
from medarch.site.lint import lint

PAGE = "book/demo/first.md"
# What the fixture book lacks by design; a real chapter would have to mend it.
KNOWN = {"1 exercises, and a chapter has at least 3", "0 exercises, and a chapter has at least 3"}


def faults(root: Path, names: tuple[str, ...] = ("demo/first",)) -> list[Fault]:
    found = lint(Project(root), names)
    return [fault for fault in found if fault.message not in KNOWN and "words" not in fault.message]


def plant(root: Path, old: str, new: str, page: str = PAGE) -> int:
    """Replace a piece of a page; the line on which it stands."""
    path = root / page
    text = path.read_text("utf8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), "utf8")
    return text[: text.index(old)].count("\n") + 1


def test_fixture_is_in_order_but_for_its_size(fixture_book: Path) -> None:
    assert faults(fixture_book, ()) == []
    assert len(lint(Project(fixture_book))) == 4


CODE = 'print("faces:", len(faces))'
PROSE = "One throw of a die says little"


@pytest.mark.parametrize(
    ("old", "new", "offset", "told"),
    [
        (CODE, "len(faces);", 0, "the cell ends with a semicolon"),
        (CODE, "\n".join(["len(faces)"] * 40), -4, "the cell has 44 lines"),
        (CODE, "import torch\ntorch.manual_seed(0)", 1, "torch.manual_seed uses the global generator"),
        (CODE, "import torch as t\nt.randn(3)", 1, "torch.randn uses the global generator"),
        (CODE, "from torch import rand\nrand(3)", 1, "torch.rand uses the global generator"),
        (CODE, "faces.normal_()", 0, "faces.normal_ uses the global generator"),
        (CODE, "import numpy as np\nnp.random.seed(1)", 1, "numpy.random.seed uses the global generator"),
        (CODE, "import numpy as np\nnp.random.rand(1)", 1, "numpy.random.rand uses the global generator"),
        (CODE, "import numpy as np\nnp.random.default_rng()", 1, "numpy.random.default_rng has no seed"),
        (CODE, "import random\nrandom.shuffle(faces)", 1, "random.shuffle uses the global generator"),
        (CODE, "import time\nprint(time.perf_counter())", 1, "time.perf_counter reads the clock"),
        (CODE, "from datetime import datetime\ndatetime.now()", 1, "datetime.datetime.now reads the clock"),
        (CODE, "import warnings\nwarnings.filterwarnings('ignore')", 1, "warnings.filterwarnings silences every warning"),
        (CODE, "import requests", 0, "requests needs a network"),
        (CODE, "from urllib.request import urlopen", 0, "urllib needs a network"),
        (CODE, "AutoModel.from_pretrained('gpt2', revision='x')", 0, "AutoModel.from_pretrained needs a network"),
        (CODE, "from sklearn import datasets as d\nd.fetch_openml('x')", 1, "sklearn.datasets.fetch_openml needs a network"),
        (CODE, "import matplotlib.pyplot as plt\nplt.plot(faces)", 1, "the cell draws without alternative text"),
        (CODE, "from IPython.display import SVG\nSVG('')", 1, "the cell draws without alternative text"),
        (CODE, "from medarch.book import interactive\ninteractive.Figure(faces)", 1, "draws without alternative text"),
        (":alt: A die that shows three.\n", "", -2, "the image ../_static/die.svg has no alternative text"),
        (PROSE, "![](../_static/die.svg) One", 0, "the image ../_static/die.svg has no alternative text"),
        (PROSE, "![A die](https://example.org/die.png) One", 0, "comes from elsewhere"),
        (PROSE, "One \U0001f3b2", 0, "emoji '\U0001f3b2'"),
        (PROSE, "{claim}`dice-mean-is-four` " * 3, 36, "4 claims are discussed inline"),
        ("## Exercises", "# Exercises", 0, "the page has a second title"),
        (":class: predict", ":class: guess", -2, "exercise 'dice-two' has no known class"),
        ('@exercise("dice-two")\n', "", -8, "exercise 'dice-two' has 0 of its checker"),
        (":tags: [exercise]\n", "", -14, "exercise 'dice-two' has 0 of its starter"),
        ("```python\nanswer = 2", "```\nanswer = 2", -23, "exercise 'dice-two' has 0 of its solution"),
    ],
)  # fmt: skip
def test_planted_fault_is_told(fixture_book: Path, old: str, new: str, offset: int, told: str) -> None:
    line = plant(fixture_book, old, new)
    found = [fault for fault in faults(fixture_book) if told in fault.message]
    assert found, faults(fixture_book)
    assert all(fault.file == PAGE and fault.remedy for fault in found)
    assert line + offset in [fault.line for fault in found]


@pytest.mark.parametrize(
    "allowed",
    [
        "import torch\ng = torch.Generator().manual_seed(0)\ntorch.randn(3, generator=g)",
        "import numpy as np\nnp.random.default_rng(3).normal(size=2)",
        "import random\nrandom.Random(3).shuffle(faces)",
        "import warnings\nwarnings.filterwarnings('ignore', message='one', category=UserWarning)",
        "import warnings\nwarnings.filterwarnings('ignore', 'one')",
        "AutoModel.from_pretrained('../checkpoint')",
        "%matplotlib inline\nfaces",
    ],
)
def test_what_is_right_is_left_alone(fixture_book: Path, allowed: str) -> None:
    plant(fixture_book, CODE, allowed)
    assert faults(fixture_book) == []


@pytest.mark.parametrize(("words", "good"), [(1100, False), (1200, True), (2300, True), (2600, False)])
def test_length_of_a_page(fixture_book: Path, words: int, good: bool) -> None:
    plant(fixture_book, PROSE, PROSE + " and" * words)
    told = [fault.message for fault in lint(Project(fixture_book), ["demo/first"]) if "words" in fault.message]
    assert (told == []) is good
