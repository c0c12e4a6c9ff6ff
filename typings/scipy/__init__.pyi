"""What the package uses of scipy, as far as it uses it: pyright works minutes on scipy's own source, which has no types."""
