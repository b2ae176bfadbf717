"""Post-training quantization of a pretrained network, stage by stage."""
