"""Looking at a trained model: curvature, perturbations, corruptions, lowered bit-widths and loss landscapes.

Every measurement takes a finished model, batches and a function that scores them, gives back plain dataclasses with
``to_dict()``, draws from its own seed, and leaves the model as it was, to the bit.
"""
