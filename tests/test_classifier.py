import torch

from scoring.classifier import accuracy, train_classifier
from utils.synthetic import synthetic_digits

CPU = torch.device("cpu")


def test_it_learns_to_read():
    net = train_classifier(*synthetic_digits(400, seed=1), CPU, epochs=12, batch_size=64)
    assert accuracy(net, *synthetic_digits(500, seed=2), CPU) > 0.7


def test_the_seed_decides_every_weight():
    digits = synthetic_digits(100, seed=1)

    def weights(seed):
        net = train_classifier(*digits, CPU, epochs=2, batch_size=50, seed=seed)
        return torch.cat([value.flatten().double() for value in net.state_dict().values()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))
