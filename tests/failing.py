"""Commands that must fail."""

import pytest

from fastalex import cli


def error_of(capsys, *arguments):
    """The message on stderr of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("fastalex: error: ")
    assert message.count("\n") == 1
    return message
