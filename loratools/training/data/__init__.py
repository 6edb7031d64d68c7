"""Training data: pictures and captions, aspect-ratio buckets, crops, captions' variants, the fingerprint and the cache."""
