"""`sagittal serve`: models as an HTTP service whose jobs outlive it. POSIX only; needs the extra `serve`."""
