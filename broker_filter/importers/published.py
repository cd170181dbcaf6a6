"""What the importers of published networks for ZTF (braai, ACAI, BTSbot) share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from broker_filter.scoring.bundle import BundleError, ImageInput, Training, describe_problems

TRIPLET = ImageInput(size=63, order=("science", "template", "difference"), normalisation="l2_image", padding=1e-9)
"""The preprocessing of cutouts in `make_triplet` of braai's repository, ACAI's `utils.py` and btsbot's
`alert_utils.py`."""
MISSING = -999.0
"""ZTF's value for a missing measurement; the networks were trained with it."""
LABELLED_BY_EYE = Training(
    method="by its authors; see the citation", data="ZTF alerts labelled by eye; see the citation"
)


@contextmanager
def checked_name(name: str) -> Iterator[None]:
    """Convert the ValidationError of a Description with this name to a BundleError: the user chose only the name."""
    try:
        yield
    except ValidationError as error:
        raise BundleError(f"a bundle cannot be named {name!r}: {describe_problems(error)}") from error
