"""A report as files, and the templates that they are made with."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from opdlab.errors import UsageError
from opdlab.files import replacing
from opdlab.report.drawing import Picture
from opdlab.report.table import Table, markdown_text
from opdlab.viewer.text import visible

PAGE, MARKDOWN = "report.html", "report.md"
_KINDS = ("png", "svg", "pdf", "md", "csv", "tex")


@dataclass(frozen=True)
class Part:
    """What a report has to say of a study, or of runs.

    Args:
        title: of the page, if this is its only part.
        body: HTML.
        files: content of further files, by name inside the report's folder.
        conclusion: lines for the console.
    """

    title: str
    body: str
    files: Mapping[str, bytes]
    conclusion: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """A report, ready to be written.

    Args:
        folder: output folder.
        files: content, by name inside the folder.
        conclusion: lines of its first section; control characters are written as code points.
        own: the folder holds reports only, so that files of an earlier one may be deleted.
    """

    folder: Path
    files: Mapping[str, bytes]
    conclusion: Sequence[str]
    own: bool = True

    def write(self) -> Path:
        """Write all files, and delete files of an earlier report that are no longer part of it.

        Returns:
            Path of ``report.md`` if there is one, of ``report.html`` otherwise.

        Raises:
            UsageError: the folder cannot be written.
        """
        try:
            for name, content in self.files.items():
                path = self.folder / name
                with replacing(path) as file:
                    file.write(content)
            for path in (path for part in ("tables", "figures") for path in (self.folder / part).glob("*")):
                unknown = path.relative_to(self.folder).as_posix() not in self.files
                if self.own and path.suffix[1:] in _KINDS and unknown:
                    path.unlink()
        except OSError as error:
            fault = f"{self.folder} cannot be written ({error.strerror or error}): mend that, and report again"
            raise UsageError(fault) from error
        return self.folder / (MARKDOWN if MARKDOWN in self.files else PAGE)


def page(title: str, bodies: Sequence[str]) -> bytes:
    """Return the page that stands alone.

    Args:
        title: of the page.
        bodies: HTML of its parts.
    """
    return encoded(template("page.html").render(title=title, bodies=[Markup(body) for body in bodies]))


def encoded(text: str) -> bytes:
    """Return text as UTF-8; a lone surrogate, which a name from a YAML file may hold, is replaced."""
    return text.encode("utf-8", "replace")


def table_files(name: str, table: Table) -> dict[str, bytes]:
    """Return a table as Markdown and LaTeX files, by name inside the report's folder."""
    return {f"tables/{name}.md": encoded(table.markdown()), f"tables/{name}.tex": encoded(table.latex())}


def picture_files(pictures: Sequence[Picture]) -> dict[str, bytes]:
    """Return the files of pictures, by name inside the report's folder."""
    return {f"figures/{each.name}.{kind}": content for each in pictures for kind, content in each.files.items()}


def template(name: str) -> Template:
    """Return a template that escapes for its format everything except text that is marked as such.

    HTML pages forbid requests, scripts and foreign styles.
    """
    kind = name.rpartition(".")[2]
    escapes: dict[str, Callable[[str], str]] = {"md": markdown_text, "html": visible, "txt": str}
    escape = escapes[kind]
    environment = Environment(
        loader=PackageLoader("opdlab.report"),
        autoescape=kind == "html",
        finalize=lambda value: value if isinstance(value, Markup) else escape(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = lambda table: Markup(table.markdown())
    css = files("opdlab.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return environment.get_template(name, globals={"css": Markup(css), "policy": Markup(policy)})
