"""Thirty first code blocks of the kind that diffusers' model pages show, with one line added to each.

The blocks (:mod:`.blocks`) are written anew; small models with random weights stand where a page calls
``from_pretrained``, and sizes are small. All else is what such a page leaves at its default or sets: precisions,
offloading, slicing and tiling, guidance, negative prompts, exchanged schedulers, adapters. They end where they have
their picture. What a page does with it next (save it) needs no gradient.
"""
