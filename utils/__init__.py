"""Helpers that know little of diffusion: data, files, devices, processes, logs, pictures."""
