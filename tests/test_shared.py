"""What a session makes once: by one process of several, whole or not at all, and a copy for each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import once

ROOT = Path(__file__).parents[1]
# Appends a line to a file each time that something is made.
MAKE = """
import sys, time
from pathlib import Path
from tests.shared import once

def make(folder):
    with open(sys.argv[2], "a") as calls:
        calls.write("made\\n")
    time.sleep(0.3)  # long enough for the others to come
    return folder / "file"

print(once(Path(sys.argv[1]), make))
"""


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, str(tmp_path / "folder" / "it"), str(tmp_path / "calls")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate()[0].strip() for process in running]
    assert printed == [str(tmp_path / "folder" / "it" / "file")] * 4
    assert (tmp_path / "calls").read_text() == "made\n"


def test_each_caller_has_its_own_copy(tmp_path: Path) -> None:
    first = once(tmp_path / "it", lambda folder: [1])
    first.append(2)
    assert once(tmp_path / "it", lambda folder: [3]) == [1]


def test_what_failed_is_made_again_from_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "left").touch()
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            once(tmp_path / "it", fail)
    assert once(tmp_path / "it", lambda folder: sorted(folder.iterdir())) == []
