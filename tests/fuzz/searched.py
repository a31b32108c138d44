"""Hypothesis under the command line of this folder: a case is a number of examples that follow from its seed."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

EACH = 50  # examples of a case


def searched(examples: SearchStrategy, tried: Callable[[object], str], each: int = EACH) -> Callable[[int], Counter[str]]:
    """The function from a seed to what came of its examples; an example that `tried` fails on is raised as small as it gets."""

    def case(number: int) -> Counter[str]:
        came: Counter[str] = Counter()

        @seed(number)
        @settings(max_examples=each, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(examples)
        def run(example: object) -> None:
            came[tried(example)] += 1

        with quiet():
            run()
        return came

    return case


@contextlib.contextmanager
def quiet():
    """Libraries say nothing meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
