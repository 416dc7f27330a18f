"""The instruments of the executable book *How Diffusion Models Memorize*."""
