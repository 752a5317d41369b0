"""The examination of a pipeline: what is set up in it, and whether its gradients are right. See :mod:`..doctor`."""
