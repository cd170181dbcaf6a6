"""Fink science module: the probability that an alert of Rubin is real, from its cutouts and measurements."""

from pathlib import Path

import pandas as pd
from fink_science import __file__ as fink_science
from fink_science.tester import spark_unit_tests
from pyspark.sql.functions import pandas_udf
from pyspark.sql.types import FloatType

from broker_filter.plugins.fink import open_rubin

score = open_rubin()  # loads the model when the module is imported


@pandas_udf(FloatType())
def real_bogus(source: pd.DataFrame, science: pd.Series, template: pd.Series, difference: pd.Series) -> pd.Series:
    """Return the probability that an alert is real, by the bundle `default` of broker-filter.

    Parameters
    ----------
    source: pd.DataFrame
        The struct diaSource
    science, template, difference: pd.Series
        Cutouts: FITS images, as bytes

    Returns
    -------
    pd.Series of float
        Probability between 0 (bogus) and 1 (real); null if the alert cannot be scored

    Examples
    --------
    >>> df = spark.read.load(rubin_alert_sample)
    >>> columns = ["diaSource", "cutoutScience", "cutoutTemplate", "cutoutDifference"]
    >>> df = df.withColumn("real", real_bogus(*columns)).cache()
    >>> df.count() == spark.read.load(rubin_alert_sample).count()
    True

    # Each score is a probability, and not all scores are null
    >>> df.filter("real < 0 or real > 1 or isnan(real)").count()
    0
    >>> df.filter("real is not null").count() > 0
    True

    # An alert without a cutout has no score
    >>> from pyspark.sql.functions import lit
    >>> none = real_bogus("diaSource", lit(None).cast("binary"), *columns[2:])
    >>> df.withColumn("none", none).filter("none is not null").count()
    0

    """
    return score(source, science, template, difference)


if __name__ == "__main__":
    globs = globals()
    globs["rubin_alert_sample"] = f"file://{Path(fink_science).parent}/data/alerts/rubin_sample"
    spark_unit_tests(globs)
