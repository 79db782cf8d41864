"""TensorBoard logging, in the five methods that training needs."""

from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from config import TrainConfig


class TensorBoardLogger:
    """Writes one run's folder. Hides what was logged before from `first_step` on, if given."""

    def __init__(self, folder: Path, first_step: int | None = 0):
        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def hyperparameters(self, cfg: TrainConfig) -> None:
        """The settings, as a table and for the HPARAMS tab."""
        settings = {k: "default" if v is None else v for k, v in asdict(cfg).items()}
        for key, value in settings.items():
            if isinstance(value, str):  # file names need not be valid text
                settings[key] = value.encode(errors="backslashreplace").decode()
        for summary in hparams(settings, {"train/loss": 0.0}):
            self.writer.file_writer.add_summary(summary)
        rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        self.writer.add_text("config", f"| setting | value |\n| --- | --- |\n{rows}")

    def scalars(self, step: int, group: str = "train", **values: float) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def grid(self, step: int, name: str, grid: Tensor) -> None:
        """`grid`: uint8 (C, H, W), as `visualization.make_grid` returns it."""
        self.writer.add_image(name, grid, step, dataformats="CHW")
        self.writer.flush()

    def figure(self, step: int, name: str, figure: Figure) -> None:
        self.writer.add_figure(name, figure, step)

    def close(self) -> None:
        self.writer.close()
