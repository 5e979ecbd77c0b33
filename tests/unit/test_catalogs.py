"""The catalogs of translations: complete, as new as the sources, and compiled."""

import gettext
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fsm_storage

ROOT = Path(fsm_storage.__file__).parent
MAKE = [
    "makemessages",
    "--locale",
    "ru",
    "--no-obsolete",
    "--no-wrap",
    "--no-location",
]  # as `make messages` does
PO, MO = (Path("locale/ru/LC_MESSAGES") / f"django.{kind}" for kind in ("po", "mo"))


@pytest.fixture
def tools() -> None:
    if shutil.which("xgettext") is None:
        if os.environ.get("CI"):
            pytest.fail("gettext is not installed")
        pytest.skip("gettext is not installed")


def entries(catalog: Path) -> list[str]:
    """The entries of a .po file, without its head."""
    return catalog.read_text().rstrip().split("\n\n")[1:]


def compiled(catalog: Path) -> dict[object, str]:
    with catalog.open("rb") as file:
        found = dict(vars(gettext.GNUTranslations(file))["_catalog"])
    found.pop("")
    return found


def test_no_text_is_without_its_translation_or_guessed():
    for entry in entries(ROOT / PO):
        assert "#, fuzzy" not in entry
        assert not re.search(r'^msgstr(\[\d\])? ""$', entry, re.MULTILINE), entry


def test_placeholders_are_kept():
    for entry in entries(ROOT / PO):
        wanted, _, told = entry.partition("\nmsgstr")
        for translation in re.split(r"\nmsgstr\[\d\]", told):
            if "python-format" in entry:
                assert set(re.findall(r"%\(\w+\)\w|%s", translation)) == set(
                    re.findall(r"%\(\w+\)\w|%s", wanted)
                )


def test_the_catalog_is_as_new_as_the_sources(tools, tmp_path):
    """If not: `make messages`, and translate what it has found."""
    copy = tmp_path / "fsm_storage"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__", "vendor", "*.mo"))
    env = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, "-m", "django", *MAKE],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert entries(copy / PO) == entries(ROOT / PO)


def test_the_compiled_catalog_is_that_of_the_texts(tools, tmp_path):
    """If not: `make messages`."""
    subprocess.run(["msgfmt", "--check-format", "-o", tmp_path / "new.mo", ROOT / PO], check=True)
    assert compiled(tmp_path / "new.mo") == compiled(ROOT / MO)
