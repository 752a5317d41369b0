"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, with the clocks lam and rho and their exact inverses.

| clock | definition | direction |
|---|---|---|
| ``t`` | what the network is conditioned on | falls from noise to data |
| ``lam`` = log(alpha / sigma) | half the log signal-to-noise ratio | rises from noise to data |
| ``rho`` = sigma / alpha | noise-to-signal ratio | falls from noise to data |

Every quantity is a float64 tensor on the CPU, whatever the data's dtype; ``t`` is any real number in the
schedule's range, never rounded to a trained step. Times outside the range raise.
"""

from .base import Schedule
from .straight import EDM, Flow
from .vp import VP, VPCosine, VPDiscrete, VPLinear

__all__ = ["EDM", "VP", "Flow", "Schedule", "VPCosine", "VPDiscrete", "VPLinear"]
