"""Runs that are killed at random moments and resumed end with the same bits as one that was left alone."""

import os

import pytest

import benchmark_kills
from conftest import QUICK, forked


@pytest.mark.parametrize("recipe", ["tuned", "reference"])
def test_three_killed_runs_end_as_one_that_was_left_alone(small_network, shared_data, tmp_path, recipe):
    def start(words):
        return forked(*[] if "--resume" in words else ["--data", shared_data, *QUICK, "--epochs", 2, "--save-minutes", 0, "--recipe", recipe], *words)
    said = benchmark_kills.trials(start, tmp_path, 3, seed=int.from_bytes(os.urandom(4), "big"), every_writing=2)
    assert said.startswith("3 runs were killed") and said.endswith("3 ended with the bits of the run left alone")
