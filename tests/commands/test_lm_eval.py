"""`opencola lm_eval` where the harness is missing; `interop/test_harness.py` has the rest."""

import pytest

from opencola.commands import main


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("opencola.commands.lm_eval.importlib.util.find_spec", lambda name: None)
    assert main.main(["lm_eval", "--model", "opencola", "--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert error == "error: the lm-evaluation-harness is not installed: pip install 'opencola[harness]'\n"


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_needs_no_harness(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("opencola.commands.lm_eval.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main.main(["lm_eval", *argv])
    assert stop.value.code == 0 and "opencola lm_eval --model opencola" in capsys.readouterr().out
