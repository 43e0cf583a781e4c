"""Documents that are made from the code, and the help texts that the commands' reference is made of."""

import re
import runpy

import click
import pytest

from jigsaw_pretrain.cli import LazyGroup
from jigsaw_pretrain.detect.cli import main as detect
from jigsaw_pretrain.prep.cli import main as prep
from jigsaw_pretrain.train.cli import main as train
from tests.helpers.settings import REPOSITORY


def test_the_reference_of_recipes_is_what_the_code_says() -> None:
    page = runpy.run_path(str(REPOSITORY / "docs" / "recipes.py"))["page"]()
    assert (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8") == page, "run `make docs-reference`"


@pytest.mark.parametrize("stage", [prep, train, detect])
def test_help_texts_are_whole_sentences(stage: LazyGroup) -> None:
    context = click.Context(stage)
    commands = {name: stage.get_command(context, name) for name in stage.list_commands(context)}
    texts = {name: text for name, (_, text) in stage._lazy.items()}
    for name, command in commands.items():
        assert command is not None
        texts |= {f"{name} --help": command.help or ""}
        options = [one for one in command.params if isinstance(one, click.Option)]
        texts |= {f"{name} {one.opts[0]}": one.help or "" for one in options}
    # Choices are named as they are typed; of an option's default click itself says most.
    sentence = re.compile(r"(?:[A-Z]|ignore takes|pixels decodes).*[.?](?: \[default: .*\])?", re.DOTALL)
    bad = [(name, text) for name, text in texts.items() if not sentence.fullmatch(text.strip())]
    assert bad == [], "a help text is a sentence, from its capital to its full stop"


def test_every_test_that_a_document_names_is_there() -> None:
    named = []
    for page in ("architecture.md", "experiments.md", "extending.md", "lab-notebook.md"):
        text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
        named += re.findall(r"(tests/[\w/]+\.py): ((?:test_\w+(?:, )?)+)", text)
        assert [path for path in re.findall(r"tests/[\w/]+\.py", text) if not (REPOSITORY / path).is_file()] == [], page
    assert len(named) > 20
    for path, tests in named:
        there = set(re.findall(r"^def (test_\w+)", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE))
        assert set(tests.rstrip(", ").split(", ")) <= there, path
