"""nexus_ext: run PyTorch models that do not fit."""
