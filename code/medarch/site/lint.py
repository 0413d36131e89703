"""What a chapter must have and must not do, each fault with its line and its remedy; no cell is run.

What Sphinx tells anyway (unknown roles, labels, files, claims) is left to the build, which takes each warning for an
error. Alternative text stands in ``:alt:`` for an image or figure, and in a cell's options, as ``mystnb: image:
alt:``, for what it draws (myst-nb has one text for all images of a cell, so a cell draws one).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

from medarch.site.chapters import Chapter, Fault, Project
from medarch.site.markup import directives, exercises, prose

Found = Iterator[tuple[int, str, str]]
MAX_LINES, MAX_CLAIMS, MIN_EXERCISES, WORDS = 30, 3, 3, (1200, 2500)
KINDS = ("predict", "change", "build", "find-the-fault")
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u2712\u2714-\u2716\u2718-\u27bf\ufe0f]")
NETWORK = re.compile(r"\s*(?:import|from) (requests|urllib3?|httpx?|aiohttp|socket|huggingface_hub|datasets)\b")
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
    (
        r"warnings\.(filterwarnings|simplefilter)\('ignore'\)",
        ("message", "category", "module"),
        "silences every warning",
        "mend its cause, or name the message",
    ),
    (r"medarch\.book\.interactive\.Figure", ("alt",), "draws without alternative text", "say in alt= what is seen"),
    (r".*\.from_pretrained\('[^./][^']*'.*\)|torch\.hub\..*|.*\.load_dataset", (), *OFFLINE),
    (r"sklearn\.datasets\.fetch_\w+", (), *OFFLINE),
]


def lint(project: Project, names: Iterable[str] = ()) -> list[Fault]:
    """Every fault of the named chapters, or of all, sorted by file and line.

    Raises:
        BookError: where a chapter cannot be read at all.
    """
    faults: set[Fault] = set()
    for chapter in project.pick(names):
        for found in (_cells(chapter), _prose(chapter), _exercises(chapter)):
            faults.update(Fault(chapter.file, *fault) for fault in found)
    return sorted(faults)


def _cells(chapter: Chapter) -> Found:
    modules: dict[str, str] = {}  # by the names that the chapter gives them
    for line, cell in chapter.code_cells:
        lines = cell.source.rstrip().splitlines() or [""]
        if lines[-1].endswith(";"):
            yield line + len(lines) - 1, "the cell ends with a semicolon, which hides its output", "delete it"
        if len(lines) > MAX_LINES:
            yield line, f"the cell has {len(lines)} lines", f"at most {MAX_LINES}; move code into the package"
        for number, text in enumerate(lines):
            if module := NETWORK.match(text):
                yield line + number, f"{module[1]} {OFFLINE[0]}", OFFLINE[1]
        drawn = None
        for at, name, node in _calls(cell.source, modules):
            drawn = line + at if DRAWS.fullmatch(name) else drawn
            forms, given = (name, f"{name}({', '.join(map(ast.unparse, node.args))})"), {k.arg for k in node.keywords}
            for pattern, allowed, wrong, remedy in CALLS:
                if not given & {*allowed, None} and any(re.fullmatch(pattern, form) for form in forms):
                    yield line + at, f"{name} {wrong}", remedy
        alt = ((cell.metadata.get("mystnb") or {}).get("image") or {}).get("alt")
        if drawn and not alt and "remove-output" not in cell.metadata.get("tags", []):
            yield drawn, "the cell draws without alternative text", "give it the option mystnb: image: alt:"


def _calls(source: str, modules: dict[str, str]) -> Iterator[tuple[int, str, ast.Call]]:
    """Each call of a cell with its line, from zero, and its full name, whatever the chapter calls the module."""
    try:
        tree = ast.parse(re.sub(r"(?m)^(\s*)[%!]", r"\1# ", source))
    except SyntaxError:  # the executor says so, with the line
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom):
            modules.update((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            yield node.lineno - 1, modules.get(head, head) + dot + rest, node


def _prose(chapter: Chapter) -> Found:
    lines = prose(chapter.text)
    for line, string in lines:
        for alt, url in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", string):
            yield from _image(line, alt, url)
    for block in directives(chapter.text):
        if block.name in ("figure", "image"):
            yield from _image(block.line, block.options.get("alt") or "", block.argument)
    for number, string in enumerate(chapter.text.splitlines(), start=1):
        for emoji in EMOJI.findall(string):
            yield number, f"emoji {emoji!r}", "say it in words"
    titles = [line for line, string in lines if string.startswith("# ")]
    for line in titles[1:]:
        yield line, "the page has a second title", "use a heading of level 2"
    claims = [line for line, string in lines for _ in range(string.count("{claim}`"))]
    if len(claims) > MAX_CLAIMS:
        yield claims[MAX_CLAIMS], f"{len(claims)} claims are discussed inline", f"at most {MAX_CLAIMS}"
    running = "\n".join(string for _, string in prose(chapter.text, "exercise", "solution", "deck-only"))
    words = len(re.findall(r"[^\W\d_][\w'’-]*", re.sub(r"\{[\w:+-]+\}|\$[^$]+\$|\]\([^)]*\)", " ", running)))
    if not WORDS[0] <= words <= WORDS[1] and not chapter.name.startswith("labs/"):
        wanted = f"{WORDS[0]} to {WORDS[1]} make a chapter"
        yield titles[0] if titles else 1, f"the chapter has {words} words", wanted


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
        first = next((places[0][0] for places in parts.values() if places), 1)
        for part, places in parts.items():
            if len(places) != 1:
                remedy = "one text, one @exercise, one cell tagged exercise that calls check, one solution in Python"
                yield first, f"exercise {label!r} has {len(places)} of its {part}", remedy
        for line, kind in parts["text"]:
            if kind not in KINDS:
                yield line, f"exercise {label!r} has no known class", f"write :class: {' or '.join(KINDS)}"
