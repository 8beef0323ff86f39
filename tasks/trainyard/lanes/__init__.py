"""The ways to compile and serve; everything that differs between them is in this package."""
