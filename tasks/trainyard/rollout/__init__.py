"""Moving a channel from its stable release to a candidate, and back."""
