"""The loop, read from top to bottom (`fold`), what comes before it (`stages`) and after it (`finish`)."""
