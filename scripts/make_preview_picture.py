"""Make docs/preview.svg: what a terminal shows of `lorakit preview recipes/quickstart/recipe.yaml -n 1`.

    python scripts/make_preview_picture.py [FILE]

Drawn from the preview itself, so that it shows what lorakit does and not what it once did. It names no font
but the reader's own monospace one and nothing of it lies elsewhere.
"""

import argparse
import contextlib
import io
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from lorakit.preview import preview
from lorakit.recipe import load_recipe

HERE = Path(__file__).parent.parent
COMMAND = "lorakit preview recipes/quickstart/recipe.yaml -n 1"
COLUMNS = 108

THEME = TerminalTheme(
    (13, 17, 23),
    (216, 222, 228),
    [
        *((22, 27, 34), (255, 123, 114), (95, 210, 125), (227, 179, 65)),
        *((108, 182, 255), (210, 168, 255), (86, 212, 221), (216, 222, 228)),
    ],
)
DRAWING = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: 20.3px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>
<g fill="#30363d">
<circle cx="22" cy="22" r="7"/><circle cx="44" cy="22" r="7"/><circle cx="66" cy="22" r="7"/>
</g>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</g>
</svg>
"""


def draw() -> str:
    """The picture, the same text wherever it is made."""
    words = COMMAND.split()
    with contextlib.chdir(HERE):  # as the reader would: places in data are relative to it
        shown = preview(load_recipe(words[2]), int(words[4])).styled()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text(f"$ {COMMAND}", "bold"), shown, sep="\n")
    return console.export_svg(theme=THEME, code_format=DRAWING, unique_id="preview")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", default=HERE / "docs" / "preview.svg")
    file = parser.parse_args().file
    file.parent.mkdir(exist_ok=True)
    file.write_text(draw(), "utf-8")
