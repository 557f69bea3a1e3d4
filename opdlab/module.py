"""The class path under which configurations name the LightningModule; it is defined in :mod:`opdlab.training`."""

from opdlab.policies import BehaviorConfig
from opdlab.training import NonFiniteLossError, OPDModule

__all__ = ["BehaviorConfig", "NonFiniteLossError", "OPDModule"]
