"""Tables and progress bars on a terminal, all alike."""

import sys
from collections.abc import Collection

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ENDLESS = 10_000  # characters in a line


def table(*columns: str, words: Collection[int] = (0,), whole: Collection[int] = ()) -> Table:
    """An empty table: numbers on the right of their column, words on the left.

    words: places of the columns that hold words; whole: of those whose words are never broken to fit the terminal.
    Heads, like cells, are rich's markup.
    """
    grid = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), show_header=any(columns))
    for place, column in enumerate(columns):
        grid.add_column(column, justify="left" if place in words else "right", no_wrap=place in whole)
    return grid


def console() -> Console:
    """Standard output; where it is no terminal, such as a file, no line is too long for it."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else ENDLESS)


def put(grid: Table) -> None:
    """Print a table. Numbers and whole words are never cut or broken: a table too wide for a terminal goes on there."""
    screen = console()
    for column in grid.columns:
        if column.justify == "right" or column.no_wrap:
            cells = [column.header, *column.cells]
            column.min_width = max(screen.measure(cell).maximum for cell in cells)
    screen.print(grid, crop=False)


def progress_bar(display: bool = True, transient: bool = False) -> Progress:
    """A bar for each task on standard error: what is done, how much of it, and how long the rest will take.

    display: show anything; transient: leave nothing behind.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # where nothing can be taken back, a bar would leave an empty line in front of what comes next
    display = display and (console.is_interactive or not transient)
    return Progress(*columns, console=console, transient=transient, disable=not display)
