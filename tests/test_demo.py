"""What the demonstration prints is what the records say."""

from __future__ import annotations

import pytest

import miwv_fast
from miwv_fast.demo import _show_extremes, run_demo
from support import text_embedder


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    """It is told before anything is scored."""
    monkeypatch.setattr(miwv_fast, "score", lambda *_, **__: pytest.fail("it was scored"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        run_demo(tmp_path / "file")
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write everywhere
    with pytest.raises(PermissionError, match=f"{tmp_path} cannot be written to"):
        run_demo(tmp_path / "new")


def test_markup_and_control_characters_of_records_stay_text(llama, capsys):
    words = ["[bold]Name[/bold] a colour", "Say \x1b[31mred", "[/] count", "Add [1] and [2]"]
    rows = [{"instruction": text, "output": f"{text} indeed"} for text in words]
    _show_extremes(miwv_fast.score(rows, llama, embedder=text_embedder), 4)
    printed = capsys.readouterr().out
    assert "[bold]Name[/bold] a colour" in printed and "[/] count" in printed and "Add [1] and [2]" in printed
    assert "\x1b" not in printed
