"""The import path of the LightningModule, which is defined in :mod:`opdlab.training`."""

from opdlab.policies import BehaviorConfig as BehaviorConfig
from opdlab.training import NonFiniteLossError as NonFiniteLossError
from opdlab.training import OPDModule as OPDModule
