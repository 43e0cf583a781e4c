"""Writes docs/recipes.md, the reference of both recipes' keys, from their types, defaults and docstrings.

`make docs-reference` runs it; tests/test_docs.py compares the file with what it would write.
"""

import inspect
from pathlib import Path
from types import ModuleType

from jigsaw_pretrain.config import Config, reference
from jigsaw_pretrain.detect import recipe as detect_recipe
from jigsaw_pretrain.train import recipe as train_recipe

HEAD = """# Recipes

<!-- Written by docs/recipes.py from the docstrings of train/recipe.py and detect/recipe.py: `make docs-reference`. -->

A recipe is a TOML file of sections, such as those in [recipes/](../recipes). A key that it leaves out has its default,
and `--set section.key=value` changes one for one command:

```sh
jigsaw-train pretrain --data OUT --run RUN --recipe recipes/paper-r50.toml --set optim.steps=200 --set data.lanes=none
```

A value is written as in TOML; a bare word is a string, and `none` is no value. `preview`, `erf`, `digest` and
`estimate` take the same two options, so they show what the trainer sees. What does not change the result (workers,
folders, device) is an option of the command and no key.
"""


def chapter(title: str, module: ModuleType, kind: type[Config]) -> str:
    """One recipe: its module's docstring and its sections."""
    said = (inspect.getdoc(module) or "").replace("``", "`")
    return f"## {title}\n\n{said}\n\n{reference(kind)}"


def page() -> str:
    """The text of docs/recipes.md."""
    chapters = (
        chapter("Pre-training", train_recipe, train_recipe.Recipe),
        chapter("Detectors", detect_recipe, detect_recipe.DetectorRecipe),
    )
    return "\n".join((HEAD, *chapters))


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
