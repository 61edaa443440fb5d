"""The record of a run: what it prints."""

import sys

from nanobit import record


def test_the_result_is_json_except_on_a_terminal(capsys, monkeypatch):
    """stdout ends with one JSON line; on a terminal a summary is shown instead, unless --json is given."""
    record.print_result({"step": 3, "loss": float("nan")}, False, "three steps")
    assert capsys.readouterr().out == '{"step": 3, "loss": null}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    record.print_result({"step": 3}, False, "three steps")
    assert capsys.readouterr().out == "three steps\n"
    record.print_result({"step": 3}, True, "three steps")
    assert capsys.readouterr().out == '{"step": 3}\n'
