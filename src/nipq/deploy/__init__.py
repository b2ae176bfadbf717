"""The deployed model: integer weights in plain inference modules, and the packed file that holds them."""
