"""Scores over several draws, and whether two scores differ."""

import math
import statistics
from dataclasses import dataclass

from scipy.special import stdtrit

from scoring.metrics import Score

ENOUGH_DRAWS = 5  # to measure a spread; with fewer, the stated spreads are more reliable
LEVEL = 0.05  # how often the score of a perfect model may be reported to differ from real data


def typical(scores: list[Score]) -> Score:
    """The mean of the values, and the root mean square of their stated spreads."""
    values, stated = zip(*scores, strict=True)
    return statistics.fmean(values), math.sqrt(statistics.fmean(spread**2 for spread in stated))


@dataclass(frozen=True)
class Estimate:
    """A score over several draws, each of the same number of images.

    Attributes:
        value: the mean over the draws.
        spread: the standard deviation of one draw.
        draws: the number of draws.
        measured: True if `spread` is computed from the draws, False if it is their stated spread.
    """

    value: float
    spread: float
    draws: int = 1
    measured: bool = False

    @classmethod
    def of(cls, scores: list[Score], enough: int = ENOUGH_DRAWS) -> "Estimate":
        """From the score of each draw; `enough` draws (at least 2) measure the spread."""
        value, stated = typical(scores)
        if len(scores) < enough:
            return cls(value, stated, len(scores))
        return cls(value, statistics.stdev(value for value, _ in scores), len(scores), True)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.spread / math.sqrt(self.draws)

    def differs(self, other: "Estimate") -> bool:
        """Whether the two means differ, by Welch's t-test (1947) at LEVEL, two-sided.

        A measured spread has draws - 1 degrees of freedom; a stated one counts as known.
        """
        variance = self.error**2 + other.error**2
        unsure = sum(e.error**4 / (e.draws - 1) for e in (self, other) if e.measured)
        freedom = variance**2 / unsure if unsure else 1e9
        needed = stdtrit(freedom, 1 - LEVEL / 2) * math.sqrt(variance)
        return bool(abs(self.value - other.value) > needed)


def beside(
    name: str, own: Estimate | None, floor: Estimate | None, matched: Estimate | None = None
) -> dict[str, float | bool | None]:
    """The fields of one score in a result; None if there are too few images.

    NAME, NAME_spread: of the samples; NAME_error: the standard error, if NAME is a mean.
    NAME_floor, NAME_floor_spread: of real images, scored like samples.
    NAME_matched, NAME_matched_spread: of the samples under the conditions of the floor, if these
        are different (`scoring.yardstick.Yardstick`).
    NAME_distance: samples - floor, in units of NAME_floor_spread; None if that is 0.
    NAME_differs: whether this many images are enough to tell samples from real ones by this score.
    """
    fields: dict[str, float | bool | None] = {}
    for part, estimate in (("", own), ("_floor", floor), ("_matched", matched)):
        if estimate or part != "_matched":
            fields[name + part] = getattr(estimate, "value", None)
            fields[f"{name}{part}_spread"] = getattr(estimate, "spread", None)
    if own and own.draws > 1:
        fields[f"{name}_error"] = own.error
    compared, distance, differs = matched or own, None, None
    if compared and floor:
        differs = compared.differs(floor)
        distance = (compared.value - floor.value) / floor.spread if floor.spread else None
    return fields | {f"{name}_distance": distance, f"{name}_differs": differs}
