"""Charts on the pages: the picture that a cell drew, and the live chart that takes its place where scripts run.

A cell returns a :class:`medarch.book.interactive.Figure`, and its output holds the chart as Vega, its picture and its
words. The page gets the picture with the chart beside it as data. Pages with charts, and no others, have a small script
that fetches Vega when the reader comes near one. Vega runs with its interpreter, so that no text is evaluated as code;
it is bundled from what vl-convert brings along, once for each version of it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import myst_nb.core.render
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

from medarch.site.execute import write_if_changed

VEGA, STILL = "application/vnd.vega.v5+json", "image/svg+xml"
SIGN = 'class="chart-data"'
FILES = Path(__file__).with_suffix("")  # the folder of scripts and style beside this module


class Renderer:
    """What myst-nb asks for every output: how a chart is written. (Its own way of adding one is an entry point.)"""

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """A chart as data, and a word for those without scripts; what is no chart is left to myst-nb."""
        if data.mime_type != VEGA:
            return None
        env = renderer.renderer.sphinx_env
        env.metadata[env.docname]["charts"] = "yes"
        bound = [signal for signal in data.content["signals"] if "bind" in signal]
        values = ", ".join(
            f"{signal['bind'].get('name', signal['name']).strip()} {signal.get('value', '')}" for signal in bound
        )
        text = json.dumps(data.content, separators=(",", ":")).replace("</", r"<\/")
        page = (
            f'<script type="application/json" {SIGN}>{text}</script>'
            f"<noscript><p>This figure can be moved where scripts run. Here it stands at {values}.</p></noscript>"
        )
        return [nodes.raw("", page, format="html", alt=data.content["description"])]


class PictureWithChart(SphinxPostTransform):
    """Put the chart behind its picture, before myst-nb chooses one form of each output."""

    default_priority = 3

    def run(self, **_: Any) -> None:
        """Change the outputs that have both forms."""
        for bundle in self.document.findall(nodes.container):
            forms = {form.get("mime_type"): form for form in bundle.children if isinstance(form, nodes.container)}
            if bundle.get("nb_element") == "mime_bundle" and VEGA in forms:
                (picture,), (data,) = forms[STILL].children, forms[VEGA].children
                picture["alt"] = data["alt"]
                forms[STILL] += data


def add_script(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Give a page with a chart the script and the style."""
    if SIGN in context.get("body", ""):
        app.add_js_file("chart.js", loading_method="defer")
        app.add_css_file("chart.css")


def write_scripts(app: Any, env: Any) -> None:
    """Write scripts and style before the pages, which name them with checksums; a book without charts has none."""
    if app.builder.name != "html" or not any("charts" in metadata for metadata in env.metadata.values()):
        return
    source, target = (FILES / "live.js").read_text("utf8"), Path(app.outdir) / "_static"
    key = hashlib.sha256((importlib.metadata.version("vl-convert-python") + source).encode()).hexdigest()[:16]
    bundle = Path(app.srcdir) / "_build" / "charts" / f"vega-{key}.js"
    if not bundle.exists():
        import vl_convert

        # A function of its own, for the names of a bundle are short, and other scripts have the same ones.
        write_if_changed(bundle, f'(() => {{"use strict";{vl_convert.javascript_bundle(source)}}})();\n')
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle, target / "vega.js")
    shutil.copyfile(FILES / "chart.css", target / "chart.css")
    (target / "chart.js").write_text((FILES / "chart.js").read_text("utf8").replace("KEY", key), "utf8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer, the transform and the scripts."""
    myst_nb.core.render.load_mime_renders = lambda: [Renderer]
    app.add_post_transform(PictureWithChart)
    app.connect("env-updated", write_scripts)
    app.connect("html-page-context", add_script, priority=800)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
