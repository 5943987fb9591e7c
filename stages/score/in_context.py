"""`qpipe score --at --context`: scores a folder's examples under a prompt of the teacher's own.

The demonstrations of the folder are read again, a system message is put in front, and the teacher
scores the same supervised tokens after it: self-distillation with privileged context (arXiv
2601.18734, 2601.19897, 2602.12275). The message is a Jinja template over the fields of a row, so it
may hold a hint or the answer. Each example keeps its id, its supervised tokens and their weights;
its other tokens are the teacher's own. An example is rejected if the context changes how its
supervised tokens are tokenised, which are compared one by one.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.errors import UserError, one_line, reason
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.folders.shard_run import Job
from ...pipeline.format.batches import split
from ...pipeline.format.records import Reject, ScoredExample, WeightedExample
from ...trainer.models.files import ModelFiles
from ..demonstrations.demonstration import Demonstration, Messages, UnusableError
from ..demonstrations.formats import check_readable, parse_row
from ..demonstrations.messages import value_of
from ..demonstrations.sources import open_sources
from ..encoding.encoder import Encoded
from ..encoding.sandbox.environment import compiled_plainly
from ..encoding.sandbox.overruns import Overruns
from ..encoding.sandbox.watch import TooMuchError, watched
from ..engines.base import GivenIds
from .from_demonstrations import Demonstrations, unusable
from .settings import ScoreSettings
from .stage import ShardInput

if TYPE_CHECKING:
    from jinja2 import Template


class ExamplesInContext:
    """Reads the examples of a score folder, each behind a context, with the ids stored there."""

    gathers = True

    def __init__(
        self,
        settings: ScoreSettings,
        folder: SealedFolder,
        model: ModelFiles,
        stage_at: Callable[..., Any],
    ) -> None:
        """`stage_at` makes the stage of settings and a job, in a worker."""
        assert settings.context is not None
        self._stage_at = stage_at
        self.folder = folder
        self.context = Context(settings.context)
        size = folder.settings.get("shard_size")
        if size is None:
            raise UserError(
                f"{folder.path}: was not made from demonstrations: --context cannot read them again"
            )
        rows = replace(settings.rows, shard_size=size)
        sources = open_sources(rows.demonstrations)
        self.demonstrations = Demonstrations(rows, sources, model, settings.out)
        check_readable(sources, rows.format, self.demonstrations.columns)
        self.max_length = self.demonstrations.max_length
        self.vocab_size = model.vocab_size

    def settings(self) -> dict[str, Any]:
        return self.demonstrations.settings() | {"context": self.context.text}

    def inputs(self) -> dict[str, str]:
        return {"at": self.folder.manifest.fingerprint, **self.demonstrations.inputs()}

    def parents(self) -> dict[str, Any]:
        return {"at": self.folder.manifest.as_parent}

    def rebuild(self, settings: Any, job: Job) -> tuple[Any, ...]:
        return self._stage_at, (self.demonstrations.dated(settings), job)

    @property
    def count(self) -> int | None:
        return self.folder.manifest.totals["rows"]

    @property
    def shard_count(self) -> int | None:
        return len(self.folder.shards)

    def read(self, index: int) -> ShardInput | None:
        found: dict[str, deque[_Found]] = defaultdict(deque)  # an id may stand in several rows
        for row, encoded in self._encoded(index):
            found[row.id].append((row, encoded))
        at: list[GivenIds] = []
        shard = ShardInput(at=at)
        for batch in self.folder.batches(index):
            scored: ScoredExample
            for scored in split(self.folder.schema, batch):
                if not found[scored.id]:
                    raise UserError(
                        f"{self.folder.path}: its example {scored.id} is not among the "
                        "demonstrations: give --demonstrations as when it was made"
                    )
                example = _same_answer(scored, found[scored.id].popleft())
                if isinstance(example, Reject):
                    if self.demonstrations.options.strict:
                        raise unusable(example)
                    shard.content.rejects.append(example)
                    continue
                shard.examples.append(example)
                given = GivenIds(scored.counts, scored.topk_ids)
                at.append(given.below(self.vocab_size))
        return shard

    def _encoded(self, index: int) -> Iterator["_Found"]:
        """The demonstrations of a shard, each encoded behind the context, or rejected."""
        reader, options = self.demonstrations, self.demonstrations.options
        size = options.shard_size
        for source, line, raw in reader.rows.read(index * size, (index + 1) * size):
            row = parse_row(source, line, raw, options.format, reader.columns)
            if isinstance(row, Reject):  # as when the folder was made
                continue
            try:
                behind = self.context.before(row, value_of(raw))
            except UnusableError as error:
                yield row, Reject(row.source, row.line, reason(error))
            except TooMuchError as error:
                yield row, self.context.overruns.reject(row, error)
            else:
                yield row, reader.encoder.encode(behind)


class Context:
    """A Jinja template over the fields of a row, as a system message."""

    def __init__(self, option: str) -> None:
        """`option` is the template's text, or @ and the path of a file with it."""
        self.text = _text_of_file(Path(option[1:])) if option.startswith("@") else option
        self.overruns = Overruns("--context", "give a template that takes less")
        _ = self._template

    def before(self, demonstration: Demonstration, row: dict[str, Any]) -> Demonstration:
        """The demonstration with the context in front; UnusableError where it has no value.

        Raises TooMuchError for a template that takes too much.
        """
        try:
            text = watched(lambda: self._template.render(row))
        except TooMuchError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise UnusableError(f"--context: {one_line(error)}") from error
        messages: Messages = list(demonstration.messages)
        added = not (messages and messages[0]["role"] == "system")
        if added:
            messages.insert(0, {"role": "system", "content": text})
        elif isinstance(content := messages[0]["content"], str):
            messages[0] = messages[0] | {"content": f"{content}\n\n{text}"}
        else:
            raise UnusableError("--context: the system message of the row is not a text")
        prompt_length, weights = demonstration.prompt_length, demonstration.weights
        return replace(
            demonstration,
            messages=messages,
            weights=((None,) * added + weights) if weights else (),
            prompt_length=prompt_length + added if prompt_length else 0,
        )

    @cached_property
    def _template(self) -> "Template":
        try:
            return compiled_plainly(self.text)
        except Exception as error:  # of Jinja's compiler, such as RecursionError
            raise UserError(f"--context: not a Jinja template: {one_line(error)}") from error


def _text_of_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--context @{path}: cannot be read: {one_line(error)}") from error


_Found = tuple[Demonstration, Encoded | Reject]


def _same_answer(scored: ScoredExample, found: _Found) -> WeightedExample | Reject:
    """The example behind the context, or a reject that names the first other supervised token."""
    row, encoded = found
    if isinstance(encoded, Reject):
        return encoded
    example = encoded.example
    pairs = (each.observed_ids.tolist() for each in (scored, example))
    for place, (theirs, ours) in enumerate(zip_longest(*pairs, fillvalue="absent")):
        if theirs != ours:
            return Reject(
                row.source,
                row.line,
                f"behind the context supervised token {place} is {ours}, not {theirs}",
            )
    return WeightedExample(scored.id, example.input_ids, example.positions, scored.token_weights)
