"""Sums that the server learns without learning what is summed: pairwise masks (Bonawitz et al., CCS 2017).

`secure_sum` is the server's side, `Participant` a client's; how messages travel is the caller's affair. docs/secure.md says
what the server learns, and what it costs.
"""

from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.identity import Identity
from fedlora.secure.participant import Participant
from fedlora.secure.server import Total, secure_sum
from fedlora.secure.sets import Sets
from fedlora.secure.terms import ACTIONS, LEAST, Terms

__all__ = ["ACTIONS", "LEAST", "FixedPoint", "Identity", "Participant", "Sets", "Terms", "Total", "secure_sum"]
