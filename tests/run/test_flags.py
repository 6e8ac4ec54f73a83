"""What tyro complains about comes as one plain line, in a terminal, too."""

import io
import sys
from dataclasses import dataclass

import pytest
import tyro

from opencola.ranges import Count, Share, check
from opencola.run import flags


@dataclass(frozen=True)
class Inner:
    """Nested."""

    depth: Count = 2
    """How deep."""
    num_heads: Count | None = None
    """How many, if any."""
    rates: tuple[Share, ...] = ()
    """How fast."""

    def __post_init__(self) -> None:
        check(self)
        if self.depth == 7:
            raise ValueError("depth must not be 7")


@dataclass(frozen=True)
class Options:
    """Some flags."""

    name: str
    """A name."""
    size: float
    """A size."""
    inner: Inner = Inner()
    """More."""
    plain: tyro.conf.OmitArgPrefixes[Inner] = Inner()
    """Without a prefix."""
    batch_size: Count = 1
    """How much."""

    def __post_init__(self) -> None:
        check(self)


class Terminal(io.StringIO):
    """A terminal, as far as tyro can tell: it gets colours and frames."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=["terminal", "pipe"])
def stdout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    output = Terminal() if request.param == "terminal" else io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "50")
    return output


GOOD = ["--name", "a", "--size", "1"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "missing: --name, --size"),
        (["--name", "a"], "missing: --size"),
        ([*GOOD, "--inner.dept", "3"], "Unrecognized options: --inner.dept, 3; did you mean --inner.depth?"),
        ([*GOOD, "--whatever"], "Unrecognized options: --whatever"),
        ([*GOOD, "--size", "big"], "Error parsing --size: could not convert string to float: 'big'"),
        ([*GOOD, "--inner.depth", "7"], "Error parsing inner: depth must not be 7"),
        ([*GOOD, "--inner.depth", "0"], "--inner.depth must be at least 1, but is 0"),
        ([*GOOD, "--inner.depth=0"], "--inner.depth must be at least 1, but is 0"),
        ([*GOOD, "--inner.num-heads", "0"], "--inner.num-heads must be at least 1, but is 0"),
        ([*GOOD, "--inner.num_heads", "0"], "--inner.num_heads must be at least 1, but is 0"),
        ([*GOOD, "--inner.rates", "0", "nan"], "--inner.rates must be at least 0 and at most 1, but is nan"),
        ([*GOOD, "--depth", "-1"], "--depth must be at least 1, but is -1"),
        ([*GOOD, "--num-heads", "0"], "--num-heads must be at least 1, but is 0"),
        ([*GOOD, "--batch-size", "0"], "--batch-size must be at least 1, but is 0"),
        ([*GOOD, "--size"], "Missing value for argument '--size'. Expected 1 values."),
    ],
)
def test_one_line(args: list[str], message: str, stdout: io.StringIO) -> None:
    with pytest.raises(ValueError) as caught:
        flags.parse(Options, args)
    assert str(caught.value) == message
    assert stdout.getvalue() == ""


def test_what_is_right_passes(stdout: io.StringIO) -> None:
    assert flags.parse(Options, GOOD) == Options("a", 1.0)
    assert flags.parse(Options, [*GOOD, "--x", "1"], return_unknown_args=True) == (Options("a", 1.0), ["--x", "1"])


def test_help_still_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        flags.parse(Options, ["--help"])
    assert stop.value.code == 0
    assert "How deep." in capsys.readouterr().out
