"""Scores the partitions of a table that an engine hands to Python as iterators of record batches.

It imports no engine, so that its tests need none.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from broker_filter.errors import BrokerFilterError
from broker_filter.streaming.filtering import BATCH_SIZE
from broker_filter.tables.arrow_scorer import ArrowScorer

UNKNOWN_IN_ENGINES = ("duplicate", "source")
"""The columns of the scores that are null, because the rows of an engine have no order and come from no named file."""


class PartitionError(BrokerFilterError):
    """A partition cannot be scored. The message names the machine, because its files may differ from the others'."""


@dataclass(frozen=True)
class PartitionScorer:
    """Scores the rows of a partition in memory that is bounded by `batch_rows`. Picklable.

    Calling it with an iterator of record batches, of any sizes, yields record batches that hold one row for each row of
    the input, in the same order: the columns of `ArrowScorer.schema_of`. The columns UNKNOWN_IN_ENGINES are null.

    The call raises PartitionError for what `scorer` raises as a BrokerFilterError, for example a bundle that is not on
    this machine.
    """

    scorer: ArrowScorer
    batch_rows: int = BATCH_SIZE

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the scores of `batches`; see the class."""
        for batch in batches:
            for start in range(0, batch.num_rows, self.batch_rows):
                try:
                    scores = self.scorer(batch.slice(start, self.batch_rows))
                except BrokerFilterError as error:
                    raise PartitionError(f"on the machine {socket.gethostname()}: {error}") from error
                for name in UNKNOWN_IN_ENGINES:
                    column = scores.schema.get_field_index(name)
                    kind = scores.schema.field(column)
                    scores = scores.set_column(column, kind, pa.nulls(scores.num_rows, kind.type))
                yield from scores.to_batches()
