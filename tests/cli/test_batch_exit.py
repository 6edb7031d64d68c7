"""The worst failure of a batch is its exit code."""

from typing import Any

from tests.cli.test_inspect import BAD, by_name


def test_the_worst_failure_is_the_exit_code(run: Any, fake: Any, page: dict[str, Any]) -> None:
    fake("inspect", by_name(page, bad=BAD, strange=KeyError("x")))
    assert run("inspect", "bad", "strange").exit_code == 3
    assert run("inspect", "strange", "bad").exit_code == 3
