"""A pipeline's own call as a ``Denoiser``: listened to once, and made a function of state, time and conditioning."""
