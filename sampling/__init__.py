"""From noise to images: samplers, batches, and what may be asked of a trained model."""
