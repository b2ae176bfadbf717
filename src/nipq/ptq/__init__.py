"""Post-training quantization: from a float model and a few hundred unlabelled samples to a deployable one."""
