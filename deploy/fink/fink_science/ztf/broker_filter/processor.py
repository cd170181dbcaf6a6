"""Fink science module: the probability that an alert of ZTF is real, from its cutouts."""

from pathlib import Path

import pandas as pd
from fink_science import __file__ as fink_science
from fink_science.tester import spark_unit_tests
from pyspark.sql.functions import pandas_udf
from pyspark.sql.types import FloatType

from broker_filter.plugins.fink import open_ztf

score = open_ztf()  # loads the model when the module is imported


@pandas_udf(FloatType())
def real_bogus(science: pd.Series, template: pd.Series, difference: pd.Series) -> pd.Series:
    """Return the probability that an alert is real, by the bundle `default` of broker-filter.

    Parameters
    ----------
    science, template, difference: pd.Series
        Stamps: FITS images compressed with gzip, as bytes

    Returns
    -------
    pd.Series of float
        Probability between 0 (bogus) and 1 (real); null if a stamp is null or unusable

    Examples
    --------
    >>> df = spark.read.load(ztf_alert_sample)
    >>> stamps = [df[f"cutout{kind}.stampData"] for kind in ("Science", "Template", "Difference")]
    >>> df = df.withColumn("real", real_bogus(*stamps)).cache()
    >>> df.count() == spark.read.load(ztf_alert_sample).count()
    True

    # Each score is a probability, and not all scores are null
    >>> df.filter("real < 0 or real > 1 or isnan(real)").count()
    0
    >>> df.filter("real is not null").count() > 0
    True

    # An alert without a stamp has no score, and the others keep theirs
    >>> from pyspark.sql.functions import lit
    >>> df.withColumn("none", real_bogus(lit(None).cast("binary"), *stamps[1:])).filter("none is not null").count()
    0

    """
    return score(science, template, difference)


if __name__ == "__main__":
    globs = globals()
    globs["ztf_alert_sample"] = f"file://{Path(fink_science).parent}/data/alerts/datatest"
    spark_unit_tests(globs)
