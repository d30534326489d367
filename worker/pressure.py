"""Whether memory is short, with hysteresis. Knows the share in use as heartbeats read it; does not know what to give back."""

from typing import Final

MARGIN: Final = 0.05


class Pressure:
    """Observed by the thread of the heartbeats, acted upon by that of the data loop: two flags, each written whole.

    Args:
        high: the share from which memory is short; it is so until a twentieth less is in use.

    Attributes:
        has_news: memory is short, or no longer: to be looked at by the data loop, which takes it back.
        num_high: readings in a row that were high: the more of them, the more there is to give back.
    """

    def __init__(self, high: float) -> None:
        self.is_high = False
        self.has_news = False
        self.num_high = 0
        self.fraction = 0.0
        self._high = high

    def observe(self, fraction: float) -> bool:
        """A reading; whether there is something to do: when pressure begins and ends, and after 2, 4, 8 ... high readings.

        A loop that has not acted on the last one is not asked for more.
        """
        self.fraction = fraction
        was_high = self.is_high
        self.is_high = fraction > (self._high - MARGIN if was_high else self._high)
        if self.has_news:
            return False
        self.num_high = self.num_high + 1 if self.is_high else 0
        is_due = self.num_high > 0 and self.num_high & (self.num_high - 1) == 0
        self.has_news = is_due or (was_high and not self.is_high)
        return self.has_news
