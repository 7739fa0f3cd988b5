"""One self-contained page: tables, Plotly figures and clips in a file that needs no network and runs no script but ours.

Whatever comes from data is text. Jinja escapes it in HTML, `embed` in JSON, `figures.plain` in what Plotly draws; and the
page's Content-Security-Policy names the digests of its two scripts, so that no other would run.
"""

import base64
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mc3_jax import whole_file
from mc3_jax.evals import media

_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
      text: Shown.
      key: Sorted by; None where there is nothing, which is sorted last.
    """

    text: str
    key: float | str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose columns sort.

    Attributes:
      caption: Says what it is, to those who can't see it as well.
      columns: Headers.
      rows: As many cells each; the first names the row.
      marked: Rows that stand out.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: frozenset[int] = frozenset()

    @property
    def kinds(self) -> list[str]:
        """Of each column, "number" or "text"; what is missing says nothing."""
        keys = [[row[i].key for row in self.rows] for i in range(len(self.columns))]
        return ["text" if any(isinstance(key, str) for key in column) else "number" for column in keys]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure and what it says.

    Attributes:
      name: Unique in the page, letters, digits and hyphens.
      title: Above it.
      alt: What is to be seen, for those who can't.
      figure: Plotly's.
    """

    name: str
    title: str
    alt: str
    figure: go.Figure


def text(value: str) -> Cell:
    """Returns a cell that sorts by its letters."""
    return Cell(value, value)


def number(value: float | None, form: str = ".3f", note: str = "") -> Cell:
    """Returns a cell that sorts by its number; "–" where there is none.

    Args:
      value: The number, None or NaN.
      form: Of it, as `format` takes it.
      note: Behind it.
    """
    if value is None or math.isnan(value):
        return Cell("–")
    return Cell(format(value, form) + note, float(value))


def markdown(table: Table) -> str:
    """Returns a table as Markdown, without its caption; what is in its cells stays text."""
    lines = [table.columns, ["---"] * len(table.columns), *([cell.text for cell in row] for row in table.rows)]
    escaped = ([text.replace("<", "&lt;").replace("|", "\\|") for text in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def embed(value: str) -> Markup:
    """Returns JSON that may stand in a <script>: nothing in it ends the element or looks like markup.

    Args:
      value: JSON.
    """
    for character in "<>&\u2028\u2029":  # in JSON they occur within strings alone
        value = value.replace(character, f"\\u{ord(character):04x}")
    return Markup(value)


def write(
    folder: pathlib.Path,
    template: str,
    *,
    title: str,
    facts: str,
    plots: Sequence[Plot] = (),
    clips: Mapping[int, media.Shown] | None = None,
    **content,
) -> pathlib.Path:
    """Writes `folder/index.html` in one step and returns its path.

    Args:
      folder: Made where missing.
      template: File beside this one.
      title, facts: Head of the page.
      plots: Every figure of the page; the template places them by name.
      clips: Every clip of the page by its index; the template places them, each is stored once.
      **content: What else the template takes.
    """
    clips = clips or {}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    scripts = [(_HERE / "page.js").read_text()]
    if plots:
        scripts = [get_plotlyjs().replace("\r\n", "\n"), *scripts]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    page = environment.get_template(template).render(
        title=title, facts=facts, scripts=[Markup(script) for script in scripts], digests=digests,
        style=Markup((_HERE / "page.css").read_text()), plots={plot.name: plot for plot in plots},
        figures={plot.name: embed(plot.figure.to_json()) for plot in plots}, clips=clips,
        encoded={index: embed(json.dumps(clip.encoded())) for index, clip in clips.items()},
        **content,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    with whole_file.writing(path) as aside:
        aside.write_text(page, encoding="utf-8", newline="\n")
    return path
