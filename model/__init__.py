"""The network, EDM, autoencoders, text encoders and generation. Imports neither `pipeline` nor `trainer`."""
