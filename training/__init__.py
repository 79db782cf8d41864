"""Training: the loop, the trainers, the optimizers and the averaged weights."""
