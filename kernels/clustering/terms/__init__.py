"""Terms of the CIMC loss, one a file; each takes logits or a model and gives a scalar loss."""
