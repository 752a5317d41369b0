"""The certificate: how good each gradient method is on one's own model, measured beside references.

:mod:`~.problem` is what is differentiated, :mod:`~.menu` what it is differentiated with, :mod:`~.pull` one measured
gradient, :mod:`~.flow`, :mod:`~.differences` and :mod:`~.sampler` the references, :mod:`~.verdicts` and
:mod:`~.recommendation` what follows, and :mod:`~.certificate` the whole.
"""
