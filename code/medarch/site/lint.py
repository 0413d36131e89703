"""What a chapter must have and must not do, each fault with its line and its remedy; no cell is run.

Alternative text stands in ``:alt:`` for an image or figure, and in a cell's options, as ``mystnb: image:
alt:``, for what it draws (myst-nb has one text for all images of a cell, so a cell draws one).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import Any

from medarch.book.ledger import Claim
from medarch.site.chapters import BookError, Chapter, Fault, Project, line_of
from medarch.site.chapters import _nearest as nearest
from medarch.site.evidence import read_claims, read_sources
from medarch.site.export import export_notebook, read_page
from medarch.site.markup import VERBATIM, blocks, code_cells, exercises, markdown_cells, prose, walk

Found = Iterator[tuple[int, str, str]]
MAX_LINES, MAX_CLAIMS, MIN_EXERCISES, WORDS = 30, 3, 3, (1200, 2500)
KINDS = ("predict", "change", "build", "find-the-fault")
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u2712\u2714-\u2716\u2718-\u27bf\ufe0f]")
NETWORK = re.compile(
    r"\s*(?:import|from) (requests|urllib3?|httpx?|aiohttp|socket|huggingface_hub|datasets)\b"
)
DRAWS = re.compile(r"matplotlib\.pyplot\.(?!close|rc|style|get_cmap)\w+|IPython\.display\.(SVG|Image)")
GLOBAL = "uses the global generator", "pass a torch.Generator or a numpy.random.default_rng with a seed"
CLOCK = "reads the clock", "time with medarch.bench, or read a record"
OFFLINE = "needs a network", "read from an installed package or the repository (medarch.data)"
# A call by its full name, perhaps with its arguments; keywords that make it right; what is wrong; the remedy.
CALLS = [
    (r"torch\.(cuda\.)?(manual_seed(_all)?|seed)|numpy\.random\.seed|random\.seed", (), *GLOBAL),
    (r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial)", ("generator",), *GLOBAL),
    (r".+\.(normal|uniform|bernoulli|random)_", ("generator",), *GLOBAL),
    (r"numpy\.random\.(?!default_rng|Generator|SeedSequence|PCG64)\w+|random\.(?!Random)\w+", (), *GLOBAL),
    (r"(numpy\.random\.default_rng|random\.Random)\(\)", ("seed",), "has no seed", "write one"),
    (r"time\.(time|perf_counter|process_time|monotonic)(_ns)?", (), *CLOCK),
    (r"datetime\.(datetime|date)\.(now|today|utcnow)", (), *CLOCK),
    (r"warnings\.(filterwarnings|simplefilter)\('ignore'\)", ("message", "category", "module"),
     "silences every warning", "mend its cause, or name the message"),
    (r".*\.from_pretrained\('[^./][^']*'.*\)|torch\.hub\..*|.*\.load_dataset", (), *OFFLINE),
    (r"sklearn\.datasets\.fetch_\w+", (), *OFFLINE),
]  # fmt: skip


def lint(project: Project, names: Iterable[str] = ()) -> list[Fault]:
    """Every fault of the named chapters, or of all, sorted by file and line.

    Raises:
        BookError: where a chapter or the ledger cannot be read at all.
    """
    claims, faults = read_claims(project), set(_labels(project))
    for chapter in project.pick(names):
        for found in (_cells(chapter), _prose(chapter), _exercises(chapter), _ids(project, chapter, claims)):
            faults.update(Fault(chapter.file, *fault) for fault in found)
        try:
            export_notebook(chapter, claims)
        except BookError as error:
            faults.update(error.faults)
    return sorted(faults)


def _labels(project: Project) -> Iterator[Fault]:
    first: dict[str, str] = {}
    for name in project.toc:
        for label in read_page(project.page(name)).labels:
            file = f"book/{name}.md"
            where = first.setdefault(label.label.lower(), f"{file}:{label.line}")
            if where != f"{file}:{label.line}":
                yield Fault(
                    file,
                    label.line,
                    f"the label {label.label!r} stands twice (first at {where})",
                    "rename one",
                )


def _calls(chapter: Chapter) -> Iterator[tuple[int, Any, str, ast.Call]]:
    """Each call with its line, cell and full name, whatever the chapter calls the module."""
    names: dict[str, str] = {}
    for line, cell in code_cells(chapter):
        try:
            tree = ast.parse(re.sub(r"(?m)^(\s*)[%!]", r"\1# ", cell.source))
        except SyntaxError:  # the executor says so, with the line
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names.update((a.asname, a.name) for a in node.names if a.asname)
            elif isinstance(node, ast.ImportFrom):
                names.update((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
            elif isinstance(node, ast.Call):
                head, dot, rest = ast.unparse(node.func).partition(".")
                yield line + node.lineno - 1, cell, names.get(head, head) + dot + rest, node


def _cells(chapter: Chapter) -> Found:
    for line, cell in code_cells(chapter):
        lines = cell.source.rstrip().splitlines() or [""]
        if lines[-1].endswith(";"):
            yield line + len(lines) - 1, "the cell ends with a semicolon, which hides its output", "delete it"
        if len(lines) > MAX_LINES:
            yield line, f"the cell has {len(lines)} lines", f"at most {MAX_LINES}; move code into the package"
        for number, text in enumerate(lines):
            if module := NETWORK.match(text):
                yield line + number, f"{module[1]} {OFFLINE[0]}", OFFLINE[1]
    drawing = {}
    for line, cell, name, node in _calls(chapter):
        call = f"{name}({', '.join(map(ast.unparse, node.args))})"
        given = {keyword.arg for keyword in node.keywords}
        for pattern, allowed, wrong, remedy in CALLS:
            if not given & {*allowed, None} and any(re.fullmatch(pattern, text) for text in (name, call)):
                yield line, f"{name} {wrong}", remedy
        if DRAWS.fullmatch(name):
            drawing[cell.id] = line, cell.metadata
    for line, options in drawing.values():
        alt = ((options.get("mystnb") or {}).get("image") or {}).get("alt")
        if not alt and "remove-output" not in options.get("tags", []):
            yield line, "the cell draws without alternative text", "give it the option mystnb: image: alt:"


def _prose(chapter: Chapter) -> Found:
    words, claims, level, text = 0, [], 0, chapter.path.read_text("utf8")
    for start, cell in markdown_cells(chapter):
        for line, string in prose(cell.source, start):
            plain = re.sub(r"\{[\w:+-]+\}|\$[^$]+\$|\]\([^)]*\)", " ", string)
            words += len(re.findall(r"[^\W\d_][\w'’-]*", plain))
            claims += [line] * string.count("{claim}`")
            for alt, url in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", string):
                yield from _image(line, alt, url)
        for line, string in prose(cell.source, start, nested=False):
            if heading := re.match(r"(#{1,6}) ", string):
                before, level = level, len(heading[1])
                if level > before + 1:
                    yield line, f"the heading jumps from level {before} to {level}", "use the next level"
                if level == 1 and before:
                    yield line, "the page has a second title", "use a heading of level 2"
        for block in walk(cell.source, start):
            if block.name in ("figure", "image"):
                yield from _image(block.line, block.options.get("alt") or "", block.argument)
    for block in blocks(text):
        for inner in walk(block.body, block.body_line) if block.name not in VERBATIM else ():
            if inner.name == "code-cell":
                yield (
                    inner.line,
                    f"a code cell inside {{{block.name}}} does not run",
                    "close that before the cell",
                )
    for number, string in enumerate(text.splitlines(), start=1):
        for emoji in EMOJI.findall(string):
            yield number, f"emoji {emoji!r}", "say it in words"
    if len(claims) > MAX_CLAIMS:
        yield claims[MAX_CLAIMS], f"{len(claims)} claims are discussed inline", f"at most {MAX_CLAIMS}"
    if not WORDS[0] <= words <= WORDS[1] and not chapter.name.startswith("labs/"):
        yield (
            line_of(text, "# "),
            f"the chapter has {words} words",
            f"{WORDS[0]} to {WORDS[1]} make a chapter",
        )


def _image(line: int, alt: str, url: str) -> Found:
    if not alt.strip():
        yield line, f"the image {url} has no alternative text", "say what is to be seen (:alt:)"
    if re.match(r"\w+:|//", url):
        yield line, f"the image {url} comes from elsewhere", "keep it in book/_static, with its licence"


def _exercises(chapter: Chapter) -> Found:
    found = exercises(chapter)
    if len(found) < MIN_EXERCISES:
        yield 1, f"{len(found)} exercises, and a chapter has at least {MIN_EXERCISES}", "write the others"
    for label, parts in found.items():
        pieces = {
            "text ({exercise})": [line for line, _ in parts.texts],
            "checker (@exercise)": parts.checkers,
            "starter (a cell tagged exercise that calls check)": [line for line, _ in parts.starters],
            "solution": [line for line, _ in parts.solutions],
        }
        line = next(lines[0] for lines in pieces.values() if lines)
        for what, lines in pieces.items():
            if len(lines) != 1:
                yield line, f"exercise {label!r} has {len(lines)} of its {what}", "write exactly one of each"
        for line, block in parts.texts:
            if block.options.get("class") not in KINDS:
                yield line, f"exercise {label!r} has no known class", f"write :class: {' or '.join(KINDS)}"
        for line, code in parts.solutions:
            if len(code) != 1:
                yield (
                    line,
                    f"the solution of {label!r} has {len(code)} Python blocks",
                    "one, to replace the starter",
                )


def _ids(project: Project, chapter: Chapter, claims: dict[str, Claim]) -> Found:
    sources, text = read_sources(project), chapter.path.read_text("utf8")
    for section in chapter.meta["covers"]:
        if section not in sources:
            near = nearest(section, sources)
            yield (
                line_of(text, "covers:"),
                f"book/sources.yml has no section {section!r}",
                f"correct the id{near}",
            )
    for line, _, name, node in _calls(chapter):
        if not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        given = str(node.args[0].value)
        if name.endswith("ledger.prove") and given not in claims:
            near = nearest(given, claims)
            yield line, f"book/claims.yml has no claim {given!r}", f"add it or correct the id{near}"
        made = (project.book / "records").glob(f"{given.replace('/', '-')}.*.json")
        if name.endswith("records.show_record") and not any(made):
            yield (
                line,
                f"there is no record of {given!r} in book/records",
                f"make it: `medarch bench {given}`",
            )
