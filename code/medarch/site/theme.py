"""The look and the weight of the site: what the theme lets no option, template or style sheet change.

A Sphinx extension in three steps. Before the build it takes the book's addresses from the environment. For each page,
in memory, it leaves out scripts and styles that the page has no use for and mends its markup. After the build it cuts
the theme's icon fonts and styles down to the icons in use and copies the part of MathJax that pages load.
"""

from __future__ import annotations

import functools
import hashlib
import html
import importlib.metadata
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import imagesize
from sphinx.application import Sphinx
from sphinx.config import Config

# Assets that only some pages need: start of the file's name -> what in a page's body shows that it needs it.
CODE = '<div class="highlight"'
ASSETS = {
    "clipboard.min.js": CODE,
    "copybutton": CODE,
    "pygments.css": CODE,
    "design-tabs.js": "sd-tab-set",
    "sphinx-design.min.css": 'class="sd-',
    "exercise.css": 'class="exercise',
    "mystnb.": 'class="cell',
    "mathjax/": 'class="math',
}
# What MathJax needs for TeX; its menu alone weighs as much as TeX input and output together.
MATHJAX = "startup.js core.js loader.js input/tex.js input/tex/extensions a11y/assistive-mml.js"
MATHJAX += " output/chtml.js output/chtml/fonts"
FONTS = "vendor/fontawesome/webfonts"
DROPPED = f"scripts/fontawesome.js* s*/*.map {FONTS}/*.ttf images/logo_* *macros.html locales"
ICON_RULE = re.compile(r'((?:\.fa-[a-z0-9-]+:before,?)+)\{content:"[^"]*"\}')


def read_addresses(app: Sphinx, config: Config) -> None:
    """Take the site's and the repository's address from the environment (see the head of _config.yml)."""
    site = (config.html_baseurl or os.environ.get("MEDARCH_SITE_URL", "")).rstrip("/")
    repository = os.environ.get("MEDARCH_REPOSITORY_URL", "").rstrip("/")
    for name, address in {"MEDARCH_SITE_URL": site, "MEDARCH_REPOSITORY_URL": repository}.items():
        if address and urlsplit(address).scheme not in ("http", "https"):
            raise ValueError(f"{name}={address!r} is no web address: begin it with https:// or unset it")
    config.html_baseurl = config.ogp_site_url = f"{site}/" if site else ""
    config.notfound_urls_prefix = urlsplit(config.html_baseurl).path or "/"
    if site:
        config.sitemap_url_scheme = "{link}"
        config.sitemap_excludes = ["search.html", "404.html"]
    if repository:
        buttons = ("use_edit_page_button", "use_issues_button", "use_repository_button")
        branch = os.environ.get("MEDARCH_REPOSITORY_BRANCH", "main")
        options = {"repository_url": repository, "repository_branch": branch, **dict.fromkeys(buttons, True)}
        config.html_theme_options.update(options)


def describe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Give the description of a page's front matter to Open Graph; without one, its extension takes the first words."""
    written = re.search(r'<meta content="([^"]*)" name="description"', context.get("metatags") or "")
    if doctree is not None and written:
        own = {"og:description": html.unescape(written[1]), "ogp_description_length": "0"}
        context["meta"] = {**(context.get("meta") or {}), **own}


def lighten_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Keep the scripts and styles that this page uses, and let no script hold up its first paint."""
    body = context.get("body", "")

    def wanted(asset: Any) -> bool:
        name = str(asset.filename or "").removeprefix("_static/")
        inline = asset.attributes.get("body", "")
        if "window.MathJax" in inline:  # Sphinx also gives it to pages whose children have equations
            return ASSETS["mathjax/"] in body
        # The theme's one inline script serves its version switch, which a book without versions has not.
        unused = "DOCUMENTATION_OPTIONS.pagename" in inline
        return not unused and all(sign in body for start, sign in ASSETS.items() if name.startswith(start))

    def deferred(script: Any) -> Any:
        if not script.filename or template != "page.html":  # the search page's scripts count on their order
            return script
        return type(script)(script.filename, priority=script.priority, **{**script.attributes, "defer": "defer"})

    context["css_files"] = [asset for asset in context["css_files"] if wanted(asset)]
    context["script_files"] = [deferred(asset) for asset in context["script_files"] if wanted(asset)]


def mend_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Mend what docutils, the theme and the extensions write against HTML's and accessibility's rules."""
    tags = re.sub(r'<meta (content="[^"]*" )?name="viewport"[^>]*>', "", context.get("metatags") or "")
    if not app.config.html_baseurl:  # an address that is not known is left out, not made relative
        tags = re.sub(r'<meta property="og:(url|image|image:alt)" [^>]*>\n?', "", tags)
    context["metatags"] = tags + '<meta name="viewport" content="width=device-width, initial-scale=1">'
    if "body" not in context:
        return
    body = fold_dropdowns(context["body"])
    # docutils gives the list of citations a role, and its entries one that this role does not allow
    body = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    body = body.replace(' role="doc-biblioentry"', "")
    # a box to tick needs a name
    box = '<input class="task-list-item-checkbox"'
    body = body.replace(box, f'{box} aria-label="to do"')
    body = body.replace(f'{box} aria-label="to do" checked=', f'{box} aria-label="done" checked=')
    # every exercise and every solution carries the same id
    body = re.sub(r'<section id="(exercise|solution)-content">', "<section>", body)
    # a label names its input; sphinx-design has it control the panel too
    body = re.sub(r'<label aria-controls="[^"]*" class="sd-tab-label"', '<label class="sd-tab-label"', body)
    # a summary's words are its name, and a paragraph cannot stand in one
    body = re.sub(r"<summary aria-label=[^>]*>", "<summary>", body)
    folded = re.compile(r'<p class="(collapsed|expanded) admonition-title">(.*?)</p>')
    body = folded.sub(r'<span class="\1">\2</span>', body)
    context["body"] = re.sub(r"<img [^>]*>", functools.partial(measured_image, app), body)


