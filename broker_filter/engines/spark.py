"""Scores the alerts in DataFrames of Apache Spark, batch or streaming. It needs the extra `spark`.

>>> from broker_filter.engines.spark import score  # doctest: +SKIP
>>> scores = score(spark.read.parquet("alerts/"), ["default"], columns=["objectId"])  # doctest: +SKIP
>>> scores.where("default__real > 0.9").write.parquet("real/")  # doctest: +SKIP
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import pandas_udf
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import FloatType, StructType

from broker_filter import config
from broker_filter.engines import stamps
from broker_filter.engines.partitions import PartitionScorer
from broker_filter.streaming.filtering import BATCH_SIZE
from broker_filter.tables.arrow_scorer import ArrowScorer

ROWS_OF_A_BATCH = "spark.sql.execution.arrow.maxRecordsPerBatch"
"""The option of a session that says how many rows Spark hands to Python at a time. Its default is 10,000: 0.6 GB of
packets."""

log = logging.getLogger(__name__)


def score(
    df: DataFrame,
    models: str | Path | Sequence[str | Path] = ("default",),
    *,
    also: Sequence[config.SurveyName] = (),
    schema_registry: str | Path | None = None,
    columns: Sequence[str] = (),
    batch_rows: int = BATCH_SIZE,
) -> DataFrame:
    """Return the scores of the alerts in a DataFrame: one row for each row of `df`, in the same partition.

    `df`: a batch or streaming DataFrame whose rows are alerts, in one of the layouts that `ArrowScorer` takes.
    `models`, `also`, `schema_registry`: as for `ArrowScorer`; a path must lead to the same files on every executor.
    `columns`: names of columns of `df` that are copied to the result. `batch_rows`: the number of alerts in memory at a
    time.

    The result has the columns of `broker-filter score`, then the copied ones. A row that cannot be scored has the
    status `rejected` and a reason. `duplicate` and `source` are null, because the rows of a DataFrame have no order.
    Only the columns that the models need are read from `df`. The models are opened once in each Python process of an
    executor, and run on one thread.

    The session's option `spark.sql.execution.arrow.maxRecordsPerBatch` is lowered to `batch_rows` if it is larger:
    Spark holds this many rows in memory, and reads the option when the result is computed.

    Raises ColumnsError, which is a BrokerFilterError, if `df` has no columns of alerts or lacks one of `columns`, and
    as `Scorer.open` does for the models.
    """
    scorer = ArrowScorer(models, also=also, schema_registry=schema_registry, columns=columns)
    given = to_arrow_schema(df.schema)
    needed = scorer.reads(given)
    scorer(given.empty_table().select(needed))  # raises before Spark starts a job
    _limit_rows(df.sparkSession, batch_rows)
    result = StructType([*from_arrow_schema(scorer.schema), *(df.schema[name] for name in scorer.columns)])
    return df.select(*map(_quoted, needed)).mapInArrow(PartitionScorer(scorer, batch_rows), result)


@pandas_udf(FloatType())  # type: ignore[untyped-decorator]
def real_bogus(science: pd.Series, template: pd.Series, difference: pd.Series) -> pd.Series:
    """Return the probability that an alert of ZTF is real, as a column of float, from three columns of stamps.

    The columns are those that Fink writes: `real_bogus("cutoutScience.stampData", "cutoutTemplate.stampData",
    "cutoutDifference.stampData")`. The score is the one of the bundle `default`. It is null where a stamp is null or
    unusable. Stamps of LSST give null, because the network for LSST reads fluxes that cutouts do not have: use `score`.
    """
    return pd.Series(stamps.real_bogus(science.tolist(), template.tolist(), difference.tolist()))


def _limit_rows(session: SparkSession, rows: int) -> None:
    set_to = int(session.conf.get(ROWS_OF_A_BATCH))
    if not 0 < set_to <= rows:  # 0 and negative numbers mean no limit
        log.info(
            "%s is set from %d to %d, so that an executor holds few alerts at a time", ROWS_OF_A_BATCH, set_to, rows
        )
        session.conf.set(ROWS_OF_A_BATCH, str(rows))


def _quoted(column: str) -> str:
    """Return the name of a column so that Spark takes it as one name, whatever characters it has."""
    return "`" + column.replace("`", "``") + "`"
