"""What people read: tables for the terminal, self-contained pages for browsers."""
