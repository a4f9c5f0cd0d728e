"""What the fault suite shares: a small table, a run on it, and settings."""

import pytest
from helpers import toy_settings, toy_table

from faults.children import together

# All state there is: BatchNorm in towers and heads, two granularities, prototypes carried over an episode.
STATE = {"model": "RN-mini", "episodes": 3, "k": [4, 6], "infonce_warmup_episodes": 0}


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    return toy_table(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def settings(table):
    """Settings of a training of two seconds in a folder."""
    return lambda run, **changes: toy_settings(table, run, **STATE | changes)


@pytest.fixture(scope="session")
def unbroken(settings, tmp_path_factory):
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert together(settings(run)) == [0]
    return run
