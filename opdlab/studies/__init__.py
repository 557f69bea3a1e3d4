"""Studies: one configuration in several variants, over seeds and budgets.

Importing this package must not import torch: a run's process sets its number of threads before it imports torch.
"""

from opdlab.studies.study import Study, Variant, read_study

__all__ = ["Study", "Variant", "read_study"]
