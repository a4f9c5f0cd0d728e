"""Episodes are drawn without replacement over passes of the table."""

import numpy as np
import pytest

from protoclip_lab.data.batches import Episodes


@pytest.mark.parametrize("rows, size", [(10, 4), (10, 10), (12, 4), (7, 5), (100, 33), (5, 4), (1000, 999)])
def test_every_sample_once_before_any_twice(rows, size):
    episodes = Episodes(rows, size, seed=3)
    stream = np.concatenate([episodes.ids(e) for e in range(1, 40)])
    counts = np.zeros(rows, int)
    for sample in stream:
        counts[sample] += 1
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("rows, size", [(10, 4), (7, 5), (100, 33), (5, 4), (1000, 999)])
def test_no_episode_holds_a_sample_twice(rows, size):
    episodes = Episodes(rows, size, seed=1)
    for e in range(1, 60):
        ids = episodes.ids(e)
        assert len(ids) == size == len(set(ids.tolist()))


def test_any_episode_can_be_asked_for_first():
    walked = Episodes(50, 13, seed=5)
    there = [walked.ids(e) for e in range(1, 30)]
    for e in (29, 4, 17, 1):
        assert np.array_equal(Episodes(50, 13, seed=5).ids(e), there[e - 1])
    assert np.array_equal(walked.ids(2), there[1])


def test_other_seed_other_order():
    assert not np.array_equal(Episodes(50, 50, seed=0).ids(1), Episodes(50, 50, seed=1).ids(1))


def test_whole_table_is_a_fresh_permutation_each_episode():
    episodes = Episodes(30, None, seed=0)
    first, second = episodes.ids(1), episodes.ids(2)
    assert sorted(first) == sorted(second) == list(range(30))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("rows, size", [(10, 11), (10, 0), (0, None)])
def test_impossible_size_is_refused_with_both_numbers(rows, size):
    with pytest.raises(ValueError, match=f"table of {rows} usable"):
        Episodes(rows, size, seed=0)
