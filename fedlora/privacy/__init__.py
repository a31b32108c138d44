"""Private training: what noise costs, how much of it a budget asks for, and what every client has spent.

Importing this package loads neither torch nor an accountant; each function imports what it needs when it is called.
"""

from fedlora.privacy.accounting import History, LooserBound, epsilon
from fedlora.privacy.calibration import calibrate, noise_multiplier
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.user_level import user_epsilon, user_noise_multiplier

__all__ = [
    "History",
    "Ledger",
    "LooserBound",
    "calibrate",
    "epsilon",
    "noise_multiplier",
    "user_epsilon",
    "user_noise_multiplier",
]
