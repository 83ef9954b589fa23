"""Text to packed batches: prepare.py tokenises once, loader.py reads by random access."""
