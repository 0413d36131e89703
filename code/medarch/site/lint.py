"""What a chapter must have and must not do, each fault with its line and its remedy; no cell is run.

Alternative text stands in ``:alt:`` for an image or figure, and in the cell's options as ``mystnb: image: alt:`` for what a
cell draws (myst-nb has one text for all images of a cell, so a cell draws one).
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
SEED = "pass a torch.Generator or a numpy.random.default_rng with a seed"
OFFLINE = "read data from an installed package or the repository (medarch.data); the book runs without a network"
TIMES = "time with medarch.bench, or read a record"
# A call, by its full name: what is wrong with it and what to do; with a keyword that makes it right.
CALLS = [
    (r"torch\.(cuda\.)?(manual_seed(_all)?|seed)|numpy\.random\.seed|random\.seed", None, "seeds the global generator", SEED),
    (r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial)|.+\.(normal|uniform|bernoulli|random)_", "generator", "draws from the global generator", SEED),
    (r"numpy\.random\.(?!default_rng|Generator|SeedSequence|PCG64)\w+", None, "draws from the global generator", SEED),
    (r"random\.(?!Random)\w+", None, "draws from the global generator", SEED),
    (r"(numpy\.random\.default_rng|random\.Random)\(\)", "seed", "makes a generator without a seed", SEED),
    (r"time\.(time|perf_counter|process_time|monotonic)(_ns)?", None, "reads the clock", TIMES),
    (r"datetime\.(datetime|date)\.(now|today|utcnow)", None, "reads the clock", TIMES),
    (r"warnings\.(filterwarnings|simplefilter)\('ignore'\)", "message", "silences every warning",
     "mend its cause, or name the message and the module"),
    (r".*\.from_pretrained\('[^./][^']*'.*\)|torch\.hub\..*|.*\.load_dataset|sklearn\.datasets\.fetch_\w+", None, "needs a network", OFFLINE),
]  # fmt: skip
NETWORK = {"requests", "urllib", "urllib3", "httpx", "aiohttp", "socket", "http", "huggingface_hub", "datasets", "wget"}
DRAWS = re.compile(r"matplotlib\.pyplot\.(?!close|rc|style|get_cmap)\w+|IPython\.display\.(SVG|Image)")


def lint(project: Project, names: Iterable[str] = ()) -> list[Fault]:
    """Every fault of the named chapters, or of all, sorted by file and line.

    Raises:
        BookError: where a chapter or the ledger cannot be read at all.
    """
    claims, sources = read_claims(project), read_sources(project)
    faults: set[Fault] = set(_labels(project))
    for chapter in project.pick(names):
        for found in (_cells(chapter), _prose(chapter), _exercises(chapter), _ids(project, chapter, claims, sources)):
            faults.update(Fault(chapter.file, *fault) for fault in found)
        try:
            export_notebook(chapter, claims)
        except BookError as error:
            faults.update(error.faults)
    return sorted(faults)


def _labels(project: Project) -> Iterator[Fault]:
    first: dict[str, str] = {}
    for name in project.toc:
        file = project.page(name).relative_to(project.root).as_posix()
        for label, *_, line in read_page(project.page(name)).labels:
            where = f"{file}:{line}"
            if first.setdefault(label.lower(), where) != where:
                yield Fault(file, line, f"the label {label!r} stands twice (first at {first[label.lower()]})", "rename one")


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
                names.update((a.asname or a.name.split(".")[0], a.name if a.asname else a.name.split(".")[0]) for a in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.update((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Call):
                head, dot, rest = ast.unparse(node.func).partition(".")
                yield line + node.lineno - 1, cell, names.get(head, head) + dot + rest, node


def _cells(chapter: Chapter) -> Found:
    for line, cell in code_cells(chapter):
        lines = cell.source.rstrip().splitlines() or [""]
        if lines[-1].endswith(";"):
            yield line + len(lines) - 1, "the cell ends with a semicolon, which hides its output from the comparison", "delete it"
        if len(lines) > MAX_LINES:
            yield line, f"the cell has {len(lines)} lines, and {MAX_LINES} is the limit", "cut it, or move code into the package"
        for number, text in enumerate(lines):
            module = re.match(r"\s*(?:import|from)\s+(\w+)", text)
            if module and module[1] in NETWORK:
                yield line + number, f"{module[1]} needs a network", OFFLINE
    drawing = {}
    for line, cell, name, node in _calls(chapter):
        given = ", ".join(ast.unparse(argument) for argument in node.args)
        for pattern, keyword, wrong, remedy in CALLS:
            allowed = any(k.arg in (keyword, None, "category", "module") for k in node.keywords) if keyword else False
            if not allowed and (re.fullmatch(pattern, name) or re.fullmatch(pattern, f"{name}({given})")):
                yield line, f"{name} {wrong}", remedy
        if DRAWS.fullmatch(name):
            drawing[cell.id] = line, cell
    for line, cell in drawing.values():
        options = cell.metadata.get("mystnb") or {}
        if not (options.get("image") or {}).get("alt") and "remove-output" not in cell.metadata.get("tags", []):
            yield line, "the cell draws without alternative text", "say what is to be seen in its options: mystnb: image: alt:"


def _prose(chapter: Chapter) -> Found:
    words, claims, level = 0, [], 0
    text = chapter.path.read_text("utf8")
    for start, cell in markdown_cells(chapter):
        for line, string in prose(cell.source, start):
            words += len(re.findall(r"[^\W\d_][\w'’-]*", re.sub(r"\{[\w:+-]+\}|\$[^$]+\$|\]\([^)]*\)", " ", string)))
            claims += [line] * len(re.findall(r"\{claim\}`", string))
            for alt, url in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", string):
                yield from _image(line, alt, url)
        for line, string in prose(cell.source, start, nested=False):
            if heading := re.match(r"(#{1,6}) ", string):
                if len(heading[1]) > level + 1:
                    yield line, f"the heading jumps from level {level} to {len(heading[1])}", "use the next level"
                if len(heading[1]) == 1 and level:
                    yield line, "the page has a second title", "use a heading of level 2"
                level = len(heading[1])
        for block in walk(cell.source, start):
            if block.name in ("figure", "image"):
                yield from _image(block.line, block.options.get("alt") or "", block.argument)
    for block in blocks(text):
        inner = walk(block.body, block.body_line) if block.name not in VERBATIM else ()
        for cell in (nested for nested in inner if nested.name == "code-cell"):
            yield cell.line, f"a code cell inside {{{block.name}}} does not run", "close the directive before the cell"
    for number, string in enumerate(text.splitlines(), start=1):
        if EMOJI.search(string):
            yield number, f"emoji {EMOJI.search(string)[0]!r}", "say it in words"  # type: ignore[index]  # just found
    if len(claims) > MAX_CLAIMS:
        yield claims[MAX_CLAIMS], f"{len(claims)} claims are discussed inline", f"at most {MAX_CLAIMS}; the table holds the others"
    if not WORDS[0] <= words <= WORDS[1] and not chapter.name.startswith("labs/"):
        yield line_of(text, "# "), f"the chapter has {words} words", f"{WORDS[0]} to {WORDS[1]} make a page that is read whole"


def _image(line: int, alt: str, url: str) -> Found:
    if not alt.strip():
        yield line, f"the image {url} has no alternative text", "say what is to be seen (:alt:)"
    if re.match(r"\w+:|//", url):
        yield line, f"the image {url} comes from elsewhere", "keep it in book/_static, with its licence"


def _exercises(chapter: Chapter) -> Found:
    found = exercises(chapter)
    if len(found) < MIN_EXERCISES:
        yield 1, f"{len(found)} exercises, and a chapter has at least {MIN_EXERCISES}", "add some: predict, change, build, find the fault"
    for label, parts in found.items():
        pieces = {"text ({exercise})": parts.texts, "checker (@exercise)": parts.checkers,
                  "starter (a cell tagged exercise that calls check)": parts.starters, "solution": parts.solutions}  # fmt: skip
        lines = [*(line for line, _ in (*parts.texts, *parts.starters, *parts.solutions)), *parts.checkers]
        for what, present in pieces.items():
            if len(present) != 1:
                yield lines[0], f"exercise {label!r} has {len(present)} of its {what}", "write exactly one of each"
        for line, block in parts.texts:
            if block.options.get("class") not in KINDS:
                yield line, f"exercise {label!r} is of class {block.options.get('class')!r}", f"one of {', '.join(KINDS)}"
        for line, code in parts.solutions:
            if len(code) != 1:
                yield line, f"the solution of {label!r} has {len(code)} Python blocks", "one, which can stand in for the starter"


def _ids(project: Project, chapter: Chapter, claims: dict[str, Claim], sources: dict[str, Any]) -> Found:
    for section in chapter.meta["covers"]:
        if section not in sources:
            line = line_of(chapter.path.read_text("utf8"), "covers:")
            yield line, f"book/sources.yml has no section {section!r}", f"correct the id{nearest(section, sources)}"
    for line, _, name, node in _calls(chapter):
        given = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if name.endswith("ledger.prove") and given is not None and given not in claims:
            yield line, f"book/claims.yml has no claim {given!r}", f"add it or correct the id{nearest(str(given), claims)}"
        if name.endswith("records.show_record") and given is not None:
            if not list((project.book / "records").glob(f"{str(given).replace('/', '-')}.*.json")):
                yield line, f"there is no record of {given!r} in book/records", f"make it: `medarch bench {given}`"
