r"""What MkDocs does for us besides: files of the repository as pages, sections of them inside pages, links, formulas.

- **Pages from elsewhere.** ``PAGES`` are files of the repository that are pages of the site too, each notebook is one.
- **Includes.** A line ``<!-- include: README.md#evaluate -->`` is replaced by that section, without its heading, so
  that a fact is written once.
- **Links** of all these are relative to the file that they stand in, so that they work in the repository as well. Here
  they are made to point at pages; a link to what is no page (a source file, say) becomes its label.
- **Nothing from elsewhere.** A page that would fetch a script, style, font or picture from the network is a warning.
- **Formulas**, ``\( … \)`` and ``\[ … \]``, become MathML when the site is built, which browsers draw by themselves.
"""

import html
import json
import logging
import posixpath
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Files of the repository, and the pages that they are.
PAGES = {
    "ARCHITECTURE.md": "project/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "configs/README.md": "project/configurations.md",
    "configs/paper/README.md": "project/paper_runs.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
# What search puts first, by how much. In a page's own front matter, GitHub would show it as a table.
BOOSTS = {"metrics.md": 4}
_INCLUDE = re.compile(r"^<!-- include: (\S+)#(\S+) -->$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`+[^`]*`+")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
# What loads something as soon as a page is opened; links do not. The theme fetches the script that draws Mermaid.
_FETCHES = {
    ".html": re.compile(
        r"""<(?:script|img|iframe|source|object|embed|video|audio)\b[^>]*\b(?:src|data)=["']?(?:https?:)?//[^>]*>"""
        r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*href=["']?(?:https?:)?//[^>]*>|class=["']?mermaid"""
    ),
    ".css": re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^)]*"""),
}
_log = logging.getLogger("mkdocs.hooks.opdlab")


def notebooks() -> dict[str, str]:
    """The repository's notebooks, and the pages that they are."""
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return {f"notebooks/{file.name}": f"notebooks/{file.stem}.md" for file in found}


def sections() -> dict[str, str]:
    """Sections that pages include, as ``file#heading``, and the page that includes each."""
    found = {}
    for file in sorted((ROOT / "docs").rglob("*.md")):
        for name, anchor in _INCLUDE.findall(file.read_text(encoding="utf-8")):
            found[f"{name}#{anchor}"] = file.relative_to(ROOT / "docs").as_posix()
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks into the navigation, before the API."""
    pages = list(notebooks().values())
    if pages and config.nav is not None:
        place = next(index for index, item in enumerate(config.nav) if "API" in item)
        config.nav.insert(place, {"Notebooks": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, page in notebooks().items():
        files.append(File.generated(config, page, content=notebook_text(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Include sections, and turn links."""
    shown = page.file.src_uri
    if shown in BOOSTS:
        page.meta["search"] = {"boost": BOOSTS[shown]}
    sources = {shown: source for source, shown in (PAGES | notebooks()).items()}
    # The page's own links first: those of the sections are relative to other files.
    turned = turn_links(markdown, sources.get(shown, f"docs/{shown}"), shown)
    return _INCLUDE.sub(lambda match: turn_links(section(match[1], match[2]), match[1], shown), turned)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML."""
    return _FORMULA.sub(_mathml, content)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of what a page would fetch from elsewhere when it is opened: with --strict the build fails."""
    for file in sorted(Path(config.site_dir).rglob("*")):
        pattern = _FETCHES.get(file.suffix)
        for match in pattern.finditer(file.read_text(encoding="utf-8")) if pattern else ():
            _log.warning("%s fetches something from elsewhere: %s", file.relative_to(config.site_dir), match[0])


def _mathml(match: re.Match[str]) -> str:
    tag, formula = match.groups()
    latex = html.unescape(formula).strip()[2:-2]  # without \\( and \\)
    shown = latex2mathml.converter.convert(latex, display="block" if tag == "div" else "inline")
    return f'<{tag} class="formula">{shown}</{tag}>'


def notebook_text(file: Path) -> str:
    """A notebook's cells as Markdown, without outputs, which the repository does not store."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    texts = [
        "".join(cell["source"])
        if cell["cell_type"] == "markdown"
        else "```python\n{}\n```".format("".join(cell["source"]))
        for cell in cells
    ]
    first, *rest = texts
    return "\n\n".join([first, f"*This is `notebooks/{file.name}`: open it in Jupyter to run it.*", *rest])


def section(name: str, anchor: str) -> str:
    """The text under a heading of a file of the repository, up to the next heading of that level.

    Args:
        name: of the file.
        anchor: the heading as it stands in links, lower case and with hyphens.

    Raises:
        ValueError: there is no such heading.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    fences = [match.span() for match in _FENCE.finditer(text)]
    headings = [
        (match.start(), match.end(), len(match[1]), slug(match[2]))
        for match in re.finditer(r"^(#+) (.*)$", text, re.MULTILINE)
        if not any(start < match.start() < end for start, end in fences)
    ]
    for index, (_, end, level, found) in enumerate(headings):
        if found == anchor:
            later = (start for start, _, other, _ in headings[index + 1 :] if other <= level)
            return text[end : next(later, len(text))].strip()
    raise ValueError(f"{name} has no heading #{anchor}; it has {', '.join(found for *_, found in headings)}")


def slug(heading: str) -> str:
    """A heading as it stands in links."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def turn_links(markdown: str, source: str, page: str) -> str:
    """Make the links of a repository file those of a page.

    Args:
        markdown: the text.
        source: the file that it stands in, relative to the repository.
        page: the page that it is shown on, relative to ``docs``.
    """
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    # Code is left alone; a link's label may hold some, so it is put back last.
    hidden = _CODE.sub(keep, _FENCE.sub(keep, markdown))
    turned = _LINK.sub(lambda match: _turned(match, source, page), hidden)
    while "\0" in turned:
        turned = re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], turned)
    return turned


def _turned(match: re.Match[str], source: str, page: str) -> str:
    bang, label, link = match.groups()
    path, _, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return match[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if (ROOT / target / "README.md").is_file():
        target = f"{target}/README.md"
    if not (ROOT / target).exists():
        return match[0]  # MkDocs warns
    shown, anchor = _page_of(target, anchor)
    if shown is None:
        return label
    relative = posixpath.relpath(shown, posixpath.dirname(page) or ".")
    return f"{bang}[{label}]({relative}{'#' if anchor else ''}{anchor})"


def _page_of(target: str, anchor: str) -> tuple[str | None, str]:
    """The page that a file of the repository, or its section, is shown on, and the anchor there."""
    if page := sections().get(f"{target}#{anchor}"):
        return page, ""
    if target == "README.md":
        return "index.md", ""
    if target.startswith("docs/") and "/scripts/" not in target and not target.endswith(".json"):
        return target.removeprefix("docs/"), anchor
    return PAGES.get(target) or notebooks().get(target), anchor
