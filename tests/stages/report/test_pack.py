"""What a page unpacks is what was packed."""

import base64
import zlib

import numpy as np
from qpipe.pipeline.targets.distributions import Supports
from qpipe.stages.report.pack import MOST_ROWS, alternatives, packed, quantised


def supports(*rows: dict[int, float]) -> Supports:
    return Supports(
        np.array([len(row) for row in rows]),
        np.array([each for row in rows for each in row], np.int32),
        np.log([p for row in rows for p in row.values()]),
        np.array([1 - sum(row.values()) for row in rows]),
    )


def test_columns_are_packed_plane_by_plane() -> None:
    columns = [np.array([1, 515], np.uint16), np.array([7], np.uint8), np.array([], np.uint32)]
    content = zlib.decompress(base64.b64decode(packed(columns)))
    assert content == b"\x02\0\0\0\x01\x03\x00\x02" + b"\x01\0\0\0\x07" + b"\0\0\0\0"


def test_numbers_are_rounded_to_their_unit_and_cut_at_the_largest() -> None:
    assert quantised("nats", np.array([1.234, 0.0, 1e9])).tolist() == [123, 0, 65535]
    assert quantised("log-prob", np.array([0.5, 0.0])).tolist() == [693, 65535]
    assert quantised("rank", np.array([1.0, 70000.0])).tolist() == [1, 65535]


def test_alternatives_are_those_of_any_distribution_under_all_of_them() -> None:
    own = supports({5: 0.9, 6: 0.1}, {8: 1.0})
    base = supports({7: 0.6, 5: 0.2, 6: 0.1, 9: 0.001}, {8: 0.5, 9: 0.25})
    found = alternatives({"target": own, "base": base}, np.array([5, 8], np.int32), most=2)
    assert found.counts.tolist() == [3, 2]
    assert found.ids.tolist() == [5, 6, 7, 8, 9]
    share = {role: (probs / 255) ** 2 for role, probs in found.probs.items()}
    np.testing.assert_allclose(share["target"], [0.9, 0.1, 0, 1, 0], atol=0.005)
    np.testing.assert_allclose(share["base"], [0.2, 0.1, 0.6, 0.5, 0.25], atol=0.005)


def test_the_observed_token_stays_where_there_are_too_many() -> None:
    many = dict.fromkeys(range(10, 22), 0.05) | {99: 0.0001}
    found = alternatives({"base": supports(many)}, np.array([99], np.int32), most=12)
    assert found.counts.tolist() == [MOST_ROWS]
    assert 99 in found.ids.tolist()
