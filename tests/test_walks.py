"""The settings of a command pass through few files before the first scores and the first loss."""

from pathlib import Path

from qpipe.tests.walks import walks


def test_settings_pass_through_few_files(tmp_path: Path) -> None:
    score, train = walks(tmp_path)
    assert 0 < len(score.given) <= 18
    assert 0 < len(train.given) <= 20
    assert len(score.made) <= 40
    assert len(train.made) <= 44
