"""Configuration: TOML files and ``--set section.key=value`` become frozen, typed records, with errors of one line.

A configuration is a ``Config`` whose fields are sections, and a section is a ``Record`` of fields that are documented
below them. Types are msgspec's: ``Literal`` for choices, ``Annotated[float, msgspec.Meta(ge=0, le=1)]`` for bounds (an
upper one refuses infinity). A value is checked however the record is made, and nothing is converted but a whole number
to a number and a list to a tuple. Costs microseconds per field. Prefer a command's own option for what does not decide
the result.
"""

import ast
import difflib
import errno
import inspect
import json
import stat
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import msgspec

from jigsaw_pretrain.errors import UserError

LIMIT = 10**9
"""The largest number where there is no other bound; it keeps out infinity."""

Count = Annotated[int, msgspec.Meta(ge=1, le=LIMIT)]
"""A whole number of things, at least one."""

CountOrZero = Annotated[int, msgspec.Meta(ge=0, le=LIMIT)]

Number = Annotated[float, msgspec.Meta(ge=-LIMIT, le=LIMIT)]

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

ShareBelowOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]

Positive = Annotated[float, msgspec.Meta(gt=0, le=LIMIT)]

PositiveOrZero = Annotated[float, msgspec.Meta(ge=0, le=LIMIT)]


def as_number(text: str) -> float:
    """The number that a text is, as every language reads it; raises ValueError.

    Python's own reading takes ``0_5`` for 5, and digits of other alphabets.
    """
    if "_" in text or not text.isascii():
        raise ValueError(f"{text!r} is no number")
    return float(text)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen record whose fields hold values of their declared types and bounds; UserError otherwise.

    Declare subclasses with ``kw_only=True``; checks across fields go into ``__post_init__``, after super's.
    """

    def __post_init__(self) -> None:
        """Check every field."""
        for field in msgspec.structs.fields(self):
            value = checked(getattr(self, field.name), field.type, f"{type(self).__name__}.{field.name}")
            msgspec.structs.force_setattr(self, field.name, value)


def check_fields(record: Any) -> None:
    """Check every field of a dataclass as a Record does, but leave each value as it was given.

    What a dataset records of an option is part of its digest, and 2 is recorded as another text than 2.0.
    """
    for name, kind in get_type_hints(type(record), include_extras=True).items():
        checked(getattr(record, name), kind, f"{type(record).__name__}.{name}")


def _own_recipes() -> dict[str, Traversable]:
    """The TOML files that come with the program, by name."""
    found = resources.files("jigsaw_pretrain.recipes").iterdir()
    return {one.name.removesuffix(".toml"): one for one in found if one.name.endswith(".toml")}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file: of that path, else, of a plain name, of the program's own recipes.

    Raises UserError, naming the remedy.
    """
    own = _own_recipes().get(str(path))
    file: Traversable = own if own is not None and not Path(path).exists() else Path(path)
    try:
        return parse_toml(read_bytes(file), str(path))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name a TOML file, or a recipe that comes with the program "
            f"({', '.join(sorted(_own_recipes()))})"
        ) from error


def parse_toml(raw: bytes, where: str) -> dict[str, Any]:
    """The values of a TOML file's bytes; raises UserError, which calls the file ``where``."""
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        # Python's own words on numbers of thousands of digits and on arrays in arrays without end, too.
        raise UserError(f"{where} is not valid TOML: {error}") from error


def read_bytes(file: Traversable) -> bytes:
    """The bytes of a file that a user named; raises OSError, also for what does not end: a FIFO, a device."""
    if isinstance(file, Path) and not file.is_dir() and not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "not a file but a FIFO, socket or device", str(file))
    return file.read_bytes()


class Config(Record, frozen=True):
    """A record of sections, read from TOML and settings and written as TOML or plain values."""

    @classmethod
    def load(cls, path: str | Path | None = None, settings: Iterable[str] = ()) -> Self:
        """Read a configuration: a TOML file, or the defaults, with settings laid over it.

        Args:
            path: the TOML file, or the name of one that comes with the program (``sample``); None for the defaults.
            settings: ``section.key=value`` each, the value as TOML has it; a bare word is a string and ``none`` is
                no value. A later one wins.

        Raises:
            UserError: naming the file or ``--set``, the key with its section, and the remedy.
        """
        if path is None:
            return cls()._with({}, settings, ())
        return cls()._with(read_toml(path), settings, (str(path),))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read plain values as ``to_dict`` gave them.

        Args:
            values: a mapping of each section's keys to their values.
            where: what errors name, such as a file.

        Raises:
            UserError: for unknown keys and wrong values, and for the flat keys that versions before sections wrote.
        """
        keys = {path.partition(".")[2] for path in _kinds(cls)}
        if any(key in keys and not isinstance(value, Mapping) for key, value in values.items()):
            raise UserError(
                f"{where} keeps its recipe without sections, as versions before 0.1.0 did: it cannot be continued or "
                "read by this version; start a new run"
            )
        return cls()._with(values, (), (where,))

    def updated(self, *settings: str) -> Self:
        """The same with ``section.key=value`` settings laid over it; raises as ``load`` does."""
        return self._with({}, settings, ())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section (lists for tuples), for JSON and checkpoints."""
        values: dict[str, dict[str, Any]] = msgspec.to_builtins(self)
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
            for section, table in values.items()
        }

    def to_toml(self) -> str:
        """A TOML file that gives this configuration again; a key without a value is left out."""
        sections = []
        for section, table in self.to_dict().items():
            # JSON's strings, numbers, booleans and lists are TOML's.
            lines = [
                f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items() if value is not None
            ]
            sections.append("\n".join((f"[{section}]", *lines)) + "\n")
        return "\n".join(sections)

    def differences(self, other: Self) -> list[str]:
        """``section.key = mine, was theirs`` for every key that differs."""
        mine, theirs = dict(_flat(self.to_dict())), dict(_flat(other.to_dict()))
        return [f"{key} = {_shown(mine[key])}, was {_shown(theirs[key])}" for key in mine if mine[key] != theirs[key]]

    def _with(self, values: Mapping[str, Any], settings: Iterable[str], sources: tuple[str, ...]) -> Self:
        """Lay values and then settings over this configuration, each checked under its own source's name."""
        kinds, found = _kinds(type(self)), dict(_flat(self.to_dict()))
        for section, table in values.items():
            if not isinstance(table, Mapping):
                if section in self.__struct_fields__:
                    raise UserError(f"{sources[0]}: {section} is a section: write [{section}] and its keys below it")
                raise _unknown(section, kinds, sources[0])
            for key, value in table.items():
                if (path := f"{section}.{key}") not in kinds:
                    raise _unknown(path, kinds, sources[0])
                found[path] = checked(value, kinds[path], f"{sources[0]}: {path}")
        for setting in settings:
            path, equals, text = (part.strip() for part in setting.partition("="))
            if not equals:
                raise UserError(f"--set {setting}: write it as section.key=value, such as --set optim.steps=200")
            if path not in kinds:
                raise _unknown(path, kinds, f"--set {setting}")
            found[path] = checked(_value(text, kinds[path]), kinds[path], f"--set {setting}: {path}")
            sources = (*sources, f"--set {setting}")
        tables: dict[str, dict[str, Any]] = {}
        for path, value in found.items():
            section, _, key = path.partition(".")
            tables.setdefault(section, {})[key] = value
        sections = {field.name: field.type for field in msgspec.structs.fields(self)}
        try:
            # Built once, from everything: some keys are judged together.
            return type(self)(**{name: sections[name](**table) for name, table in tables.items()})
        except UserError as error:
            raise UserError(f"{', '.join(sources)}: {error.message}" if sources else error.message) from error


