"""The optimal denoiser for a finite set of images, in closed form and without a network."""

from torch import Tensor


class IdealDenoiser:
    """D(x, sigma) -> x0_hat, the mean of the images that x may come from; for any sampler.

        D(x, sigma) = sum_i w_i x_i,    w = softmax_i(-|x - x_i|^2 / (2 sigma^2))

    (Karras et al. 2022, eq. 57). No denoiser has a smaller error on noised images of the set, so
    a network that fits its training images perfectly would learn this one. At low sigma, w is 1 for
    the nearest image and 0 for the rest, so samplers draw copies of the images.

    Args:
        images: (N, C, H, W), in [-1, 1].
    """

    def __init__(self, images: Tensor):
        self.vectors = images.flatten(1)
        self.half_squares = self.vectors.square().sum(dim=1) / 2

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B, C, H, W) = x0 + sigma * eps, sigma a 0-d tensor -> (B, C, H, W)."""
        return (self.weights(x, sigma) @ self.vectors).view_as(x)

    def weights(self, x: Tensor, sigma: Tensor) -> Tensor:
        """w (B, N): the probability that x comes from each image, for a uniform prior."""
        # -|x - x_i|^2 / 2 without |x|^2, which is the same for all images
        nearness = x.flatten(1) @ self.vectors.T - self.half_squares
        return (nearness / float(sigma) ** 2).softmax(dim=1)
