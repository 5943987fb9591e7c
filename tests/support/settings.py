"""The settings of `qpipe score` from flat keywords: names of fields, or `server_…`."""

from dataclasses import fields
from typing import Any

from qpipe.stages.engines.settings import EngineSettings, ServerSettings
from qpipe.stages.score.settings import RowSettings, ScoreSettings

_SERVER = {"server_requests": "concurrency"}


def score_settings(**options: Any) -> ScoreSettings:
    """The settings, their parts filled in."""
    server = {
        _SERVER.get(name, name.removeprefix("server_")): options.pop(name)
        for name in list(options)
        if name.startswith("server_")
    }
    rows = RowSettings(**_of(RowSettings, options))
    engine = EngineSettings(**_of(EngineSettings, options), server=ServerSettings(**server))
    return ScoreSettings(rows=rows, engine=engine, **options)


def _of(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {each.name: options.pop(each.name) for each in fields(kind) if each.name in options}
