"""Metrics of clustering and verification, and the lists that they are computed on."""
