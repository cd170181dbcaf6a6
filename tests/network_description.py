"""Describes the networks that tests make, for the card of a bundle."""

from __future__ import annotations

from broker_filter.config import SurveyName
from broker_filter.scoring.bundle import Architecture, Description, Inputs, Outputs, Training


def describe(
    name: str, task: str, surveys: tuple[SurveyName, ...], inputs: Inputs, outputs: Outputs, architecture: Architecture
) -> Description:
    """Return a description in which nothing is said about the training."""
    return Description(
        name=name,
        version="1",
        task=task,
        surveys=surveys,
        inputs=inputs,
        outputs=outputs,
        architecture=architecture,
        licence="BSD-3-Clause",
        source="this test",
        citation="none",
        training=Training(method="none", data="none"),
    )
