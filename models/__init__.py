"""Networks by name, and how to build a network and its diffusion process from a config."""

from torch import nn

from config import TrainConfig, named
from models.diffusion import Diffusion
from utils.data_loader import DatasetInfo
from utils.noise_scheduler import NoiseSchedule

MODELS = {
    "unet": "models.unet:UNet",
    "cnn": "models.SimpleCNN:SimpleCNN",
    "resnet": "models.ResNet:ResNet",
}


def build_model(cfg: TrainConfig, data: DatasetInfo) -> nn.Module:
    """The untrained noise predictor that `cfg` describes, for the images and labels of `data`."""
    asked = {"width": cfg.width, "fourier": cfg.fourier}
    options = {name: value for name, value in asked.items() if value}
    num_classes = data.num_classes if cfg.class_conditional else 0
    network = named(MODELS[cfg.model_type])
    return network(in_channels=data.channels, num_classes=num_classes, **options)


def build_diffusion(cfg: TrainConfig, device="cpu") -> Diffusion:
    """The diffusion process that `cfg` describes."""
    schedule = NoiseSchedule(cfg.schedule, cfg.timesteps)
    options = {name: getattr(cfg, name) for name in ("t_mean", "t_std", "t_even", "loss_weight")}
    return Diffusion(schedule, cfg.prediction, **options, device=device)
