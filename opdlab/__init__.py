"""opdlab: gated on-policy distillation of language models on PyTorch Lightning."""

from opdlab.version import __version__ as __version__
