"""Links to the pages of brokers and catalogues about an object or a position. No request is made here."""

from __future__ import annotations

import re
from urllib.parse import quote

_ZTF_NAME = re.compile(r"ZTF[0-9]{2}[a-z]{7}")
_LSST_NAME = re.compile(r"[0-9]{1,20}")
_BY_NAME = {
    "ztf": (
        _ZTF_NAME,
        {
            "ALeRCE": "https://alerce.online/object/{}",
            "Fink": "https://ztf.fink-portal.org/{}",
            "Lasair": "https://lasair-ztf.lsst.ac.uk/objects/{}/",
            "ANTARES": "https://antares.noirlab.edu/loci?search={}",
            "Babamul": "https://babamul.caltech.edu/objects/ZTF/{}",
        },
    ),
    "lsst": (
        _LSST_NAME,
        {
            "ALeRCE": "https://lsst.alerce.online/object/{}?survey=lsst",
            "Fink": "https://lsst.fink-portal.org/{}",
            "Lasair": "https://lasair.lsst.ac.uk/objects/{}/",
            "ANTARES": "https://antares.noirlab.edu/loci?search={}",
            "Babamul": "https://babamul.caltech.edu/objects/LSST/{}",
        },
    ),
}
"""For each survey: how names of its objects look, and the brokers' pages for a name."""
_BY_POSITION = {
    "SIMBAD": "https://simbad.cds.unistra.fr/simbad/sim-coo?Coord={ra:.6f}%20{dec:+.6f}&CooFrame=ICRS&Radius=5"
    "&Radius.unit=arcsec",
    "TNS": "https://www.wis-tns.org/search?ra={ra:.6f}&decl={dec:.6f}&radius=5&coords_unit=arcsec",
    "Legacy Survey": "https://www.legacysurvey.org/viewer?ra={ra:.6f}&dec={dec:.6f}&layer=ls-dr10&zoom=16"
    "&mark={ra:.6f},{dec:.6f}",
}


def links(survey: str, object_id: str, ra: float, dec: float) -> list[tuple[str, str]]:
    """Return the name and the address of each page about an alert's object or position (degrees, ICRS).

    An object id that does not look like one of the survey gives only the pages by position.
    """
    pattern, pages = _BY_NAME.get(survey, (_LSST_NAME, {}))
    by_name = pages if pattern.fullmatch(object_id) else {}
    return [
        *((name, address.format(quote(object_id, safe=""))) for name, address in by_name.items()),
        *((name, address.format(ra=ra, dec=dec)) for name, address in _BY_POSITION.items()),
    ]
