"""Networks by name, and everything that a config says about them."""

from torch import nn

from config import GUIDANCE, MODEL_TYPES, NUM_CLASSES, TrainConfig
from models.diffusion import Diffusion
from models.ResNet import ResNet
from models.SimpleCNN import SimpleCNN
from models.unet import UNet
from utils.noise_scheduler import NoiseSchedule

MODELS = dict(zip(MODEL_TYPES, (UNet, SimpleCNN, ResNet), strict=True))


def build_model(cfg: TrainConfig) -> nn.Module:
    """The untrained noise predictor that `cfg` describes."""
    options = {"num_classes": NUM_CLASSES if cfg.class_conditional else 0}
    if cfg.width is not None:
        options["width"] = cfg.width
    return MODELS[cfg.model_type](**options)


def build_diffusion(cfg: TrainConfig, device="cpu") -> Diffusion:
    """The process that `cfg` describes."""
    schedule = NoiseSchedule(cfg.schedule, cfg.timesteps)
    # a network that never hid a label cannot leave it out
    guidance = GUIDANCE if cfg.class_conditional and cfg.label_dropout else 1.0
    return Diffusion(
        schedule,
        cfg.prediction,
        cfg.t_mean,
        cfg.t_std,
        cfg.t_even,
        guidance=guidance,
        device=device,
    )
