"""Modules that own quantizer parameters, and how they attach to a layer."""
