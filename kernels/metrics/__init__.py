"""Metrics of clustering, verification and text, and the lists that they are computed on."""
