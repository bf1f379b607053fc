"""What is made of a finished output: reports, a viewer, a dataset for nnU-Net. Nothing else depends on it."""
