"""From noise to images: samplers, batches, and requests to a trained model."""