def choices(kind: Any) -> tuple[str, ...]:
    """The strings of a ``Literal``, in the order of its declaration."""
    assert get_origin(kind) is Literal, kind
    return get_args(kind)


def describe(kind: Any, with_limit: bool = True) -> str:
    """What a field's values may be, in words: ``a whole number of at least 1``, ``one of crop, warp, resize``.

    Without ``with_limit``, a bound that is only LIMIT is not mentioned.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        metas = [one for one in args[1:] if isinstance(one, msgspec.Meta)]
        return describe(args[0], with_limit) + "".join(_bounds(meta, with_limit) for meta in metas)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin in (Union, UnionType):
        return " or ".join("none" if one is NoneType else describe(one, with_limit) for one in args)
    if origin is tuple:
        return f"a list of {describe(args[0], with_limit).removeprefix('a ').replace('number', 'numbers', 1)}"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(kind, str(kind))


def reference(kind: type[Config]) -> str:
    """The sections and fields of a configuration as Markdown, from their types, defaults and docstrings."""
    parts = []
    for section in msgspec.structs.fields(kind):
        said = _field_docs(section.type)
        parts.append(f"### [{section.name}]\n\n{inspect.cleandoc(section.type.__doc__ or '').splitlines()[0]}\n")
        parts.append("| key | value | default | what it does |\n| --- | --- | --- | --- |")
        for field in msgspec.structs.fields(section.type):
            text = said[field.name].replace("|", "\\|")
            parts.append(
                f"| `{field.name}` | {describe(field.type, with_limit=False)} | `{_shown(field.default)}` | {text} |"
            )
        parts.append("")
    return "\n".join(parts)


def _field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a class, in one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in pairwise(tree.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _kinds(kind: type[Config]) -> dict[str, Any]:
    """The type of each ``section.key``."""
    return {
        f"{section.name}.{field.name}": field.type
        for section in msgspec.structs.fields(kind)
        for field in msgspec.structs.fields(section.type)
    }


def _flat(values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for section, table in values.items():
        for key, value in table.items():
            yield f"{section}.{key}", value


def _unknown(path: str, kinds: Mapping[str, Any], where: str) -> UserError:
    """The error for a key that does not exist, with the nearest one that does, whatever section it was given in."""
    by_key = {known.partition(".")[2]: known for known in kinds}
    near = difflib.get_close_matches(path.rpartition(".")[2], by_key, n=1, cutoff=0.5)
    sections = dict.fromkeys(known.partition(".")[0] for known in kinds)
    hint = (
        f"did you mean {by_key[near[0]]}?" if near else f"the sections are {', '.join(sections)}, see docs/recipes.md"
    )
    return UserError(f"{where}: unknown key {path}; {hint}")


def _value(text: str, kind: Any) -> Any:
    """A setting's text as TOML reads it; a bare word is a string, and ``none`` is no value where there may be none."""
    if text == "none" and NoneType in get_args(kind):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def checked(value: Any, kind: Any, where: str) -> Any:
    """The value as a field of this type holds it; raises UserError, which calls it ``where``."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} must be {describe(kind)}, not {_shown(value)}") from error


def _bounds(meta: msgspec.Meta, with_limit: bool) -> str:
    given = {"of at least": meta.ge, "above": meta.gt, "at most": meta.le, "below": meta.lt}
    said = {
        word: f"{bound:,}" for word, bound in given.items() if bound is not None and (with_limit or abs(bound) != LIMIT)
    }
    if said.keys() == {"of at least", "at most"}:
        return f" from {said['of at least']} to {said['at most']}"
    return "".join(f" {'and ' if nth else ''}{word} {bound}" for nth, (word, bound) in enumerate(said.items()))


def _shown(value: Any) -> str:
    """A value as TOML and ``--set`` have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value)
