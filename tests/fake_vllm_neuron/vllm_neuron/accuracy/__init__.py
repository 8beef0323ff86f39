"""Its accuracy tools."""
