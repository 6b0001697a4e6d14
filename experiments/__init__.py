"""The experiments on CIFAR-10: what was planned, the command that runs what is left of it, and its tables."""
