"""Where models come from: resolve a revision, list its files, read them."""