def fold_dropdowns(body: str) -> str:
    """Turn admonitions of the class dropdown into details elements, which need no script."""
    opening = re.compile(r'<div class="(?=[^"]*\badmonition\b)[^"]*\bdropdown\b[^"]*"[^>]*>')
    title = re.compile(r'\s*<p class="admonition-title">(.*?)</p>', re.DOTALL)
    for start in reversed(list(opening.finditer(body))):
        depth = 1
        for tag in re.compile(r"<(/?)div\b[^>]*>").finditer(body, start.end()):
            depth += -1 if tag[1] else 1
            if depth == 0:
                heading, inner = title.match(body, start.end()), body[start.end() : tag.start()]
                if heading:  # without the links that may not stand in a control
                    words = re.sub("</?a[^>]*>", "", heading[1])
                    inner = f'<summary class="admonition-title">{words}</summary>' + body[heading.end() : tag.start()]
                details = start[0].replace("<div", "<details", 1) + inner + "</details>"
                body = body[: start.start()] + details + body[tag.end() :]
                break
    return body


def measured_image(app: Sphinx, tag: re.Match[str]) -> str:
    """Give an image its width and height, so that the text below it does not jump when it arrives."""
    source = re.search(r'src="[^"]*_images/([^"]+)"', tag[0])
    if not source or " width=" in tag[0] or " style=" in tag[0]:
        return tag[0]
    path = next((key for key, name in app.builder.images.items() if name == source[1]), None)
    width, height = imagesize.get(Path(app.srcdir) / path) if path else (-1, -1)
    size = f' width="{int(width)}" height="{int(height)}"' if width > 0 else ""
    return f'{tag[0].rstrip("/> ")}{size} loading="lazy" decoding="async">'


def finish_site(app: Sphinx, error: Exception | None) -> None:
    """Put the lean fonts, styles and MathJax in place of the full ones, and a redirect at the site's root."""
    if error is not None or app.builder.name != "html":
        return
    static = Path(app.outdir) / "_static"
    if getattr(app.config, "medarch_preview", False) and (static / "mathjax").exists():
        return
    for path in {found for pattern in DROPPED.split() for found in static.glob(pattern)}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lean_icons(static, Path(app.srcdir) / "_build" / "fonts")
    full = importlib.metadata.distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline")
    for part in MATHJAX.split():
        source, target = Path(str(full)) / "static" / "mathjax" / part, static / "mathjax" / part
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    if (root := f"{app.config.root_doc}.html") != "index.html":
        title = html.escape(app.config.project)
        (Path(app.outdir) / "index.html").write_text(
            f'<!DOCTYPE html>\n<html lang="{app.config.language}"><head><meta charset="utf-8">'
            f'<title>{title}</title><meta http-equiv="refresh" content="0; url={root}"></head>'
            f'<body><main><h1><a href="{root}">{title}</a></h1></main></body></html>\n',
            encoding="utf-8",
        )


def lean_icons(static: Path, cache: Path) -> None:
    """Cut Font Awesome's styles and fonts down to the icons that some page, script or style uses.

    Args:
        static: the built site's ``_static`` folder.
        cache: a folder that keeps a cut font for as long as the icons and the full font stay the same.
    """
    import pydata_sphinx_theme
    from fontTools import subset

    logging.getLogger("fontTools").setLevel(logging.WARNING)
    theme = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static"
    used: set[str] = set()
    for path in [*static.parent.rglob("*.html"), *static.glob("*.js"), *static.glob("scripts/*.js")]:
        used.update(re.findall(r"\bfa-[a-z0-9-]+", path.read_text(encoding="utf-8")))

    def keep(rule: re.Match[str]) -> str:
        return rule[0] if used & set(re.findall(r"fa-[a-z0-9-]+", rule[1])) else ""

    styles = ICON_RULE.sub(keep, (theme / "styles" / "pydata-sphinx-theme.css").read_text(encoding="utf-8"))
    styles = re.sub(r',url\([^)]*\.ttf\) format\("truetype"\)|/\*# sourceMappingURL.*?\*/', "", styles)
    (static / "styles" / "pydata-sphinx-theme.css").write_text(styles, encoding="utf-8")

    everything = "".join(path.read_text(encoding="utf-8") for path in sorted(static.rglob("*.css")))
    codes = {int(code, 16) for code in re.findall(r"\\([ef][0-9a-f]{3})\b", everything)}
    codes |= {ord(sign) for sign in everything if 0xE000 <= ord(sign) <= 0xF8FF}
    cache.mkdir(parents=True, exist_ok=True)
    for font in sorted((theme / FONTS).glob("*.woff2")):
        key = hashlib.sha256(font.read_bytes() + repr(sorted(codes)).encode()).hexdigest()[:24]
        cut = cache / f"{font.stem}-{key}.woff2"
        if not cut.exists():
            points = ",".join(f"{code:x}" for code in sorted(codes))
            subset.main([str(font), "--flavor=woff2", f"--unicodes={points}", f"--output-file={cut}"])
        shutil.copyfile(cut, static / FONTS / font.name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the three steps with Sphinx."""
    if app.config.html_baseurl or os.environ.get("MEDARCH_SITE_URL"):
        app.setup_extension("sphinx_sitemap")
    app.connect("config-inited", read_addresses, priority=100)
    app.connect("html-page-context", describe, priority=400)
    app.connect("html-page-context", lighten_page, priority=900)
    app.connect("html-page-context", mend_page, priority=901)
    app.connect("build-finished", finish_site, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
