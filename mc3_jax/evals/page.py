"""One self-contained page: tables, Plotly figures and clips in a file that needs no network and runs no script but ours.

Text from data is never markup: Jinja escapes it in HTML, `embed` in JSON and `figures.plain` in what Plotly draws. The page's
Content-Security-Policy also names the digests of its two scripts, so that no other one would run.
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
      text: Text that is shown.
      key: Value that the column is sorted by; None for an empty cell, which is sorted last.
    """

    text: str
    key: float | str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that can be sorted by any column.

    Attributes:
      caption: What the table shows; screen readers read it too.
      columns: Headers of the columns.
      rows: Cells of each row, one for each column; the first names the row.
      marked: Indices of the rows to highlight.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: frozenset[int] = frozenset()

    @property
    def kinds(self) -> list[str]:
        """Kind of each column, "number" or "text"; empty cells are ignored."""
        keys = [[row[i].key for row in self.rows] for i in range(len(self.columns))]
        return ["text" if any(isinstance(key, str) for key in column) else "number" for column in keys]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with its title and description.

    Attributes:
      name: Name, unique in the page, of letters, digits and hyphens.
      title: Title above the figure.
      alt: Description for readers who can't see the figure.
      figure: Plotly figure.
    """

    name: str
    title: str
    alt: str
    figure: go.Figure


def text(value: str) -> Cell:
    """Returns a cell that is sorted by its text."""
    return Cell(value, value)


def number(value: float | None, form: str = ".3f", note: str = "") -> Cell:
    """Returns a cell that is sorted by its number; "–" for None and NaN.

    Args:
      value: The number, None or NaN.
      form: Format of the number, as for `format`.
      note: Text that follows the number.
    """
    if value is None or math.isnan(value):
        return Cell("–")
    return Cell(format(value, form) + note, float(value))


def markdown(table: Table) -> str:
    """Returns a table as Markdown, without its caption; text of cells is escaped."""
    lines = [table.columns, ["---"] * len(table.columns), *([cell.text for cell in row] for row in table.rows)]
    escaped = ([text.replace("<", "&lt;").replace("|", "\\|") for text in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def embed(value: str) -> Markup:
    """Returns JSON escaped so that it may stand in a <script>: nothing in it ends the element or looks like markup.

    Args:
      value: JSON text.
    """
    for character in "<>&\u2028\u2029":  # in JSON these occur only within strings
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
    """Writes `folder/index.html` atomically and returns its path.

    Args:
      folder: Created if missing.
      template: File name of the template, in this module's folder.
      title, facts: Title of the page and the line below it.
      plots: All figures of the page; the template places them by name.
      clips: Index → clip for all clips of the page; the template places them, and each is stored once.
      **content: Further variables of the template.
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
