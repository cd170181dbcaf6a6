"""Archived alerts into rows of a table of scores: for the command line and for the library."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from broker_filter.packets.schemas.registry import SchemaRegistry
from broker_filter.scoring.scorer import Scorer
from broker_filter.sky.files import SkyFiles
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filtering import score_stream
from broker_filter.streaming.scored import ScoredBatch
from broker_filter.tables.policy_columns import Policies
from broker_filter.tables.rows import table_schema, to_rows


class ArchiveScores:
    """The scores of all alerts of `inputs`, which are read and scored during the iteration, once.

    The iteration gives each scored batch and its rows, which have the columns of `schema`.
    """

    def __init__(
        self,
        inputs: str | Path | Sequence[str | Path],
        scorer: Scorer,
        *,
        schema_registry: SchemaRegistry | str | Path | None = None,
        policies: Sequence[str] = (),
        where: str | None = None,
        skip: Collection[Path] = (),
    ) -> None:
        """Arguments and errors: see `score_archive`. `skip`: files that are not read although a folder has them."""
        self._policies = Policies(policies, scorer.outputs)
        self._where = None if where is None else compile_filter(where, FIELDS, scorer.outputs, SkyFiles(Path()))
        self._scorer = scorer
        needed = (*self._policies.columns, *(self._where.columns if self._where else ()))
        self._decoder = scorer.decoder(schema_registry, columns=needed)
        self._packets = read_packets(inputs, wanted=self._decoder.fields, skip=skip)
        embeddings = [model.name for model in scorer.models if model.bundle.embedding is not None]
        self.schema: pa.Schema = table_schema(scorer.outputs, self._policies.names, embeddings)

    def __iter__(self) -> Iterator[tuple[ScoredBatch, pa.RecordBatch]]:
        for batch in score_stream(self._packets, self._decoder, self._scorer):
            chosen = self._where.evaluate(batch) if self._where else None
            yield batch, to_rows(batch, self.schema, self._policies.judge(batch), chosen)

    def share_read(self) -> float | None:
        """Return the share of the bytes of the inputs that was read so far; None if their total is not known."""
        return self._packets.share_read()


def score_archive(
    inputs: str | Path | Sequence[str | Path],
    models: Scorer | str | Path | Sequence[str | Path] = ("default",),
    *,
    schema_registry: str | Path | None = None,
    policies: Sequence[str] = (),
    where: str | None = None,
) -> pa.RecordBatchReader:
    """Score archived alerts into a table: one row for each alert and for each rejected input, in the order of reading.

    `inputs`: as for `read_packets`. `models`: as for `Scorer.open`, or a scorer that is already open.
    `schema_registry`: as for Decoder; packets of LSST in Confluent wire format need it. `policies`: columns
    `POLICY=OUTPUT` of the Bright Transient Survey, for example `bts_p1=btsbot.bts`; alerts must be in order of time.
    `where`: a filter expression, as in a service file; a scored alert has a row only if it is true for the alert. Names
    of files in it start in the current directory.

    Returns a pyarrow.RecordBatchReader. Iterating over it scores batch by batch, in flat memory; `read_all()` gives a
    pyarrow.Table, and `read_pandas()` a pandas.DataFrame. The columns are those of `broker-filter score`: ids, time,
    position, `status` (`scored` or `rejected`), `source`, a float32 column `<model>__<label>` for each output, and a
    list column `<model>__embedding` for each model with an embedding. Scores are null in rows of rejected inputs.

    Raises BrokerFilterError for an input, a bundle or a policy that does not exist, and for an invalid filter; reading
    raises InputError if the system refuses to read a file, and RegistryUnavailable if the schema registry does not
    answer.

    >>> from broker_filter import score_archive
    >>> table = score_archive("night.tar").read_all()
    >>> table.select(["survey", "status"]).to_pylist()[0]
    {'survey': 'ztf', 'status': 'scored'}
    """
    scorer = models if isinstance(models, Scorer) else Scorer.open(models)
    scores = ArchiveScores(inputs, scorer, schema_registry=schema_registry, policies=policies, where=where)
    return pa.RecordBatchReader.from_batches(scores.schema, (rows for _, rows in scores))
