"""A run: one folder that is written as the work goes, and can be taken up again after a kill.

The folder
==========
::

    record.json              everything below, rewritten after every iteration
    pictures/*.png           what to look at
    tensors/*.safetensors    what was found (the best so far)
    checkpoint.pt            what a restart needs; read with ``weights_only=True``
    report.html              drawn from record.json and pictures/ by ``backdrift.report.write(folder)``

Every file is written beside its place and renamed into it, so a kill at any moment leaves the old or the
new file, never half of one.

The record (``record.json``, UTF-8, no NaN: an unknown number is ``null``)
==========================================================================
========================  ============================================================================
``format``                ``"backdrift-run/1"``
``kind``                  ``"optimize"``, ``"invert"``, ``"ambigram"``, …: which verb wrote it
``title``                 one line for people, e.g. ``"optimize noise: a red seven"``
``status``                ``"running"``, ``"finished"``, ``"stopped early"``, ``"interrupted"`` or
                          ``"failed"``
``message``               one line: why it stopped early or failed; else ``""``
``created``, ``updated``  UTC times, ISO 8601
``prompt``                list of strings, one per example
``seed``                  integer
``settings``              {name: JSON value}: every setting that the result depends on, and ``memory``
``fingerprint``           SHA-256 over the settings that the result depends on
``versions``              {package: version}
``machine``               {``platform``, ``device``, ``threads``}
``iterations``            list, in order, of objects with
                          ``iteration`` (0 is before any update; the last one is measured, not updated),
                          ``loss`` (mean over samples, without the prior),
                          ``per_sample`` (list of losses), ``examples`` (their indices),
                          ``grad_norm`` (before clipping; ``null`` where no gradient was taken),
                          ``lr``, ``seconds``, and where asked for ``prior`` and ``heldout``
``best``                  ``null`` or {``iteration``, ``loss``, ``heldout`` (or ``null``)}, and for
                          independent samples ``per_sample``: list of {``iteration``, ``loss``}
``pictures``              {name: {``path``, ``caption``}}, in the order in which to show them; ``path``
                          is relative to the folder. Usual names: ``before``, ``target``, ``after``
``tensors``               {name: {``path``, ``shapes``: {tensor name: [sizes]}}}
``files``                 {name: {``path``, ``caption``}}: other things to take away (an embedding, a LoRA)
``stats``                 {``network_calls``, ``redone``, ``vjps``, ``peak_bytes``, ``seconds``}: sums over
                          the run (``peak_bytes``: the maximum); a figure that is not known is ``null``
``figures``               {name: number or string}: the table of results to print
========================  ============================================================================
"""
