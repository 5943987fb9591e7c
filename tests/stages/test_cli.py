"""Options: several values after one name, and config files."""

from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.stages.cli import cli, command_of


def parsed(command: str, *words: object) -> dict[str, Any]:
    """The parameters that a command would run with."""
    arguments = [str(word) for word in words]
    group = click.Context(cli, info_name="qpipe")
    return command_of(command).make_context(command, arguments, parent=group).params


def config_file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_the_list_of_commands_has_the_first_line_of_each() -> None:
    lines = {name: each.short_help for name, each in cli.commands.items()}
    assert lines == {name: command_of(name).get_short_help_str(limit=200) for name in lines}


SCORE = ("--model", "m", "--out", "o")
BUILD = ("--scores", "s", "--out", "o")


def test_an_option_takes_several_values_and_may_be_repeated() -> None:
    words = ("--demonstrations", "a", "b", *SCORE, "--demonstrations", "c")
    assert parsed("score", *words)["demonstrations"] == ("a", "b", "c")
    assert parsed("score", "--demonstrations=a", "b", *SCORE)["demonstrations"] == ("a", "b")
    assert parsed("build-targets", *BUILD, "--param", "x=1", "y=-2")["params"] == ("x=1", "y=-2")


def test_a_value_after_an_option_that_takes_one_is_refused() -> None:
    with pytest.raises(click.UsageError, match="unexpected extra argument"):
        parsed("score", *SCORE, "--demonstrations", "a", "--top-k", 3, 4)


def test_a_folder_behind_such_an_option_is_missed_with_the_reason() -> None:
    with pytest.raises(
        click.UsageError, match=r"'DIR'.* --where takes all values after it: put it"
    ):
        parsed("subset", "--where", "tokens < 3", "scores", "--out", "o")
    for words in (("subset", "--out", "o"), ("score", "--demonstrations", "a", "b", "--out", "o")):
        with pytest.raises(click.MissingParameter):
            parsed(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("score", *SCORE, "--plan", "--gpu-memory", "nan"), "nan is not a finite number"),
        (("score", *SCORE, "--plan", "--gpu-speed", "inf"), "inf is not in the range 0.001<"),
        (("score", *SCORE, "--plan", "--gpu-speed", "1e-310"), "1e-310 is not in the range 0.001<"),
        (("score", *SCORE, "--plan", "--gpu-tflops", "1e300"), "not in the range 0.001<=x<="),
        (("score", *SCORE, "--plan", "--gpu-memory", "0.001"), "0.001 is not in the range 1<=x<="),
        (("verify", "t", "--seed", "-1"), "-1 is not in the range"),
        (("list", "root", "--stage", "targets"), "'targets' is not one of 'score'"),
    ],
)
def test_values_out_of_range(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(click.BadParameter, match=message):
        parsed(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "t", "--max-megabytes", "nan"), "nan is out of range: give 0.1 or more"),
        (("report", "t", "--alternatives", "9"), "9 is out of range: give 0 to 8"),
        (("report", "t", "--seed", "-1"), "-1 is out of range: give 0 or more"),
        (("inspect", "t", "--seed", "-1"), "-1 is out of range: give 0 or more"),
        (("inspect", "t", "-n", "-1"), "-n -1 is out of range: give 0 or more"),
        (("inspect", "t", "--random", "0"), "--random 0 is out of range: give 1 or more"),
    ],
)
def test_settings_out_of_range(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.main(list(words), standalone_mode=False)


def test_a_config_file_gives_defaults_and_the_command_line_wins(tmp_path: Path) -> None:
    config = config_file(tmp_path, "model: m\nout: o\ndemonstrations: a.jsonl\ntop-k: 3\n")
    given = parsed("score", "--config", config, "--out", "elsewhere")
    assert given["model"] == "m"
    assert given["demonstrations"] == ("a.jsonl",)
    assert given["top_k"] == 3
    assert given["out"] == Path("elsewhere")


def test_a_command_takes_its_section_of_a_shared_config_file(tmp_path: Path) -> None:
    config = config_file(
        tmp_path,
        "score: {top_k: 3}\nbuild-targets: {param: [lam=0.2], top-p: 0.9}\n"
        "train: {learning-rate: 2e-5}\n",
    )
    given = parsed("build-targets", *BUILD, "--config", config)
    assert given["params"] == ("lam=0.2",)
    assert given["top_p"] == 0.9
    trained = parsed("train", "--targets", "t", "--model", "m", "--out", "o", "--config", config)
    assert trained["learning_rate"] == 2e-5
    config.write_text("score: {top-k: 3}\n")
    assert parsed("build-targets", *BUILD, "--config", config)["top_p"] == 0.99


def test_parameters_may_be_a_mapping_and_numbers_are_read_as_words(tmp_path: Path) -> None:
    config = config_file(tmp_path, "param: {lam: 0.2}\ntop-p: 1\nmethod: sft+kl\n")
    given = parsed("build-targets", *BUILD, "--config", config)
    assert (given["params"], given["top_p"]) == (("lam=0.2",), 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour: 1\n", "has no option --colour"),
        ("- a\n", "must hold options"),
        ("build-targets: 3\n", "must hold options"),
        ("a: [\n", "cannot be read"),
        ("top-k: 2024-13-45\n", "cannot be read: month must be in 1..12"),
        ("top-p: [1, 2]\n", "--top-p takes one value"),
        ("method: {a: 1}\n", "--method takes one value"),
        ("top-p: null\n", "--top-p: None is not a value"),
        ("param: [[1]]\n", "--param: [[1]] is not a value"),
        ("config: other.yaml\n", "has no option --config"),
        ('log-json: ""\n', "'--log-json': '' is not a file name"),
        ('log-json: "\\ud800"\n', "--log-json holds half a surrogate pair or a NUL: '\\ud800'"),
        ('log-json: "a\\0b"\n', "--log-json holds half a surrogate pair or a NUL: 'a\\x00b'"),
    ],
)
def test_a_config_file_that_means_nothing_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(click.ClickException) as refused:
        parsed("build-targets", *BUILD, "--config", config_file(tmp_path, text))
    assert words in refused.value.format_message()


