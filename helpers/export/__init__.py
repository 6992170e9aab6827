"""From whatever people have to a model bundle: networks, conversion, 8 bits, and what is lost on the way. Torch."""
