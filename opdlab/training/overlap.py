"""The end of sampling beside training."""

import lightning.pytorch as pl


class StopSampling(pl.Callback):
    """Ends the worker that samples ahead when training ends, for any reason; the module adds it."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the worker: the end was not foreseen, as after an early stop."""
        if (ahead := getattr(pl_module, "ahead", None)) is not None:
            ahead.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the worker after an error or a signal."""
        self.on_train_end(trainer, pl_module)