def test_a_config_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException) as refused:
        parsed("build-targets", *BUILD, "--config", tmp_path / "missing.yaml")
    assert "missing.yaml: cannot be read" in refused.value.format_message()


def each_in_the_next(lists: int, times: int) -> str:
    """A list of lists, each of which holds the one before it some times over."""
    rows = [", ".join([f"*a{number - 1}"] * times) for number in range(1, lists)]
    return f"[&a0 [1], {', '.join(f'&a{n} [{row}]' for n, row in enumerate(rows, 1))}]"


@pytest.mark.parametrize(
    "value",
    [
        each_in_the_next(3000, times=1),
        f"{{x: {each_in_the_next(3000, times=1)}}}",
        each_in_the_next(10, times=9),  # three hundred million values
        "{x: [1]}",
        "&a [*a]",
        "&a {x: *a}",
        "{}",
    ],
    ids=range(7),
)
def test_a_config_file_of_values_within_values(tmp_path: Path, value: str) -> None:
    config = config_file(tmp_path, f"param: {value}\n")
    with pytest.raises(click.ClickException, match=r"--param: .* is not a value") as refused:
        parsed("build-targets", *BUILD, "--config", config)
    assert len(refused.value.format_message()) < 500


@pytest.mark.parametrize("depth", [100, 5000])
def test_a_config_file_of_nested_lists(tmp_path: Path, depth: int) -> None:
    config = config_file(tmp_path, f"top-k: {'[' * depth}{']' * depth}\n")
    with pytest.raises(click.ClickException, match="--config"):
        parsed("score", "--config", config)


def test_a_process_that_imports_the_main_module_does_not_run_it() -> None:
    """As the processes of vLLM's engine do, which are spawned."""
    import_module("qpipe.stages.__main__")
