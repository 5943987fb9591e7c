"""Options that several commands share, and options made of settings dataclasses."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, Field
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import click

from ...pipeline.errors import option_of, shown
from ...pipeline.options import Option, choices_of, described, names_of
from ..execution.settings import Execution

Settings = TypeVar("Settings")


class _Place(click.ParamType):
    """A path, or a URL of fsspec."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from ...pipeline.storage.remote import open_path

        return open_path(value)


class _FileToWrite(click.Path):
    """A local file to write or overwrite, in an existing folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = cast(Path, super().convert(value, param, ctx))
        if not path.name:
            self.fail(f"{value!r} is not a file name", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{path.parent} is not a folder", param, ctx)
        return path


class Number(click.FloatRange):
    """A finite number within a range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


FOLDER, FILE = _Place("folder"), _Place("file")
FILE_TO_WRITE = _FileToWrite()


class Command(click.Command):
    """A command whose options may take several values after one name, as in `--scores a b c`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and parameter.multiple
            for name in parameter.opts
        }
        spread: list[str] = []
        current = greedy = None
        for argument in args:
            name = argument.partition("=")[0]
            if argument.startswith("-") and argument != "-":
                current = name if name in several else None
            elif current is not None and spread[-1] != current:
                spread.append(current)
                greedy = current
            spread.append(argument)
        try:
            return super().parse_args(ctx, spread)
        except click.MissingParameter as error:
            if greedy is None or not isinstance(error.param, click.Argument):
                raise
            message = f"{error.format_message()} {greedy} takes all values after it: put it last"
            raise click.UsageError(message, ctx) from error


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Use the options of a YAML file as defaults; the command line takes precedence."""
    if path is None:
        return
    import yaml

    try:
        config = yaml.safe_load(path.read_text()) or {}
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise click.ClickException(f"--config {path}: cannot be read: {error}") from error
    group = ctx.parent.command if ctx.parent else None
    commands = group.commands if isinstance(group, click.Group) else {}
    if isinstance(config, dict) and config.keys() & commands.keys():
        config = config.get(ctx.info_name) or {}
    if not isinstance(config, dict):
        raise click.ClickException(f"--config {path}: must hold options, as in `top-k: 64`")
    ctx.default_map = dict(_default(ctx, path, str(key), val) for key, val in config.items())


def _default(ctx: click.Context, path: Path, key: str, value: Any) -> tuple[str, Any]:
    """The parameter for a key of a config file, and its value in the form that click takes."""
    option = option_of(key)
    for parameter in ctx.command.params:
        if option in parameter.opts and option != "--config" and parameter.name is not None:
            named = value if isinstance(value, dict) else {}
            values = value if isinstance(value, list) else list(named.values()) or [value]
            if any(isinstance(one, list | dict | None) for one in values):
                raise click.ClickException(
                    f"--config {path}: {option}: {shown(value)} is not a value: give one, or "
                    "leave it out"
                )
            if not parameter.multiple and isinstance(value, list | dict):
                raise click.ClickException(
                    f"--config {path}: {option} takes one value, not {shown(value)}"
                )
            words = [f"{name}={one}" for name, one in named.items()] or list(map(str, values))
            if not all(map(_can_be_typed, words)):
                raise click.ClickException(
                    f"--config {path}: {option} holds half a surrogate pair or a NUL: "
                    f"{shown(value)}: leave that out"
                )
            return parameter.name, words if parameter.multiple else words[0]
    raise click.ClickException(f"--config {path}: `{ctx.command_path}` has no option {option}")


def _can_be_typed(word: str) -> bool:
    try:
        return b"\0" not in word.encode()
    except UnicodeEncodeError:
        return False


def options_of(
    *kinds: type, only: Sequence[str] = (), without: Collection[str] = (), **changes: Any
) -> Callable[[Any], Any]:
    """A decorator that adds an option for each described field of settings dataclasses, in order.

    `only`, in this order, and `without` are names of fields; `changes` are arguments of
    `click.option` by field.
    """
    chosen = [
        (each, about)
        for kind in kinds
        for each, about in described(kind).items()
        if each.name in (only or {each.name}) and each.name not in without
    ]
    if only:
        chosen.sort(key=lambda pair: only.index(pair[0].name))

    def decorate(command: Any) -> Any:
        for each, about in reversed(chosen):
            names = names_of(each, about)
            parameter = _parameter(each, about)
            if each.default is True:
                names = (f"{names[0]}/--no-{names[0][2:]}",)
            given = _arguments(each, about) | changes.get(each.name, {})
            command = click.option(*names, parameter, **given)(command)
        return command

    return decorate


def take(kind: Callable[..., Settings], options: dict[str, Any], **others: Any) -> Settings:
    """The settings dataclass of options added by `options_of`; these are removed from `options`."""
    given = {
        each.name: options.pop(name)
        for each, about in described(kind).items()
        if (name := _parameter(each, about)) in options
    }
    return kind(**given, **others)


def _parameter(each: Field[Any], about: Option) -> str:
    return names_of(each, about)[0].lstrip("-").replace("-", "_")


def _arguments(each: Field[Any], about: Option) -> dict[str, Any]:
    """Arguments of `click.option` for the annotation and the default of a field."""
    choices = choices_of(each.type)
    types = _types_in(each.type)
    kind = next((one for one in (bool, int, float, Path) if one in types), str)
    given: dict[str, Any] = {
        "help": about.help,
        "metavar": about.metavar,
        "multiple": tuple in types,
        "type": click.Choice(choices) if choices else FOLDER if kind is Path else kind,
    }
    if each.default is MISSING:
        return given | {"required": True}
    if tuple in types:
        return given
    return given | {"default": each.default, "is_flag": kind is bool}


def _types_in(annotation: Any) -> set[Any]:
    """The types in an annotation: {tuple, Path} for `tuple[Path, ...]`."""
    parts = get_args(annotation)
    own = {annotation} if not parts else {get_origin(annotation)}
    return own.union(*map(_types_in, parts))


def config_option(command: Any) -> Any:
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="YAML file of options (`top-k: 64`), or of one section per command (`score: "
        "{…}`). Options on the command line take precedence.",
    )(command)


def log_json_option(help: str) -> Any:
    """`--log-json`, a file of JSON lines that the command appends to."""
    return click.option("--log-json", type=FILE_TO_WRITE, default=None, metavar="FILE", help=help)


execution_options = options_of(Execution, log_json={"type": FILE_TO_WRITE})


def out_options(command: Any) -> Any:
    """`--out` and `--store`, one of which `take_place` turns into settings."""
    command = click.option(
        "--store",
        type=FOLDER,
        default=None,
        metavar="ROOT",
        help="Root of a store; replaces --out. The folder is named by its fingerprint there, "
        "and an existing one is reused.",
    )(command)
    return click.option("--out", type=FOLDER, default=None, help="Output folder.")(command)


def take_place(options: dict[str, Any]) -> None:
    """Replace `out_options` by the settings `out` and `in_store`."""
    store = options.pop("store")
    if (store is None) == (options["out"] is None):
        raise click.UsageError("give either --out DIR or --store ROOT")
    options["in_store"] = store is not None
    options["out"] = options["out"] if store is None else store
