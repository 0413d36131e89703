"""The mending of pages and the lean icons, against input as Sphinx and its extensions write it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from fontTools.ttLib import TTFont
from sphinx.builders.html._assets import _CascadingStyleSheet, _JavaScript

from medarch.site import theme


class Balance(HTMLParser):
    """Fails on an end tag that closes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Note what is open."""
        if tag not in ("img", "input", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element, which must be this one."""
        assert self.open.pop() == tag


def balanced(markup: str) -> bool:
    """Whether every element is closed where it must be."""
    parser = Balance()
    parser.feed(markup)
    return not parser.open


SOLUTION = (
    '<div class="solution dropdown admonition" id="s">\n\n<p class="admonition-title">Solution to'
    '<a class="reference internal" href="#x"> Exercise 1</a></p>\n<section id="solution-content">'
    '<div class="highlight"><div>code</div></div></section>\n</div><div>after</div>'
)


def app(**config: object) -> SimpleNamespace:
    """A stand-in for the application with what the theme reads of it."""
    defaults = {"html_baseurl": "", "html_theme_options": {}}
    return SimpleNamespace(config=SimpleNamespace(**{**defaults, **config}))


def test_a_dropdown_becomes_details_and_takes_no_neighbour_in() -> None:
    folded = theme.fold_dropdowns(SOLUTION)
    assert folded.startswith('<details class="solution dropdown admonition" id="s">')
    assert '<summary class="admonition-title">Solution to Exercise 1</summary>' in folded
    assert folded.endswith("</section>\n</details><div>after</div>")
    assert balanced(folded)


def test_dropdowns_nest() -> None:
    outer = SOLUTION.replace("code", SOLUTION.replace('id="s"', 'id="t"'))
    folded = theme.fold_dropdowns(outer)
    assert folded.count("<details") == folded.count("</details>") == 2
    assert balanced(folded)


def test_other_admonitions_stay() -> None:
    note = '<div class="admonition note"><p class="admonition-title">Note</p></div>'
    assert theme.fold_dropdowns(note) == note


def test_markup_is_mended() -> None:
    context = {
        "metatags": '<meta name="viewport" content="width=1" />\n<meta property="og:url" content="book/x.html" />\n',
        "body": '<section id="exercise-content">a</section><section id="exercise-content">b</section>'
        '<div role="list" class="citation-list"><div class="citation" role="doc-biblioentry">c</div></div>'
        '<input class="task-list-item-checkbox" disabled="disabled" type="checkbox">'
        '<input class="task-list-item-checkbox" checked="checked" disabled="disabled" type="checkbox">'
        '<summary aria-label="Toggle hidden content">\n'
        '<p class="collapsed admonition-title">Show</p></summary>',
    }
    theme.mend_page(app(), "p", "page.html", context, None)
    body, tags = context["body"], context["metatags"]
    assert "exercise-content" not in body
    assert "role=" not in body
    assert body.count('aria-label="to do" disabled') == body.count('aria-label="done" checked') == 1
    assert '<summary>\n<span class="collapsed">Show</span></summary>' in body
    assert tags.count("viewport") == 1
    assert "og:url" not in tags
    assert balanced(body)


def test_a_known_address_keeps_its_open_graph() -> None:
    context = {"metatags": '<meta property="og:url" content="https://a.example/x.html" />\n'}
    theme.mend_page(app(html_baseurl="https://a.example/"), "p", "page.html", context, None)
    assert "https://a.example/x.html" in context["metatags"]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("<p>words</p>", {"theme.js"}),
        ('<div class="highlight">', {"theme.js", "copybutton.js"}),
        ('<span class="math notranslate">', {"theme.js", "mathjax/startup.js", "window.MathJax = {}"}),
    ],
)
def test_a_page_loads_what_it_uses(body: str, kept: set[str]) -> None:
    scripts = [_JavaScript(f"_static/{name}") for name in ("theme.js", "copybutton.js", "mathjax/startup.js")]
    inline = ["window.MathJax = {}", "DOCUMENTATION_OPTIONS.pagename = 'x'"]
    scripts += [_JavaScript(None, body=text) for text in inline]
    sheets = [_CascadingStyleSheet("_static/exercise.css")]
    context = {"body": body, "script_files": scripts, "css_files": sheets}
    theme.lighten_page(app(), "p", "page.html", context, None)
    found = {
        str(s.filename).removeprefix("_static/") if s.filename else s.attributes["body"]
        for s in context["script_files"]
    }
    assert found == kept
    assert all(s.attributes.get("defer") for s in context["script_files"] if s.filename)
    assert not context["css_files"]


def test_open_graph_has_the_description_of_the_front_matter() -> None:
    context = {"metatags": '<meta content="Eight &amp; two" name="description" />'}
    theme.describe(app(), "p", "page.html", context, object())
    assert context["meta"] == {"og:description": "Eight & two", "ogp_description_length": "0"}


def test_addresses_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDARCH_SITE_URL", "https://name.example/folder/")
    monkeypatch.setenv("MEDARCH_REPOSITORY_URL", "https://forge.example/o/r/")
    config = app().config
    theme.read_addresses(SimpleNamespace(), config)
    assert config.html_baseurl == config.ogp_site_url == "https://name.example/folder/"
    assert config.notfound_urls_prefix == "/folder/"
    assert config.html_theme_options["repository_url"] == "https://forge.example/o/r"
    assert config.html_theme_options["use_edit_page_button"] is True


def test_no_address_no_buttons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDARCH_SITE_URL", raising=False)
    monkeypatch.delenv("MEDARCH_REPOSITORY_URL", raising=False)
    config = app().config
    theme.read_addresses(SimpleNamespace(), config)
    assert config.html_baseurl == ""
    assert config.notfound_urls_prefix == "/"
    assert config.html_theme_options == {}


def test_a_wrong_address_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDARCH_SITE_URL", "name.example/folder")
    with pytest.raises(ValueError, match=r"MEDARCH_SITE_URL='name\.example/folder'.*https://"):
        theme.read_addresses(SimpleNamespace(), app().config)


def test_icons_in_use_stay_and_others_go(tmp_path: Path) -> None:
    static = tmp_path / "site" / "_static"
    for folder in ("styles", theme.FONTS):
        (static / folder).mkdir(parents=True)
    (static.parent / "page.html").write_text('<i class="fa-solid fa-stethoscope"></i>')
    theme.lean_icons(static, tmp_path / "cache")
    styles = (static / "styles" / "pydata-sphinx-theme.css").read_text(encoding="utf-8")
    assert ".fa-stethoscope:before" in styles
    assert ".fa-volleyball:before" not in styles
    glyphs = TTFont(static / theme.FONTS / "fa-solid-900.woff2").getBestCmap()
    assert 0xF0F1 in glyphs
    assert 0xF45F not in glyphs
    cut = sorted((tmp_path / "cache").iterdir())
    theme.lean_icons(static, tmp_path / "cache")
    assert sorted((tmp_path / "cache").iterdir()) == cut
