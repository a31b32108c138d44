"""How many clients a round draws."""

import pytest

from fedlora.config import from_dict
from fedlora.validate import checked


@pytest.mark.parametrize(
    ("clients", "settings", "drawn"),
    [
        (50, {}, 10),
        (5, {}, 2),  # a fifth of them is one, and a cohort of one has nothing to average
        (2, {"fraction": 0.1}, 2),
        (1, {}, 1),
        (5, {"fraction": None}, 5),
        (5, {"clients_per_round": 1}, 1),
    ],
)
def test_a_cohort_has_two_clients_at_least_unless_asked(clients, settings, drawn) -> None:
    assert checked(from_dict({"clients": clients} | settings)).cohort_size == drawn
