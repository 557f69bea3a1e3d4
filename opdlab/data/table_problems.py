"""Problems from tables: a data set of the Hugging Face hub, or JSON, CSV and Parquet files."""

import csv
import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opdlab.data.rows import RowProblems
from opdlab.data.stores import ProblemStore, SpooledStore
from opdlab.errors import UsageError, require
from opdlab.files import expanded
from opdlab.types import Problem

# Builders of `datasets` by file suffix; it knows only lower-case suffixes.
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class TableProblems(RowProblems):
    """Problems of a hub data set, or of local JSON, CSV or Parquet files, read with ``datasets``.

    CSV values stay text: ``007`` does not become 7, nor ``NA`` null. JSON values get one type per column, so 1 in a
    column with 1.5 becomes 1.0; :class:`opdlab.data.JsonlProblems` reads JSON Lines as written.

    Args:
        path: hub id such as ``openai/gsm8k``, a ``.json``, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file, or a
            folder of them.
        subset: configuration of the data set, if it has several.
        split: split of the data set; ignored for a single file.
        revision: branch, tag or commit on the hub.
        streaming: read a hub data set row by row over the network, up to ``limit``, instead of downloading it first.
            Local files are always streamed. Without ``limit`` the rows are read while training goes on.
        window: prompts of such a stream that are read and shuffled together; each pass over the prompts is one window.
        kwargs: see :class:`opdlab.data.rows.RowProblems`.

    Raises:
        UsageError: the data set or split does not exist, or cannot be reached or read; or the first row of a local CSV
            file has more or fewer fields than its header.
    """

    row_name = "row"

    def __init__(
        self,
        path: str,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        streaming: bool = False,
        window: int = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.subset, self.split, self.revision, self.streaming = path, subset, split, revision, streaming
        require(window >= 1, f"window is {window}, but must be at least 1 prompt")
        if streaming and not self._local.exists() and kwargs.get("limit") is None:
            self.window = window

    @property
    def name(self) -> str:
        """Return the data set and split."""
        return f"{self.path} ({self.split})"

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield row numbers, from 1, and rows."""
        with self._reading():
            yield from enumerate(self._table(), start=1)

    def store(self) -> ProblemStore:
        """See :meth:`ProblemSource.store`: rows of a downloaded data set are found again by their number."""
        return SpooledStore(self.problems) if self._is_streamed else _TableStore(self)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors of the reader into a :class:`UsageError`; an empty JSON file is no error."""
        import datasets  # here, because its import is slow

        try:
            yield
        except StopIteration:  # raised by the reader for an empty JSON file
            return
        except UsageError:
            raise
        # The hub's client raises OSError; pandas and pyarrow raise ValueError on files that they cannot read.
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            mend = (
                f"check that it is a JSON, CSV or Parquet file, or a folder of them with the split '{self.split}'"
                if self._local.exists()
                else "check its name, subset and split, and the connection; or download it and give the local file or "
                "folder as path"
            )
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UsageError(f"data set '{self.path}' cannot be loaded: {mend} ({reason})") from error

    @property
    def _local(self) -> Path:
        return expanded(self.path, "path")

    @property
    def _is_streamed(self) -> bool:
        return self.streaming or self._local.exists()

    def _table(self) -> Any:
        import datasets

        where: dict[str, Any] = {"path": self.path, "name": self.subset, "revision": self.revision}
        if self._local.is_file():
            file = self._local.absolute()
            suffix = file.suffix.lower()
            where["path"] = _BUILDERS.get(suffix, str(file.parent))
            where["data_files"] = {self.split: glob.escape(str(file))}
            where |= {"sep": "\t"} if suffix == ".tsv" else {}
        elif self._local.is_dir():
            where["path"] = str(self._local)
        how: dict[str, Any] = {"split": self.split, "streaming": self._is_streamed}
        config = datasets.load_dataset_builder(**where).config
        if hasattr(config, "na_filter"):
            import pandas as pd  # late: it takes half a second

            # Text as the type of every column; without types the reader infers them.
            files = [file for files in config.data_files.values() for file in files]
            columns = pd.read_csv(files[0], sep=config.sep, nrows=0)
            how |= {"features": datasets.Features(dict.fromkeys(columns, datasets.Value("string"))), "na_filter": False}
            if self._local.exists():
                for file in files:
                    _check_first_row(file, config.sep)
        return datasets.load_dataset(**where, **how)


class _TableStore(ProblemStore):
    """Problems of a downloaded data set, which ``datasets`` maps into memory; a key is the number of a row, from 0."""

    def __init__(self, source: TableProblems) -> None:
        self._source = source
        self._table: Any = ()

    def scan(self) -> Iterator[tuple[int, Problem]]:
        """See :meth:`ProblemStore.scan`."""
        with self._source._reading():
            self._table = self._source._table()
            for key, row in self._source.chosen(enumerate(self._table)):
                yield key, self._source.problem(key + 1, row)

    def read(self, keys: Sequence[int]) -> list[Problem]:
        """See :meth:`ProblemStore.read`."""
        with self._source._reading():
            columns = self._table[list(keys)]  # of lists; a row at a time is slower
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [self._source.problem(key + 1, row) for key, row in zip(keys, rows, strict=True)]


def _check_first_row(file: str, sep: str) -> None:
    """Raise :class:`UsageError` if the first row is longer or shorter than the header.

    With a longer first row pandas shifts all columns; a shorter one it pads. For longer rows further down pandas itself
    raises an error.
    """
    import fsspec  # type: ignore[import-untyped] # comes with datasets

    with fsspec.open(file, "rt", compression="infer", encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=sep)
        rows = (row for row in reader if len(row) > 1 or "".join(row).strip())  # pandas skips blank lines
        try:
            header, first = next(rows), next(rows)
        except (StopIteration, csv.Error):  # no rows, or a value too long for this reader: pandas reads both
            return
        line = reader.line_num - sum(value.count("\n") for value in first)
    require(
        len(header) == len(first),
        f'{file}, line {line}, has {len(first)} fields, but the header has {len(header)}: put quotes (") around texts '
        f"that hold the separator '{sep}', and give every row a value for each column",
    )
