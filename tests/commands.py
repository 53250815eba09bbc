"""Running the scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(*command, folder: Path) -> subprocess.CompletedProcess:
    """A Python of one thread, in this folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=100)


def refusal(capsys, main, *argv: str, code: int = 2) -> str:
    """The one error line of a command that must end with this exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    told = capsys.readouterr().err.splitlines()
    assert exit_.value.code == code and len(told) == 1 and told[0].startswith("error: "), told
    return told[0]
