"""What at least two papers share: frames, geometry, losses, metrics, training plumbing, pictures and kernels."""
