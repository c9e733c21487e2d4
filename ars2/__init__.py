"""Provide ARS2-Neo and Muon for plain PyTorch, with torch as the only dependency."""

from ars2.ars2_neo import ARS2Neo
from ars2.muon import Muon
from ars2.orthogonalize import orthogonalize
from ars2.param_groups import param_groups, report
from ars2.replay import repeatable

__version__ = "0.1.0"
__all__ = ["ARS2Neo", "Muon", "orthogonalize", "param_groups", "repeatable", "report"]
