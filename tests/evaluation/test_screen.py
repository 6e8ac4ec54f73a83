"""Tables and bars on a terminal."""

import io

import pytest
from rich.console import Console

from opencola.evaluation.screen import progress_bar, table


def printed(grid: object, width: int = 60) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(grid)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_numbers_stand_on_the_right_and_words_on_the_left() -> None:
    grid = table("task", "value", "unit", words=(0, 2))
    grid.add_row("a", "1.5", "nats")
    grid.add_row("longer", "10.25", "")
    assert printed(grid) == ["task    value  unit", "a         1.5  nats", "longer  10.25"]


def test_columns_without_heads_have_no_line_for_them() -> None:
    grid = table("", "", words=(0, 1))
    grid.add_row("data", "stories")
    assert printed(grid) == ["data  stories"]


def test_whole_columns_are_not_broken() -> None:
    broken, kept = (table("", "what it says", words=(0, 1), whole=whole) for whole in ((), (0,)))
    for grid in (broken, kept):
        grid.add_row("two words", "a sentence of many words that does not fit")
    assert any("two words" in line for line in printed(kept, 24))
    assert not any("two words" in line for line in printed(broken, 14))


@pytest.mark.parametrize("transient", [True, False])
@pytest.mark.parametrize("display", [True, False])
def test_bars_go_to_standard_error(display: bool, transient: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(display, transient) as bar:
        bar.advance(bar.add_task("scoring", total=4), 3)
    out, error = capsys.readouterr()
    assert out == ""
    if display and not transient:
        assert "scoring" in error and "3/4" in error
    else:
        assert error == "", "nothing is left on what is no terminal"
