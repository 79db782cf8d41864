"""Scores over several draws, and how far two of them lie apart."""

import math
import statistics
from dataclasses import dataclass

from scipy.special import stdtrit

from scoring.metrics import Score

ENOUGH_DRAWS = 5  # to measure a spread; fewer say less of it than the spreads that they state
LEVEL = 0.05  # how often a score of a perfect model may be said to differ from real data's


def typical(scores: list[Score]) -> Score:
    """The mean of the values, and the root mean square of the spreads that they state."""
    values, stated = zip(*scores, strict=True)
    return statistics.fmean(values), math.sqrt(statistics.fmean(spread**2 for spread in stated))


@dataclass(frozen=True)
class Estimate:
    """A score over several draws of as many images each.

    Attributes:
        value: the mean over the draws.
        spread: the standard deviation of one draw.
        draws: how many there are.
        measured: True where `spread` is how the draws differ, False where it is what they state.
    """

    value: float
    spread: float
    draws: int = 1
    measured: bool = False

    @classmethod
    def of(cls, scores: list[Score], enough: int = ENOUGH_DRAWS) -> "Estimate":
        """From the score of each draw; `enough` of them, at least 2, measure the spread."""
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
    """The fields of one score in a result; None where there are too few images.

    NAME, NAME_spread: of the samples; NAME_error: the standard error, if it is a mean.
    NAME_floor, NAME_floor_spread: of real images in their place.
    NAME_matched, NAME_matched_spread: of the samples under the conditions of the floor, if those
        are not the same anyway (`scoring.yardstick.Yardstick`).
    NAME_distance: samples - floor, in units of NAME_floor_spread; None where that is 0.
    NAME_differs: whether so many images can tell the samples from real ones by this score.
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
