"""The trained student as a Hugging Face folder."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from opdlab.module import OPDModule


class HFExport(pl.Callback):
    """Writes the student with ``save_pretrained`` when training ends, for ``AutoModelForCausalLM`` to load.

    Args:
        folder: where to; ``student`` in the run's folder by default.
        enabled: whether to write at all.
        merge: write the whole model where the student has an adapter, instead of the adapter alone.
    """

    def __init__(self, folder: str | None = None, enabled: bool = True, merge: bool = False) -> None:
        self.folder = folder
        self.enabled = enabled
        self.merge = merge

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folder, from one process."""
        assert isinstance(pl_module, OPDModule)
        run_folder = trainer.log_dir or trainer.default_root_dir  # asks all processes, so outside the branch below
        if self.enabled and trainer.is_global_zero:
            folder = Path(self.folder or Path(run_folder) / "student")
            pl_module.student.save(folder, self.merge)
            rank_zero_info(f"student written to {folder}")
