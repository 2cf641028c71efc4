"""Build a latent corpus of image-caption pairs, and train a MicroDiT on it."""


def __getattr__(n):
    from microdit.model.latent_diffusion import create_latent_diffusion

    if n == "create_latent_diffusion":
        return create_latent_diffusion
    raise AttributeError(n)
