"""Problems from a data set of the Hugging Face hub, or a folder of data files."""

from collections.abc import Iterator
from typing import Any

from opdlab.data.rows import RowProblems
from opdlab.errors import UsageError


class HubProblems(RowProblems):
    """A data set by hub id, or a folder of data files, read with ``datasets``.

    Args:
        path: hub id such as ``openai/gsm8k``, or a folder with JSON, CSV or Parquet files.
        subset: configuration of the data set, where it has several.
        split: of the data set.
        revision: branch, tag or commit on the hub.
        kwargs: see :class:`opdlab.data.rows.RowProblems`.

    Raises:
        UsageError: there is no such data set or split, or it cannot be reached.
    """

    def __init__(
        self,
        path: str,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.subset, self.split, self.revision = path, subset, split, revision

    @property
    def name(self) -> str:
        """Data set and split."""
        return f"{self.path} ({self.split})"

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield row numbers, from 1, and rows."""
        import datasets  # here, because importing it takes longer than all else together

        try:
            table = datasets.load_dataset(self.path, self.subset, split=self.split, revision=self.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"data set '{self.path}' cannot be loaded: check its name, subset and split, and the connection; a "
                f"local copy works too, with JsonlProblems ({first_line})"
            ) from error
        yield from enumerate(table, start=1)
