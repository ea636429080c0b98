"""Language models as the compression methods see them: stacks of blocks, and what feeds what."""
