"""INT8 quantization of weights and activations, and integer execution of the speaker network.

`int8` holds the grids, `gptq` rounds weights with corrections, `calibration` observes activations,
`smoothing` moves their outliers into weights, `kurtosis` ranks the operations to leave alone, and
`int8_ecapa` runs an ECAPA-TDNN on integers.
"""
