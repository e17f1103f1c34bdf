"""Tables align, and progress is plain text where there is no terminal."""

import io

import pytest

from penstock import terminal


def test_table_aligns() -> None:
    assert terminal.table(["arm", "frauds"], [["xgb", "1"], ["logistic", "1,234"]]).split("\n") == [
        "arm       frauds",
        "--------  ------",
        "xgb            1",
        "logistic   1,234",
    ]


def test_without_a_terminal_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.heading(1, "Title")
    terminal.fact("rows", "12", terminal.verdict(True))
    terminal.say(terminal.verdict(False))
    with terminal.Progress("working") as progress:
        progress(1, 2)
        progress.note("half")
        progress(2, 2)
    out, err = capsys.readouterr()
    assert "\n1  Title\n" in out
    assert "WRONG" in out
    assert err.splitlines() == ["   working ...", f"   working: {progress.seconds:.1f} s"]
    assert all(c.isprintable() or c == "\n" for c in out + err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_that_clears_itself() -> None:
    stream = Terminal()
    with terminal.Progress("working", stream) as progress:
        progress(5, 10)
        progress(10, 10)
    drawn = stream.getvalue().split("\r\033[K")
    assert any("50%" in text for text in drawn)
    assert any("[" + "#" * terminal.BAR + "] 100%" in text for text in drawn)
    assert drawn[-1] == ""
