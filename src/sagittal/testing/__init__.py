"""For users' tests and ours: plans without a data set and untrained bundles."""
