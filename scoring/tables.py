"""The tables that `validation.py` prints."""

from scoring.metrics import METRICS
from scoring.yardstick import score_text
from utils.visualization import comparable_fid


def print_scores(scores: dict) -> None:
    """Print the facts, and each metric beside its floor."""
    for key, value in scores.items():
        if key.split("_")[0] not in METRICS and isinstance(value, (str, int, float)):
            print(f"{key:16} {value:.4g}" if isinstance(value, float) else f"{key:16} {value}")
    matched = f"{METRICS[0]}_matched" in scores
    columns = [f"{scores['seeds']} seeds, ± error" if "seeds" in scores else "samples, ± spread"]
    columns += [f"of {scores['n_floor']}"] * matched + ["real data, ± spread", "distance"]
    print(f"\n{'':9}" + "".join(f"{column:>21}" for column in columns) + "  differs")
    for name in METRICS:
        error = scores.get(f"{name}_error", scores[f"{name}_spread"])
        cells = [score_text(scores[name], error)]
        if matched:
            cells.append(score_text(scores[f"{name}_matched"], scores[f"{name}_matched_spread"]))
        cells.append(score_text(scores[f"{name}_floor"], scores[f"{name}_floor_spread"]))
        cells.append(distance_text(scores, name))
        line = "".join(f"{cell:>21}" for cell in cells)
        print(f"{name:9}{line}  {differs_text(scores, name):>7}")


def distance_text(scores: dict, name: str) -> str:
    """'+3.2 SD': samples - floor, in standard deviations of the floor."""
    distance = scores[f"{name}_distance"]
    return "-" if distance is None else f"{distance:+.1f} SD"


def differs_text(scores: dict, name: str) -> str:
    """Whether the score tells the samples from real images: 'yes', 'no' or '-'."""
    return {True: "yes", False: "no", None: "-"}[scores[f"{name}_differs"]]


def print_classes(scores: dict) -> None:
    """Print for each class: share of samples, the classifier's confidence, FID, agreement.

    The FID is the one to compare with that of real images: see `scoring.yardstick.Yardstick`.
    """

    def cell(row: dict, key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    asked = "agreement" in scores
    fid = comparable_fid(scores["classes"])
    head = "\nclass      n   share (real)   confidence (real)      fid (real ± spread)  distance"
    print(head + "  differs" + "   agrees" * asked)
    for row in scores["classes"]:
        line = f"{row['class']:5} {row['n']:6g}  {cell(row, 'share', '6.3f')}"
        line += f" ({cell(row, 'share_reference', '.3f')})       {cell(row, 'confidence', '6.4f')}"
        line += f" ({cell(row, 'confidence_reference', '.4f')})"
        real = f"({cell(row, 'fid_floor', '.2f')} ± {cell(row, 'fid_floor_spread', '.2f')})"
        line += f" {cell(row, fid, '8.2f')} {real:>15}"
        line += f" {distance_text(row, 'fid'):>9}  {differs_text(row, 'fid'):>7}"
        print(line + (f"   {cell(row, 'agreement', '.4f')}" if asked else ""))
