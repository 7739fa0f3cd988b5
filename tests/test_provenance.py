"""The code that a run is started with is recorded, and a failure to find it never keeps a run from starting."""

import os
import subprocess

import pytest

from mc3_jax import provenance


def git(folder, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(["git", "-C", folder, *who, *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("")
    git(tmp_path, "add", "code.py", "benchmarks")
    git(tmp_path, "commit", "-m", "one")
    git(tmp_path, "tag", "v1")
    return tmp_path


def test_the_revision_of_a_checkout_says_whether_files_differ(checkout, monkeypatch):
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a Git hook that trains
    assert provenance._revision(checkout) == commit
    (checkout / "benchmarks" / "RESULTS.md").write_text("a table\n")
    (checkout / "new.py").write_text("1\n")
    assert provenance._revision(checkout) == commit
    (checkout / "code.py").write_text("2\n")
    assert provenance._revision(checkout) == f"{commit}-dirty"


def test_without_a_checkout_or_git_there_is_no_revision(checkout, monkeypatch):
    (checkout / "inner").mkdir()
    assert provenance._revision(checkout / "inner") == ""  # a package installed inside another project
    monkeypatch.setattr(provenance, "ROOT", checkout)
    assert len(provenance.facts()["revision"]) == 40
    monkeypatch.setitem(os.environ, "PATH", "/nowhere")
    assert "revision" not in provenance.facts()
