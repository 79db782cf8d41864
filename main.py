"""Train a diffusion model: `python main.py`. Running the same command again resumes the run.

`python main.py --teacher CHECKPOINT` distils a model into one that draws in one network call.

Writes checkpoints/<experiment>/, outputs/<experiment>/ (loss curve, sample grids, run.json) and
runs/<experiment>/ (`tensorboard --logdir runs`). `torchrun --nproc_per_node N main.py` trains with
N processes, each on its own GPU if there are GPUs.
"""

import shlex

from config import TrainConfig, parse
from training.denoising import DenoisingTrainer
from training.distiller import DistillingTrainer, inherited
from training.loop import train
from utils import distributed
from utils.data_loader import load_dataset
from utils.device import pick_device
from utils.script import run


def main() -> None:
    cfg = parse(TrainConfig, "Train a diffusion model.")
    if cfg.teacher:
        cfg = parse(TrainConfig, "Distil a diffusion model.", **inherited(cfg.teacher))
    device = pick_device(cfg.device, cfg.precision)
    with distributed.joined(device):
        where = (cfg.dataset, cfg.data_dir, "train", cfg.test_dir)
        with distributed.first_goes_ahead():
            data = load_dataset(*where, limit=cfg.train_size, held_out=cfg.held_out)
        trainer = DistillingTrainer if cfg.teacher else DenoisingTrainer
        path = train(trainer(cfg, data.info, device), data)
        if distributed.is_first():
            command = shlex.join(["python", "generate.py", "--checkpoint", str(path)])
            print(f"trained: {path}\nsamples: {command}")


if __name__ == "__main__":
    run(main)
