"""Modules, options, fields and files that the documentation's commands name exist, and its links lead somewhere."""

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shlex
import subprocess
import typing

import pytest

from mc3_jax import workdir
from mc3_jax.config import Config
from tests.world import ROOT

PRESENT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*PRESENT, ROOT / "benchmarks" / "RESULTS.md"]  # its commands are those of earlier commits
FOREIGN = {"dry_run", "environment_type", "environment_config", "job_endpoint", "runner"}  # of launch files and Beam


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: pathlib.Path) -> list[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def commands(page: pathlib.Path) -> list[list[str]]:
    """Returns the words of each command in a page's shell blocks, with continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def modules(words: list[str]) -> list[str]:
    """Returns the modules of this project that a command runs, directly or through a launch file."""
    return [word for word in words if re.fullmatch(r"(mc3_jax|data_prep|benchmarks)(\.\w+)+", word)]


@functools.cache
def options(package: str) -> str:
    """Returns the source of a whole package, in which its commands define their options."""
    return "\n".join(path.read_text() for path in sorted((ROOT / package).glob("**/*.py")))


def field_of(words: str) -> object:
    """Returns the type of a config field such as `phases[0].epochs`; fails if there is no such field."""
    kind = Config
    for name in re.sub(r"\[\d+\]", "", words).split("."):
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        assert name in fields, words
        kind = fields[name]
    return kind


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_to_one_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchors(target).count(anchor) == 1, link


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)
def test_commands_name_modules_options_configs_and_fields_that_exist(page):
    for words in commands(page):
        named = modules(words)
        for module in named:
            assert importlib.util.find_spec(module), words
        for word in words:
            if found := re.match(r"--config\.([\w.\[\]]+)=", word):
                field_of(found.group(1))
            elif named and (found := re.match(r"--(\w+)", word)):
                flag, package = found.group(1), named[0].partition(".")[0]
                assert flag in FOREIGN or re.search(rf'"(--)?{flag}"', options(package)), words
            if found := re.search(r"(configs/\w+(/\w+)*\.py)", word):
                assert (ROOT / found.group(1)).is_file(), words
            if re.match(r"launch/", word):
                assert (ROOT / word).is_file(), words


def test_modules_and_fields_in_running_text_exist():
    for page in PRESENT:
        text = page.read_text()
        for module in re.findall(r"python -m ((?:mc3_jax|data_prep|benchmarks)(?:\.\w+)+)", text):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"
        for field in re.findall(r"--config\.([a-z_]+(?:\[\d\])?(?:\.[a-z0-9_]+)*)=", text):
            field_of(field)


def test_the_fields_that_may_differ_at_the_next_start_are_listed():
    page = (ROOT / "docs" / "training.md").read_text()
    section = page.split("\n## What may differ at the next start\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert sorted(named) == sorted(workdir._FREE)


def test_the_steps_of_the_readme_are_those_of_make_demo():
    done = subprocess.run(
        ["make", "-n", "demo", "WORK=runs/steps"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    made = {}
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        made |= {module: set(words[words.index(module) :]) for module in modules(words)}
    told = {words[2]: set(words[2:]) for words in commands(ROOT / "README.md") if any("runs/steps" in word for word in words)}
    assert len(told) == 5
    for module, words in told.items():
        assert words == made[module] - {"--config.seed=0"}, module  # the config's default
