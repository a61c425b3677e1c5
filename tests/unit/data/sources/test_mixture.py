"""How often each source of a mix comes, and when."""

import numpy as np
import pytest

from gemtune.data.sources.mixture import epoch_counts, interleave, read_mix
from gemtune.errors import ConfigError


@pytest.mark.parametrize(
    ("rows", "weights", "epoch", "counts"),
    [
        ([10, 30], [None, None], "all", [10, 30]),
        ([10, 30], [1, 1], "all", [30, 30]),
        ([10, 30], [1, 1], "first", [10, 10]),
        ([10, 30], [1.0, 3.0], "all", [10, 30]),
        ([10, 90, 5], [0.5, 0.3, 0.2], "all", [150, 90, 60]),
        ([10, 90, 5], [0.5, 0.3, 0.2], "first", [10, 6, 4]),
        ([1, 1_000_000], [1, 1], "first", [1, 1]),
    ],
)
def test_an_epoch_has_the_shares_of_the_weights(rows, weights, epoch, counts):
    assert epoch_counts(rows, weights, epoch) == counts


def test_each_source_gives_all_its_rows_before_one_comes_again():
    sources, rows = interleave([5, 40], [1, 1], seed=3)
    for source, num_rows in enumerate([5, 40]):
        mine = rows[sources == source]
        for first in range(0, len(mine), num_rows):
            assert sorted(mine[first : first + num_rows]) == list(range(num_rows))
    first, second = rows[sources == 0][:5], rows[sources == 0][5:10]
    assert first.tolist() != second.tolist()  # a new order every time around


def test_the_places_of_a_small_mix():
    assert interleave([1, 3], [1, 3], seed=0)[0].tolist() == [1, 0, 1, 1]
    assert interleave([2, 2], [1, 1], seed=0)[0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("rows", [[7, 300], [3, 50, 11, 20]])
def test_sources_are_spread_evenly(rows):
    weights = list(range(1, len(rows) + 1))
    sources, _ = interleave(rows, weights, seed=0)
    share = np.bincount(sources) / len(sources)
    for source in range(len(rows)):
        come = np.cumsum(sources == source)
        due = share[source] * np.arange(1, len(sources) + 1)
        assert np.abs(come - due).max() <= len(rows) - 1


def test_the_order_is_a_pure_function_of_the_seed():
    np.random.seed(1)
    first = interleave([5, 9], [2, 1], seed=4)
    np.random.seed(2)
    again, other = interleave([5, 9], [2, 1], seed=4), interleave([5, 9], [2, 1], seed=5)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] == other[0]).all() and not (first[1] == other[1]).all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a.jsonl"], r"data.mix\[0\]='a.jsonl' must be an object"),
        ([{"pth": "a"}], r"data.mix\[0\].pth is not a field of a source. Did you mean 'path'"),
        ([{"weight": 1}], r"data.mix\[0\].path=None must name"),
        ([{"path": "a", "weight": float("nan")}], r"data.mix\[0\].weight=nan must be a finite"),
        ([{"path": "a", "weight": float("inf")}], r"data.mix\[0\].weight=inf must be a finite"),
        ([{"path": "a", "weight": 0}], r"data.mix\[0\].weight=0 must be a finite number above 0"),
        ([{"path": "a", "weight": "2"}], r"data.mix\[0\].weight=2 must be a finite number"),
        ([{"path": "a", "weight": True}], r"data.mix\[0\].weight=True must be a finite number"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], r"data.mix\[1\] has no weight, but others"),
        ([{"path": "a", "split": 3}], r"data.mix\[0\].split=3 must be a text"),
        ([{"path": "a", "columns": "x"}], r"data.mix\[0\].columns='x' must be an object"),
    ],
)
def test_a_mix_that_cannot_be(given, says):
    with pytest.raises(ConfigError, match="^" + says):
        read_mix(given)
