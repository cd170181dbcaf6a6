"""AMPEL's alert filter over the scores of broker-filter's models."""

from ampel.abstract.AbsAlertFilter import AbsAlertFilter
from ampel.protocol.AmpelAlertProtocol import AmpelAlertProtocol

from broker_filter.plugins import ampel


class ScoreFilter(AbsAlertFilter):
    """Accepts the alerts for which an expression over scores and fields is true, such as `default.real > 0.5`."""

    #: The expression, in the language of broker-filter's filters
    select: str

    def post_init(self) -> None:
        """Compile the expression. Raises ExpressionError if it is not valid."""
        self._filter = ampel.ScoreFilter(self.select)

    def process(self, alert: AmpelAlertProtocol) -> bool:
        """Return whether the alert is accepted. Raises NoScoresError if it does not come from ScoringAlertSupplier."""
        return self._filter.passes(alert.extra)
