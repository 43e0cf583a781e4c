"""Documents that are made from the code."""

import runpy

from tests.helpers.settings import REPOSITORY


def test_the_reference_of_recipes_is_what_the_code_says() -> None:
    page = runpy.run_path(str(REPOSITORY / "docs" / "recipes.py"))["page"]()
    assert (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8") == page, "run `make docs-reference`"
