"""A file is either the old one or the new one, whatever happens while it is written."""

import errno
import os

import pytest

from mc3_jax import whole_file


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with whole_file.writing(path) as aside:
        aside.write_text("ne")
        assert path.read_text() == "old"
        with aside.open("a") as file:
            file.write("w")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["results.json"]


def write(path, content: str, error: BaseException | None = None):
    with whole_file.writing(path) as aside:
        aside.write_text(content)
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt("stopped"), ValueError("odd"), OSError("a library's words")])
def test_the_old_file_stays_where_writing_fails(tmp_path, error):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(type(error), match=f"^{error}$"):
        write(path, "half", error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_an_error_names_the_file(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")  # without the file's name
    with pytest.raises(OSError, match="No space left on device: .*/results.json'$"):
        write(tmp_path / "results.json", "half", full)
    with pytest.raises(FileNotFoundError, match="/missing/results.json'$"):
        write(tmp_path / "missing" / "results.json", "whole")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="/file/results.json'$"):
        write(tmp_path / "file" / "results.json", "whole")


def test_two_that_write_at_once_each_write_all_of_a_file(tmp_path):
    path = tmp_path / "results.json"
    with whole_file.writing(path) as one:
        one.write_text("one")
        write(path, "two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["results.json"]
