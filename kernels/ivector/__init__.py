"""i-vectors: Gaussian mixture UBM, Baum-Welch statistics, total variability, scoring back ends."""
