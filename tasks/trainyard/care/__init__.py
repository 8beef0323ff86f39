"""Care of the store: what is in it, is it whole, who needs it, and what can go."""
