"""INT8 quantization of weights and activations, and execution on integers.

What networks share: `int8` holds the grids, `gptq` rounds weights with corrections, `calibration`
observes activations, `smoothing` moves their outliers into weights, `kurtosis` ranks the operations
to leave alone.

The speaker network: `quantize_ecapa` makes the tensors that `int8_ecapa` runs, convolution by
convolution (`integer_conv`).

Transformers of any architecture: `int8_transformer` quantizes and installs; its layers are
`int8_linear`, `int8_attention` and `int8_cache`; `transformer_smoothing` and `int8_sensitivity` are
its first two steps, on what `transformer_inputs` shows.
"""
