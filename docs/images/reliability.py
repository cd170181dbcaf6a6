"""Makes `reliability.svg`, the reliability diagram in `shipped-models.md`, from the cards of the shipped bundles.

    .venv/bin/python docs/images/reliability.py

A card holds the curve as text, one entry for each bin that holds alerts. Nothing is measured here.
"""

from __future__ import annotations

import re
from pathlib import Path

from broker_filter.scoring.bundle import Card, open_bundle
from training.evaluation.bootstrap import Estimate
from training.evaluation.evaluate import RELIABILITY, ReliabilityBin
from training.evaluation.plots import reliability_diagram

BIN = re.compile(r"(\d+) alerts, predicted ([\d.]+), observed ([\d.]+) \(([\d.]+) to ([\d.]+)\)")


def curve(card: Card, prefix: str = "") -> list[ReliabilityBin]:
    """Return the reliability curve on a card, whose entries begin with the prefix and RELIABILITY."""
    texts = [str(text) for name, text in card.training.evaluation.items() if name.startswith(prefix + RELIABILITY)]
    found = [BIN.fullmatch(text) for text in texts]
    return [
        ReliabilityBin(
            alerts=int(one[1]),
            said=float(one[2]),
            happened=Estimate(value=float(one[3]), low=float(one[4]), high=float(one[5])),
        )
        for one in found
        if one
    ]


def main() -> None:
    """Write the picture beside this file."""
    default = open_bundle("default").part("ztf").card
    classes, rubin = (open_bundle(name).parts[0].card for name in ("classes", "rubin"))
    curves = {
        f"`real` of default, ZTF ({default.training.evaluation['alerts']} alerts; truth: drb > 0.5)": curve(default),
        f"classes ({classes.training.evaluation['alerts']} alerts; the most probable class)": curve(classes),
        f"`real` of rubin ({rubin.training.evaluation['alerts']} alerts; truth: reliability > 0.5)": curve(rubin),
    }
    Path(__file__).with_name("reliability.svg").write_text(reliability_diagram(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
