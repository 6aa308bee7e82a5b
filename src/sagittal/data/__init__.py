"""From raw cases to training batches: data set, doctor, fingerprint, preprocessing, cache, sampling, augmentation."""
