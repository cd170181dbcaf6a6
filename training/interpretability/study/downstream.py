"""What is computed from an embedding: the anomaly score, the distance of each modality, and class probes.

They are fitted on the alerts that are not held out, and then fixed, so that an ablation at held-out alerts changes them
only through the embedding. The distances are those of the service (Mahalanobis), each in standard deviations of what
ordinary alerts show. A probe is a multinomial logistic regression of the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import Measure, ReferenceAlerts, ReferenceSetError, SurveyReference
from broker_filter.anomalies.score import Cloud, anomaly_scores
from broker_filter.packets.batch import Survey
from broker_filter.scoring.labels import UNLABELLED
from broker_filter.streaming.build_reference import calibrate

MEASURE: Measure = "mahalanobis"
ITERATIONS = 1000
"""Largest number of steps of the probes' optimiser, L-BFGS; some hundreds are enough for some hundred dimensions."""


@dataclass(frozen=True, slots=True)
class _Ordinary:
    """The ordinary alerts of a survey, and the calibration of distances from them."""

    cloud: Cloud
    usual: NDArray[np.float32]  # [1 + M, 2] mean and deviation of the distances: whole, modalities

    @classmethod
    def of(cls, reference: SurveyReference, modalities: int) -> _Ordinary:
        return cls(Cloud(reference.alerts.embedding, modalities, MEASURE, reference.label), reference.usual)


class Downstream:
    """Figures that are computed from embeddings float32[N, D] of M modalities."""

    def __init__(
        self,
        embedding: NDArray[np.float32],
        survey: NDArray[np.uint8],
        object_id: NDArray[np.str_],
        label: NDArray[np.int64],
        modalities: Sequence[str],
        classes: Sequence[str],
    ) -> None:
        """Fit the figures on N alerts.

        `survey` uint8[N], `object_id` [N]. `label` int64[N]: index into `classes`, or -1. A survey with too few alerts
        for a reference set has no distances, and one class alone has no probe.
        """
        self._modalities, self._classes = tuple(modalities), tuple(classes)
        self._ordinary: dict[int, _Ordinary] = {}
        for code in Survey:
            own = np.flatnonzero(survey == code)
            alerts = ReferenceAlerts(normalise(embedding[own]), own, object_id[own], survey[own])
            try:
                reference = calibrate(alerts, np.full(len(own), UNLABELLED), len(modalities), MEASURE)
                self._ordinary[int(code)] = _Ordinary.of(reference, len(modalities))
            except ReferenceSetError:
                continue
        known = label >= 0
        self._probe = None
        if len(np.unique(label[known])) > 1:
            probe = LogisticRegression(max_iter=ITERATIONS, class_weight="balanced")
            self._probe = probe.fit(normalise(embedding[known]), label[known])

    def figures(self, embedding: NDArray[np.float32], survey: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
        """Return each figure of n alerts, float64[n], by name: `anomaly score`, `distance: MODALITY`, `class NAME`.

        `embedding`: float32[n, D]; `survey`: uint8[n]. A figure is NaN where the alert lacks the modality, or its
        survey has no reference set.
        """
        n = len(embedding)
        distances = np.full((n, 2 + len(self._modalities)), np.nan)  # anomaly score, whole, modalities
        for code, ordinary in self._ordinary.items():
            own = np.flatnonzero(survey == code)
            if len(own):
                far = ordinary.cloud.distances(embedding[own])
                distances[own, 0] = anomaly_scores(far, ordinary.usual)
                distances[own, 1:] = (far - ordinary.usual[:, 0]) / ordinary.usual[:, 1]
        figures = {"anomaly score": distances[:, 0]}
        figures |= {f"distance: {name}": distances[:, 2 + m] for m, name in enumerate(self._modalities)}
        if self._probe is not None:
            of_classes = self._probe.predict_proba(normalise(embedding)).T
            figures |= {f"class {self._classes[c]}": p for c, p in zip(self._probe.classes_, of_classes, strict=True)}
        return figures
