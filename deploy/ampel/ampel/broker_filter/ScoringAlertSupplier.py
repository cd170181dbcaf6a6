"""AMPEL's alert supplier for ZTF, with the scores of broker-filter's models in `extra` of each alert."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, Literal

from ampel.alert.AmpelAlert import AmpelAlert
from ampel.alert.BaseAlertSupplier import BaseAlertSupplier
from ampel.view.ReadOnlyDict import ReadOnlyDict
from ampel.ztf.alert.ZiAlertSupplier import ZiAlertSupplier

from broker_filter.plugins.ampel import EXTRA, PacketScorer


class ScoringAlertSupplier(BaseAlertSupplier):
    """Yields the alerts of ZiAlertSupplier, in the same order, each with its scores in `extra["broker_filter"]`.

    It scores each packet before the cutouts are dropped. A packet that AMPEL itself cannot read is logged as an error
    and skipped.
    """

    #: Names of bundles that ship with broker-filter, or directories of bundles
    models: Sequence[str] = ("default",)
    #: Fields of the alert that ScoreFilter reads, such as magpsf
    fields: Sequence[str] = ()
    #: Number of packets that are scored together
    batch: int = 64
    #: cpu, cuda, or auto for CUDA if the machine has it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: The loader must return packets, because the cutouts are read from their bytes
    deserialize: Literal["avro"] = "avro"

    def __init__(self, **kwargs: Any) -> None:
        """Load the models. Raises BundleError if one is missing or cannot be used."""
        super().__init__(**kwargs)
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; score at least 1 packet at a time")
        self._scorer = PacketScorer(self.models, self.fields, self.device)
        self._packets: list[bytes] = []
        self._alerts: Iterator[AmpelAlert] = iter(())

    def __next__(self) -> AmpelAlert:
        """Return the next alert. Raises StopIteration when the loader has no more packets."""
        while (alert := next(self._alerts, None)) is None:
            # If the loader fails, the packets that it gave before are scored in the next call.
            while len(self._packets) < self.batch and (file := next(self.alert_loader, None)) is not None:
                self._packets.append(file.read())
            if not self._packets:
                raise StopIteration
            packets, self._packets = self._packets, []
            self._alerts = iter(self._shape(packets))
        return alert

    def _shape(self, packets: list[bytes]) -> list[AmpelAlert]:
        alerts = []
        for packet, entry in zip(packets, self._scorer.score(packets), strict=True):
            try:
                alert = ZiAlertSupplier.shape_alert_dict(self._deserialize(BytesIO(packet)))
            except Exception as error:
                self.logger.error(f"packet skipped, which AMPEL cannot read: {entry.get('reject')}", exc_info=error)
                continue
            extra = ReadOnlyDict({**(alert.extra or {}), EXTRA: entry})
            alerts.append(AmpelAlert(alert.id, alert.stock, alert.datapoints, alert.tag, extra))
        return alerts
