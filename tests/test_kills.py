"""Runs that are killed at random moments and resumed end with the bits of one left alone."""

import os

import benchmark_kills
import pytest
from conftest import QUICK, forked


@pytest.mark.parametrize("recipe", ["tuned", "reference"])
def test_killed_runs_end_as_one_that_was_left_alone(small_network, shared_data, tmp_path, recipe):
    begin = ("--data", shared_data, *QUICK, "--epochs", 3, "--recipe", recipe)

    def start(words):
        return forked(*() if "--resume" in words else begin, *words)
    said = benchmark_kills.trials(start, tmp_path, 3, seed=int.from_bytes(os.urandom(4), "big"),
                                  every_writing=2)
    assert said.startswith("3 runs were killed")
    assert said.endswith("3 ended with the bits of the run left alone")
