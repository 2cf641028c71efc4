"""The torchrun trainer: `torchrun -m trainer RECIPE`."""
