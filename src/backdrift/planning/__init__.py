"""What a job with gradients needs, before it runs: counted on the meta device, searched under a budget.

``count`` counts live bytes, ``profile`` one call's, ``job`` a whole run's calls, ``timeline`` puts them together under
the ``choices`` there are, ``search`` takes what costs least time, ``plan`` says what was chosen and why.
"""
