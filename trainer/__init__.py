"""The torchrun trainer: `torchrun -m microdit.trainer RECIPE`."""
