"""Bugs to plant in the product, each as a change of one thing: the simulation has to notice every one of them.

`plant` changes classes for good, so it is for a process that does nothing else afterwards.
"""

from simulation import planted_broker, planted_journal, planted_peers
from simulation.bugs import BUGS, plant

__all__ = ["BUGS", "plant", "planted_broker", "planted_journal", "planted_peers"]
