"""The speech front end: frames, filterbanks, cepstra, normalisation, VAD, augmentation."""
