"""AdjointDPM's Table 1 on real digits: the quality of samples at few network calls, solver by solver."""
